"""Weights in files, safetensors or pickles of tensors: opened without being read, and checked as
they are read.

Refused, each in one line that names file and tensor: a pointer of Git LFS, a damaged file, a pickle
that holds more than tensors, a tensor of more numbers than its file holds, NaN and infinity.
Nothing in a file is ever run.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from torch import Tensor, nn

from scd_sf.files import foreign, read_typed, refuse_lfs_pointer, safe_path
from scd_sf.types import UserError

PICKLES = (".pt", ".pth", ".ckpt", ".bin")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPES = {**FLOATS, **WHOLE, "BOOL": torch.bool}
LONG_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}  # float32 ..
SHORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AGAIN = "download or copy the file again"
NAME_LIMIT = 1000  # characters of a tensor's name
# of a pickle: the optimizer states of the largest models have some ten thousand
MOST_ENTRIES = 1_000_000
DEEPEST = 16


@dataclass(frozen=True)
class Lazy:
    """A tensor that is on disk: its meta twin, how to read it (checked, on the CPU), and the file
    it is in.

    ``other_type``: the type of a pickle's entry that is no tensor and cannot be read; else "".
    """

    meta: Tensor
    read: Callable[[], Tensor]
    origin: str = ""
    other_type: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)


def dtype_of(name: str, field: str = "dtype") -> torch.dtype:
    """The torch type of "fp32", "bf16", "fp16", or of torch's own name ("bfloat16"). UserError
    naming ``field`` for another name."""
    dtype = (SHORT_DTYPES | LONG_DTYPES).get(name)
    if dtype is None:
        raise UserError(f"{field} '{name}' is unknown; use one of {', '.join(SHORT_DTYPES)}")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """torch's own name, as manifests hold it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def kind_of(tensor: Lazy) -> str:
    """safetensors' name of a tensor's type: F32, BF16, .."""
    return next(kind for kind, dtype in DTYPES.items() if dtype == tensor.meta.dtype)


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]


def open_tensors(file: Path, remedy: str = AGAIN) -> dict[str, Lazy]:
    """The tensors of one file by name; the tables inside a pickle's tables by dotted names."""
    if not file.is_file():
        raise UserError(f"{file}: missing; {remedy}")
    refuse_lfs_pointer(file)
    tensors = (
        _open_pickle(file, remedy) if file.suffix in PICKLES else _open_safetensors(file, remedy)
    )
    for name in tensors:
        if len(name) > NAME_LIMIT:
            raise UserError(
                f"{file}: the name {name[:40]!r}.. has {len(name):,} characters; {remedy}"
            )
    return tensors


def read_metadata(file: Path, remedy: str = AGAIN) -> dict[str, str]:
    """The metadata of a safetensors file. UserError for anything else."""
    if not file.is_file():
        raise UserError(f"{file}: missing; {remedy}")
    refuse_lfs_pointer(file)
    with (
        foreign(f"{file}: not a readable safetensors file", remedy),
        safe_open(str(file), "pt") as tensors,
    ):
        return dict(tensors.metadata() or {})


def read_tensors(file: Path, remedy: str = AGAIN) -> dict[str, Tensor]:
    """All tensors of a file, read and checked. A pickle's are mapped from the disk where its form
    allows that."""
    return read_all(open_tensors(file, remedy))


def read_all(tensors: Mapping[str, Lazy]) -> dict[str, Tensor]:
    """Every tensor of a table, read and checked."""
    for name, tensor in tensors.items():
        if tensor.other_type:
            raise UserError(
                f"{tensor.origin}: entry '{name}' is not a tensor; use a file of the weights alone"
            )
    return {name: tensor.read() for name, tensor in tensors.items()}


def check_tensors(tensors: Mapping[str, Lazy]) -> None:
    """Read every tensor, one at a time, and keep none. UserError as :func:`read_all`."""
    for tensor in tensors.values():
        tensor.read()


def open_tensor_folder(folder: Path, stem: str, remedy: str = AGAIN) -> dict[str, Lazy]:
    """The tensors of ``folder/stem.safetensors``, of its shards, or of a pickle of that name.

    The index alone decides which shard a tensor is read from. UserError where shards and index
    disagree otherwise.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return _open_shards(index, remedy)
    for name in (f"{stem}.safetensors", *(f"{stem}{suffix}" for suffix in PICKLES)):
        if (folder / name).is_file():
            return open_tensors(folder / name, remedy)
    if shards := sorted(folder.glob(f"{stem}-*-of-*.safetensors")):
        raise UserError(
            f"{index}: missing beside {len(shards)} shards such as {shards[0].name}; only it says which shard "
            "a tensor is read from: copy it too"
        )
    return open_tensors(folder / f"{stem}.safetensors", remedy)


def in_memory(tensor: Tensor, origin: str = "", dtype: torch.dtype | None = None) -> Lazy:
    """A :class:`Lazy` of a tensor in memory, read in ``dtype`` (None: its own)."""
    meta = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")
    return Lazy(meta, partial(tensor.detach().to, "cpu", meta.dtype), origin)


def check_finite(tensor: Tensor, name: str, where: str) -> Tensor:
    """``tensor`` itself; UserError naming it where it holds NaN or infinity. One pass, no copy."""
    if tensor.is_floating_point() and tensor.numel():
        lowest, highest = tensor.aminmax()
        if not (lowest.isfinite() and highest.isfinite()):
            raise UserError(
                f"{where}: tensor '{name}' holds NaN or infinity; these weights are broken, use others"
            )
    return tensor


# ----------------------------------------------------------------------------------------- one file


def _open_safetensors(file: Path, remedy: str) -> dict[str, Lazy]:
    with foreign(f"{file}: unreadable safetensors", f"truncated or damaged: {remedy}"):
        handle = safe_open(str(file), framework="pt")
        views = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  # not a mapping
        kinds = {name: (view.get_dtype(), view.get_shape()) for name, view in views.items()}
    tensors: dict[str, Lazy] = {}
    for name, (dtype, shape) in kinds.items():
        if dtype not in DTYPES:
            raise UserError(
                f"{file}: tensor '{name[:80]}' is {dtype}; only {', '.join(FLOATS)} are read as weights"
            )
        meta = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        tensors[name] = Lazy(
            meta, partial(_read, partial(handle.get_tensor, name), name, file), str(file)
        )
    return tensors


def _read(load: Callable[[], Tensor], name: str, file: Path) -> Tensor:
    with foreign(f"{file}: tensor '{name}'", AGAIN):
        tensor = load()
    return check_finite(tensor, name, str(file))


def _open_pickle(file: Path, remedy: str) -> dict[str, Lazy]:
    """Tensors only (``weights_only``), in tables or tables of tables."""
    with foreign(f"{file}: unreadable", remedy):
        is_zip = zipfile.is_zipfile(file)
        if is_zip:
            with zipfile.ZipFile(file) as archive:
                num_bytes = sum(item.file_size for item in archive.infolist())
            if num_bytes > file.stat().st_size:
                raise UserError(
                    f"{file}: its parts claim {num_bytes:,} bytes, more than the file has; {remedy}"
                )
        try:
            content: object = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
        except UnpicklingError as error:
            raise UserError(
                f"{file}: holds more than tensors, which is refused, or is damaged; convert it to safetensors"
            ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{file}: holds a {type(content).__name__}, not a table of tensors; use another file"
        )
    tensors: dict[str, Lazy] = {}
    _flatten(content, (), (id(content),), tensors, file)
    return tensors


def _flatten(
    table: dict[object, object],
    path: tuple[str, ...],
    ancestor_ids: tuple[int, ...],
    tensors: dict[str, Lazy],
    file: Path,
) -> None:
    """Collect the tensors of a pickle's nested tables in ``into``, by dotted names. Other values
    are collected with ``other_type`` where they stand beside tensors."""
    holds_tensors = any(isinstance(value, Tensor) for value in table.values())
    for key, value in table.items():
        name = ".".join((*path, str(key)))
        if len(tensors) > MOST_ENTRIES:
            raise UserError(
                f"{file}: more than {MOST_ENTRIES:,} entries; use a file of the weights alone"
            )
        if isinstance(value, dict):
            if len(path) >= DEEPEST or id(value) in ancestor_ids:
                raise UserError(
                    f"{file}: tables inside tables at '{name[:80]}'; use a file of the weights alone"
                )
            _flatten(value, (*path, str(key)), (*ancestor_ids, id(value)), tensors, file)
        elif name in tensors:
            raise UserError(f"{file}: holds '{name}' twice; use a file of the weights alone")
        elif isinstance(value, Tensor):
            tensors[name] = _lazy_of(value, name, file)
        elif holds_tensors:
            tensors[name] = Lazy(
                torch.empty(0, device="meta"),
                partial(_refuse_entry, name, file),
                str(file),
                type(value).__name__,
            )


def _refuse_entry(name: str, file: Path) -> Tensor:
    raise UserError(f"{file}: entry '{name}' is not a tensor; use a file of the weights alone")


def _lazy_of(tensor: Tensor, name: str, file: Path) -> Lazy:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_meta or tensor.dtype not in DTYPES.values():
        kind = "meta" if tensor.is_meta else tensor.dtype if plain else type(tensor).__name__
        raise UserError(
            f"{file}: tensor '{name[:80]}' is {kind}; only plain tensors of numbers are read as weights"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(
            f"{file}: tensor '{name[:80]}' has more numbers than the file holds of it; {AGAIN}"
        )
    meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return Lazy(meta, partial(_read, tensor.detach, name, file), str(file))


# ------------------------------------------------------------------------------------------- shards


def _open_shards(index: Path, remedy: str) -> dict[str, Lazy]:
    places = read_typed(index, _Index, remedy).weight_map
    for file in places.values():
        if Path(file).name != file:
            raise UserError(
                f"{index}: shard name {file[:80]!r} leaves the directory; it is not read: {remedy}"
            )
    names = sorted(set(places.values()))
    where = f"{index}: a shard's name"  # which may be a link, as in the caches of Hugging Face
    shards = {
        name: open_tensors(safe_path(index.parent, name, where, links=True), remedy)
        for name in names
    }
    message = f"the index and its shards do not belong together: {remedy}"
    for file, tensors in shards.items():
        for name in tensors:
            if name not in places:
                raise UserError(
                    f"{index.parent / file}: has tensor '{name}', which {index.name} does not name; {message}"
                )
    for name, file in places.items():
        if name not in shards[file]:
            raise UserError(
                f"{index}: places tensor '{name[:80]}' in {file}, which does not have it; {message}"
            )
    return {name: shards[file][name] for name, file in places.items()}
