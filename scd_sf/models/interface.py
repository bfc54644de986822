"""What rollout and losses know of a student: :class:`FrameGenerator`. SCD and the causal baseline both are one.

Letters: B batch, K noisy samples per frame, F latent frames, M target chunks, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from scd_sf.nn.kv_cache import Window
from scd_sf.nn.rope import Axes
from scd_sf.types import Conditioning, UserError, on_device


@dataclass(frozen=True)
class Query:
    """The encoder's noisy query frames of SCD on Wan: x (B, F, C, H, W) at times t (B, F) (paper 4; spec W4); None for
    models trained from scratch, whose encoder has no query.

    ``eta`` is the context corruption of Eq. 7; its noise comes from ``rng`` (CPU), independently per noisy sample.
    """

    x: Tensor | None = None
    t: Tensor | None = None
    eta: float = 0.0
    rng: torch.Generator | None = None


@dataclass(frozen=True)
class CacheConfig:
    """The streaming history, counted in latent frames."""

    window: int | None = None
    """Latent frames that are kept; null: all."""
    sink: int = 0
    """First frames that always stay in the window."""
    preallocate: int | None = None
    """Frames of an in-place ring (sampling only); null: the functional cache of training."""
    turn_sink: bool = True
    """Turn the sink's keys along, to stand right before the window (scd_sf/nn/kv_cache.py)."""

    def __post_init__(self) -> None:
        if (self.window is not None and self.window < 1) or self.sink < 0:
            raise UserError(
                f"cache: window {self.window} must be at least 1 frame (or null), sink {self.sink} at least 0"
            )
        if self.preallocate is not None and self.preallocate < 1:
            raise UserError(f"cache.preallocate is {self.preallocate}; it must be at least 1 frame")

    @classmethod
    def sampling(cls, window: int, sink: int, frames: int) -> CacheConfig:
        """A preallocated history: of all ``frames`` (``window`` 0, or none shorter than they), or of the first ``sink``
        and last ``window``."""
        if window < 0 or sink < 0 or (sink and not window):
            raise UserError(f"window {window} and sink {sink} must be >= 0, and a sink needs a window")
        if not window or window + sink >= frames:
            return cls(preallocate=frames)
        return cls(window, sink, preallocate=window + sink)

    def tokens(self, per_frame: int, axes: Axes) -> Window:
        """In tokens, for keys whose rotary positions are split over ``axes``."""
        recent = None if self.window is None else self.window * per_frame
        return Window(recent, self.sink * per_frame, per_frame if self.turn_sink and self.sink else 0, axes)


class FrameStreamer(Protocol):
    """What a rollout knows of a student, guided or not: it generates ``chunk`` latent frames at a time.

    ``Stream`` objects are opaque to callers: :meth:`start` makes one, :meth:`advance` returns the next one.
    """

    @property
    def chunk(self) -> int: ...

    def start(self, cond: Conditioning, latent: tuple[int, int], cache: CacheConfig | None = None) -> Any:
        """A new stream for latent frames of (H, W)."""
        ...

    def switch(self, stream: Any, cond: Conditioning) -> Any:
        """The same stream under another prompt from the next chunk on; what was cached of the past stays."""
        ...

    def advance(self, stream: Any, x_0: Tensor | None, query_noise: Tensor) -> Any:
        """Once per chunk: the finished previous chunk in (None before the first), the next chunk's context out."""
        ...

    def denoise(self, stream: Any, x_t: Tensor, t: Tensor) -> Tensor:
        """S times per chunk, a pure read: x_t (B, chunk, C, H, W), t (B,) -> velocity."""
        ...


class FrameGenerator(FrameStreamer, Protocol):
    """A student: it can be rolled out, and trained on whole clips."""

    @property
    def needs_query(self) -> bool:
        """Whether its encoder is given noisy query frames (SCD on Wan)."""
        ...

    def teacher_forced(
        self,
        x_t: Tensor,
        t: Tensor,
        x_clean: Tensor,
        cond: Conditioning,
        *,
        query: Query | None = None,
        targets: Sequence[int] | None = None,
    ) -> Tensor:
        """One pass over the clip: x_t (K, B, F, C, H, W), t (K, B, F), x_clean (B, F, C, H, W) -> velocity
        (K, B, M*chunk, C, H, W) of the target chunks (default: all). ``query``: SCD's query frames and the corruption
        of its context; ignored by others."""
        ...


def check_chunks(frames: int, chunk: int) -> int:
    """Number of chunks in a clip; UserError if they do not divide."""
    if frames % chunk:
        raise UserError(f"chunk is {chunk}, which does not divide the clip's {frames} latent frames: choose a divisor")
    return frames // chunk


def pick_chunks(x: Tensor, targets: Sequence[int], chunk: int, dim: int) -> Tensor:
    """The frames of the target chunks along ``dim``; no copy when all are wanted."""
    if list(targets) == list(range(x.shape[dim] // chunk)):
        return x
    frames = [c * chunk + i for c in targets for i in range(chunk)]
    return x.index_select(dim, on_device(torch.tensor(frames), x.device))


def pick_frames(signal_BFE: Tensor | None, frames: Sequence[int]) -> Tensor | None:
    """The vectors of these frames; one vector (labels) serves all. UserError: frames that nothing is told of."""
    if signal_BFE is None:
        return None
    told = signal_BFE.shape[1]
    if told == 1:
        return signal_BFE.expand(-1, len(frames), -1)
    if max(frames, default=0) >= told:
        raise UserError(f"actions are given for {told} frames, frame {max(frames)} needs one too: give one per frame")
    first, count = frames[0] if frames else 0, len(frames)
    if list(frames) == list(range(first, first + count)):
        return signal_BFE[:, first : first + count]
    return signal_BFE.index_select(1, on_device(torch.tensor(list(frames)), signal_BFE.device))
