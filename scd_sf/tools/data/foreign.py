"""Clips in other projects' layouts, one after another. Nothing is extracted and no code of theirs
can run.

- rCM: tars of ``{idx:09d}.latent.pt``, ``.embed.pt``, ``.prompt.txt``; latents (C, F, H, W),
  normalised.
- our own: tars of 'scd data export-webdataset'.
- Self-Forcing, CausVid: LMDB (or a folder of them) with ``latents_{i}_data`` (fp16),
  ``prompts_{i}_data`` and the text ``latents_shape``: N F C H W, or N K F C H W, whose last of K is
  the clean clip. Normalised. No text states. (The LMDB library itself trusts the structure of its
  files: import such a file only from where you would run code.)
- FastVideo: parquet; latents (C, F, H, W) as the VAE gives them, not normalised.
"""

from __future__ import annotations

import importlib
import itertools
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scd_sf.data.sources.raw_files import COPY, LARGEST, Refused, one_tensor, tar_refusal
from scd_sf.files import foreign, reason
from scd_sf.tensor_files import LONG_DTYPES
from scd_sf.types import UserError, printable

SUFFIXES = (".latent.pt", ".embed.pt", ".prompt.txt", ".safetensors", ".mp4")
RCM, OWN = {"latent.pt", "embed.pt", "prompt.txt"}, {"safetensors", "prompt.txt"}
PARQUET = (
    "caption",
    "vae_latent_bytes",
    "vae_latent_shape",
    "vae_latent_dtype",
    "text_embedding_bytes",
    "text_embedding_shape",
    "text_embedding_dtype",
)
PARQUET_KNOWN = {
    *PARQUET,
    "id",
    "file_name",
    "media_type",
    "width",
    "height",
    "num_frames",
    "duration_sec",
    "fps",
}
# bytes of a row group without compression; 64 clips of 81 frames at 480x832 are 1.1e9
ROW_GROUP = 8 * 2**30


@dataclass(frozen=True)
class ForeignClip:
    """One clip of a source. ``latents`` (F, C, H, W), ``text`` (T, E) without padding or None;
    ``raw``: as the VAE gives them, not normalised. ``own_bytes``: the bytes of one of our files
    instead, and of its mp4."""

    name: str
    prompt: str = ""
    latents: Tensor | None = None
    text: Tensor | None = None
    raw: bool = False
    own_bytes: bytes | None = None
    video: bytes | None = None


Part = ForeignClip | Refused


@dataclass(frozen=True)
class _Member:
    """A member of a tar. ``fault``: why it is refused; without a ``name`` it is the tar's own."""

    name: str
    data: bytes = b""
    fault: str = ""

    @property
    def key(self) -> str:
        """Its folder and its name up to the first dot: what the members of a sample share."""
        folder, _, file = self.name.rpartition("/")
        return f"{folder}/{file.partition('.')[0]}".lstrip("/")

    @property
    def suffix(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2]


def read_tar(path: Path) -> Iterator[Part]:
    """The samples of a tar of rCM's or of ours, whose members stand together, in a loader's order.

    A sample is refused with any of its members. UserErrors of the tar itself are refusals too.
    """
    for key, group in itertools.groupby(_members(path), lambda member: member.key):
        members = list(group)
        name = printable(f"{path}[{key}]")
        try:
            if faulty := [member for member in members if member.fault]:
                name = printable(f"{path}[{faulty[0].name}]" if faulty[0].name else str(path))
                raise ValueError(faulty[0].fault)
            yield _sample(name, {member.suffix: member.data for member in members})
        except ValueError as error:  # UserErrors too
            yield Refused(name, str(error))


def _members(path: Path) -> Iterator[_Member]:
    """A tar's members in order; what is wrong with the tar itself comes last."""
    try:
        with foreign(path, COPY), tarfile.open(path, "r:") as tar:
            for entry in tar:
                if entry.size < 0 or tar.offset <= entry.offset:
                    raise tarfile.ReadError("a header with a negative size")
                if fault := tar_refusal(entry, SUFFIXES):
                    yield _Member(entry.name, fault=fault)
                    continue
                file = tar.extractfile(entry)
                data = b"" if file is None else file.read()
                cut = f"{len(data)} bytes instead of {entry.size}: the tar is cut"
                yield _Member(entry.name, data, cut if len(data) != entry.size else "")
    except UserError as error:
        cause = reason(error.__cause__ or error)
        yield _Member(
            "", fault=f"the tar is damaged or cut ({cause}); what came before it is taken"
        )


def _sample(name: str, members: dict[str, bytes]) -> ForeignClip:
    """A clip of its members (suffix -> contents). ValueError where they are no clip."""
    if members.keys() in (OWN, OWN | {"mp4"}):
        return ForeignClip(name, own_bytes=members["safetensors"], video=members.get("mp4"))
    if members.keys() != RCM:
        raise ValueError(
            f"has {', '.join(sorted(members))}; a sample needs {', '.join(sorted(RCM))}"
        )
    latents = one_tensor(members["latent.pt"], "latent.pt")
    text = one_tensor(members["embed.pt"], "embed.pt")
    if latents.ndim == 5 and len(latents) == 1:
        latents = latents[0]
    if latents.ndim != 4:
        raise ValueError(f"latents of shape {tuple(latents.shape)} instead of (C, F, H, W)")
    return ForeignClip(
        name, members["prompt.txt"].decode(), latents.transpose(0, 1), unpadded(text)
    )


def unpadded(text: Tensor) -> Tensor:
    """(T, E) of (L, E) or (1, L, E): without the zeros after the true length. ValueError for
    another shape, or none."""
    rows = text[0] if text.ndim == 3 and len(text) == 1 else text
    if rows.ndim != 2:
        raise ValueError(f"text states of shape {tuple(text.shape)} instead of (L, E)")
    nonzero_rows = rows.ne(0).any(dim=1).nonzero()
    if not len(nonzero_rows):
        raise ValueError("text states are all zero")
    return rows[: int(nonzero_rows[-1]) + 1]


def read_lmdb(path: Path) -> Iterator[Part]:
    """The samples of an LMDB environment. Values are bytes of numbers and of text: nothing in them
    is executed."""
    lmdb = _library("lmdb")
    with foreign(path, COPY):
        env = lmdb.open(
            str(path), readonly=True, lock=False, create=False, readahead=True, max_readers=1
        )
    with env:
        with foreign(path, COPY):
            _check_lmdb(env, path)
            with env.begin() as view:
                shape = _lmdb_shape(view.get(b"latents_shape"), path)
        if 2 * shape[0] > (entries := env.stat()["entries"]):
            raise UserError(
                f"{path}: 'latents_shape' says {shape[0]} clips, it has {entries} entries; copy it again"
            )
        for number in range(shape[0]):
            try:
                yield _lmdb_sample(env, number, shape, f"{path}[{number}]")
            except ValueError as error:  # UserErrors too
                yield Refused(f"{path}[{number}]", str(error))


def _check_lmdb(env: Any, path: Path) -> None:
    """ValueError where the file is shorter than its pages. Reading beyond its end would kill the
    process."""
    needed_bytes = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    size = (path / "data.mdb").stat().st_size
    if size < needed_bytes:
        raise ValueError(f"data.mdb has {size} bytes instead of {needed_bytes} (cut?)")


def _lmdb_sample(env: Any, number: int, shape: tuple[int, ...], name: str) -> ForeignClip:
    with foreign("damaged", COPY), env.begin() as view:
        data = view.get(f"latents_{number}_data".encode())
        prompt = view.get(f"prompts_{number}_data".encode())
    if data is None or prompt is None:
        raise ValueError("has no latents or no prompt")
    latents = numbers_of(data, "float16", shape[1:])
    return ForeignClip(name, prompt.decode(), latents[-1] if latents.ndim == 5 else latents)


def _lmdb_shape(text: bytes | None, path: Path) -> tuple[int, ...]:
    sizes = (text or b"").decode("ascii", "replace").split()
    if len(sizes) not in (5, 6) or not all(re.fullmatch("[1-9][0-9]{0,9}", size) for size in sizes):
        raise UserError(
            f"{path}: 'latents_shape' is {text!r}; it must be the numbers N F C H W, or N K F C H W"
        )
    return tuple(int(size) for size in sizes)


def numbers_of(data: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Raw little-endian numbers as a tensor. ValueError where bytes, type and shape do not fit each
    other."""
    if dtype not in LONG_DTYPES:
        raise ValueError(f"dtype '{dtype}' is unknown; known are {', '.join(LONG_DTYPES)}")
    count = LONG_DTYPES[dtype].itemsize
    for size in shape:
        count *= size
    if not shape or min(shape) < 1 or len(data) != count or count > LARGEST:
        raise ValueError(f"{len(data)} bytes for shape {shape} of {dtype}")
    return torch.frombuffer(bytearray(data), dtype=LONG_DTYPES[dtype]).view(shape)


def read_parquet(path: Path) -> Iterator[Part]:
    """The rows of FastVideo's text-to-video parquet. UserError for other columns, and for row
    groups beyond memory.

    A row group that cannot be decoded is refused from its first bad row on.
    """
    parquet = _library("pyarrow.parquet")
    with foreign(f"{path}: cannot be read as parquet", COPY):
        file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)  # reads page by page
        columns = file.schema_arrow.names
    with file:
        _check_columns(path, columns)
        with foreign(f"{path}: cannot be read as parquet", COPY):
            _check_row_groups(path, file.metadata)
        for group in range(file.num_row_groups):
            yield from _row_group(path, file, group)


def _check_columns(path: Path, columns: list[str]) -> None:
    missing_names = [name for name in PARQUET if name not in columns]
    unknown_names = sorted(set(columns) - PARQUET_KNOWN)
    if missing_names or unknown_names:
        problem = (
            f"has no column '{missing_names[0]}'"
            if missing_names
            else f"has a column '{unknown_names[0]}' that is not known"
        )
        raise UserError(
            f"{path}: {problem}; only FastVideo's text-to-video layout is read: {', '.join(PARQUET)}"
        )


def _check_row_groups(path: Path, metadata: Any) -> None:
    """UserError naming the first row group that takes more than :data:`ROW_GROUP` bytes without
    compression.

    The columns' own sizes are not asked for: pyarrow ends the process where a column's statistics
    are damaged.
    """
    rows = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        rows, size = rows + group.num_rows, group.total_byte_size
        if size > ROW_GROUP:
            raise UserError(
                f"{path}: row group {number} takes {size / 2**30:.3g} GiB, more than {ROW_GROUP / 2**30:.3g}; "
                "write the file again in smaller row groups"
            )
    if rows != metadata.num_rows:
        raise ValueError(f"its row groups hold {rows} rows, the file {metadata.num_rows}")


def _row_group(path: Path, file: Any, group: int) -> Iterator[Part]:
    """The rows of a row group, one at a time."""
    name = f"{path}[{group}]"
    try:
        with foreign("damaged", COPY):
            batches = file.iter_batches(
                1, row_groups=[group], columns=list(PARQUET), use_threads=False
            )
        for number in itertools.count():
            name = f"{path}[{group}:{number}]"
            with foreign("damaged", COPY):
                if (batch := next(batches, None)) is None:
                    break
                (row,) = batch.to_pylist()
            try:
                part: Part = _parquet_sample(name, row)
            except ValueError as error:
                part = Refused(name, str(error))
            yield part
        if number != (rows := file.metadata.row_group(group).num_rows):
            yield Refused(f"{path}[{group}]", f"{number} rows instead of {rows} (cut?)")
    except UserError as error:
        yield Refused(name, f"the rest of its row group is not read: {error}")


def _parquet_sample(name: str, row: dict[str, Any]) -> ForeignClip:
    tensors = []
    for part in ("vae_latent", "text_embedding"):
        data, shape, dtype = (row[f"{part}_{field}"] for field in ("bytes", "shape", "dtype"))
        if (
            not isinstance(data, bytes)
            or not shape
            or not all(isinstance(size, int) for size in shape)
        ):
            raise ValueError(f"'{part}_bytes' or '{part}_shape' is empty or of another type")
        tensors.append(numbers_of(data, str(dtype).removeprefix("torch."), tuple(shape)))
    latents, text = tensors
    if latents.ndim != 4 or not isinstance(row["caption"], str):
        raise ValueError(
            f"latents of shape {tuple(latents.shape)} instead of (C, F, H, W), or no caption"
        )
    return ForeignClip(name, row["caption"], latents.transpose(0, 1), unpadded(text), raw=True)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"this layout needs {name.partition('.')[0]}; pip install 'scd-sf[data]'"
        ) from error
