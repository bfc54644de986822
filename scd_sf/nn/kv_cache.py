"""Key/value caches of the streaming path. Keys are stored rotated; lengths are Python integers (no ``.item()``).

``KVCache`` is immutable and detached: training's rollout uses it, so no gradient can cross frames (spec
self_forcing.md 1.4: writing K/V in place leaks gradients between chunks). ``RingKVCache`` is preallocated and written
in place: inference only. Letters: B batch, N heads, L tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scd_sf.types import UserError

KV = tuple[Tensor, Tensor]


class Past(Protocol):
    """What attention reads of the past: per layer, keys and values (B, N, L, D), or None when there are none."""

    def layer(self, index: int) -> KV | None: ...


class Cache(Past, Protocol):
    """A past that can grow by what one forward staged."""

    def extended(self, staged: Mapping[int, KV]) -> Cache: ...


@dataclass(frozen=True)
class Window:
    """Which past tokens stay visible: the first ``sink`` and the last ``recent`` (None = all)."""

    recent: int | None = None
    sink: int = 0


@dataclass(frozen=True)
class LivePast:
    """K/V of one pass with their graph: the decoder's cached prefix, where gradients must reach the encoder."""

    layers: Mapping[int, KV]

    def layer(self, index: int) -> KV | None:
        return self.layers.get(index)


@dataclass(frozen=True)
class KVCache:
    """Append-only and functional: :meth:`extended` returns a new cache, tensors are detached and never written."""

    layers: Mapping[int, KV]
    length: int = 0
    window: Window = Window()

    @classmethod
    def empty(cls, window: Window | None = None) -> KVCache:
        return cls({}, 0, window or Window())

    def layer(self, index: int) -> KV | None:
        kv = self.layers.get(index)
        recent, sink = self.window.recent, self.window.sink
        if kv is None or recent is None or self.length <= recent + sink:
            return kv
        k, v = (torch.cat([x[:, :, :sink], x[:, :, -recent:]], dim=2) for x in kv)
        return k, v

    def extended(self, staged: Mapping[int, KV]) -> KVCache:
        """The cache after the staged tokens; ``staged`` maps layer -> (k, v), each (B, N, L_new, D)."""
        grown: dict[int, KV] = {}
        added = 0
        for index, (k, v) in staged.items():
            old = self.layers.get(index)
            k, v = k.detach(), v.detach()
            added = k.shape[2]
            grown[index] = (k, v) if old is None else (torch.cat([old[0], k], 2), torch.cat([old[1], v], 2))
        return KVCache(grown, self.length + added, self.window)


class RingKVCache:
    """Preallocated, written in place, constant memory: for sampling under ``torch.no_grad`` only.

    ``capacity`` tokens per layer. When full, the oldest tokens after the first ``sink`` are overwritten; order does
    not matter to attention, because keys carry their positions. Without room for a request it raises, so that a video
    longer than the cache is never silently truncated: pass a window (``wrap=True``) to allow it.
    """

    def __init__(self, capacity: int, *, sink: int = 0, wrap: bool = False) -> None:
        self.capacity, self.sink, self.wrap = capacity, sink, wrap
        self.length = 0
        self._buffers: dict[int, KV] = {}

    def layer(self, index: int) -> KV | None:
        buffers = self._buffers.get(index)
        filled = min(self.length, self.capacity)
        return None if buffers is None or filled == 0 else (buffers[0][:, :, :filled], buffers[1][:, :, :filled])

    def extended(self, staged: Mapping[int, KV]) -> RingKVCache:
        """Write the staged tokens in place; returns itself."""
        assert not torch.is_grad_enabled(), "RingKVCache is written in place: sampling only, under torch.no_grad()"
        added = 0
        for index, (k, v) in staged.items():
            added = k.shape[2]
            slots = self._slots(added, k.device)
            if index not in self._buffers:
                shape = (k.shape[0], k.shape[1], self.capacity, k.shape[3])
                self._buffers[index] = (k.new_zeros(shape), v.new_zeros(shape))
            for buffer, new in zip(self._buffers[index], (k, v), strict=True):
                buffer[:, :, slots] = new
        self.length += added
        return self

    def _slots(self, added: int, device: torch.device) -> slice | Tensor:
        end = self.length + added
        if end <= self.capacity:
            return slice(self.length, end)
        if not self.wrap:
            raise UserError(f"the KV cache holds {self.capacity} tokens and {end} are needed: give it a window")
        if added > self.capacity - self.sink:
            raise UserError(f"the KV window holds {self.capacity - self.sink} tokens, fewer than one chunk ({added})")
        positions = torch.arange(self.length, end, device=device)
        ring = self.capacity - self.sink
        return torch.where(positions < self.sink, positions, self.sink + (positions - self.sink) % ring)
