"""Files of data sets that others made: in a folder, or inside tars that are read in place, never
extracted.

What could lead elsewhere (absolute paths, ``..``, links) or is of no known kind is refused and
named. Arrays are read without running code: no pickles, no sizes but those that the file itself
has.
"""

from __future__ import annotations

import io
import math
import os
import re
import tarfile
import zipfile
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from scd_sf.files import foreign, read_bytes, reason, safe_path
from scd_sf.types import UserError, printable

LARGEST = 2**30  # bytes of a member, or of a tensor
LARGEST_ARRAY = 2**28  # bytes of an array, unpacked: 300 frames of 512x512
# minecraft.tar.partaa, x.tar.000, x.taraa
PARTS = re.compile(r"^(.*\.tar)\.?(?:part)?([a-z]{2}|\d+)$")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COPY = "copy it again"


@dataclass(frozen=True)
class Refused:
    """A part of a source that is refused, and the reason."""

    name: str
    reason: str


class RawFiles(Protocol):
    """Named files, wherever they lie. Names are POSIX paths without a root."""

    @property
    def names(self) -> list[str]:
        """Sorted."""
        ...

    @property
    def refused(self) -> list[Refused]: ...

    def where(self, name: str) -> str:
        """The file's name in errors."""
        ...

    def read(self, name: str) -> bytes:
        """The contents. UserError: there is no such file, it is cut, or larger than 1 GiB."""
        ...


class RawFolder:
    """The files with one of ``suffixes`` under a folder; others are not looked at."""

    def __init__(self, root: Path, suffixes: Sequence[str]) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; check the path")
        self.root = root
        self.names: list[str] = []
        self.refused: list[Refused] = []
        names = (
            (Path(folder) / file).relative_to(root).as_posix()
            for folder, _, files in os.walk(root)
            for file in files
            if file.endswith(tuple(suffixes))
        )
        home = Path(os.path.realpath(root))
        for name in sorted(names):
            path = root / name
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
                self.refused.append(Refused(str(path), "a link that leaves the folder"))
            elif printable(name) != name:
                self.refused.append(Refused(printable(str(path)), "its name is no plain text"))
            else:
                self.names.append(name)

    def where(self, name: str) -> str:
        return str(self.root / name)

    def read(self, name: str) -> bytes:
        return read_bytes(safe_path(self.root, name, f"{self.root}: a file's name"), COPY, LARGEST)


class RawTars:
    """The regular members of tars, found once when opened and then read where they lie. Any thread
    may read."""

    def __init__(self, archives: Sequence[Sequence[Path]], suffixes: Sequence[str]) -> None:
        """``archives``: each is one tar, whole or in parts (``minecraft.tar.partaa`` ..) that
        follow one another."""
        self.refused: list[Refused] = []
        self._members: dict[str, tuple[_Parts, int, int]] = {}
        for parts in archives:
            self._index(_Parts(parts), tuple(suffixes))
        self.names = sorted(self._members)

    def where(self, name: str) -> str:
        return f"{self._members[name][0].name}[{name}]" if name in self._members else name

    def read(self, name: str) -> bytes:
        if name not in self._members:
            raise UserError(f"{name}: is in none of the tars; {COPY}")
        parts, offset, size = self._members[name]
        data = parts.at(offset, size)
        if len(data) != size:
            raise UserError(
                f"{self.where(name)}: {len(data)} bytes instead of {size}: the tar is cut; {COPY}"
            )
        return data

    def _index(self, parts: _Parts, suffixes: tuple[str, ...]) -> None:
        try:
            with foreign(parts.name, COPY), tarfile.open(fileobj=parts, mode="r:") as tar:
                for entry in tar:
                    if entry.size < 0 or tar.offset <= entry.offset:
                        raise tarfile.ReadError("a header with a negative size")
                    if entry.isdir():
                        continue
                    name = PurePosixPath(entry.name).as_posix()
                    fault = tar_refusal(entry, suffixes)
                    if not fault and name in self._members:
                        fault = "a second member of this name"
                    if fault:
                        self.refused.append(
                            Refused(printable(f"{parts.name}[{entry.name}]"), fault)
                        )
                    else:
                        self._members[name] = (parts, entry.offset_data, entry.size)
                    tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory
                end = parts.at(tar.offset, tarfile.BLOCKSIZE)
                # tarfile stops in silence at a broken header that is not the first
                if end != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("no end mark where the members end")
        except UserError as error:
            cause = reason(error.__cause__ or error)
            self.refused.append(
                Refused(
                    parts.name, f"the tar is damaged or cut ({cause}); what came before is taken"
                )
            )


def tar_refusal(entry: tarfile.TarInfo, suffixes: tuple[str, ...]) -> str:
    """Why a member of a tar is refused; "" for one that is accepted."""
    name = PurePosixPath(entry.name)
    if name.is_absolute() or ".." in name.parts or "\\" in entry.name:
        return "its path leaves the archive"
    if printable(entry.name) != entry.name:
        return "its name is no plain text"
    if not entry.isreg() or entry.issparse():
        return "not a regular file (a link, a device or a sparse file)"
    if not entry.name.endswith(suffixes):
        return f"its suffix is none of {', '.join(suffixes)}"
    return f"{entry.size} bytes, more than {LARGEST}" if entry.size > LARGEST else ""


class _Parts(io.RawIOBase):
    """Several files read as one, in their order."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.name = str(paths[0])
        try:
            self._files = [os.open(path, os.O_RDONLY) for path in paths]
            sizes = [os.fstat(file).st_size for file in self._files]
        except OSError as error:
            raise UserError(
                f"{error.filename}: cannot be read ({error.strerror}); {COPY}"
            ) from error
        self._stops, self._place = list(accumulate(sizes)), 0

    def __del__(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []

    def close(self) -> None:
        """Do nothing: tarfile closes its file after the index is read, but members are read
        later."""

    def at(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset`` on; no state, so threads do not disturb each
        other."""
        pieces = []
        while size > 0 and offset < self._stops[-1]:
            part = bisect_right(self._stops, offset)
            begin = self._stops[part - 1] if part else 0
            piece = os.pread(
                self._files[part], min(size, self._stops[part] - offset), offset - begin
            )
            if not piece:
                break
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return b"".join(pieces)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + {0: 0, 1: self._place, 2: self._stops[-1]}[whence]
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        count = self._stops[-1] - self._place if size is None or size < 0 else size
        data = self.at(self._place, max(0, count))
        self._place += len(data)
        return data


def open_raw(root: Path, suffixes: Sequence[str]) -> RawFiles:
    """A folder's files, or a tar's, or those of all tars in a folder that holds tars (or parts of
    them).

    UserError: nothing there, or a compressed tar.
    """
    if root.is_file():
        return RawTars([[root]], suffixes)
    if not root.is_dir():
        raise UserError(f"{root}: no such file or folder; check the path")
    files = sorted(path for path in root.iterdir() if path.is_file())
    if compressed := [path for path in files if path.name.endswith(PACKED)]:
        raise UserError(
            f"{compressed[0]}: members of a compressed tar cannot be read in place; decompress it to a .tar"
        )
    archives: dict[str, list[Path]] = {path.name: [path] for path in files if path.suffix == ".tar"}
    for path in files:
        if match := PARTS.match(path.name):
            archives.setdefault(match[1], []).append(path)
    return (
        RawTars([archives[name] for name in sorted(archives)], suffixes)
        if archives
        else RawFolder(root, suffixes)
    )


def arrays_of(data: bytes, names: Sequence[str], where: str) -> dict[str, np.ndarray]:
    """The arrays ``names`` of a .npz, by name, without missing ones. UserError: no .npz, a pickle,
    or an array whose size is not its header's."""
    arrays = {}
    with (
        foreign(f"{where}: not a .npz of plain arrays", COPY),
        zipfile.ZipFile(io.BytesIO(data)) as archive,
    ):
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        for name in names:
            if (size := sizes.get(f"{name}.npy")) is None:
                continue
            with archive.open(f"{name}.npy") as file:
                _check_array(file, size, name)
            with archive.open(f"{name}.npy") as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def _check_array(file: IO[bytes], size: int, name: str) -> None:
    """ValueError unless the header of a .npy of ``size`` bytes says as many, of numbers, and not
    too many."""
    version = np.lib.format.read_magic(file)
    header_readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in header_readers:
        raise ValueError(f"an array of format {version}")
    shape, _, dtype = header_readers[version](file)
    if dtype.hasobject:
        raise ValueError("a pickle, which could run code: not loaded")
    if dtype.kind not in "biuf":
        raise ValueError(f"'{name}' holds {dtype}, not numbers")
    if size > LARGEST_ARRAY:
        raise ValueError(f"'{name}' has {size} bytes, more than {LARGEST_ARRAY}")
    if math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"{size - file.tell()} bytes for shape {shape} of {dtype}")


def actions_of(array: np.ndarray | None, frames: int, num_actions: int, where: str) -> Tensor:
    """(F,) int64 of a stored array of actions. UserError: none, not one whole number per frame, or
    one too large."""
    if array is None:
        raise UserError(f"{where}: has no 'actions'; {COPY}")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(
            f"{where}: 'actions' has shape {array.shape} of {array.dtype}, not whole numbers (F,); {COPY}"
        )
    if len(array) != frames:
        raise UserError(f"{where}: {len(array)} actions for {frames} frames; {COPY}")
    if len(array) and not 0 <= int(array.min()) <= int(array.max()) < num_actions:
        raise UserError(
            f"{where}: actions {int(array.min())}..{int(array.max())} are not in 0..{num_actions - 1}; "
            "give the true number of actions"
        )
    return torch.from_numpy(array.astype(np.int64))


def tensor_file(data: bytes, where: str) -> object:
    """The contents of a ``torch.save`` file. UserError for anything that is not plain data; code in
    a pickle is not run.

    ``torch.save`` does not compress, so what the file holds is not larger than the file.
    """
    with foreign(f"{where}: not a file of torch.save", COPY):
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > len(data):
                    raise ValueError("its parts are compressed")
                if damaged_name := archive.testzip():  # torch.load compares no checksum
                    raise ValueError(f"{damaged_name} is damaged")
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise UserError(f"{where}: a pickle that could run code; it is not loaded") from error


def one_tensor(data: bytes, where: str) -> Tensor:
    """The one tensor of floating point numbers that a ``torch.save`` file holds. UserError for
    anything else."""
    value = tensor_file(data, where)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise UserError(
            f"{where}: holds a {type(value).__name__}, not one tensor of floating point numbers; {COPY}"
        )
    if value.layout != torch.strided or value.device.type != "cpu":
        raise UserError(
            f"{where}: its tensor has no numbers in memory ({value.layout}, {value.device}); {COPY}"
        )
    if value.numel() * value.itemsize > LARGEST:  # an expanded view of few bytes
        raise UserError(
            f"{where}: a tensor of shape {tuple(value.shape)}, more than {LARGEST} bytes; {COPY}"
        )
    return value.detach()
