"""Names of Wan 2.1's tensors: the maps against the published key lists and against diffusers' own
converter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from scd_sf.models.sections import choose_section
from scd_sf.models.wan.names import (
    ROOTS,
    diffusers_to_original,
    layout_of,
    original_to_diffusers,
    to_diffusers,
    to_ours,
)
from scd_sf.models.wan.transformer import Wan, WanConfig
from scd_sf.tensor_files import in_memory
from scd_sf.types import UserError

KEYS = Path(__file__).parent
WAN_14B = WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40)
SIZES = [("1.3B", WanConfig(), 825, 1_418_996_800), ("14B", WAN_14B, 1095, 14_288_491_584)]


def original_keys(size: str) -> dict[str, list[int]]:
    keys: dict[str, list[int]] = json.loads(
        (KEYS / f"wan2.1_t2v_{size}_original_keys.json").read_text()
    )
    return keys


@pytest.mark.parametrize(("size", "config", "tensors", "parameters"), SIZES, ids=["1.3B", "14B"])
def test_original_names_and_shapes_are_ours(
    size: str, config: WanConfig, tensors: int, parameters: int
) -> None:
    """Every published tensor, by name and shape, is one of our model's at full size, and the other
    way round."""
    published = original_keys(size)
    with torch.device("meta"):
        ours = {name: list(p.shape) for name, p in Wan(config).named_parameters()}
    renamed = {}
    for name, shape in published.items():
        diffusers = original_to_diffusers(name)
        assert diffusers is not None and diffusers_to_original(diffusers) == name
        assert to_diffusers(to_ours(diffusers)) == diffusers
        renamed[to_ours(diffusers)] = shape
    assert renamed == ours and len(ours) == tensors
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == parameters


def test_the_map_is_diffusers_own() -> None:
    names = list(original_keys("1.3B"))
    theirs = convert_wan_transformer_to_diffusers(
        {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    )
    assert {name: int(value) for name, value in theirs.items()} == {
        original_to_diffusers(name): i for i, name in enumerate(names)
    }


@pytest.mark.parametrize(
    "wrapped",
    [
        "model.blocks.3.self_attn.q.weight",
        "module.blocks.3.self_attn.q.weight",
        "model._fsdp_wrapped_module.blocks.3._fsdp_wrapped_module.self_attn.q.weight",
        "_orig_mod.model.blocks.3._checkpoint_wrapped_module.self_attn.q.weight",
        "model.diffusion_model.blocks.3.self_attn.q.weight",
        "generator.model.blocks.3.self_attn.q.weight",
        "blocks.3.self_attn.q.weight",
    ],
)
def test_wrappers_come_off(wrapped: str) -> None:
    (name,) = choose_section({wrapped: in_memory(torch.zeros(1))}, ROOTS, "", "file.pt")
    assert name == "blocks.3.self_attn.q.weight"
    assert original_to_diffusers(name) == "blocks.3.attn1.to_q.weight"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("blocks.0.cross_attn.k_img.weight", "image-to-video"),
        ("img_emb.proj.0.weight", "image-to-video"),
        ("condition_embedder.image_embedder.norm1.weight", "image-to-video"),
        ("vace_blocks.0.norm3.weight", "another Wan model"),
        ("blocks.0.self_attn.q.lora_A.weight", "LoRA"),
        ("transformer.h.0.attn.weight", "neither"),
    ],
)
def test_other_models_are_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(UserError, match=rf"(?s)file\.pt.*{why}|file\.pt: {why}"):
        layout_of([name], "file.pt")
    assert original_to_diffusers(name) is None or why == "image-to-video"


def test_layouts() -> None:
    names = list(original_keys("1.3B"))
    assert layout_of(names, "f") == "original"
    assert layout_of((original_to_diffusers(name) or "" for name in names), "f") == "diffusers"
    with pytest.raises(UserError, match="no tensors"):
        layout_of([], "f")
