"""Rectified flow: ``x_t = (1-t) x_0 + t eps``, velocity ``eps - x_0``, t in [0,1] with 1 = pure
noise.

Sigma is the float t itself: no 1000-entry grids and no nearest-neighbour look-ups (public DMD code
mixes two grids and is off by up to 19 % at low noise: docs/deviations.md). Everything is at least
fp32.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from scd_sf.types import UserError

Level = TypeVar("Level", float, Tensor)


def broadcast_time(t: Tensor, like: Tensor) -> Tensor:
    """t with fewer axes -> broadcastable to ``like`` (trailing axes of size 1), in at least
    fp32."""
    t = t if t.dtype == torch.float64 else t.float()
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def add_noise(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t; t is (..leading axes of x_0..). t = 0 returns x_0 exactly, t = 1 returns eps exactly."""
    s = broadcast_time(t, x_0)
    return (1 - s) * x_0 + s * eps


def velocity_target(x_0: Tensor, eps: Tensor) -> Tensor:
    """eps - x_0 (paper Eq. 1)."""
    return eps - x_0


def x_0_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """x_0 = x_t - t * velocity."""
    return x_t - broadcast_time(t, x_t) * velocity


def shift_time(u: Level, shift: float) -> Level:
    """t = k u / (1 + (k-1) u): Wan's timestep shift; k = 5 is the supplement's 5t/(1+4t) (Tables 6,
    7)."""
    if shift <= 0:
        raise UserError(f"timestep shift is {shift}; it must be positive (Wan 2.1 at 480p uses 5)")
    return shift * u / (1 + (shift - 1) * u)


def shifted_uniform(shape: tuple[int, ...], shift: float, rng: torch.Generator) -> Tensor:
    """t of the given shape: u uniform in [0, 1) from a CPU generator, then shifted. fp32."""
    return shift_time(torch.rand(shape, generator=rng), shift)


def shifted_logit_normal(shape: tuple[int, ...], shift: float, rng: torch.Generator) -> Tensor:
    """t of the given shape: u logit-normal(0, 1) (the released SCD's and FAR's sampler), then
    shifted. fp32."""
    return shift_time(torch.randn(shape, generator=rng).sigmoid(), shift)


def stratified_times(batch: int, shift: float, rng: torch.Generator) -> Tensor:
    """(B,) shifted times, one u in each of B equal strata of [0, 1), shuffled: less gradient noise
    at small batches."""
    u = (torch.randperm(batch, generator=rng) + torch.rand(batch, generator=rng)) / batch
    return shift_time(u, shift)
