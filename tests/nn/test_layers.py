"""The block: modulation per frame equals modulation per token, prompts are shared by rows, text K/V
may be cached."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from scd_sf.nn.attention import FullSequence
from scd_sf.nn.layers import LayerNorm, WanBlock, upcast
from scd_sf.nn.rope import Rotary, axis_dims, rope_table

WIDTH, HEADS, FRAMES, TOKENS = 24, 2, 3, 4


def block(cross_attn_norm: bool = True) -> WanBlock:
    made = WanBlock(WIDTH, 32, HEADS, cross_attn_norm, 1e-6)
    tiny.redraw(made, 0, torch.float64)
    return made


def inputs(rows: int = 2) -> tuple[Tensor, Tensor, Tensor, Rotary]:
    rng = tiny.generator(1)
    x = torch.randn(rows, FRAMES * TOKENS, WIDTH, generator=rng, dtype=torch.float64)
    mod = torch.randn(rows, FRAMES, 6, WIDTH, generator=rng, dtype=torch.float64)
    text = torch.randn(2, 5, WIDTH, generator=rng, dtype=torch.float64)
    return (
        x,
        mod,
        text,
        rope_table(
            tuple(range(FRAMES)),
            2,
            2,
            axis_dims(WIDTH // HEADS),
            torch.device("cpu"),
            torch.float64,
        ),
    )


@pytest.mark.parametrize("cross_attn_norm", [True, False])
@torch.no_grad()
def test_modulation_per_frame_equals_per_token(cross_attn_norm: bool) -> None:
    made, (x, mod, text, rotary) = block(cross_attn_norm), inputs()
    per_frame = made(x, mod, text, rotary, FullSequence(), 0)
    per_token = made(x, mod.repeat_interleave(TOKENS, 1), text, rotary, FullSequence(), 0)
    assert torch.allclose(per_frame, per_token, rtol=0, atol=1e-13)
    one = made(x, mod[:, :1], text, rotary, FullSequence(), 0)
    assert torch.allclose(
        one, made(x, mod[:, :1].expand_as(mod), text, rotary, FullSequence(), 0), rtol=0, atol=1e-13
    )


@torch.no_grad()
def test_rows_share_prompts_batch_major_and_text_may_come_as_kv() -> None:
    made, (x, mod, text, rotary) = block(), inputs(rows=6)
    shared = made(x, mod, text, rotary, FullSequence(), 0)
    repeated = made(x, mod, text.repeat_interleave(3, 0), rotary, FullSequence(), 0)
    cached = made(x, mod, made.attn2.kv(text), rotary, FullSequence(), 0)
    assert torch.allclose(shared, repeated, rtol=0, atol=1e-13)
    assert torch.equal(shared, cached)


@torch.no_grad()
def test_qk_norm_is_over_all_heads() -> None:
    made, (x, *_) = block(), inputs()
    made.attn1.norm_q.weight.fill_(1.0)
    q = made.attn1.query(x)
    assert q.shape == (2, HEADS, FRAMES * TOKENS, WIDTH // HEADS)
    rms = q.pow(2).mean(dim=(1, 3)).sqrt()
    assert torch.allclose(rms, torch.ones_like(rms), atol=1e-3)


def test_norms_run_in_fp32_and_fp64_stays() -> None:
    norm = LayerNorm(8, 1e-6, affine=True).bfloat16()
    assert norm(torch.randn(2, 8).bfloat16()).dtype == torch.float32
    assert upcast(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert upcast(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    plain = LayerNorm(8, 1e-6, affine=False)
    assert not list(plain.parameters())
    x = torch.randn(3, 8, generator=tiny.generator(0)) * 5 + 2
    assert torch.allclose(plain(x).mean(-1), torch.zeros(3), atol=1e-6)
    assert torch.allclose(plain(x).var(-1, unbiased=False), torch.ones(3), atol=1e-5)
