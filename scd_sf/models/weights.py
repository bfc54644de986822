"""Wan 2.1 transformer weights on disk: diffusers' layout, read and written (one file or shards with an index).

Ours and diffusers' parameter names map 1:1: ``trunk.<name>``, and the output head sits under ``trunk.head.``.
Only safetensors are read.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scd_sf.data.manifest import Json, read_json
from scd_sf.models.trunk import WanConfig
from scd_sf.models.wan import Wan
from scd_sf.types import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
AGAIN = "download or copy the file again"
_HEAD = ("proj_out.weight", "proj_out.bias", "scale_shift_table")


def to_ours(name: str) -> str:
    """diffusers' parameter name -> ours."""
    return f"trunk.head.{name}" if name in _HEAD else f"trunk.{name}"


def to_diffusers(name: str) -> str:
    """Our parameter name -> diffusers'."""
    return name.removeprefix("trunk.").removeprefix("head.")


def transformer_dir(path: Path) -> Path:
    """``path`` itself or its ``transformer/`` sub-folder, whichever holds the transformer's config.json."""
    for folder in (path / "transformer", path):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path}: no transformer/config.json there; give a Wan 2.1 directory in diffusers layout")


def read_wan_config(path: Path) -> WanConfig:
    """The geometry of a diffusers Wan transformer. UserError for other architectures and for image-to-video."""
    file = transformer_dir(path) / "config.json"
    raw = read_json(file, AGAIN)
    name = raw.get("_class_name")
    if name != "WanTransformer3DModel":
        raise UserError(f"{file}: _class_name is {name!r}; stage 1 needs a WanTransformer3DModel")
    if raw.get("image_dim") or raw.get("added_kv_proj_dim"):
        raise UserError(f"{file}: this is an image-to-video Wan (image_dim is set); use the text-to-video one")
    if raw.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
        raise UserError(f"{file}: qk_norm is {raw['qk_norm']!r}; only 'rms_norm_across_heads' (Wan 2.1) is supported")
    patch = raw.get("patch_size", [1, 2, 2])
    if not isinstance(patch, list) or len(patch) != 3 or patch[0] != 1:
        raise UserError(f"{file}: patch_size is {patch!r}; it must be [1, height, width]")
    channels = _number(raw, file, "in_channels", 16)
    eps, norm = raw.get("eps", 1e-6), raw.get("cross_attn_norm", True)
    if not isinstance(eps, float) or not isinstance(norm, bool):
        raise UserError(f"{file}: eps must be a float and cross_attn_norm true or false; {AGAIN}")
    return WanConfig(
        num_attention_heads=_number(raw, file, "num_attention_heads"),
        attention_head_dim=_number(raw, file, "attention_head_dim"),
        in_channels=channels,
        out_channels=_number(raw, file, "out_channels", channels),
        text_dim=_number(raw, file, "text_dim", 4096),
        freq_dim=_number(raw, file, "freq_dim", 256),
        ffn_dim=_number(raw, file, "ffn_dim"),
        num_layers=_number(raw, file, "num_layers"),
        patch_height=int(patch[1]),
        patch_width=int(patch[2]),
        cross_attn_norm=norm,
        eps=eps,
    )


def _number(raw: Json, file: Path, name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{file}: {name} is {value!r}, not a whole number; {AGAIN}")
    return value


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file; UserError naming the file if it is missing or truncated."""
    if not file.is_file():
        raise UserError(f"{file}: missing; download or copy it again")
    try:
        with safe_open(str(file), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(f"{file}: unreadable safetensors ({error}); truncated or damaged: copy it again") from error


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        return [folder / WEIGHTS]
    table = read_json(index, AGAIN).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise UserError(f"{index}: 'weight_map' is not a table of file names; {AGAIN}")
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: shard name {name!r} leaves the directory; it is not read: {AGAIN}")
    return [folder / name for name in names]


def load_wan(path: Path, dtype: torch.dtype = torch.float32) -> Wan:
    """A Wan 2.1 transformer from a diffusers directory, every tensor checked by name and shape."""
    folder = transformer_dir(path)
    cfg = read_wan_config(path)
    with torch.device("meta"):
        model = Wan(cfg)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for file in _files(folder):
        for name, tensor in read_tensors(file).items():
            ours = to_ours(name)
            if expected.get(ours) != tuple(tensor.shape):
                raise UserError(
                    f"{file}: tensor '{name}' has shape {list(tensor.shape)}, config.json implies "
                    f"{list(expected[ours]) if ours in expected else 'no such tensor'}; these files do not match"
                )
            state[ours] = tensor.to(dtype)
    missing = sorted(set(expected) - set(state))
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} tensors missing, first '{to_diffusers(missing[0])}'; copy all shards"
        )
    model.load_state_dict(state, assign=True)
    return model


def wan_config_json(cfg: WanConfig) -> dict[str, object]:
    """config.json of a diffusers WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.42.1",
        "added_kv_proj_dim": None,
        "attention_head_dim": cfg.attention_head_dim,
        "cross_attn_norm": cfg.cross_attn_norm,
        "eps": cfg.eps,
        "ffn_dim": cfg.ffn_dim,
        "freq_dim": cfg.freq_dim,
        "image_dim": None,
        "in_channels": cfg.in_channels,
        "num_attention_heads": cfg.num_attention_heads,
        "num_layers": cfg.num_layers,
        "out_channels": cfg.out_channels,
        "patch_size": [1, cfg.patch_height, cfg.patch_width],
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": cfg.text_dim,
    }


def save_wan(state: dict[str, Tensor], cfg: WanConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write ``folder``/config.json and one safetensors file that ``WanTransformer3DModel.from_pretrained`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {to_diffusers(name): tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(wan_config_json(cfg), indent=2) + "\n")
