"""The geometry of a Wan 2.1 transformer in config.json of both layouts, or seen in tensor
shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from scd_sf.files import read_json, typed
from scd_sf.models.wan.names import Layout
from scd_sf.models.wan.transformer import WanConfig
from scd_sf.tensor_files import AGAIN
from scd_sf.types import UserError

HeadsFrom = Literal["stated", "like", "assumed", "unknown"]
# width -> heads of the released models; tensors do not say it
RELEASED_HEADS = {1536: 12, 3072: 24, 5120: 40}
SMALLEST_HEAD = 6  # the rotary positions have three axes
# limits of a config.json, as Size: a hundred times those of any released model
MOST_LAYERS = 1000
Size = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
# Fields that a config.json may leave out -> Wan 2.1's values, the usual one first.
SUPPORTED: dict[Layout, dict[str, tuple[object, ...]]] = {
    "diffusers": {
        "image_dim": (None, 0),
        "added_kv_proj_dim": (None, 0),
        "qk_norm": ("rms_norm_across_heads",),
    },
    "original": {"model_type": ("t2v",), "qk_norm": (True,)},
}


@dataclass(frozen=True, kw_only=True)
class _Common:
    """Fields with the same name in both layouts. Those that a published config.json leaves out have
    Wan 2.1's values."""

    num_layers: Annotated[int, msgspec.Meta(ge=1, le=MOST_LAYERS)]
    ffn_dim: Size
    text_dim: Size = 4096
    freq_dim: Size = 256
    patch_size: tuple[Literal[1], Size, Size] = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-6


@dataclass(frozen=True, kw_only=True)
class _Diffusers(_Common):
    num_attention_heads: Size
    attention_head_dim: Size
    in_channels: Size = 16
    out_channels: Size | None = None


@dataclass(frozen=True, kw_only=True)
class _Original(_Common):
    dim: Size
    num_heads: Size
    in_dim: Size = 16
    out_dim: Size | None = None


def read_config(file: Path) -> tuple[WanConfig, Layout]:
    """The geometry in a config.json and whose layout it is. UserError for other architectures and
    image-to-video."""
    raw = read_json(file, AGAIN)
    name = raw.get("_class_name")
    if name not in ("WanTransformer3DModel", "WanModel", "CausalModel"):
        raise UserError(
            f"{file}: _class_name is {repr(name)[:80]}; this needs a WanTransformer3DModel or the original's WanModel"
        )
    layout: Layout = "diffusers" if name == "WanTransformer3DModel" else "original"
    for field, values in SUPPORTED[layout].items():
        if raw.get(field, values[0]) not in values:
            value = repr(raw[field])[:80]
            raise UserError(
                f"{file}: {field} is {value}; only {values[0]!r} (Wan 2.1 text-to-video) is supported"
            )
    common: _Common
    if layout == "diffusers":
        common = diffusers = typed(raw, _Diffusers, file, AGAIN)
        heads, head_dim = diffusers.num_attention_heads, diffusers.attention_head_dim
        channels, out_channels = diffusers.in_channels, diffusers.out_channels
    else:
        common = original = typed(raw, _Original, file, AGAIN)
        heads, head_dim = original.num_heads, original.dim // original.num_heads
        channels, out_channels = original.in_dim, original.out_dim
        if original.dim % heads:
            raise UserError(
                f"{file}: dim {original.dim} is not divisible by num_heads {heads}; {AGAIN}"
            )
    if head_dim % 2 or head_dim < SMALLEST_HEAD:
        raise UserError(
            f"{file}: heads of {head_dim} numbers; it must be even and at least {SMALLEST_HEAD}: {AGAIN}"
        )
    _, patch_height, patch_width = common.patch_size
    config = WanConfig(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=out_channels or channels,
        text_dim=common.text_dim,
        freq_dim=common.freq_dim,
        ffn_dim=common.ffn_dim,
        num_layers=common.num_layers,
        patch_height=patch_height,
        patch_width=patch_width,
        cross_attn_norm=common.cross_attn_norm,
        eps=common.eps,
    )
    return config, layout


def config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], heads: int, file: Path, like: WanConfig | None = None
) -> tuple[WanConfig, HeadsFrom]:
    """The geometry that tensors of these shapes (by diffusers' names) have, and how the number of
    heads is known.

    ``heads`` 0: that of ``like`` if it is as wide, or of the released model of this width; else
    "unknown", and the geometry says 1. UserError when a tensor it needs is missing or has the wrong
    number of axes, or the heads do not divide the width.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        size = shapes.get(name, ())
        if len(size) != axes or not all(size):
            raise UserError(
                f"{file}: tensor for '{name}' is missing or has shape {list(size)}; {AGAIN}"
            )
        return size

    width, channels, _, patch_height, patch_width = shape("patch_embedding.weight", 5)
    count, heads_from = _heads(width, heads, like)
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
    return config, heads_from


def _is_index(text: str) -> bool:
    """Whether ``text`` is a block's number. Tensors with anything else are refused later."""
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
    common: dict[str, object] = {
        "num_layers": cfg.num_layers,
        "ffn_dim": cfg.ffn_dim,
        "text_dim": cfg.text_dim,
        "freq_dim": cfg.freq_dim,
        "patch_size": [1, cfg.patch_height, cfg.patch_width],
        "cross_attn_norm": cfg.cross_attn_norm,
        "eps": cfg.eps,
    }
    if layout == "original":
        return common | {
            "_class_name": "WanModel",
            "_diffusers_version": "0.30.0",
            "model_type": "t2v",
            "dim": cfg.width,
            "num_heads": cfg.num_attention_heads,
            "in_dim": cfg.in_channels,
            "out_dim": cfg.out_channels,
            "text_len": 512,
            "qk_norm": True,
        }
    return common | {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.42.1",
        "num_attention_heads": cfg.num_attention_heads,
        "attention_head_dim": cfg.attention_head_dim,
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "qk_norm": "rms_norm_across_heads",
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
        "rope_max_seq_len": 1024,
    }
