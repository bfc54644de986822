"""Wan 2.1 transformer weights on disk, read and written in both public layouts, and read from distilled generators.

Layouts: diffusers' (config.json with ``WanTransformer3DModel``), the original (config.json with ``WanModel``), each in
one file or in shards with an index; or one file alone, safetensors or a pickle of tensors (``.pt``, ``.pth``), such as
the released Self-Forcing, Causal-Forcing and CausVid generators. Names: names.py.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scd_sf.files import read_json, write_json
from scd_sf.models.names import (
    Layout,
    diffusers_to_original,
    layout_of,
    original_to_diffusers,
    to_diffusers,
    to_ours,
    unwrapped,
)
from scd_sf.models.trunk import WanConfig
from scd_sf.models.wan import Wan
from scd_sf.models.wan_json import AGAIN, config_from_shapes, config_json, read_config
from scd_sf.types import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = "diffusion_pytorch_model{suffix}.safetensors"
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
MAX_SHARD = "10GB"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SECTIONS = ("generator_ema", "generator", "model", "state_dict")


@dataclass(frozen=True)
class Lazy:
    """A tensor that is on disk: its meta twin, how to read it, and where it comes from."""

    meta: Tensor
    read: Callable[[], Tensor]
    origin: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)


@dataclass(frozen=True)
class WanFiles:
    """A transformer on disk: its geometry, whose layout it has, and its tensors by our names, none read yet."""

    path: Path
    config: WanConfig
    layout: Layout
    tensors: Mapping[str, Lazy]


def is_wan_directory(path: Path) -> bool:
    """Whether a transformer's config.json is there or in ``transformer/``; our own checkpoints have none."""
    return any((folder / "config.json").is_file() for folder in (path / "transformer", path))


def transformer_dir(path: Path) -> Path:
    """``path`` itself or its ``transformer/`` sub-folder, whichever holds the transformer's config.json."""
    for folder in (path / "transformer", path):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path}: no transformer/config.json there; give a Wan 2.1 directory or a file of its weights")


def open_wan(path: Path, *, section: str = "", heads: int = 0) -> WanFiles:
    """A Wan 2.1 text-to-video transformer, every tensor's name and shape checked, none of them read yet.

    ``path``: a directory in either layout, or one file. For a file alone ``section`` picks a part of a training
    checkpoint (empty: its EMA generator, else its generator) and ``heads`` the number of attention heads (0: width /
    128, as in all released models); the rest of the geometry follows from the shapes.
    """
    if path.is_file():
        found, where = _read_file(path, section), path
        layout = layout_of(found, str(path))
        shapes = {to_diffusers(_ours(name, layout, path)): tensor.shape for name, tensor in found.items()}
        config = config_from_shapes(shapes, heads, path)
    else:
        where, found = transformer_dir(path), {}
        config, _ = read_config(where / "config.json")
        for file in _files(where):
            found |= _read_file(file, "")
        layout = layout_of(found, str(where))
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in Wan(config).named_parameters()}
    tensors: dict[str, Lazy] = {}
    for name, tensor in found.items():
        ours = _ours(name, layout, where)
        if expected.get(ours) != tensor.shape:
            implied = list(expected[ours]) if ours in expected else "no such tensor"
            raise UserError(
                f"{tensor.origin}: tensor '{name}' has shape {list(tensor.shape)}, the config implies {implied}; "
                "these files do not match"
            )
        tensors[ours] = tensor
    missing = [name for name in expected if name not in tensors]
    if missing:
        first = _theirs(missing[0], layout)
        raise UserError(f"{where}: {len(missing)} tensors missing, first '{first}'; copy all shards")
    return WanFiles(where, config, layout, {name: tensors[name] for name in expected})


def read_wan_config(path: Path) -> WanConfig:
    """The geometry of a transformer in either layout. UserError for other architectures and for image-to-video."""
    if path.is_file():
        return open_wan(path).config
    return read_config(transformer_dir(path) / "config.json")[0]


def load_wan(path: Path, dtype: torch.dtype = torch.float32, *, section: str = "", heads: int = 0) -> Wan:
    """The transformer of :func:`open_wan`, read into a model."""
    files = open_wan(path, section=section, heads=heads)
    with torch.device("meta"):
        model = Wan(files.config)
    model.load_state_dict({name: tensor.read().to(dtype) for name, tensor in files.tensors.items()}, assign=True)
    return model


def _ours(name: str, layout: Layout, where: Path) -> str:
    """Our name of an unwrapped tensor, which may not be one of ours: then the caller finds it unexpected."""
    if layout == "diffusers":
        return to_ours(name)
    renamed = original_to_diffusers(name)
    if renamed is None:
        raise UserError(f"{where}: tensor '{name}' is not one of Wan 2.1 text-to-video; use its own files")
    return to_ours(renamed)


def _theirs(name: str, layout: Layout) -> str:
    diffusers = to_diffusers(name)
    return diffusers if layout == "diffusers" else diffusers_to_original(diffusers) or diffusers


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one file, safetensors or a pickle of tensors (which is mapped from the disk, not read at once).

    UserError naming the file if it is missing, truncated or holds more than tensors.
    """
    return {name: tensor.read() for name, tensor in _open_file(file).items()}


def _read_file(file: Path, section: str) -> dict[str, Lazy]:
    """By names without the wrappers of training scripts."""
    return {unwrapped(name): tensor for name, tensor in _open_file(file, section).items()}


def _open_file(file: Path, section: str = "") -> dict[str, Lazy]:
    return _read_pickle(file, section) if file.suffix in PICKLES else _read_safetensors(file)


def _read_safetensors(file: Path) -> dict[str, Lazy]:
    if not file.is_file():
        raise UserError(f"{file}: missing; {AGAIN}")
    try:
        handle = safe_open(str(file), framework="pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(f"{file}: unreadable safetensors ({error}); truncated or damaged: copy it again") from error
    tensors = {}
    for name, view in slices.items():
        if view.get_dtype() not in DTYPES:
            raise UserError(f"{file}: tensor '{name}' is {view.get_dtype()}; only {', '.join(DTYPES)} are read")
        meta = torch.empty(view.get_shape(), dtype=DTYPES[view.get_dtype()], device="meta")
        tensors[name] = Lazy(meta, partial(handle.get_tensor, name), str(file))
    return tensors


def _read_pickle(file: Path, section: str) -> dict[str, Lazy]:
    """Tensors only (``weights_only``), mapped from the disk; the wanted section of a training checkpoint."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError as error:
        raise UserError(f"{file}: holds more than tensors, which is refused; convert it to safetensors") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{file}: unreadable ({str(error).splitlines()[0]}); {AGAIN}") from error
    path = str(file)
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        known = [str(name) for name, value in content.items() if isinstance(value, dict)]
        chosen = section if section in known else next((name for name in SECTIONS if name in known), "")
        if not chosen or (section and section not in known and path == str(file)):
            names = ", ".join(known) or "none"
            raise UserError(f"{path}: no weights '{section or SECTIONS[0]}' in it (it has {names}); set section")
        content, path = content[chosen], f"{path}[{chosen}]"
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a table of tensors; use another file")
    odd = [name for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd:
        raise UserError(f"{path}: entry {odd[0]!r} is not a tensor; use a file of the model's weights alone")
    return {name: _in_memory(tensor, tensor.dtype, path) for name, tensor in content.items()}


def _in_memory(tensor: Tensor, dtype: torch.dtype, origin: str = "") -> Lazy:
    meta = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return Lazy(meta, lambda: tensor.detach().to("cpu", dtype), origin)


def _files(folder: Path) -> list[Path]:
    """The weight files of a directory: one, or the shards its index names; the original's pickle if that is all."""
    index = folder / INDEX
    if index.is_file():
        table = read_json(index, AGAIN).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise UserError(f"{index}: 'weight_map' is not a table of file names; {AGAIN}")
        names = sorted(set(table.values()))
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{index}: shard name {name!r} leaves the directory; it is not read: {AGAIN}")
        return [folder / name for name in names]
    for name in (WEIGHTS, *(f"diffusion_pytorch_model{suffix}" for suffix in PICKLES)):
        if (folder / name).is_file():
            return [folder / name]
    return [folder / WEIGHTS]


def save_wan(
    state: Mapping[str, Tensor],
    cfg: WanConfig,
    folder: Path,
    dtype: torch.dtype,
    *,
    layout: Layout = "diffusers",
    max_shard: int | str = MAX_SHARD,
) -> None:
    """Write a model's state (our names) in ``dtype``; see :func:`write_wan`."""
    write_wan({name: _in_memory(tensor, dtype) for name, tensor in state.items()}, cfg, folder, layout, max_shard)


def write_wan(
    tensors: Mapping[str, Lazy], cfg: WanConfig, folder: Path, layout: Layout, max_shard: int | str = MAX_SHARD
) -> None:
    """Write config.json and safetensors, in shards with an index where they are large; one shard in memory at a time.

    ``WanTransformer3DModel.from_pretrained`` and the original code's ``WanModel.from_pretrained`` read their layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {_theirs(name, layout): tensor for name, tensor in tensors.items()}
    metas = {name: tensor.meta for name, tensor in named.items()}
    plan = split_torch_state_dict_into_shards(metas, filename_pattern=SHARDS, max_shard_size=max_shard)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: named[name].read().contiguous() for name in names}, str(folder / file), {"format": "pt"})
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    write_json(folder / "config.json", config_json(cfg, layout))
