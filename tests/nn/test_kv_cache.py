"""Functional cache against ring buffer, windows and sinks against slices of the whole history."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from scd_sf.nn.kv_cache import KV, KVCache, RingKVCache, Window
from scd_sf.types import UserError


def pieces(sizes: list[int], layers: int = 2) -> list[dict[int, KV]]:
    rng = tiny.generator(0)

    def one(size: int) -> Tensor:
        return torch.randn(1, 2, size, 3, generator=rng)

    return [{layer: (one(size), one(size)) for layer in range(layers)} for size in sizes]


def tokens(kv: KV | None) -> set[tuple[float, ...]]:
    """The cached tokens (key and value of head 0) as a set: order means nothing to attention."""
    assert kv is not None
    return {tuple(row) for row in torch.cat([kv[0][0, 0], kv[1][0, 0]], -1).tolist()}


def test_append_only_and_functional() -> None:
    first, second = pieces([3, 2])
    empty = KVCache.empty()
    assert empty.layer(0) is None and empty.length == 0
    one = empty.extended(first)
    two = one.extended(second)
    assert (empty.length, one.length, two.length) == (0, 3, 5)
    got = two.layer(1)
    assert got is not None and torch.equal(got[0], torch.cat([first[1][0], second[1][0]], 2))
    assert one.layer(1) is not None and torch.equal(one.layers[1][0], first[1][0])


@pytest.mark.parametrize(("recent", "sink"), [(4, 0), (4, 2), (6, 2), (2, 4)])
@torch.no_grad()
def test_window_and_sink_are_slices_and_the_ring_agrees(recent: int, sink: int) -> None:
    staged = pieces([2] * 9)
    cache, ring = KVCache.empty(Window(recent, sink)), RingKVCache(recent + sink, sink=sink, wrap=True)
    everything: Tensor = torch.empty(1, 2, 0, 3)
    for piece in staged:
        cache, ring = cache.extended(piece), ring.extended(piece)
        everything = torch.cat([everything, piece[0][0]], 2)
        length = everything.shape[2]
        kept = everything if length <= recent + sink else torch.cat(
            [everything[:, :, :sink], everything[:, :, length - recent :]], 2
        )  # fmt: skip
        got = cache.layer(0)
        assert got is not None and torch.equal(got[0], kept)
        for layer in (0, 1):
            assert tokens(ring.layer(layer)) == tokens(cache.layer(layer))
    assert cache.length == ring.length == 18


@torch.no_grad()
def test_ring_without_wrap_fills_up_and_then_says_so() -> None:
    ring = RingKVCache(5)
    assert ring.layer(0) is None
    for piece in pieces([3, 2]):
        ring = ring.extended(piece)
    with pytest.raises(UserError, match="holds 5 tokens and 6 are needed: give it a window"):
        ring.extended(pieces([1])[0])
    whole = KVCache.empty()
    for piece in pieces([3, 2]):
        whole = whole.extended(piece)
    assert torch.equal(ring.layer(0)[0], whole.layer(0)[0])  # type: ignore[index]


@torch.no_grad()
def test_ring_keeps_its_memory() -> None:
    ring = RingKVCache(6, sink=2, wrap=True)
    staged = pieces([2] * 5)
    ring.extended(staged[0])
    before = ring.layer(0)
    for piece in staged[1:]:
        ring.extended(piece)
    after = ring.layer(0)
    assert before is not None and after is not None
    assert before[0].untyped_storage().data_ptr() == after[0].untyped_storage().data_ptr()


@torch.no_grad()
def test_a_ring_smaller_than_one_chunk_is_refused() -> None:
    with pytest.raises(UserError, match=r"window holds 2 tokens, fewer than one chunk \(3\)"):
        RingKVCache(4, sink=2, wrap=True).extended(pieces([2])[0]).extended(pieces([3])[0])


def test_ring_refuses_training() -> None:
    with pytest.raises(AssertionError, match="sampling only"):
        RingKVCache(4).extended(pieces([1])[0])
