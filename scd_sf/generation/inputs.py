"""A clip that is made from a video instead of pure noise (SDEdit): each chunk begins with ``x_t =
(1 - t) x + t eps`` of the video's latents x, at one of the sampler's times. No student is trained
for it.

Letters: B batch, n latent frames of a chunk, F pixel frames, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scd_sf.diffusion.flow import add_noise
from scd_sf.diffusion.noise import Noise
from scd_sf.diffusion.samplers import OnStep, Sampler, Velocity, first_step
from scd_sf.models.wan.vae import Vae
from scd_sf.types import on_device


@dataclass(frozen=True)
class ChunkInput:
    """What a chunk is made from: latents (B or 1, n, C, H, W) and the share of noise in them, 1 for
    pure noise (:func:`~scd_sf.diffusion.samplers.first_step`)."""

    latents: Tensor
    strength: float


class InputsEnd(Exception):
    """There is no input for another chunk."""


@dataclass
class FromInputs:
    """The sampler ``inner``, which begins each chunk with the next of ``inputs``: it is taken when
    the chunk's denoising begins, after the encoder's pass. Raises InputsEnd after the last."""

    inner: Sampler
    inputs: Iterator[ChunkInput]

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def steps(self) -> int:
        return self.inner.steps

    @property
    def times(self) -> tuple[float, ...]:
        return self.inner.times

    def __call__(
        self,
        velocity: Velocity,
        x_T: Tensor,
        noise_like: Noise,
        exit_step: int | None = None,
        on_step: OnStep | None = None,
        begin: int = 0,
    ) -> Tensor:
        """As ``inner``, but ``begin`` follows from the input's strength."""
        source = next(self.inputs, None)
        if source is None:
            raise InputsEnd
        begin = first_step(self.inner, source.strength)
        t = torch.full(x_T.shape[:1], self.times[begin], device=x_T.device)
        x_t = add_noise(on_device(source.latents, x_T.device), x_T, t)
        return self.inner(velocity, x_t, noise_like, exit_step, on_step, begin)


def chunk_inputs(
    vae: Vae, frames: Iterable[Tensor], chunk: int, strength: float
) -> Iterator[ChunkInput]:
    """The chunks of a video, each encoded when it is taken; frames that fill no chunk are left out.

    ``frames``: pixels (B or 1, F, 3, H, W) in [0, 1] in pieces of any length, read as they are
    needed. ``strength``: of all chunks.
    """
    stream, pieces, num_held = vae.encoder_stream(), list[Tensor](), 0
    size = 1 + (chunk - 1) * vae.geometry.temporal
    for piece in frames:
        pieces.append(piece)
        num_held += piece.shape[1]
        while num_held >= size:
            pixels = torch.cat(pieces, dim=1)
            pieces, num_held = [pixels[:, size:]], num_held - size
            yield ChunkInput(stream.push(pixels[:, :size] * 2 - 1), strength)
            size = chunk * vae.geometry.temporal
