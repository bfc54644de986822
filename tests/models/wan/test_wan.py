"""The bidirectional model: everything sees everything, time per frame, batch and dtype rules.
Parity: tests/parity."""

from __future__ import annotations

import pytest
import tiny
import torch

from scd_sf.models.trunk import Trunk
from scd_sf.models.wan.transformer import ConditionEmbedder, Wan, WanConfig
from scd_sf.types import Conditioning, UserError


@torch.no_grad()
def test_one_time_per_clip_is_the_same_time_for_every_frame() -> None:
    model, x, cond = tiny.wan(), tiny.latents(2, 3), tiny.prompts(2)
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    once, per_frame = model(x, t, cond), model(x, t[:, None].expand(2, 3), cond)
    assert once.shape == x.shape
    assert torch.allclose(once, per_frame, rtol=0, atol=1e-12)
    t_frames = t[:, None].repeat(1, 3)
    t_frames[:, 2] = 0.5
    assert float((model(x, t_frames, cond) - once).abs().max()) > 1e-3


@torch.no_grad()
def test_every_frame_sees_every_frame() -> None:
    model, x, cond, t = (
        tiny.wan(),
        tiny.latents(1, 3),
        tiny.prompts(1),
        torch.full((1,), 0.5, dtype=torch.float64),
    )
    before = model(x, t, cond)
    x[:, 2] += 1
    assert all(
        float(change) > 1e-4 for change in (model(x, t, cond) - before).abs().amax(dim=(0, 2, 3, 4))
    )


@torch.no_grad()
def test_padding_is_zero_before_the_embedder_and_attended_to() -> None:
    """As Wan: more zero padding changes the output, because zero rows embed to a constant that
    attention sees."""
    model, x, cond, t = (
        tiny.wan(),
        tiny.latents(1, 2),
        tiny.prompts(1),
        torch.full((1,), 0.5, dtype=torch.float64),
    )
    padded = Conditioning(torch.cat([cond.text_BLE, torch.zeros_like(cond.text_BLE)], 1))
    assert float((model(x, t, padded) - model(x, t, cond)).abs().max()) > 1e-4


@torch.no_grad()
def test_output_is_at_least_fp32_and_time_is_not_rounded_to_the_models_dtype() -> None:
    model, x = tiny.wan(dtype=torch.bfloat16), tiny.latents(1, 2, dtype=torch.float32)
    cond = tiny.prompts(1, dtype=torch.float32)
    assert model(x, torch.full((1,), 0.5), cond).dtype == torch.float32
    embedder = ConditionEmbedder(
        WanConfig(2, 12, freq_dim=256, text_dim=8), with_text=False
    ).bfloat16()
    near, far = embedder.time(torch.tensor([[0.999], [0.998]]))[0].unbind(0)
    assert float((near - far).abs().max()) > 0, (
        "t = 0.999 and 0.998 are one number in bf16, but not here"
    )


def test_geometry_errors_say_what_to_do() -> None:
    with pytest.raises(
        UserError, match=r"latent frame 5x6 is not divisible by the patch 2x2.*multiples of 2x2"
    ):
        tiny.wan()(
            tiny.latents(1, 1)[..., :1, :].expand(-1, -1, -1, 5, -1),
            torch.zeros(1),
            tiny.prompts(1),
        )
    for head_dim in (7, 4):
        with pytest.raises(UserError, match=f"attention_head_dim is {head_dim}"):
            WanConfig(attention_head_dim=head_dim)
    assert WanConfig().tokens(60, 104) == 1560
    assert WanConfig().width == 1536


def test_default_config_is_t2v_1_3b() -> None:
    with torch.device("meta"):
        model = Wan(WanConfig())
    assert sum(p.numel() for p in model.parameters()) == 1_418_996_800
    assert len(dict(model.named_parameters())) == 825


def test_a_trunk_without_head_or_text_says_so() -> None:
    trunk = Trunk(tiny.CFG, (0,), with_text=False, with_head=False)
    with pytest.raises(AssertionError, match="without a text embedder"):
        trunk.text(torch.zeros(1, 1, tiny.TEXT))
    with pytest.raises(AssertionError, match="without a head"):
        trunk.velocity(torch.zeros(1, 6, tiny.CFG.width), torch.zeros(1, 1, tiny.CFG.width), 4, 6)
