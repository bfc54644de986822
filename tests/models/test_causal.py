"""What holds for the causal baseline alone: exactly Wan's parameters and, where nothing is hidden,
Wan's output."""

from __future__ import annotations

import pytest
import tiny
import torch

from scd_sf.models.causal import Causal
from scd_sf.models.scd.transplant import transplant_causal
from scd_sf.nn.kv_cache import CacheConfig, KVCache, RingKVCache, Window, new_cache
from scd_sf.nn.layers import WanBlock
from scd_sf.types import UserError


def test_parameters_are_wans_parameters() -> None:
    ours = {name: p.shape for name, p in Causal(tiny.CFG).named_parameters()}
    assert ours == {name: p.shape for name, p in tiny.wan().named_parameters()}


@torch.no_grad()
def test_one_chunk_over_the_whole_clip_is_the_bidirectional_model() -> None:
    """With chunk = clip there is no history, and both ways of running the student are Wan
    itself."""
    wan, data = tiny.wan(), tiny.clip(3, chunks=1, samples=1)
    with tiny.double():
        model, _ = transplant_causal(wan, chunk=3)
    expected = wan(data.x_t[0], data.t[0], data.cond)
    assert torch.allclose(tiny.teacher_forced(model, data)[0], expected, rtol=0, atol=1e-12)
    stream = model.advance(model.start(data.cond, (tiny.HEIGHT, tiny.WIDTH)), None, data.query.x)
    assert torch.allclose(
        model.denoise(stream, data.x_t[0], data.t[0, :, 0]), expected, rtol=0, atol=1e-12
    )


@torch.no_grad()
def test_history_is_written_at_time_zero_and_at_its_own_position() -> None:
    """Teacher-forced: the clean half at t = 0. Another clean time must change what later chunks
    see."""
    model, data = tiny.student(tiny.Variant("causal", 1)), tiny.clip(1, samples=1)
    assert isinstance(model, Causal)
    stream = model.advance(
        model.start(data.cond, (tiny.HEIGHT, tiny.WIDTH)), None, data.query.x[:, :1]
    )
    assert isinstance(stream.cache, KVCache) and stream.cache.length == 0 and stream.index == 0
    stream = model.advance(stream, data.x[:, :1], data.query.x[:, 1:2])
    assert stream.index == 1
    trunk = model.trunk
    x = trunk.embed(data.x[:, :1])
    block, mod = trunk.blocks[0], trunk.times(torch.zeros(2, 1)).mod
    assert isinstance(block, WanBlock)
    modulation = (block.scale_shift_table + mod).unsqueeze(3)
    h = block.norm1(x) * (1 + modulation[:, 0, 1]) + modulation[:, 0, 0]
    _, v = block.attn1.kv(h)
    assert isinstance(stream.cache, KVCache)
    kept = stream.cache.layer(0)
    assert kept is not None and torch.allclose(kept[1], v, rtol=0, atol=1e-12)


def test_which_cache_a_config_means() -> None:
    axes = (4, 2, 2)
    whole = new_cache(None, 6, axes, 1)
    assert isinstance(whole, KVCache) and whole.window == Window(axes=axes)
    windowed = new_cache(CacheConfig(window=2, sink=1), 6, axes, 1)
    assert isinstance(windowed, KVCache) and windowed.window == Window(12, 6, 6, axes)
    ring = new_cache(CacheConfig(preallocate=5), 6, axes, 2)
    assert isinstance(ring, RingKVCache) and (ring.capacity, ring.new, ring.wrap) == (30, 12, False)
    rolling = new_cache(CacheConfig(window=2, sink=1, preallocate=5), 6, axes, 1)
    assert isinstance(rolling, RingKVCache) and (rolling.capacity, rolling.sink, rolling.wrap) == (
        18,
        6,
        True,
    )


def test_chunk_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"model\.chunk is 0"):
        transplant_causal(tiny.wan(), 0)
