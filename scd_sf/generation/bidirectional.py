"""Sampling of a bidirectional model, such as the teacher: all frames denoised together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scd_sf.diffusion.noise import row_noise
from scd_sf.diffusion.samplers import Sampler
from scd_sf.types import Conditioning, Denoiser


@torch.no_grad()
def sample_bidirectional(
    denoiser: Denoiser,
    cond: Conditioning,
    shape: tuple[int, int, int, int],
    sampler: Sampler,
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Latents (B, F, C, H, W) of a bidirectional model, one clip per prompt and seed.

    ``shape`` is (F, C, H, W). Students are sampled by generation/generate.py."""
    noise_like = row_noise(seeds)

    def velocity(x_t: Tensor, t: float) -> Tensor:
        return denoiser(x_t, torch.full(x_t.shape[:1], t, device=x_t.device), cond)

    return sampler(velocity, noise_like(torch.empty(len(seeds), *shape, device=device)), noise_like)
