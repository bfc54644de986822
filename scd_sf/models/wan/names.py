"""Names of Wan 2.1's tensors in this project, in diffusers, in the original files, and in distilled
generators of others.

Ours and diffusers' names map 1:1: ``trunk.<name>``, and the output head sits under ``trunk.head.``.
The original names (``Wan-AI/Wan2.1-T2V-*``) map 1:1 on diffusers'; generators trained with FSDP or
torch.compile wrap them in prefixes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from scd_sf.models.renaming import renamed
from scd_sf.types import UserError

Layout = Literal["diffusers", "original"]

_HEAD = ("proj_out.weight", "proj_out.bias", "scale_shift_table")

_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
DIFFUSERS_TO_ORIGINAL = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
    **{
        f"blocks.N.attn1.{diffusers_name}": f"blocks.N.self_attn.{original_name}"
        for diffusers_name, original_name in _ATTENTION.items()
    },
    **{
        f"blocks.N.attn2.{diffusers_name}": f"blocks.N.cross_attn.{original_name}"
        for diffusers_name, original_name in _ATTENTION.items()
    },
    "blocks.N.norm2": "blocks.N.norm3",
    "blocks.N.ffn.net.0.proj": "blocks.N.ffn.0",
    "blocks.N.ffn.net.2": "blocks.N.ffn.2",
    "blocks.N.scale_shift_table": "blocks.N.modulation",
}
ORIGINAL_TO_DIFFUSERS = {
    original_name: diffusers_name for diffusers_name, original_name in DIFFUSERS_TO_ORIGINAL.items()
}

_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"}
ROOTS = {
    "blocks",
    "patch_embedding",
    "text_embedding",
    "time_embedding",
    "time_projection",
    "head",
    "condition_embedder",
    "proj_out",
    "scale_shift_table",
}  # what the names of both layouts begin with
_IMAGE = ("img_emb.", "condition_embedder.image_embedder.", ".k_img.", ".add_k_proj.")
_OTHER_WANS = (
    "vace_",
    "face_adapter.",
    "motion_encoder.",
    "control_adapter.",
    "ref_conv.",
    "casual_audio_encoder.",
)


def to_ours(name: str) -> str:
    """diffusers' parameter name -> ours."""
    return f"trunk.head.{name}" if name in _HEAD else f"trunk.{name}"


def to_diffusers(name: str) -> str:
    """Our parameter name -> diffusers'."""
    return name.removeprefix("trunk.").removeprefix("head.")


def original_to_diffusers(name: str) -> str | None:
    """The original's parameter name -> diffusers'; None if Wan 2.1 text-to-video has no such
    tensor."""
    return renamed(name, ORIGINAL_TO_DIFFUSERS)


def diffusers_to_original(name: str) -> str | None:
    """diffusers' parameter name -> the original's; None if Wan 2.1 text-to-video has no such
    tensor."""
    return renamed(name, DIFFUSERS_TO_ORIGINAL)


def without_wrappers(name: str) -> str:
    """``name`` without the parts that FSDP, torch.compile, DDP and activation checkpointing add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def layout_of(names: Iterable[str], where: str) -> Layout:
    """The layout that these (unwrapped) names belong to. UserError for image-to-video, other Wan
    models, and anything else."""
    names = list(names)
    for name in names:
        if any(part in name for part in _IMAGE):
            raise UserError(
                f"{where}: tensor '{name}' belongs to an image-to-video Wan; use the text-to-video one"
            )
        if name.startswith(_OTHER_WANS) or any(f".{part}" in name for part in _OTHER_WANS):
            raise UserError(
                f"{where}: tensor '{name}' belongs to another Wan model; use Wan 2.1 text-to-video"
            )
        if name.endswith(
            (".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight")
        ):
            raise UserError(
                f"{where}: tensor '{name}' is a LoRA's; merge it into the full model first"
            )
    if "condition_embedder.time_proj.weight" in names:
        return "diffusers"
    if "time_projection.1.weight" in names:
        return "original"
    first = f"first tensor '{names[0]}'" if names else "no tensors"
    raise UserError(
        f"{where}: neither diffusers' nor the original's names of Wan 2.1 ({first}); give a Wan 2.1 file"
    )
