"""Clips in other projects' layouts, one after another. Nothing is extracted and no code of theirs can run.

- rCM: tars of ``{idx:09d}.latent.pt``, ``.embed.pt``, ``.prompt.txt``; latents (C, F, H, W), normalised.
- our own: tars of 'scd data export-webdataset'.
- Self-Forcing, CausVid: LMDB (or a folder of them) with ``latents_{i}_data`` (fp16), ``prompts_{i}_data`` and the text
  ``latents_shape``: N F C H W, or N K F C H W, whose last of K is the clean clip. Normalised. No text states.
  (The LMDB library itself trusts the structure of its files: import such a file only from where you would run code.)
- FastVideo: parquet; latents (C, F, H, W) as the VAE gives them, not normalised.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scd_sf.data.sources.raw_files import COPY, LARGEST, Refused, one_tensor, refusal
from scd_sf.files import foreign, reason
from scd_sf.tools.data.parquet_footer import ROW_GROUP, check_row_groups
from scd_sf.types import UserError, printable

SUFFIXES = (".latent.pt", ".embed.pt", ".prompt.txt", ".safetensors", ".mp4")
RCM, OWN = {"latent.pt", "embed.pt", "prompt.txt"}, {"safetensors", "prompt.txt"}
PARQUET = (
    "caption", "vae_latent_bytes", "vae_latent_shape", "vae_latent_dtype",
    "text_embedding_bytes", "text_embedding_shape", "text_embedding_dtype",
)  # fmt: skip
PARQUET_KNOWN = {*PARQUET, "id", "file_name", "media_type", "width", "height", "num_frames", "duration_sec", "fps"}
NUMPY = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Sample:
    """One clip of a source. ``latents`` (F, C, H, W), ``text`` (T, E) without padding or None; ``raw``: as the VAE
    gives them, not normalised. ``own``: the bytes of one of our files instead, and of its mp4."""

    name: str
    prompt: str = ""
    latents: Tensor | None = None
    text: Tensor | None = None
    raw: bool = False
    own: bytes | None = None
    video: bytes | None = None


Part = Sample | Refused


def read_tar(path: Path) -> Iterator[Part]:
    """The samples of a tar of rCM's or of ours. Members that could lead elsewhere are refused with their samples."""
    members: dict[str, dict[str, bytes]] = {}
    bad: dict[str, str] = {}
    last = ""
    for part in _members(path):
        if isinstance(part, Refused):
            yield part
            continue
        name, fault, data = part
        stem, _, suffix = name.rpartition("/")[2].partition(".")
        key = f"{name.rpartition('/')[0]}/{stem}".lstrip("/")
        if last and key != last:
            yield from _finished(path, last, members, bad)
        last = key
        if fault:
            bad[key] = fault
            if "cut" not in fault:
                yield Refused(printable(f"{path}[{name}]"), fault)
        else:
            members.setdefault(key, {})[suffix] = data
    if last:
        yield from _finished(path, last, members, bad)


def _members(path: Path) -> Iterator[tuple[str, str, bytes] | Refused]:
    """(name, why it is not taken, contents) of a tar's members; what is wrong with the tar itself comes last."""
    try:
        with foreign(path, COPY), tarfile.open(path, "r:") as tar:
            for entry in tar:
                if entry.size < 0 or tar.offset <= entry.offset:
                    raise tarfile.ReadError("a header with a negative size")
                if fault := refusal(entry, SUFFIXES):
                    yield entry.name, fault, b""
                    continue
                file = tar.extractfile(entry)
                data = b"" if file is None else file.read()
                cut = len(data) != entry.size
                yield entry.name, f"{len(data)} bytes instead of {entry.size}: the tar is cut" if cut else "", data
    except UserError as error:
        why = reason(error.__cause__ or error)
        yield Refused(str(path), f"the tar is damaged or cut ({why}); what came before it is taken")


def _finished(path: Path, key: str, members: dict[str, dict[str, bytes]], bad: dict[str, str]) -> Iterator[Part]:
    """The sample of a key whose members have all been read; nothing for one of which a member was refused."""
    found, name = members.pop(key, {}), printable(f"{path}[{key}]")
    if reason := bad.pop(key, ""):
        if found or "cut" in reason:
            yield Refused(name, f"one of its members was refused: {reason}")
        return
    try:
        if set(found) >= OWN and set(found) <= OWN | {"mp4"}:
            yield Sample(name, own=found["safetensors"], video=found.get("mp4"))
        elif set(found) == RCM:
            latents, text = one_tensor(found["latent.pt"], "latent.pt"), one_tensor(found["embed.pt"], "embed.pt")
            if latents.ndim == 5 and len(latents) == 1:
                latents = latents[0]
            if latents.ndim != 4:
                raise ValueError(f"latents of shape {tuple(latents.shape)} instead of (C, F, H, W)")
            yield Sample(name, found["prompt.txt"].decode(), latents.transpose(0, 1), unpadded(text))
        else:
            raise ValueError(f"has {', '.join(sorted(found))}; a sample needs {', '.join(sorted(RCM))}")
    except ValueError as error:
        yield Refused(name, str(error))


def unpadded(text: Tensor) -> Tensor:
    """(T, E) of (L, E) or (1, L, E): without the zeros after the true length. ValueError for another shape, or none."""
    rows = text[0] if text.ndim == 3 and len(text) == 1 else text
    if rows.ndim != 2:
        raise ValueError(f"text states of shape {tuple(text.shape)} instead of (L, E)")
    filled = rows.ne(0).any(dim=1).nonzero()
    if not len(filled):
        raise ValueError("text states are all zero")
    return rows[: int(filled[-1]) + 1]


def read_lmdb(path: Path) -> Iterator[Part]:
    """The samples of an LMDB environment. Values are bytes of numbers and of text: nothing in them is executed."""
    lmdb = _library("lmdb")
    with foreign(path, COPY):
        env = lmdb.open(str(path), readonly=True, lock=False, create=False, readahead=True, max_readers=1)
    with env:
        with foreign(path, COPY):
            _check_lmdb(env, path)
            with env.begin() as view:
                shape = _lmdb_shape(view.get(b"latents_shape"), path)
        if 2 * shape[0] > (entries := env.stat()["entries"]):
            raise UserError(f"{path}: 'latents_shape' says {shape[0]} clips, it has {entries} entries; copy it again")
        for number in range(shape[0]):
            try:
                yield _lmdb_sample(env, number, shape, f"{path}[{number}]")
            except ValueError as error:  # UserErrors too
                yield Refused(f"{path}[{number}]", str(error))


def _check_lmdb(env: Any, path: Path) -> None:
    """ValueError where the file is shorter than its pages: to read beyond its end would kill the process."""
    needed, size = (env.info()["last_pgno"] + 1) * env.stat()["psize"], (path / "data.mdb").stat().st_size
    if size < needed:
        raise ValueError(f"data.mdb has {size} bytes instead of {needed} (cut?)")


def _lmdb_sample(env: Any, number: int, shape: tuple[int, ...], name: str) -> Sample:
    with foreign("damaged", COPY), env.begin() as view:
        data, prompt = view.get(f"latents_{number}_data".encode()), view.get(f"prompts_{number}_data".encode())
    if data is None or prompt is None:
        raise ValueError("has no latents or no prompt")
    latents = numbers_of(data, "float16", shape[1:])
    return Sample(name, prompt.decode(), latents[-1] if latents.ndim == 5 else latents)


def _lmdb_shape(text: bytes | None, path: Path) -> tuple[int, ...]:
    sizes = (text or b"").decode("ascii", "replace").split()
    if len(sizes) not in (5, 6) or not all(re.fullmatch("[1-9][0-9]{0,9}", size) for size in sizes):
        raise UserError(f"{path}: 'latents_shape' is {text!r}; it must be the numbers N F C H W, or N K F C H W")
    return tuple(int(size) for size in sizes)


def numbers_of(data: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Raw little-endian numbers as a tensor. ValueError where bytes, type and shape do not fit each other."""
    if dtype not in NUMPY:
        raise ValueError(f"dtype '{dtype}' is unknown; known are {', '.join(NUMPY)}")
    count = NUMPY[dtype].itemsize
    for size in shape:
        count *= size
    if not shape or min(shape) < 1 or len(data) != count or count > LARGEST:
        raise ValueError(f"{len(data)} bytes for shape {shape} of {dtype}")
    return torch.frombuffer(bytearray(data), dtype=NUMPY[dtype]).view(shape)


def read_parquet(path: Path) -> Iterator[Part]:
    """The rows of FastVideo's text-to-video parquet. UserError for other columns, and for row groups beyond memory."""
    polars = _library("polars")
    with _polars(path):
        check_row_groups(path, ROW_GROUP)
        table = polars.scan_parquet(path.absolute(), glob=False, hive_partitioning=False)
        schema = table.collect_schema()
    missing, unknown = [n for n in PARQUET if n not in schema], sorted(set(schema) - PARQUET_KNOWN)
    if missing or unknown:
        what = f"has no column '{missing[0]}'" if missing else f"has a column '{unknown[0]}' that is not known"
        raise UserError(f"{path}: {what}; only FastVideo's text-to-video layout is read: {', '.join(PARQUET)}")
    with _polars(path):
        count = table.select(polars.len()).collect().item()
    for number in range(count):
        name = f"{path}[{number}]"
        try:
            with _polars(path):
                row = table.select(PARQUET).slice(number, 1).collect().row(0, named=True)
            yield _parquet_sample(name, row)
        except ValueError as error:  # UserErrors too
            yield Refused(name, str(error))


@contextmanager
def _polars(path: Path) -> Iterator[None]:
    """:func:`foreign`, also for what the library raises when its own code gives up, which is no ``Exception``."""
    panic = _library("polars").exceptions.PanicException
    with foreign(f"{path}: cannot be read as parquet", COPY):
        try:
            yield
        except panic as error:
            raise ValueError(str(error)) from error


def _parquet_sample(name: str, row: dict[str, Any]) -> Sample:
    tensors = []
    for part in ("vae_latent", "text_embedding"):
        data, shape, dtype = (row[f"{part}_{field}"] for field in ("bytes", "shape", "dtype"))
        if not isinstance(data, bytes) or not shape or not all(isinstance(size, int) for size in shape):
            raise ValueError(f"'{part}_bytes' or '{part}_shape' is empty or of another type")
        tensors.append(numbers_of(data, str(dtype).removeprefix("torch."), tuple(shape)))
    latents, text = tensors
    if latents.ndim != 4 or not isinstance(row["caption"], str):
        raise ValueError(f"latents of shape {tuple(latents.shape)} instead of (C, F, H, W), or no caption")
    return Sample(name, row["caption"], latents.transpose(0, 1), unpadded(text), raw=True)


def _library(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(f"this layout needs {name}; pip install 'scd-sf[data]'") from error
