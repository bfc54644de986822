"""The geometry of a Wan 2.1 transformer in config.json of both layouts, or seen in tensor shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from scd_sf.files import Json, read_json
from scd_sf.models.names import Layout
from scd_sf.models.trunk import WanConfig
from scd_sf.types import UserError

WAN_HEAD_DIM = 128  # of every released Wan 2.1; tensors do not say how many heads they have
AGAIN = "download or copy the file again"


def read_config(file: Path) -> tuple[WanConfig, Layout]:
    """The geometry in a config.json and whose layout it is. UserError for other architectures and image-to-video."""
    raw = read_json(file, AGAIN)
    name = raw.get("_class_name")
    if name == "WanTransformer3DModel":
        return _diffusers_config(raw, file), "diffusers"
    if name in ("WanModel", "CausalModel"):
        return _original_config(raw, file), "original"
    raise UserError(f"{file}: _class_name is {name!r}; this needs a WanTransformer3DModel or the original's WanModel")


def _diffusers_config(raw: Json, file: Path) -> WanConfig:
    if raw.get("image_dim") or raw.get("added_kv_proj_dim"):
        raise UserError(f"{file}: this is an image-to-video Wan (image_dim is set); use the text-to-video one")
    if raw.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
        raise UserError(f"{file}: qk_norm is {raw['qk_norm']!r}; only 'rms_norm_across_heads' (Wan 2.1) is supported")
    heads, head_dim = _number(raw, file, "num_attention_heads"), _number(raw, file, "attention_head_dim")
    return _geometry(raw, file, heads, head_dim, "in_channels", "out_channels")


def _original_config(raw: Json, file: Path) -> WanConfig:
    kind = raw.get("model_type", "t2v")
    if kind != "t2v":
        raise UserError(f"{file}: model_type is {kind!r}; only text-to-video ('t2v') is supported")
    if raw.get("qk_norm", True) is not True:
        raise UserError(f"{file}: qk_norm is {raw['qk_norm']!r}; only true (Wan 2.1) is supported")
    width, heads = _number(raw, file, "dim"), _number(raw, file, "num_heads")
    if heads < 1 or width % heads:
        raise UserError(f"{file}: dim {width} is not divisible by num_heads {heads}; {AGAIN}")
    return _geometry(raw, file, heads, width // heads, "in_dim", "out_dim")


def _geometry(raw: Json, file: Path, heads: int, head_dim: int, inputs: str, outputs: str) -> WanConfig:
    """What both layouts call alike but for the channels' names. Fields that a published config.json leaves out have
    Wan 2.1's defaults."""
    patch_height, patch_width = _patch(raw, file)
    channels = _number(raw, file, inputs, 16)
    eps, norm = raw.get("eps", 1e-6), raw.get("cross_attn_norm", True)
    if not isinstance(eps, float) or not isinstance(norm, bool):
        raise UserError(f"{file}: eps must be a float and cross_attn_norm true or false; {AGAIN}")
    return WanConfig(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=_number(raw, file, outputs, channels),
        text_dim=_number(raw, file, "text_dim", 4096),
        freq_dim=_number(raw, file, "freq_dim", 256),
        ffn_dim=_number(raw, file, "ffn_dim"),
        num_layers=_number(raw, file, "num_layers"),
        patch_height=patch_height,
        patch_width=patch_width,
        cross_attn_norm=norm,
        eps=eps,
    )


def _patch(raw: Json, file: Path) -> tuple[int, int]:
    patch = raw.get("patch_size", [1, 2, 2])
    if not isinstance(patch, list) or len(patch) != 3 or patch[0] != 1:
        raise UserError(f"{file}: patch_size is {patch!r}; it must be [1, height, width]")
    return int(patch[1]), int(patch[2])


def _number(raw: Json, file: Path, name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{file}: {name} is {value!r}, not a whole number; {AGAIN}")
    return value


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], heads: int, file: Path) -> WanConfig:
    """The geometry that tensors of these shapes (by diffusers' names) have. ``heads`` 0: width / 128.

    UserError when a tensor it needs is missing or has the wrong number of axes.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        found = shapes.get(name, ())
        if len(found) != axes:
            raise UserError(f"{file}: tensor for '{name}' is missing or has shape {list(found)}; {AGAIN}")
        return found

    width, channels, _, patch_height, patch_width = shape("patch_embedding.weight", 5)
    heads = heads or width // WAN_HEAD_DIM
    if heads < 1 or width % heads:
        raise UserError(
            f"{file}: width {width} is not divisible into heads of {WAN_HEAD_DIM}; say how many heads it has"
        )
    layers = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    return WanConfig(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=shape("proj_out.weight", 2)[0] // (patch_height * patch_width),
        text_dim=shape("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        freq_dim=shape("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        ffn_dim=shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
        num_layers=max(layers, default=0) + 1,
        patch_height=patch_height,
        patch_width=patch_width,
        cross_attn_norm="blocks.0.norm2.weight" in shapes,
    )


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
