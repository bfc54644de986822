"""The interface of students, :class:`FrameGenerator`, that losses and the rollout use. Read this
first.

Both SCD models and the causal baseline are one. A clip is made of *chunks* of ``chunk`` latent
frames, denoised together. There are two ways through a student, and tests hold them equal:

- Training on whole clips: :meth:`~FrameGenerator.teacher_forced`, one pass over all chunks under a
  mask.
- Rollout (sampling, stage 3), chunk by chunk, with a cache in the mask's place:

      stream = generator.start(cond, latent_size)
      for each chunk:
          stream = generator.advance(stream, x_0 of the chunk before, query_noise)   # once per chunk
          x_0 = sampler(x_t -> generator.denoise(stream, x_t, t))                    # S calls per chunk

SCD puts its encoder into ``advance`` and its light decoder into ``denoise``. The causal baseline
writes the history in ``advance`` and runs the whole model in ``denoise``.

Gradients: the history is detached, and x_0 is detached by ``advance``, so no gradient crosses
chunks. Within a chunk they flow through ``denoise`` into what ``advance`` computed, which is SCD's
encoder: ``advance`` must run with gradients for the chunks that train. Nothing that a stream holds
is written in place, except the preallocated history of sampling, which refuses to be written under
autograd.

Letters: B clips, K noisy samples per frame, F latent frames, M target chunks, C channels, H W
height and width of a latent frame, L tokens of a chunk, E width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.types import Conditioning, UserError, on_device

Stream = Any  # state of a video that is being generated; each student has its own type


@dataclass(frozen=True)
class Query:
    """The query frames that SCD's encoder on Wan reads in training (supplement E.1): ``x`` (B, F,
    C, H, W) at times ``t`` (B, F), with noise of their own (ADR 0004)."""

    x: Tensor
    t: Tensor


@dataclass(frozen=True)
class Corruption:
    """Noise on SCD's contexts in training (Eq. 7), independent for each noisy sample.

    ``strength`` is relative to a context's root mean square; the noise comes from ``rng`` (CPU).
    """

    strength: float
    rng: torch.Generator


class FrameStreamer(Protocol):
    """The methods of a student, guided or not, that a rollout calls."""

    @property
    def chunk(self) -> int:
        """Latent frames generated together."""
        ...

    def start(
        self, cond: Conditioning, latent_size: tuple[int, int], cache: CacheConfig | None = None
    ) -> Stream:
        """A new stream of B videos: ``cond`` has B rows, latent frames are ``latent_size`` = (H, W).

        ``cache``: how much history is kept, and where (None: all of it, for training).
        """
        ...

    def switch(self, stream: Stream, cond: Conditioning) -> Stream:
        """The same stream under other conditions from the next chunk on; the history stays."""
        ...

    def advance(self, stream: Stream, x_0: Tensor | None, query_noise: Tensor) -> Stream:
        """Once per chunk: x_0 (B, chunk, C, H, W), the finished chunk before, joins the history
        (None before the first chunk), and the coming chunk's context is made.

        ``query_noise``: pure noise of the coming chunk's shape, not the noise it starts from (ADR
        0004). SCD on Wan encodes it; the others read its shape and dtype alone.
        """
        ...

    def denoise(self, stream: Stream, x_t: Tensor, t: Tensor) -> Tensor:
        """S times per chunk: x_t (B, chunk, C, H, W) at t (B,) -> velocity of the same shape.
        Changes nothing."""
        ...


class SeparableStreamer(FrameStreamer, Protocol):
    """A student whose encoder and decoder can be driven apart: SCD. Guidance of the decoder needs
    it."""

    def encode_next(
        self, stream: Stream, x_0: Tensor | None, query_noise: Tensor
    ) -> tuple[Stream, Tensor]:
        """The encoder's part of :meth:`advance`: the stream, and the coming chunk's context (B, L,
        E)."""
        ...

    def with_context(self, stream: Stream, c_RLE: Tensor, query_noise: Tensor) -> Stream:
        """The decoder's part of :meth:`advance`: contexts of R rows, one per row of its
        conditions."""
        ...

    def switch_decoder(self, stream: Stream, cond: Conditioning) -> Stream:
        """Other conditions for the decoder alone, of a multiple of B rows."""
        ...


class FrameGenerator(FrameStreamer, Protocol):
    """A student: it can be rolled out, and trained on whole clips."""

    @property
    def needs_query(self) -> bool:
        """Whether training has to give its encoder noisy query frames (SCD on Wan)."""
        ...

    def teacher_forced(
        self,
        x_t: Tensor,
        t: Tensor,
        x_clean: Tensor,
        cond: Conditioning,
        *,
        query: Query | None = None,
        corruption: Corruption | None = None,
        targets: Sequence[int] | None = None,
    ) -> Tensor:
        """The velocities of the target chunks, each given the clean chunks before it.

        x_t (K, B, F, C, H, W) at t (K, B, F), constant within a chunk; x_clean (B, F, C, H, W) ->
        (K, B, M*chunk, C, H, W). ``targets``: indices of the M chunks (None: all). ``query``: read
        by SCD on Wan. ``corruption``: None, or that of SCD's contexts. The causal baseline ignores
        both. UserError: chunks do not divide F, or SCD on Wan has no query.
        """
        ...


def check_chunks(frames: int, chunk: int) -> int:
    """Number of chunks in a clip; UserError if they do not divide."""
    if frames % chunk:
        raise UserError(
            f"chunk is {chunk}, which does not divide the clip's {frames} latent frames: choose a divisor"
        )
    return frames // chunk


def pick_chunks(x: Tensor, targets: Sequence[int], chunk: int, dim: int) -> Tensor:
    """The frames of the target chunks along ``dim``; no copy when these are all chunks."""
    if list(targets) == list(range(x.shape[dim] // chunk)):
        return x
    frames = torch.tensor(chunk_frames(targets, chunk))
    return x.index_select(dim, on_device(frames, x.device))


def chunk_frames(chunks: Sequence[int], chunk: int) -> list[int]:
    """Indices of the frames of these chunks, ``chunk`` frames each."""
    return [index * chunk + offset for index in chunks for offset in range(chunk)]


def pick_frames(signal_BFE: Tensor | None, frames: Sequence[int]) -> Tensor | None:
    """The vectors (B, n, E) of n frames of a signal (B, F, E). A single vector (a clip's label)
    serves all frames.

    UserError: a frame that the signal does not reach.
    """
    if signal_BFE is None:
        return None
    count, num_frames = len(frames), signal_BFE.shape[1]
    if num_frames == 1:
        return signal_BFE.expand(-1, count, -1)
    last = max(frames, default=0)
    if last >= num_frames:
        raise UserError(
            f"actions are given for {num_frames} frames, frame {last} needs one too: give one per frame"
        )
    first = frames[0] if frames else 0
    if list(frames) == list(range(first, first + count)):
        return signal_BFE[:, first : first + count]
    indices = on_device(torch.tensor(list(frames)), signal_BFE.device)
    return signal_BFE.index_select(1, indices)
