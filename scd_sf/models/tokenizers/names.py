"""Names of tensors in public image tokenizers, turned into those of diffusers' classes.

- **DC-AE** as its authors publish it (mit-han-lab/efficientvit,
  ``encoder.stages.1.op_list.0.main.conv1.conv.weight``) to ``AutoencoderDC``. FAR's checkpoints
  need no map: FAR trains a class with diffusers' names and saves its state.
- **LDM's KL autoencoder** (CompVis/latent-diffusion, ``encoder.down.0.block.0.conv1.weight``;
  VA-VAE and E2E-VAE use it) to ``AutoencoderKL``, whose decoder counts levels from the latent up
  where LDM counts from the pixels down.

Values change in two ways only: 1x1 convolutions of attention become matrices, and DC-AE's one
kernel for query, key and value is cut in three.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from scd_sf.models.renaming import renamed
from scd_sf.types import UserError

# Parts of a training that public LDM checkpoints carry beside the autoencoder: losses, VA-VAE's
# vision model.
TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")
_ONE_BY_ONE = 4  # dimensions of a 1x1 convolution's kernel

# efficientvit puts each convolution into a layer of its own with the members conv and norm;
# diffusers does not.
_DC_BLOCK = {
    "main.conv1.conv": "conv1",
    "main.conv2.conv": "conv2",
    "main.conv2.norm": "norm",
    "main.conv": "conv",
    "main.conv.conv": "conv",
    "context_module.main.qkv.conv": "attn.qkv",
    "context_module.main.aggreg.N.0": "attn.to_qkv_multiscale.N.proj_in",
    "context_module.main.aggreg.N.1": "attn.to_qkv_multiscale.N.proj_out",
    "context_module.main.proj.conv": "attn.to_out",
    "context_module.main.proj.norm": "attn.norm_out",
    "local_module.main.inverted_conv.conv": "conv_out.conv_inverted",
    "local_module.main.depth_conv.conv": "conv_out.conv_depth",
    "local_module.main.point_conv.conv": "conv_out.conv_point",
    "local_module.main.point_conv.norm": "conv_out.norm",
}
DC_FROM_EFFICIENTVIT = {
    **{
        f"encoder.stages.N.op_list.N.{a}": f"encoder.down_blocks.N.N.{b}"
        for a, b in _DC_BLOCK.items()
    },
    **{
        f"decoder.stages.N.op_list.N.{a}": f"decoder.up_blocks.N.N.{b}"
        for a, b in _DC_BLOCK.items()
    },
    "encoder.project_in.conv": "encoder.conv_in",
    # a first stage without blocks: it also changes the size
    "encoder.project_in.conv.conv": "encoder.conv_in.conv",
    "encoder.project_out.main.op_list.0.conv": "encoder.conv_out",
    "decoder.project_in.main.conv": "decoder.conv_in",
    "decoder.project_out.op_list.0": "decoder.norm_out",
    "decoder.project_out.op_list.2.conv": "decoder.conv_out",
    "decoder.project_out.op_list.2.conv.conv": "decoder.conv_out.conv",
}

_KL_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {
    "nin_shortcut": "conv_shortcut"
}
_KL_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_KL_PARTS = {
    **{f"block.N.{a}": f"resnets.N.{b}" for a, b in _KL_RESNET.items()},
    **{f"attn.N.{a}": f"attentions.N.{b}" for a, b in _KL_ATTENTION.items()},
    "downsample.conv": "downsamplers.0.conv",
    "upsample.conv": "upsamplers.0.conv",
}
_KL_MIDDLE = {  # counts from 1, with an underscore
    a.replace(".N.", f"_{number + 1}."): b.replace("N", str(number))
    for a, b in _KL_PARTS.items()
    for number in (0, 1)
}
KL_FROM_LDM = {
    **{f"encoder.down.N.{a}": f"encoder.down_blocks.N.{b}" for a, b in _KL_PARTS.items()},
    **{f"decoder.up.N.{a}": f"decoder.up_blocks.N.{b}" for a, b in _KL_PARTS.items()},
    **{
        f"{side}.mid.{a}": f"{side}.mid_block.{b}"
        for a, b in _KL_MIDDLE.items()
        for side in ("encoder", "decoder")
    },
    **{name: name for name in ("quant_conv", "post_quant_conv")},
    **{
        f"{side}.{end}": f"{side}.{end}"
        for side in ("encoder", "decoder")
        for end in ("conv_in", "conv_out")
    },
    **{f"{side}.norm_out": f"{side}.conv_norm_out" for side in ("encoder", "decoder")},
}
_KL_LEVEL = re.compile(r"(?<=decoder\.up\.)\d+|(?<=encoder\.down\.)\d+")


def is_efficientvit(names: Mapping[str, object]) -> bool:
    """Whether these are DC-AE's own names."""
    return any(name.startswith(("encoder.stages.", "encoder.project_in.")) for name in names)


def is_ldm(names: Mapping[str, object]) -> bool:
    """Whether these are those of LDM's KL autoencoder."""
    return any(name.startswith(("encoder.down.", "encoder.mid.block_1.")) for name in names)


def dc_from_efficientvit(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """DC-AE's own tensors under ``AutoencoderDC``'s names. UserError naming the first tensor that
    has no place."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new_name = renamed(name, DC_FROM_EFFICIENTVIT)
        if new_name is None:
            raise UserError(
                f"{where}: tensor '{name}' is not one of DC-AE; use the autoencoder's own weights"
            )
        if new_name.endswith(".qkv.weight"):
            parts = zip(("to_q", "to_k", "to_v"), tensor.flatten(1).chunk(3), strict=True)
            result |= {
                f"{new_name.removesuffix('qkv.weight')}{part}.weight": value.contiguous()
                for part, value in parts
            }
        else:
            result[new_name] = _matrix(tensor) if ".to_out." in new_name else tensor
    return result


def kl_from_ldm(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """LDM's tensors under ``AutoencoderKL``'s names, without :data:`TRAINING_ONLY`. UserError as
    above."""
    levels = 1 + max(
        (int(m[0]) for m in map(_KL_LEVEL.search, tensors) if m is not None), default=0
    )
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(TRAINING_ONLY):
            continue
        new_name = renamed(_from_the_latent(name, levels), KL_FROM_LDM)
        if new_name is None:
            raise UserError(
                f"{where}: tensor '{name}' is not one of LDM's KL autoencoder; use its own weights"
            )
        result[new_name] = _matrix(tensor) if ".attentions." in new_name else tensor
    return result


def kl_config(tensors: Mapping[str, Tensor], where: str) -> dict[str, object]:
    """The fields of ``AutoencoderKL`` that LDM's tensors (its names) imply; LDM has 32 norm groups,
    always.

    UserError naming the tensor that is missing.
    """

    def size(name: str, dimension: int = 0) -> int:
        if name not in tensors or tensors[name].ndim <= dimension:
            raise UserError(
                f"{where}: tensor '{name}' is missing or no kernel; copy the weights again"
            )
        return tensors[name].shape[dimension]

    def present(part: str) -> int:
        """How many numbered members ``part`` has: 0, 1, ..."""
        return len(
            {m[1] for name in tensors if (m := re.match(re.escape(part) + r"\.(\d+)\.", name))}
        )

    levels = present("encoder.down")
    kinds = ["Attn" if present(f"encoder.down.{level}.attn") else "" for level in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": size("encoder.conv_in.weight", 1),
        "out_channels": size("decoder.conv_out.weight"),
        "block_out_channels": [
            size(f"encoder.down.{level}.block.0.conv1.weight") for level in range(levels)
        ],
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        "layers_per_block": present("encoder.down.0.block"),
        "latent_channels": size("post_quant_conv.weight"),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in tensors,
    }


def _from_the_latent(name: str, levels: int) -> str:
    """An LDM decoder's name with its level counted from the latent up, as diffusers does."""
    return re.sub(r"(?<=decoder\.up\.)\d+", lambda match: str(levels - 1 - int(match[0])), name)


def _matrix(kernel: Tensor) -> Tensor:
    """A 1x1 convolution's kernel (O, I, 1, 1) -> (O, I); anything else as it is."""
    return torch.flatten(kernel, 1) if kernel.ndim == _ONE_BY_ONE else kernel
