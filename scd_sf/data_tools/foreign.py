"""Clips in other projects' layouts, one after another. Nothing is extracted and no code of theirs can run.

- rCM: tars of ``{idx:09d}.latent.pt``, ``.embed.pt``, ``.prompt.txt``; latents (C, F, H, W), normalised.
- our own: tars of 'scd data export-webdataset'.
- Self-Forcing, CausVid: LMDB (or a folder of them) with ``latents_{i}_data`` (fp16), ``prompts_{i}_data`` and the text
  ``latents_shape``: N F C H W, or N K F C H W, whose last of K is the clean clip. Normalised. No text states.
  (The LMDB library itself trusts the structure of its files: import such a file only from where you would run code.)
- FastVideo: parquet; latents (C, F, H, W) as the VAE gives them, not normalised.
"""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from scd_sf.types import UserError

LARGEST = 2**30  # bytes of a member or of a value
SUFFIXES = {"latent.pt", "embed.pt", "prompt.txt", "safetensors", "mp4"}
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


@dataclass(frozen=True)
class Refused:
    """A part of a source that is not taken, and why."""

    name: str
    reason: str


Part = Sample | Refused


def read_tar(path: Path) -> Iterator[Part]:
    """The samples of a tar of rCM's or of ours. Members that could lead elsewhere are refused with their samples."""
    members: dict[str, dict[str, bytes]] = {}
    bad: dict[str, str] = {}
    last = ""
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                where = f"{path}[{entry.name}]"
                folder, _, name = entry.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if last and key != last:
                    yield from _finished(path, last, members, bad)
                last = key
                if reason := _refusal(entry, suffix):
                    bad[key] = reason
                    yield Refused(where, reason)
                    continue
                file = tar.extractfile(entry)
                data = b"" if file is None else file.read()
                if len(data) != entry.size:
                    bad[key] = f"{len(data)} bytes instead of {entry.size}: the tar is cut"
                    continue
                members.setdefault(key, {})[suffix] = data
    except (tarfile.TarError, OSError, EOFError) as error:
        yield Refused(str(path), f"the tar is damaged or cut ({error}); what came before it is taken")
    if last:
        yield from _finished(path, last, members, bad)


def _refusal(entry: tarfile.TarInfo, suffix: str) -> str:
    name = PurePosixPath(entry.name)
    if name.is_absolute() or ".." in name.parts or "\\" in entry.name or "\0" in entry.name:
        return "its path leaves the archive"
    if not entry.isreg():
        return "not a regular file (a link, a folder or a device)"
    if suffix not in SUFFIXES:
        return f"suffix '.{suffix}' is unknown; known are {', '.join(sorted(SUFFIXES))}"
    return f"{entry.size} bytes, more than {LARGEST}" if entry.size > LARGEST else ""


def _finished(path: Path, key: str, members: dict[str, dict[str, bytes]], bad: dict[str, str]) -> Iterator[Part]:
    """The sample of a key whose members have all been read; nothing for one of which a member was refused."""
    found, name = members.pop(key, {}), f"{path}[{key}]"
    if reason := bad.pop(key, ""):
        if found or "cut" in reason:
            yield Refused(name, f"one of its members was refused: {reason}")
        return
    try:
        if set(found) >= OWN and set(found) <= OWN | {"mp4"}:
            yield Sample(name, own=found["safetensors"], video=found.get("mp4"))
        elif set(found) == RCM:
            latents, text = tensor_of(found["latent.pt"]), tensor_of(found["embed.pt"])
            if latents.ndim == 5 and len(latents) == 1:
                latents = latents[0]
            if latents.ndim != 4:
                raise ValueError(f"latents of shape {tuple(latents.shape)} instead of (C, F, H, W)")
            yield Sample(name, found["prompt.txt"].decode(), latents.transpose(0, 1), unpadded(text))
        else:
            raise ValueError(f"has {', '.join(sorted(found))}; a sample needs {', '.join(sorted(RCM))}")
    except ValueError as error:
        yield Refused(name, str(error))


def tensor_of(data: bytes) -> Tensor:
    """The one tensor of a ``torch.save`` file. ValueError for anything else; code in a pickle is not run."""
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError("a pickle that holds more than tensors, which could run code: not loaded") from error
    except (RuntimeError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"not a file of torch.save ({str(error).splitlines()[0]})") from error
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        raise ValueError(f"holds a {type(value).__name__}, not one tensor of floating point numbers")
    if value.numel() * value.itemsize > LARGEST:  # an expanded view of few bytes
        raise ValueError(f"a tensor of shape {tuple(value.shape)}, more than {LARGEST} bytes")
    return value.detach()


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
    try:
        env = lmdb.open(str(path), readonly=True, lock=False, create=False, readahead=True, max_readers=1)
    except lmdb.Error as error:
        raise UserError(f"{path}: cannot be opened as LMDB ({error}); copy it again") from error
    with env, env.begin() as view:
        shape = _lmdb_shape(view.get(b"latents_shape"), path)
        for number in range(shape[0]):
            name = f"{path}[{number}]"
            data, prompt = view.get(f"latents_{number}_data".encode()), view.get(f"prompts_{number}_data".encode())
            try:
                if data is None or prompt is None:
                    raise ValueError("has no latents or no prompt")
                latents = numbers_of(data, "float16", shape[1:])
                yield Sample(name, prompt.decode(), latents[-1] if latents.ndim == 5 else latents)
            except ValueError as error:
                yield Refused(name, str(error))


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
    """The rows of FastVideo's text-to-video parquet. UserError for other columns."""
    polars = _library("polars")
    try:
        schema = polars.scan_parquet(path).collect_schema()
    except (polars.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error}); copy it again") from error
    missing, unknown = [n for n in PARQUET if n not in schema], sorted(set(schema) - PARQUET_KNOWN)
    if missing or unknown:
        what = f"has no column '{missing[0]}'" if missing else f"has a column '{unknown[0]}' that is not known"
        raise UserError(f"{path}: {what}; only FastVideo's text-to-video layout is read: {', '.join(PARQUET)}")
    count = polars.scan_parquet(path).select(polars.len()).collect().item()
    for number in range(count):
        row = polars.scan_parquet(path).select(PARQUET).slice(number, 1).collect().row(0, named=True)
        try:
            yield _parquet_sample(f"{path}[{number}]", row)
        except ValueError as error:
            yield Refused(f"{path}[{number}]", str(error))


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
