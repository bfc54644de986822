"""The geometry of a Wan 2.1 transformer in config.json of both layouts, or seen in tensor shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from scd_sf.files import Json, read_json
from scd_sf.models.trunk import WanConfig
from scd_sf.models.wan.names import Layout
from scd_sf.tensor_files import AGAIN
from scd_sf.types import UserError

HeadsFrom = Literal["stated", "like", "assumed", "unknown"]
RELEASED_HEADS = {1536: 12, 3072: 24, 5120: 40}  # width -> heads of the released models; tensors do not say it
SMALLEST_HEAD = 6  # the rotary positions have three axes
MOST_LAYERS, LARGEST = 1000, 2**20  # what a config.json may say: a hundred times what any released model has


def read_config(file: Path) -> tuple[WanConfig, Layout]:
    """The geometry in a config.json and whose layout it is. UserError for other architectures and image-to-video."""
    raw = read_json(file, AGAIN)
    name = raw.get("_class_name")
    if name == "WanTransformer3DModel":
        return _diffusers_config(raw, file), "diffusers"
    if name in ("WanModel", "CausalModel"):
        return _original_config(raw, file), "original"
    raise UserError(
        f"{file}: _class_name is {repr(name)[:80]}; this needs a WanTransformer3DModel or the original's WanModel"
    )


def _diffusers_config(raw: Json, file: Path) -> WanConfig:
    if raw.get("image_dim") or raw.get("added_kv_proj_dim"):
        raise UserError(f"{file}: this is an image-to-video Wan (image_dim is set); use the text-to-video one")
    if raw.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
        raise UserError(
            f"{file}: qk_norm is {repr(raw['qk_norm'])[:80]}; only 'rms_norm_across_heads' (Wan 2.1) is supported"
        )
    heads, head_dim = _number(raw, file, "num_attention_heads"), _number(raw, file, "attention_head_dim")
    return _geometry(raw, file, heads, head_dim, "in_channels", "out_channels")


def _original_config(raw: Json, file: Path) -> WanConfig:
    kind = raw.get("model_type", "t2v")
    if kind != "t2v":
        raise UserError(f"{file}: model_type is {repr(kind)[:80]}; only text-to-video ('t2v') is supported")
    if raw.get("qk_norm", True) is not True:
        raise UserError(f"{file}: qk_norm is {repr(raw['qk_norm'])[:80]}; only true (Wan 2.1) is supported")
    width, heads = _number(raw, file, "dim"), _number(raw, file, "num_heads")
    if width % heads:
        raise UserError(f"{file}: dim {width} is not divisible by num_heads {heads}; {AGAIN}")
    return _geometry(raw, file, heads, width // heads, "in_dim", "out_dim")


def _geometry(raw: Json, file: Path, heads: int, head_dim: int, inputs: str, outputs: str) -> WanConfig:
    """What both layouts call alike but for the channels' names. Fields that a published config.json leaves out have
    Wan 2.1's defaults."""
    patch_height, patch_width = _patch(raw, file)
    channels = _number(raw, file, inputs, 16)
    eps, norm = raw.get("eps", 1e-6), raw.get("cross_attn_norm", True)
    if not isinstance(eps, float) or not 0 < eps < 1 or not isinstance(norm, bool):
        raise UserError(f"{file}: eps must be between 0 and 1 and cross_attn_norm true or false; {AGAIN}")
    layers = _number(raw, file, "num_layers")
    if layers > MOST_LAYERS:
        raise UserError(f"{file}: num_layers is {layers}; at most {MOST_LAYERS} are read: {AGAIN}")
    if head_dim % 2 or head_dim < SMALLEST_HEAD:
        raise UserError(f"{file}: heads of {head_dim} numbers; it must be even and at least {SMALLEST_HEAD}: {AGAIN}")
    return WanConfig(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=_number(raw, file, outputs, channels),
        text_dim=_number(raw, file, "text_dim", 4096),
        freq_dim=_number(raw, file, "freq_dim", 256),
        ffn_dim=_number(raw, file, "ffn_dim"),
        num_layers=layers,
        patch_height=patch_height,
        patch_width=patch_width,
        cross_attn_norm=norm,
        eps=eps,
    )


def _patch(raw: Json, file: Path) -> tuple[int, int]:
    patch = raw.get("patch_size", [1, 2, 2])
    numbers = patch if isinstance(patch, list) else []
    whole = all(type(number) is int and 0 < number <= LARGEST for number in numbers)
    if not whole or len(numbers) != 3 or numbers[0] != 1:
        raise UserError(f"{file}: patch_size is {str(patch)[:80]}; it must be [1, height, width]")
    return numbers[1], numbers[2]


def _number(raw: Json, file: Path, name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if type(value) is not int:
        raise UserError(f"{file}: {name} is {repr(value)[:80]}, not a whole number; {AGAIN}")
    if not 1 <= value <= LARGEST:
        raise UserError(f"{file}: {name} is {value}; it must be from 1 to {LARGEST}: {AGAIN}")
    return value


def config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], heads: int, file: Path, like: WanConfig | None = None
) -> tuple[WanConfig, HeadsFrom]:
    """The geometry that tensors of these shapes (by diffusers' names) have, and how the number of heads is known.

    ``heads`` 0: that of ``like`` if it is as wide, or of the released model of this width; else "unknown", and the
    geometry says 1. UserError when a tensor it needs is missing or has the wrong number of axes, or the heads do not
    divide the width.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        size = shapes.get(name, ())
        if len(size) != axes or not all(size):
            raise UserError(f"{file}: tensor for '{name}' is missing or has shape {list(size)}; {AGAIN}")
        return size

    width, channels, _, patch_height, patch_width = shape("patch_embedding.weight", 5)
    count, known = _heads(width, heads, like)
    if count < 1 or width % count:
        raise UserError(f"{file}: width {width} is not divisible into {count} heads; correct heads")
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    config = WanConfig(
        num_attention_heads=count,
        attention_head_dim=width // count,
        in_channels=channels,
        out_channels=shape("proj_out.weight", 2)[0] // (patch_height * patch_width),
        text_dim=shape("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        freq_dim=shape("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        ffn_dim=shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
        num_layers=max((int(layer) + 1 for layer in layers if _is_index(layer)), default=1),
        patch_height=patch_height,
        patch_width=patch_width,
        cross_attn_norm="blocks.0.norm2.weight" in shapes,
    )
    return config, known


def _is_index(text: str) -> bool:
    """Whether a block's number is one; others are tensors that no model has, and refused as such."""
    return text.isascii() and text.isdecimal() and len(text) <= len(str(MOST_LAYERS))


def _heads(width: int, heads: int, like: WanConfig | None) -> tuple[int, HeadsFrom]:
    if heads:
        return heads, "stated"
    if like is not None and like.width == width:
        return like.num_attention_heads, "like"
    if width in RELEASED_HEADS:
        return RELEASED_HEADS[width], "assumed"
    return 1, "unknown"


def config_json(cfg: WanConfig, layout: Layout) -> dict[str, object]:
    """config.json of diffusers' WanTransformer3DModel, or of the original's WanModel."""
    if layout == "original":
        return {
            "_class_name": "WanModel",
            "_diffusers_version": "0.30.0",
            "model_type": "t2v",
            "dim": cfg.width,
            "ffn_dim": cfg.ffn_dim,
            "freq_dim": cfg.freq_dim,
            "in_dim": cfg.in_channels,
            "out_dim": cfg.out_channels,
            "num_heads": cfg.num_attention_heads,
            "num_layers": cfg.num_layers,
            "text_dim": cfg.text_dim,
            "text_len": 512,
            "patch_size": [1, cfg.patch_height, cfg.patch_width],
            "cross_attn_norm": cfg.cross_attn_norm,
            "qk_norm": True,
            "eps": cfg.eps,
        }
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
