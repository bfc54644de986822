"""Functional cache against ring buffer, windows and sinks against slices of the whole history."""

from __future__ import annotations

from typing import TypeVar

import pytest
import tiny
import torch
from torch import Tensor

from scd_sf.nn.kv_cache import KV, CacheConfig, KVCache, RingKVCache, Window
from scd_sf.nn.rope import axis_dims, rope_table, rotate
from scd_sf.types import UserError


def pieces(sizes: list[int], layers: int = 2) -> list[dict[int, KV]]:
    rng = tiny.generator(0)

    def one(size: int) -> Tensor:
        return torch.randn(1, 2, size, 3, generator=rng)

    return [{layer: (one(size), one(size)) for layer in range(layers)} for size in sizes]


C = TypeVar("C", KVCache, RingKVCache, KVCache | RingKVCache)


def extended(cache: C, staged: dict[int, KV]) -> C:
    return cache.grown(cache.write(staged), staged[0][0].shape[2])


def tokens(kv: KV | None) -> set[tuple[float, ...]]:
    """The cached tokens (key and value of head 0) as a set: order means nothing to attention."""
    assert kv is not None
    return {tuple(row) for row in torch.cat([kv[0][0, 0], kv[1][0, 0]], -1).tolist()}


def test_append_only_and_functional() -> None:
    first, second = pieces([3, 2])
    empty = KVCache.empty()
    assert empty.layer(0) is None and empty.length == 0
    one = extended(empty, first)
    two = extended(one, second)
    assert (empty.length, one.length, two.length) == (0, 3, 5)
    got = two.layer(1)
    assert got is not None and torch.equal(got[0], torch.cat([first[1][0], second[1][0]], 2))
    kept = one.layer(1)
    assert kept is not None and torch.equal(kept[0], first[1][0])


@pytest.mark.parametrize(("recent", "sink"), [(4, 0), (4, 2), (6, 2), (2, 4)])
@torch.no_grad()
def test_window_and_sink_are_slices_and_the_ring_agrees(recent: int, sink: int) -> None:
    staged = pieces([2] * 9)
    cache, ring = (
        KVCache.empty(Window(recent, sink)),
        RingKVCache(recent + sink, 4, wrap=True, window=Window(sink=sink)),
    )
    everything: Tensor = torch.empty(1, 2, 0, 3)
    for piece in staged:
        cache, ring = extended(cache, piece), extended(ring, piece)
        everything = torch.cat([everything, piece[0][0]], 2)
        length = everything.shape[2]
        kept = (
            everything
            if length <= recent + sink
            else torch.cat([everything[:, :, :sink], everything[:, :, length - recent :]], 2)
        )
        got = cache.layer(0)
        assert got is not None and torch.equal(got[0], kept)
        for layer in (0, 1):
            assert tokens(ring.layer(layer)) == tokens(cache.layer(layer))
    assert cache.length == ring.length == 18


@torch.no_grad()
def test_ring_without_wrap_fills_up_and_then_says_so() -> None:
    ring = RingKVCache(5, 4)
    assert ring.layer(0) is None
    for piece in pieces([3, 2]):
        ring = extended(ring, piece)
    with pytest.raises(UserError, match="holds 5 tokens and 6 are needed: give it a window"):
        extended(ring, pieces([1])[0])
    whole = KVCache.empty()
    for piece in pieces([3, 2]):
        whole = extended(whole, piece)
    assert torch.equal(ring.layer(0)[0], whole.layer(0)[0])  # type: ignore[index]


@torch.no_grad()
def test_ring_keeps_its_memory() -> None:
    ring = RingKVCache(6, 4, wrap=True, window=Window(sink=2))
    staged = pieces([2] * 5)
    extended(ring, staged[0])
    before = ring.layer(0)
    for piece in staged[1:]:
        extended(ring, piece)
    after = ring.layer(0)
    assert before is not None and after is not None
    assert before[0].untyped_storage().data_ptr() == after[0].untyped_storage().data_ptr()


@pytest.mark.parametrize(("window", "sink", "chunk"), [(4, 0, 2), (5, 0, 3), (5, 1, 3), (4, 0, 4)])
@torch.no_grad()
def test_the_number_of_a_ring_s_lengths(window: int, sink: int, chunk: int) -> None:
    config = CacheConfig.sampling(window, sink, 100)
    ring = RingKVCache(config.preallocate or 0, chunk, wrap=True, window=Window(sink=sink))
    lengths = {0} | {extended(ring, piece).num_tokens for piece in pieces([chunk] * 9)}
    assert len(lengths) == config.num_lengths(chunk)


@torch.no_grad()
def test_a_ring_smaller_than_one_chunk_is_refused() -> None:
    with pytest.raises(UserError, match=r"window holds 2 tokens, fewer than one chunk \(3\)"):
        extended(
            extended(RingKVCache(4, 4, wrap=True, window=Window(sink=2)), pieces([2])[0]),
            pieces([3])[0],
        )


def test_ring_refuses_training() -> None:
    with pytest.raises(AssertionError, match="sampling only"):
        extended(RingKVCache(4, 4), pieces([1])[0])


HEAD_DIM, PER_FRAME = 12, 6
AXES = axis_dims(HEAD_DIM)


def rotated(raw: Tensor, frames: list[int]) -> Tensor:
    """Keys (1, 2, L, D) of whole frames of 2 x 3 tokens, rotated to these frame positions."""
    return rotate(raw, rope_table(tuple(frames), 2, 3, AXES, torch.device("cpu"), torch.float64))


@pytest.mark.parametrize("ring", [False, True])
@torch.no_grad()
def test_the_sink_always_stands_right_before_the_window(ring: bool) -> None:
    """200 frames, window 3, sink 2: what is read equals the un-rotated keys rotated at consecutive
    positions."""
    raw = torch.randn(
        200, 1, 2, PER_FRAME, HEAD_DIM, generator=tiny.generator(0), dtype=torch.float64
    )
    window = Window(3 * PER_FRAME, 2 * PER_FRAME, PER_FRAME, AXES)
    cache: KVCache | RingKVCache = KVCache.empty(window)
    if ring:
        cache = RingKVCache(5 * PER_FRAME, PER_FRAME, wrap=True, window=window)
    for frame in range(200):
        cache = extended(cache, {0: (rotated(raw[frame], [frame]), raw[frame])})
        got, recent = cache.layer(0), list(range(max(2, frame - 2), frame + 1))
        near = [max(0, recent[0] - 2), max(1, recent[0] - 1)] if frame >= 2 else [0, 1][: frame + 1]
        kept = [*([0, 1][: frame + 1]), *[f for f in recent if f > 1 and f <= frame]]
        positions = [*near, *[f for f in recent if f > 1 and f <= frame]]
        expected = rotated(torch.cat([raw[f] for f in kept], 2), positions)
        assert got is not None and max(positions) - min(positions) <= 4
        keys, order = got[0], torch.argsort(got[1][0, 0, :, 0])
        wanted = torch.argsort(torch.cat([raw[f] for f in kept], 2)[0, 0, :, 0])
        assert float((keys[:, :, order] - expected[:, :, wanted]).abs().max()) < 1e-9


@torch.no_grad()
def test_a_turned_sink_does_not_drift_in_bf16() -> None:
    """It is turned from the first keys each time: after 2,000 frames as exact as bf16 is."""
    ring = RingKVCache(
        2 * PER_FRAME, PER_FRAME, wrap=True, window=Window(None, PER_FRAME, PER_FRAME, AXES)
    )
    raw = torch.randn(1, 2, PER_FRAME, HEAD_DIM, generator=tiny.generator(1), dtype=torch.float64)
    for frame in range(2000):
        key = rotated(raw, [frame]).bfloat16()
        extended(ring, {0: (key, key)})
    got = ring.layer(0)
    assert got is not None
    assert float((got[0][:, :, :PER_FRAME].double() - rotated(raw, [1998])).abs().max()) < 0.04


@torch.no_grad()
def test_joined_is_the_past_and_the_new_without_copying_the_past() -> None:
    pasts = pieces([4, 2])
    whole, ring = KVCache.empty(), RingKVCache(8, 4)
    for piece in pasts:
        whole, ring = extended(whole, piece), extended(ring, piece)
    new, other = (piece[0] for piece in pieces([3, 5]))
    ring.joined(0, *other)
    storage = ring.joined(0, *new)[0].untyped_storage().data_ptr()
    for layer in (0, 1):
        left, right = whole.joined(layer, *new), ring.joined(layer, *new)
        assert torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])
    assert ring.joined(0, *other)[0].untyped_storage().data_ptr() == storage
    assert torch.equal(ring.layer(0)[0], whole.layer(0)[0])  # type: ignore[index]
    first = KVCache.empty().joined(0, *new), RingKVCache(8, 4).joined(0, *new)
    assert all(torch.equal(kv[0], new[0]) for kv in first)
