"""Streaming attention equals masked full attention; K/V are staged once and nothing is mutated."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scd_sf.nn.attention import FullSequence, Streaming
from scd_sf.nn.kv_cache import KVCache, LivePast

HEADS, DIM = 2, 4


def qkv(length: int, seed: int = 0) -> list[Tensor]:
    rng = tiny.generator(seed)
    return [
        torch.randn(2, HEADS, length, DIM, generator=rng, dtype=torch.float64) for _ in range(3)
    ]


def block_causal(groups: tuple[int, ...]) -> Tensor:
    index = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
    return index[:, None] >= index[None, :]


@pytest.mark.parametrize("groups", [(5,), (3, 2), (2, 4, 1)])
def test_groups_are_block_causal(groups: tuple[int, ...]) -> None:
    q, k, v = qkv(sum(groups))
    streamed = Streaming(KVCache.empty(), groups)(0, q, k, v)
    assert torch.allclose(
        streamed, FullSequence(block_causal(groups))(0, q, k, v), rtol=0, atol=1e-14
    )


def test_calls_over_a_growing_cache_equal_one_masked_call() -> None:
    groups = (3, 2, 4)
    q, k, v = qkv(9)
    expected = FullSequence(block_causal(groups))(0, q, k, v)
    cache, start = KVCache.empty(), 0
    for group in groups:
        own = slice(start, start + group)
        attend = Streaming(cache, (group,), write=1)
        out = attend(0, q[:, :, own], k[:, :, own], v[:, :, own])
        assert torch.allclose(out, expected[:, :, own], rtol=0, atol=1e-14)
        cache, start = cache.grown(cache.write(attend.take()), group), start + group
    assert cache.length == 9


def test_only_the_first_groups_are_staged_and_only_when_asked() -> None:
    q, k, v = qkv(5)
    attend = Streaming(KVCache.empty(), (3, 2), write=1)
    attend(4, q, k, v)
    assert list(attend.staged) == [4]
    assert torch.equal(attend.staged[4][0], k[:, :, :3]) and torch.equal(
        attend.staged[4][1], v[:, :, :3]
    )
    silent = Streaming(KVCache.empty(), (5,))
    silent(0, q, k, v)
    assert not silent.staged


def test_recomputation_under_checkpointing_stages_nothing_new() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(4))
    attend = Streaming(KVCache.empty(), (4,), write=1)
    out = checkpoint(attend, 0, q, k, v, use_reentrant=False)
    staged = attend.staged[0]
    out.sum().backward()
    assert attend.staged[0] is staged


def test_gradients_stop_at_the_cache_but_pass_a_live_prefix() -> None:
    q, k, v = qkv(4)
    old = [x.requires_grad_() for x in qkv(3, seed=1)[1:]]
    cache = KVCache.empty()
    cache = cache.grown(cache.write({0: (old[0], old[1])}), 3)
    q.requires_grad_()
    out = Streaming(cache, (4,))(0, q, k, v).sum()
    assert all(g is None for g in torch.autograd.grad(out, old, allow_unused=True))
    live = Streaming(LivePast({0: (old[0], old[1])}), (4,))(0, q, k, v)
    assert all(float(g.abs().max()) > 0 for g in torch.autograd.grad(live.pow(2).sum(), old))
    assert LivePast({}).layer(0) is None
