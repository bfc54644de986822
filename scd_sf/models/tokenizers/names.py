"""Names of tensors in public image tokenizers, turned into those of diffusers' classes.

- **DC-AE** as its authors publish it (mit-han-lab/efficientvit, ``encoder.stages.1.op_list.0.main.conv1.conv.weight``)
  to ``AutoencoderDC``. FAR's checkpoints need no map: FAR trains a class with diffusers' names and saves its state.
- **LDM's KL autoencoder** (CompVis/latent-diffusion, ``encoder.down.0.block.0.conv1.weight``; VA-VAE and E2E-VAE use
  it) to ``AutoencoderKL``, whose decoder counts levels from the latent up where LDM counts from the pixels down.

Values change in two ways only: 1x1 convolutions of attention become matrices, and DC-AE's one kernel for query, key and
value is cut in three.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from scd_sf.types import UserError

# Parts of a training that public LDM checkpoints carry beside the autoencoder: losses, VA-VAE's vision model.
TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")
_ONE_BY_ONE = 4  # dimensions of a 1x1 convolution's kernel

# efficientvit puts each convolution into a layer of its own with the members conv and norm; diffusers does not.
_DC_SIDES = {"encoder": "down_blocks", "decoder": "up_blocks"}
_DC_STAGE = re.compile(r"(encoder|decoder)\.stages\.(\d+)\.op_list\.(\d+)\.(.+)")
_DC_BLOCKS = (
    (r"main\.(conv1|conv2)\.conv\.(weight|bias)", r"\1.\2"),
    (r"main\.conv2\.norm\.(\w+)", r"norm.\1"),
    (r"main\.conv(?:\.conv)?\.(weight|bias)", r"conv.\1"),
    (r"context_module\.main\.qkv\.conv\.weight", r"attn.qkv"),
    (r"context_module\.main\.aggreg\.(\d+)\.0\.weight", r"attn.to_qkv_multiscale.\1.proj_in.weight"),
    (r"context_module\.main\.aggreg\.(\d+)\.1\.weight", r"attn.to_qkv_multiscale.\1.proj_out.weight"),
    (r"context_module\.main\.proj\.conv\.weight", r"attn.to_out.weight"),
    (r"context_module\.main\.proj\.norm\.(\w+)", r"attn.norm_out.\1"),
    (r"local_module\.main\.inverted_conv\.conv\.(\w+)", r"conv_out.conv_inverted.\1"),
    (r"local_module\.main\.depth_conv\.conv\.(\w+)", r"conv_out.conv_depth.\1"),
    (r"local_module\.main\.point_conv\.conv\.(\w+)", r"conv_out.conv_point.\1"),
    (r"local_module\.main\.point_conv\.norm\.(\w+)", r"conv_out.norm.\1"),
)
_DC_ENDS = (  # a first stage without blocks makes the outermost convolution one that also changes the size
    (r"encoder\.project_in\.(conv\.)?conv\.(weight|bias)", r"encoder.conv_in.\1\2"),
    (r"encoder\.project_out\.main\.op_list\.0\.conv\.(\w+)", r"encoder.conv_out.\1"),
    (r"decoder\.project_in\.main\.conv\.(\w+)", r"decoder.conv_in.\1"),
    (r"decoder\.project_out\.op_list\.0\.(\w+)", r"decoder.norm_out.\1"),
    (r"decoder\.project_out\.op_list\.2\.(conv\.)?conv\.(weight|bias)", r"decoder.conv_out.\1\2"),
)

_KL_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_KL_LEVEL = re.compile(r"(encoder|decoder)\.(?:down|up)\.(\d+)\.(.+)")
_KL_ENDS = (
    (r"(encoder|decoder)\.(conv_in|conv_out)\.(\w+)", r"\1.\2.\3"),
    (r"(encoder|decoder)\.norm_out\.(\w+)", r"\1.conv_norm_out.\2"),
    (r"(quant_conv|post_quant_conv)\.(\w+)", r"\1.\2"),
)


def is_efficientvit(names: Mapping[str, object]) -> bool:
    """Whether these are DC-AE's own names."""
    return any(name.startswith(("encoder.stages.", "encoder.project_in.")) for name in names)


def is_ldm(names: Mapping[str, object]) -> bool:
    """Whether these are those of LDM's KL autoencoder."""
    return any(name.startswith(("encoder.down.", "encoder.mid.block_1.")) for name in names)


def dc_from_efficientvit(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """DC-AE's own tensors under ``AutoencoderDC``'s names. UserError naming the first tensor that has no place."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        theirs = _dc_name(name)
        if theirs is None:
            raise UserError(f"{where}: tensor '{name}' is not one of DC-AE; use the autoencoder's own weights")
        if theirs.endswith(".qkv"):
            parts = zip(("to_q", "to_k", "to_v"), tensor.flatten(1).chunk(3), strict=True)
            found |= {f"{theirs.removesuffix('qkv')}{part}.weight": value.contiguous() for part, value in parts}
        else:
            found[theirs] = _matrix(tensor) if ".to_out." in theirs else tensor
    return found


def kl_from_ldm(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """LDM's tensors under ``AutoencoderKL``'s names, without :data:`TRAINING_ONLY`. UserError as above."""
    levels = 1 + max((int(m[2]) for m in map(_KL_LEVEL.fullmatch, tensors) if m is not None), default=0)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(TRAINING_ONLY):
            continue
        theirs = _kl_name(name, levels)
        if theirs is None:
            raise UserError(f"{where}: tensor '{name}' is not one of LDM's KL autoencoder; use its own weights")
        found[theirs] = _matrix(tensor) if ".attentions." in theirs else tensor
    return found


def kl_config(tensors: Mapping[str, Tensor], where: str) -> dict[str, object]:
    """The fields of ``AutoencoderKL`` that LDM's tensors (its names) imply; LDM has 32 norm groups, always.

    UserError naming the tensor that is missing.
    """

    def size(name: str, dimension: int = 0) -> int:
        if name not in tensors or tensors[name].ndim <= dimension:
            raise UserError(f"{where}: tensor '{name}' is missing or no kernel; copy the weights again")
        return tensors[name].shape[dimension]

    def present(part: str) -> int:
        """How many numbered members ``part`` has: 0, 1, ..."""
        return len({m[1] for name in tensors if (m := re.match(re.escape(part) + r"\.(\d+)\.", name))})

    levels = present("encoder.down")
    kinds = ["Attn" if present(f"encoder.down.{level}.attn") else "" for level in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": size("encoder.conv_in.weight", 1),
        "out_channels": size("decoder.conv_out.weight"),
        "block_out_channels": [size(f"encoder.down.{level}.block.0.conv1.weight") for level in range(levels)],
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        "layers_per_block": present("encoder.down.0.block"),
        "latent_channels": size("post_quant_conv.weight"),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in tensors,
    }


def _dc_name(name: str) -> str | None:
    if (stage := _DC_STAGE.fullmatch(name)) is None:
        return _renamed(name, _DC_ENDS)
    inside = _renamed(stage[4], _DC_BLOCKS)
    return None if inside is None else f"{stage[1]}.{_DC_SIDES[stage[1]]}.{stage[2]}.{stage[3]}.{inside}"


def _kl_name(name: str, levels: int) -> str | None:
    if (level := _KL_LEVEL.fullmatch(name)) is not None:
        side, number, rest = level[1], int(level[2]), level[3]
        start = f"encoder.down_blocks.{number}" if side == "encoder" else f"decoder.up_blocks.{levels - 1 - number}"
        if (resize := re.fullmatch(r"(down|up)sample\.conv\.(\w+)", rest)) is not None:
            return f"{start}.{resize[1]}samplers.0.conv.{resize[2]}"
        return _kl_block(start, re.fullmatch(r"(block|attn)\.(\d+)\.(\w+)\.(\w+)", rest))
    if (middle := re.fullmatch(r"(encoder|decoder)\.mid\.(block|attn)_([12])\.(\w+\.\w+)", name)) is not None:
        rest = f"{middle[2]}.{int(middle[3]) - 1}.{middle[4]}"
        return _kl_block(f"{middle[1]}.mid_block", re.fullmatch(r"(block|attn)\.(\d+)\.(\w+)\.(\w+)", rest))
    return _renamed(name, _KL_ENDS)


def _kl_block(start: str, inside: re.Match[str] | None) -> str | None:
    """``block.0.nin_shortcut.weight`` or ``attn.0.q.bias`` of one level or of the middle."""
    if inside is None:
        return None
    kind, number, layer, what = inside.groups()
    if kind == "block":
        layer = "conv_shortcut" if layer == "nin_shortcut" else layer
        return f"{start}.resnets.{number}.{layer}.{what}"
    return f"{start}.attentions.{number}.{_KL_ATTENTION[layer]}.{what}" if layer in _KL_ATTENTION else None


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, replacement in rules:
        if (match := re.fullmatch(pattern, name)) is not None:
            return match.expand(replacement)
    return None


def _matrix(kernel: Tensor) -> Tensor:
    """A 1x1 convolution's kernel (O, I, 1, 1) -> (O, I); anything else as it is."""
    return torch.flatten(kernel, 1) if kernel.ndim == _ONE_BY_ONE else kernel
