"""What rollout and losses know of a student: :class:`FrameGenerator`. SCD and the causal baseline both are one.

Letters: B batch, K noisy samples per frame, F latent frames, M target chunks, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.types import Conditioning, UserError, on_device


@dataclass(frozen=True)
class Query:
    """The encoder's noisy query frames of SCD on Wan: x (B, F, C, H, W) at times t (B, F) (paper 4, supplement E.1);
    None for models trained from scratch, whose encoder has no query.

    ``eta`` is the context corruption of Eq. 7; its noise comes from ``rng`` (CPU), independently per noisy sample.
    """

    x: Tensor | None = None
    t: Tensor | None = None
    eta: float = 0.0
    rng: torch.Generator | None = None


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
    frames = torch.tensor(chunk_frames(targets, chunk))
    return x.index_select(dim, on_device(frames, x.device))


def chunk_frames(chunks: Sequence[int], chunk: int) -> list[int]:
    """Indices of the frames of these chunks, ``chunk`` frames each."""
    return [index * chunk + offset for index in chunks for offset in range(chunk)]


def pick_frames(signal_BFE: Tensor | None, frames: Sequence[int]) -> Tensor | None:
    """Of a signal (B, F, E) the vectors of these frames; one vector (a clip's label) serves all frames.

    UserError: a frame that the signal does not reach.
    """
    if signal_BFE is None:
        return None
    count, num_frames = len(frames), signal_BFE.shape[1]
    if num_frames == 1:
        return signal_BFE.expand(-1, count, -1)
    last = max(frames, default=0)
    if last >= num_frames:
        raise UserError(f"actions are given for {num_frames} frames, frame {last} needs one too: give one per frame")
    first = frames[0] if frames else 0
    if list(frames) == list(range(first, first + count)):
        return signal_BFE[:, first : first + count]
    indices = on_device(torch.tensor(list(frames)), signal_BFE.device)
    return signal_BFE.index_select(1, indices)
