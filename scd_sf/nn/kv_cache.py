"""Key/value caches of the streaming path. Keys are stored rotated; lengths are Python integers (no
``.item()``).

``KVCache`` is immutable and detached: training's rollout uses it, so no gradient can cross frames.
(Written in place, K/V would leak gradients between chunks.) ``RingKVCache`` is preallocated and
written in place: inference only. Letters: B batch, N heads, L tokens, D head dim.

A window with a sink (the first frames, kept for ever) would let the distance to the sink grow past
anything trained. So the sink's keys are rotated again as the window moves, to the positions right
before the recent frames (rotations add up: a key rotated again is the key of a later position).
Recent frames stay as they are: rotary attention sees only differences.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from scd_sf.nn.rope import Axes, rope_table, rotate
from scd_sf.types import UserError

KV = tuple[Tensor, Tensor]
Buffers = dict[int, KV]  # by layer


class Past(Protocol):
    """The past that attention reads: per layer, keys and values (B, N, L, D), or None when there
    are none."""

    def layer(self, index: int) -> KV | None: ...

    def joined(self, index: int, k_BNLD: Tensor, v_BNLD: Tensor) -> KV:
        """The past followed by these tokens."""
        ...


class Cache(Past, Protocol):
    """A past that can grow by what one forward staged, in two parts: what happens on the device,
    and what Python knows of it (a recording replays the first alone, models/replay.py)."""

    @property
    def place(self) -> Hashable:
        """Key of a recording: everything but tensor values that :meth:`joined` and :meth:`write`
        depend on."""
        ...

    def write(self, new_kv: Mapping[int, KV]) -> Mapping[int, KV]:
        """Store K/V (layer -> k and v, each (B, N, L_new, D)). Returns the argument of
        :meth:`grown`."""
        ...

    def grown(self, new_kv: Mapping[int, KV], tokens: int) -> Cache:
        """The cache with ``tokens`` more tokens, those of :meth:`write`."""
        ...


@dataclass(frozen=True)
class Window:
    """Which past tokens stay visible: the first ``sink`` and the last ``recent`` (None = all).

    ``per_frame`` tokens make a frame whose sink keys, split over the rotary ``axes``, move
    with the window; 0: they keep their positions.
    """

    recent: int | None = None
    sink: int = 0
    per_frame: int = 0
    axes: Axes = (0, 0, 0)

    def shift(self, length: int) -> int:
        """Number of frames by which the sink's keys are moved after ``length`` tokens."""
        if self.recent is None or not self.per_frame or not self.sink:
            return 0
        return max(0, length - self.recent - self.sink) // self.per_frame


@dataclass(frozen=True)
class CacheConfig:
    """The streaming history, counted in latent frames."""

    window: int | None = None
    """The last latent frames that are kept; null: all."""
    sink: int = 0
    """First frames that stay, too, beside the window's."""
    preallocate: int | None = None
    """Frames of an in-place ring (sampling only); null: the functional cache of training."""
    turn_sink: bool = True
    """Move the sink's keys to the positions right before the window (top of this file)."""

    def __post_init__(self) -> None:
        if (self.window is not None and self.window < 1) or self.sink < 0:
            raise UserError(
                f"cache: window {self.window} must be at least 1 frame (or null), sink {self.sink} at least 0"
            )
        if self.preallocate is not None and self.preallocate < 1:
            raise UserError(f"cache.preallocate is {self.preallocate}; it must be at least 1 frame")

    @classmethod
    def sampling(cls, window: int, sink: int, frames: int) -> CacheConfig:
        """A preallocated history: of all ``frames`` (``window`` 0, or none shorter than they), or
        of the first ``sink`` and last ``window``."""
        if window < 0 or sink < 0 or (sink and not window):
            raise UserError(
                f"window {window} and sink {sink} must be >= 0, and a sink needs a window"
            )
        if not window or window + sink >= frames:
            return cls(preallocate=frames)
        return cls(window, sink, preallocate=window + sink)

    def token_window(self, per_frame: int, axes: Axes) -> Window:
        """The window in tokens, for keys whose rotary positions are split over ``axes``."""
        recent = None if self.window is None else self.window * per_frame
        turn_step = per_frame if self.turn_sink and self.sink else 0
        return Window(recent, self.sink * per_frame, turn_step, axes)

    def num_lengths(self, chunk: int) -> int:
        """Number of lengths of a preallocated history that grows by ``chunk`` frames: none, whole
        chunks, full."""
        return math.ceil((self.preallocate or 0) / chunk) + 1


def turned(k_BNLD: Tensor, frames: int, axes: Axes) -> Tensor:
    """Rotated keys as they would be ``frames`` later: rotations add up, and place (0, 0) adds none
    in space."""
    if frames == 0:
        return k_BNLD
    dtype = torch.float64 if k_BNLD.dtype == torch.float64 else torch.float32
    return rotate(k_BNLD, rope_table((frames,), 1, 1, axes, k_BNLD.device, dtype))


def _append(past: KV | None, k_BNLD: Tensor, v_BNLD: Tensor) -> KV:
    if past is None:
        return k_BNLD, v_BNLD
    return _join((past, (k_BNLD, v_BNLD)))


def _copy(x_BNLD: Tensor) -> Tensor:
    """A copy without graph. A view would keep the whole tensor alive."""
    return x_BNLD.detach().clone(memory_format=torch.contiguous_format)


def _join(pieces: tuple[KV, ...]) -> KV:
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([k for k, _ in pieces], dim=2), torch.cat([v for _, v in pieces], dim=2)


@dataclass(frozen=True)
class LivePast:
    """K/V of one pass with their graph: the decoder's cached prefix, where gradients must reach the
    encoder."""

    layers: Mapping[int, KV]

    def layer(self, index: int) -> KV | None:
        return self.layers.get(index)

    def joined(self, index: int, k_BNLD: Tensor, v_BNLD: Tensor) -> KV:
        return _append(self.layer(index), k_BNLD, v_BNLD)


@dataclass(frozen=True)
class KVCache:
    """Append-only and functional: :meth:`grown` returns a new cache; tensors are detached and never
    written.

    A layer's past is kept in the pieces it came in and joined where attention reads it. A rollout's
    graph keeps the cache of every chunk. They share their pieces; joined pasts would take memory
    that grows with the square of the length.
    """

    layers: Mapping[int, tuple[KV, ...]]
    length: int = 0
    window: Window = Window()

    @classmethod
    def empty(cls, window: Window | None = None) -> KVCache:
        return cls({}, 0, window or Window())

    def layer(self, index: int) -> KV | None:
        """The past that a layer may see, joined: (k, v), each (B, N, L, D); None before the first
        frame."""
        pieces = self.layers.get(index)
        if pieces is None:
            return None
        k, v = _join(pieces)
        recent, sink = self.window.recent, self.window.sink
        if recent is None or self.length <= recent + sink:
            return k, v
        near = turned(k[:, :, :sink], self.window.shift(self.length), self.window.axes)
        return torch.cat([near, k[:, :, -recent:]], dim=2), torch.cat(
            [v[:, :, :sink], v[:, :, -recent:]], dim=2
        )

    def joined(self, index: int, k_BNLD: Tensor, v_BNLD: Tensor) -> KV:
        if self.window.recent is None:
            return _join((*self.layers.get(index, ()), (k_BNLD, v_BNLD)))
        return _append(self.layer(index), k_BNLD, v_BNLD)

    @property
    def place(self) -> Hashable:
        return self.length

    def write(self, new_kv: Mapping[int, KV]) -> Mapping[int, KV]:
        return {index: (_copy(k), _copy(v)) for index, (k, v) in new_kv.items()}

    def grown(self, new_kv: Mapping[int, KV], tokens: int) -> KVCache:
        layers = {index: (*self.layers.get(index, ()), kv) for index, kv in new_kv.items()}
        return KVCache(layers, self.length + tokens, self.window)


class RingKVCache:
    """Allocated once, written in place, constant memory: for sampling under ``torch.no_grad`` only.

    ``capacity`` tokens per layer, and room for ``new`` ones that a forward attends to together with
    them. When full, the oldest tokens after the first ``sink`` are overwritten; order does not
    matter to attention, because keys carry their positions. Without room for a request it raises,
    so that a video longer than the cache is never silently truncated: pass a window (``wrap=True``)
    to allow it.
    """

    def __init__(
        self, capacity: int, new: int, *, wrap: bool = False, window: Window | None = None
    ) -> None:
        """``window``: says how large the sink is and whether it turns."""
        window = window or Window()
        self.capacity = capacity
        self.new = new
        self.sink = window.sink
        self.wrap = wrap
        self.window = replace(window, recent=capacity - window.sink)
        self.length = self.num_tokens = 0
        self._buffers: Buffers = {}
        self._name: Hashable = None
        self._first: dict[int, Tensor] = {}  # the sink's keys at their own positions, once it moves

    def layer(self, index: int) -> KV | None:
        buffers = self._buffers.get(index)
        if buffers is None or self.num_tokens == 0:
            return None
        return buffers[0][:, :, : self.num_tokens], buffers[1][:, :, : self.num_tokens]

    def joined(self, index: int, k_BNLD: Tensor, v_BNLD: Tensor) -> KV:
        """Views: the new tokens are written behind the past, into room that the next call uses
        again."""
        buffers = self._buffers.get(index)
        if buffers is None:
            return k_BNLD, v_BNLD
        end = self.num_tokens + k_BNLD.shape[2]
        for buffer, new in zip(buffers, (k_BNLD, v_BNLD), strict=True):
            buffer[:, :, self.num_tokens : end] = new
        return buffers[0][:, :, :end], buffers[1][:, :, :end]

    def use(self, buffers: Buffers, name: Hashable) -> None:
        """Store the history in ``buffers`` of an earlier video; call it before the first token.
        ``name`` identifies them in :attr:`place`."""
        self._buffers, self._name = buffers, name

    @property
    def place(self) -> Hashable:
        return self._name, self.num_tokens

    def write(self, new_kv: Mapping[int, KV]) -> Mapping[int, KV]:
        """Behind the past, where no step reads it yet: a step that is run twice has the same
        result."""
        assert not torch.is_grad_enabled(), (
            "RingKVCache is written in place: sampling only, under torch.no_grad()"
        )
        for index, (k, v) in new_kv.items():
            self._runs(k.shape[2])  # UserError without room
            for buffer, new in zip(self._room(index, k), (k, v), strict=True):
                buffer[:, :, self.num_tokens : self.num_tokens + new.shape[2]] = new
        return {}

    def grown(self, new_kv: Mapping[int, KV], tokens: int) -> RingKVCache:
        """This cache; the new tokens replace the oldest ones where it was full."""
        for slot, first, count in self._runs(tokens):
            start = self.num_tokens + first
            buffers = [buffer for kv in self._buffers.values() for buffer in kv]
            if slot != start and buffers:
                old, new = ([b[:, :, at : at + count] for b in buffers] for at in (slot, start))
                torch._foreach_copy_(old, new)
        self.length += tokens
        self.num_tokens = min(self.length, self.capacity)
        if tokens and (shift := self.window.shift(self.length)):
            for index, (k, _) in self._buffers.items():
                sink = self._first.setdefault(index, k[:, :, : self.sink].clone())
                k[:, :, : self.sink] = turned(sink, shift, self.window.axes)
        return self

    def _room(self, index: int, like: Tensor) -> KV:
        """The layer's buffers, allocated at the first call. One token is spare, so that no view is
        ever the whole buffer: compilers take that for another case and compile again."""
        if index not in self._buffers:
            shape = (like.shape[0], like.shape[1], self.capacity + self.new + 1, like.shape[3])
            # other videos use the buffers too (use), in inference mode or not
            with torch.inference_mode(False):
                k, v = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
            self._buffers[index] = k, v
        return self._buffers[index]

    def _runs(self, num_new: int) -> list[tuple[int, int, int]]:
        """Slots of ``num_new`` tokens as few runs of (first slot, first new token, count).
        UserError without room."""
        end = self.length + num_new
        ring = self.capacity - self.sink
        if end > self.capacity and not self.wrap:
            raise UserError(
                f"the KV cache holds {self.capacity} tokens and {end} are needed: give it a window"
            )
        if end > self.capacity and num_new > ring:
            raise UserError(f"the KV window holds {ring} tokens, fewer than one chunk ({num_new})")
        runs, position = [], self.length
        while position < end:
            slot = (
                position if position < self.capacity else self.sink + (position - self.sink) % ring
            )
            count = min(end - position, self.capacity - slot)
            runs.append((slot, position - self.length, count))
            position += count
        return runs


def new_cache(config: CacheConfig | None, tokens: int, axes: Axes, new_frames: int) -> Cache:
    """An empty history for ``tokens`` tokens per latent frame, read by forwards of up to
    ``new_frames`` frames.

    ``axes``: the rotary positions of its keys.
    """
    config = config or CacheConfig()
    window, new = config.token_window(tokens, axes), new_frames * tokens
    if config.preallocate is None:
        return KVCache.empty(window)
    if window.recent is None:
        return RingKVCache(config.preallocate * tokens, new)
    return RingKVCache(window.recent + window.sink, new, wrap=True, window=window)
