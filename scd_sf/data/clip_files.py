"""One safetensors file per clip: what ``data_prep/generate_clips.py`` and ``scd data import``
write.

``FOLDER/ab/abcd....safetensors`` (the name is the clip's id) holds ``latents`` (F, C, H, W),
normalised, and ``text`` (T, E), the prompt's token states without padding; its header's ``clip``
entry is a JSON object (:class:`About`). The video, if one is kept, lies beside it as ``.mp4`` and
was written first. So a latent file that is there is a clip that is done. Names are content ids and
every write is atomic: to write a clip twice changes nothing. Files are read with plain reads
straight into the batch: a memory map costs a page fault per 4 KiB (docs/results/data.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor

from scd_sf.files import Json, foreign, parse_json, refuse_lfs_pointer, sweep, typed, write_bytes
from scd_sf.tensor_files import FLOATS
from scd_sf.types import UserError

SUFFIX, VIDEO = ".safetensors", ".mp4"
QUARANTINE = "quarantine"
FORMAT, VERSION = "scd-sf-clip", 1
REPAIR = "run 'scd data repair' on the folder, then make or copy the clip again"
ID = re.compile(r"[0-9a-f]{32}")
_FOLDER = re.compile("[0-9a-f]{2}")
_FIRST_READ, _LARGEST_HEADER = 16 * 1024, 16 * 2**20


@dataclass(frozen=True)
class About:
    """Origin of a clip. ``sha256`` is that of the bytes of latents and text, ``video_sha256`` of
    the mp4 ("": none).

    ``size`` is WIDTHxHEIGHT and ``frames`` the number of frames, in pixels; ``*_sha`` are of the
    negative prompt, the transformer, the text encoder and the VAE ("" where unknown), ``cfg`` is
    the standard w. ``seed`` -1: not ours.
    """

    id: str
    prompt: str
    sha256: str = ""
    video_sha256: str = ""
    uuid: str = ""
    seed: int = -1
    sampler: str = ""
    steps: int = 0
    shift: float = 0.0
    cfg: float = 0.0
    neg_sha: str = ""
    model_sha: str = ""
    text_sha: str = ""
    vae_sha: str = ""
    fps: int = 0
    frames: int = 0
    size: str = ""
    source: str = ""
    toolkit: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, row: Json, where: str) -> Self:
        """Parse a header's entry. UserError (naming ``where``) for other fields or kinds."""
        if (row.pop("format", None), row.pop("version", None)) != (FORMAT, VERSION):
            raise UserError(f"{where}: its 'clip' entry is not {FORMAT}/{VERSION}; {REPAIR}")
        return typed(row, cls, f"{where}: 'clip'", REPAIR, exact=True)


@dataclass(frozen=True)
class TensorLocation:
    """Location of a tensor in a file: type, shape, and its bytes ``start`` .. ``stop`` - 1."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The checked header of a clip's file: tensors by name, and what the clip is."""

    tensors: dict[str, TensorLocation]
    about: About
    bytes: int


def clip_path(root: Path, clip: str) -> Path:
    """Path of the clip with this id."""
    return root / clip[:2] / f"{clip}{SUFFIX}"


def clip_paths(root: Path) -> list[Path]:
    """The latent files of a folder in id order (names only: nothing is opened)."""
    return sorted(file for file in files_of(root) if is_clip(root, file))


def is_clip(root: Path, file: Path) -> bool:
    """Whether ``file`` has the name and the place of a clip's latents in ``root``."""
    return ID.fullmatch(file.stem) is not None and file == clip_path(root, file.stem)


def folders_of(root: Path) -> list[Path]:
    """The two-letter folders in name order, without links. UserError: no such folder."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; check the path")
    return [
        path
        for path in sorted(root.iterdir())
        if _FOLDER.fullmatch(path.name) and is_own_folder(path)
    ]


def is_own_folder(path: Path) -> bool:
    """Whether ``path`` is a folder and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def quarantine_of(root: Path) -> Path:
    """The folder for files that were moved out of the data, created if missing. UserError where it
    is a link."""
    folder = root / QUARANTINE
    if folder.is_symlink():
        raise UserError(
            f"{folder}: is a link, and nothing is moved out of {root}; put a folder in its place"
        )
    folder.mkdir(exist_ok=True)
    return folder


def files_of(root: Path) -> Iterator[Path]:
    """All regular files in the two-letter folders. Links are skipped."""
    for folder in folders_of(root):
        with os.scandir(folder) as entries:
            yield from (
                folder / entry.name for entry in entries if entry.is_file(follow_symlinks=False)
            )


# ------------------------------------------------------------------------------------------ writing


def write_clip(root: Path, latents_FCHW: Tensor, text_TE: Tensor, about: About) -> None:
    """Write a clip's file. Tensors are stored as they come, ``sha256`` is filled in; UserError when
    one is not finite.

    The metadata is one entry of sorted JSON, because safetensors writes several in a random order.
    """
    tensors = {"latents": latents_FCHW.cpu().contiguous(), "text": text_TE.cpu().contiguous()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"clip {about.id} ({about.prompt[:60]!r}): {name} are not finite in {tensor.dtype}"
            )
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(bytes_of(tensor))
    row = {**asdict(about), "sha256": digest.hexdigest(), "format": FORMAT, "version": VERSION}
    path = clip_path(root, about.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(tensors, {"clip": json.dumps(row, sort_keys=True, ensure_ascii=False)}))


def sweep_clips(root: Path) -> None:
    """Remove unfinished files of this machine's killed processes."""
    for folder in (root, *folders_of(root)):
        sweep(folder)


# ------------------------------------------------------------------------------------------ reading


class ClipFile:
    """An open clip: its header is read and checked against the file's size, tensors on demand.

    UserError that names the file when it is missing, cut, or not a clip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror}); {REPAIR}") from error
        try:
            self.header = self._read_header()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, name: str, out: Tensor) -> None:
        """Tensor ``name`` into ``out`` (contiguous, of its shape): without a copy where the dtype
        is the stored one."""
        location = self.header.tensors[name]
        if tuple(out.shape) != location.shape:
            raise UserError(
                f"{self.path}: {name} {location.shape} instead of {tuple(out.shape)}; {REPAIR}"
            )
        if out.dtype != location.dtype:
            copy = torch.empty(location.shape, dtype=location.dtype)
            self.read(name, copy)
            out.copy_(copy)
            return
        view, position = bytes_of(out), location.start
        while view:
            count = os.preadv(self._descriptor, [view], position)
            if count <= 0:
                raise UserError(f"{self.path}: became shorter while it was read; {REPAIR}")
            view, position = view[count:], position + count

    def tensor(self, name: str) -> Tensor:
        """Tensor ``name`` as stored."""
        location = self.header.tensors[name]
        out = torch.empty(location.shape, dtype=location.dtype)
        self.read(name, out)
        return out

    def digest(self) -> str:
        """Hex sha256 of the bytes of latents and text."""
        digest = hashlib.sha256()
        for name in ("latents", "text"):
            digest.update(bytes_of(self.tensor(name)))
        return digest.hexdigest()

    def _read_header(self) -> Header:
        size = os.fstat(self._descriptor).st_size
        start = os.pread(self._descriptor, _FIRST_READ, 0)
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
        if not 0 < length <= min(_LARGEST_HEADER, size - 8):
            refuse_lfs_pointer(self.path)
            raise UserError(f"{self.path}: {size} bytes, cut or not safetensors; {REPAIR}")
        if length > len(start) - 8:
            start = os.pread(self._descriptor, length + 8, 0)
        where = f"{self.path}: its header is not a clip's"
        with foreign(where, REPAIR):
            table: Any = parse_json(start[8 : 8 + length], where, REPAIR)
            row = parse_json(table.pop("__metadata__")["clip"], where, REPAIR)
            tensors = {name: _location(entry, 8 + length) for name, entry in table.items()}
        boundaries = [8 + length, *sorted(t.stop for t in tensors.values())]
        if (
            set(tensors) != {"latents", "text"}
            or sorted(t.start for t in tensors.values()) != boundaries[:-1]
        ):
            raise UserError(
                f"{self.path}: holds {', '.join(sorted(tensors))}, not latents and text; {REPAIR}"
            )
        if boundaries[-1] != size:
            raise UserError(
                f"{self.path}: {size} bytes instead of {boundaries[-1]} (cut?); {REPAIR}"
            )
        if not isinstance(row, dict):
            raise UserError(f"{self.path}: its 'clip' entry is not an object; {REPAIR}")
        return Header(tensors, About.from_json(row, str(self.path)), size)


def read_header(path: Path) -> Header:
    """The checked header of a clip's file; no data is read. UserError as :class:`ClipFile`."""
    with ClipFile(path) as file:
        return file.header


def _location(entry: Any, base: int) -> TensorLocation:
    dtype, shape = FLOATS[str(entry["dtype"])], entry["shape"]
    first, last = entry["data_offsets"]
    if not isinstance(shape, list) or any(
        type(n) is not int or n < 0 for n in (*shape, first, last)
    ):
        raise ValueError("a shape or an offset is not a number")
    count = dtype.itemsize
    for length in shape:
        count *= length
    if last - first != count:
        raise ValueError(f"{last - first} bytes for shape {shape}")
    return TensorLocation(dtype, tuple(shape), base + first, base + last)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)
