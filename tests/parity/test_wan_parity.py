"""Ours against two references: diffusers' WanTransformer3DModel and outputs of the original Wan 2.1
code.

``wan_original_tiny.safetensors`` holds a tiny Wan 2.1 with random weights (original names, ``w.*``)
and three cases of inputs and velocities computed by the original ``WanModel`` (attention by SDPA,
fp32); its metadata holds the config.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import safe_open
from torch import Tensor

from scd_sf.models.wan.names import to_ours
from scd_sf.models.wan.transformer import Wan, WanConfig
from scd_sf.models.wan.weights import load_wan, save_wan
from scd_sf.types import Conditioning

ORIGINAL = Path(__file__).parent / "wan_original_tiny.safetensors"


def random_config(seed: int) -> WanConfig:
    pick = random.Random(seed)
    channels = pick.choice([4, 16])
    return WanConfig(
        num_attention_heads=pick.choice([1, 2, 3, 4]),
        attention_head_dim=pick.choice([12, 16, 24, 26, 32]),
        in_channels=channels,
        out_channels=pick.choice([channels, 3]),
        text_dim=pick.choice([7, 48]),
        freq_dim=pick.choice([32, 64]),
        ffn_dim=pick.choice([50, 96]),
        num_layers=pick.choice([1, 2, 3]),
        cross_attn_norm=pick.random() < 0.7,
    )


def reference(cfg: WanConfig) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, cfg.patch_height, cfg.patch_width),
        num_attention_heads=cfg.num_attention_heads,
        attention_head_dim=cfg.attention_head_dim,
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels,
        text_dim=cfg.text_dim,
        freq_dim=cfg.freq_dim,
        ffn_dim=cfg.ffn_dim,
        num_layers=cfg.num_layers,
        cross_attn_norm=cfg.cross_attn_norm,
        rope_max_seq_len=64,
    ).eval()


def batch(cfg: WanConfig, seed: int) -> tuple[Tensor, Tensor, Conditioning]:
    pick, rng = random.Random(100 + seed), tiny.generator(seed)
    rows, frames = pick.choice([1, 2]), pick.choice([1, 2, 5])
    height, width, length = (
        pick.choice([2, 6, 10]),
        pick.choice([4, 8, 14]),
        pick.choice([1, 5, 24]),
    )
    x = torch.randn(rows, frames, cfg.in_channels, height, width, generator=rng)
    text = torch.randn(rows, length, cfg.text_dim, generator=rng)
    return x, torch.rand(rows, generator=rng), Conditioning(text)


@torch.no_grad()
def difference(theirs: WanTransformer3DModel, ours: Wan, seed: int) -> float:
    x, t, cond = batch(ours.cfg, seed)
    expected = theirs(x.transpose(1, 2), t * 1000, cond.text_BLE).sample.transpose(1, 2)
    got = ours(x, t, cond)
    assert got.shape == expected.shape and float(expected.std()) > 1e-2
    return float((got - expected).abs().max())


@pytest.mark.parametrize("seed", range(12))
def test_equals_diffusers_on_random_configurations(seed: int) -> None:
    cfg = random_config(seed)
    theirs, ours = reference(cfg), Wan(cfg)
    tiny.redraw(theirs, seed, torch.float32)
    ours.load_state_dict(
        {to_ours(name): tensor for name, tensor in theirs.state_dict().items()}, strict=True
    )
    assert difference(theirs, ours, seed) < 2e-5


@pytest.mark.parametrize("seed", [0, 5])
def test_files_pass_between_both_libraries(seed: int, tmp_path: Path) -> None:
    cfg = random_config(seed)
    ours = tiny.wan(seed, torch.float32, cfg)
    save_wan(ours.state_dict(), cfg, tmp_path / "ours", torch.float32)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "ours")
    assert difference(theirs, ours, seed) < 2e-5

    theirs.save_pretrained(tmp_path / "theirs" / "transformer")
    back = load_wan(tmp_path / "theirs")
    assert back.cfg == cfg
    assert all(torch.equal(p, ours.get_parameter(name)) for name, p in back.named_parameters())


def test_diffusers_shards_are_read(tmp_path: Path) -> None:
    cfg = random_config(3)
    theirs = reference(cfg)
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert difference(theirs, load_wan(tmp_path), 3) < 2e-5


@torch.no_grad()
def test_equals_the_original_wan_on_recorded_outputs() -> None:
    with safe_open(str(ORIGINAL), "pt") as file:
        raw = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    cfg = WanConfig(
        num_attention_heads=raw["num_heads"],
        attention_head_dim=raw["dim"] // raw["num_heads"],
        in_channels=raw["in_dim"],
        out_channels=raw["out_dim"],
        text_dim=raw["text_dim"],
        freq_dim=raw["freq_dim"],
        ffn_dim=raw["ffn_dim"],
        num_layers=raw["num_layers"],
        cross_attn_norm=raw["cross_attn_norm"],
    )
    weights = {
        name.removeprefix("w."): tensor for name, tensor in tensors.items() if name.startswith("w.")
    }
    model = Wan(cfg)
    renamed = convert_wan_transformer_to_diffusers(weights)
    model.load_state_dict({to_ours(name): tensor for name, tensor in renamed.items()}, strict=True)
    for case in range(3):
        x, t, text, expected = (
            tensors[f"case{case}.{part}"] for part in ("x", "t", "text", "velocity")
        )
        padded = torch.zeros(1, raw["text_len"], raw["text_dim"])
        padded[0, : len(text)] = text
        level = t if float(t) <= 1 else t / 1000
        got = model(x.transpose(0, 1)[None], level, Conditioning(padded))[0].transpose(0, 1)
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) < 1e-4
