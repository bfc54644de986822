"""Wan 2.1 transformer weights on disk, read and written in both public layouts, and read from
distilled generators.

Layouts: diffusers' (config.json with ``WanTransformer3DModel``), the original (config.json with
``WanModel``), each in one file or in shards with an index; or one file alone, safetensors or a
pickle of tensors (``.pt``, ``.pth``), such as the released Self-Forcing, Causal-Forcing and CausVid
generators. Names: names.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from scd_sf.files import write_json, write_tensors
from scd_sf.models.sections import choose_section
from scd_sf.models.skeleton import check_fit, skeleton
from scd_sf.models.wan.hub import hub_name, wan_folder
from scd_sf.models.wan.names import (
    ROOTS,
    Layout,
    diffusers_to_original,
    layout_of,
    original_to_diffusers,
    to_diffusers,
    to_ours,
)
from scd_sf.models.wan.transformer import Wan, WanConfig
from scd_sf.models.wan.wan_json import HeadsFrom, config_from_shapes, config_json, read_config
from scd_sf.tensor_files import FLOATS, Lazy, in_memory, kind_of, open_tensor_folder, open_tensors
from scd_sf.types import UserError

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
INDEX = f"{STEM}.safetensors.index.json"
SHARDS = STEM + "{suffix}.safetensors"
MAX_SHARD = "10GB"


@dataclass(frozen=True)
class WanFiles:
    """A transformer on disk: its geometry, whose layout it has, and its tensors by our names, none
    read yet.

    ``heads`` is the source of the number of attention heads. With "unknown" the config's number is
    meaningless.
    """

    path: Path
    config: WanConfig
    layout: Layout
    tensors: Mapping[str, Lazy]
    heads: HeadsFrom = "stated"


def is_wan_directory(path: Path) -> bool:
    """Whether a transformer's config.json is there or in ``transformer/``, or it is the name of a
    repository on the hub; our own checkpoints have none."""
    return hub_name(path) is not None or any(
        (folder / "config.json").is_file() for folder in (path / "transformer", path)
    )


def transformer_dir(path: Path) -> Path:
    """``path`` itself or its ``transformer/`` sub-folder, whichever holds the transformer's
    config.json. The name of a repository on the hub: see hub.py."""
    path = wan_folder(path, ("transformer",))
    for folder in (path / "transformer", path):
        if (folder / "config.json").is_file():
            return folder
    problem = "no transformer/config.json there" if path.exists() else "no such file or folder"
    raise UserError(
        f"{path}: {problem}; give a Wan 2.1 directory, a file of its weights, "
        "or a name on the hub (Wan-AI/Wan2.1-T2V-1.3B-Diffusers)"
    )


def open_wan(
    path: Path,
    *,
    section: str | None = None,
    heads: int = 0,
    like: WanConfig | None = None,
    any_heads: bool = False,
) -> WanFiles:
    """A Wan 2.1 text-to-video transformer, every tensor's name and shape checked, none of them read
    yet.

    ``path``: a directory in either layout, or one file. ``section`` picks a part of a training
    checkpoint (empty: its EMA generator, else its generator; see sections.py); None where the
    caller's user can name neither it nor ``heads``, so that errors propose ``scd convert``. A file
    alone does not say how many attention ``heads`` it has (the rest of the geometry follows from
    the shapes): 0 takes those of ``like`` if that is as wide, or those of the released models of this width.
    UserError where nothing says it, unless ``any_heads``.
    """
    where = path if path.is_file() else transformer_dir(path)
    all_tensors = open_tensors(path) if path.is_file() else open_tensor_folder(where, STEM)
    remedy = (
        "take one out with scd convert --section NAME"
        if section is None
        else "say which with section"
    )
    tensors = choose_section(all_tensors, ROOTS, section or "", str(where), remedy)
    for name, tensor in tensors.items():
        if not tensor.meta.is_floating_point():
            raise UserError(
                f"{tensor.origin}: tensor '{name}' is {kind_of(tensor)}; only {', '.join(FLOATS)} are read"
            )
    layout = layout_of(tensors, str(where))
    heads_from: HeadsFrom = "stated"
    if path.is_file():
        shapes = {
            to_diffusers(_to_our_name(name, layout, path)): tensor.shape
            for name, tensor in tensors.items()
        }
        config, heads_from = config_from_shapes(shapes, heads, path, like)
        if heads_from == "unknown" and not any_heads:
            remedy = (
                "make a directory that says it with scd convert --heads N"
                if section is None
                else "say it with heads (a released Wan's widths are known)"
            )
            raise UserError(
                f"{path}: a file of width {config.width} does not say how many attention heads it has; "
                f"{remedy}, or give the directory with its config.json"
            )
    else:
        config, _ = read_config(where / "config.json")
    return WanFiles(
        where, config, layout, _by_our_names(tensors, config, layout, where), heads_from
    )


def _by_our_names(
    tensors: Mapping[str, Lazy], config: WanConfig, layout: Layout, where: Path
) -> dict[str, Lazy]:
    """``tensors`` by our names, in the model's order. UserError where they are not those of
    ``config``."""
    description = where if where.is_file() else where / "config.json"
    remedy = "these files do not match"
    model = skeleton(lambda: Wan(config), tensors, description, remedy)
    our_tensors = {_to_our_name(name, layout, where): tensor for name, tensor in tensors.items()}
    check_fit(
        model, our_tensors, where, "the config", remedy, lambda name: _to_layout(name, layout)
    )
    return {name: our_tensors[name] for name in model.state_dict()}


def read_wan_config(path: Path) -> WanConfig:
    """The geometry of a transformer in either layout. UserError for other architectures and for
    image-to-video."""
    if path.is_file():
        return open_wan(path).config
    return read_config(transformer_dir(path) / "config.json")[0]


def load_wan(
    path: Path,
    dtype: torch.dtype = torch.float32,
    *,
    section: str | None = None,
    heads: int = 0,
    like: WanConfig | None = None,
) -> Wan:
    """The transformer of :func:`open_wan`, read into a model."""
    files = open_wan(path, section=section, heads=heads, like=like)
    with torch.device("meta"):
        model = Wan(files.config)
    model.load_state_dict(
        {name: tensor.read().to(dtype) for name, tensor in files.tensors.items()}, assign=True
    )
    return model


def _to_our_name(name: str, layout: Layout, where: Path) -> str:
    """Our name of an unwrapped tensor. A name that no model has is found by the caller, except in
    the original layout, where it is a UserError."""
    if layout == "diffusers":
        return to_ours(name)
    diffusers_name = original_to_diffusers(name)
    if diffusers_name is None:
        raise UserError(
            f"{where}: tensor '{name}' is not one of Wan 2.1 text-to-video; use its own files"
        )
    return to_ours(diffusers_name)


def _to_layout(name: str, layout: Layout) -> str:
    diffusers_name = to_diffusers(name)
    return (
        diffusers_name
        if layout == "diffusers"
        else diffusers_to_original(diffusers_name) or diffusers_name
    )


def shard_size(text: int | str) -> int:
    """Bytes of "10GB", "500 MB" or a number. UserError for anything else and for less than one
    byte."""
    match = re.fullmatch(
        r"(\d{1,15})(?:\.(\d{1,6}))?\s*(KB|MB|GB|TB|B)?",
        str(text).strip(),
        re.IGNORECASE | re.ASCII,
    )
    unit = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    size = (
        0
        if match is None
        else int(float(f"{match[1]}.{match[2] or 0}") * unit.get((match[3] or "B").upper(), 1))
    )
    if size < 1:
        raise UserError(
            f"max_shard is {str(text)[:80]!r}; write it as 10GB, 500MB or a number of bytes, at least 1"
        )
    return size


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
    write_wan(
        {name: in_memory(tensor, dtype=dtype) for name, tensor in state.items()},
        cfg,
        folder,
        layout,
        max_shard,
    )


def write_wan(
    tensors: Mapping[str, Lazy],
    cfg: WanConfig,
    folder: Path,
    layout: Layout,
    max_shard: int | str = MAX_SHARD,
) -> None:
    """Write config.json and safetensors, in shards with an index where they are large; one shard in
    memory at a time.

    ``WanTransformer3DModel.from_pretrained`` and the original code's ``WanModel.from_pretrained``
    read their layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layout_tensors = {_to_layout(name, layout): tensor for name, tensor in tensors.items()}
    metas = {name: tensor.meta for name, tensor in layout_tensors.items()}
    plan = split_torch_state_dict_into_shards(
        metas, filename_pattern=SHARDS, max_shard_size=shard_size(max_shard)
    )
    for file, names in plan.filename_to_tensors.items():
        write_tensors(
            folder / file,
            {name: layout_tensors[name].read().contiguous() for name in names},
            {"format": "pt"},
        )
    if plan.is_sharded:
        write_json(
            folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        )
    write_json(folder / "config.json", config_json(cfg, layout))
