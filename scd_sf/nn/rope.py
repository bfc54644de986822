"""Wan's three-axis rotary positions (time, height, width). Positions are arguments: Python integers, never floats.

Angles are computed in float64 and stored in float32, so frame 1,000 is as exact as frame 1 whatever the model's dtype
(released SCD and FAR code keep ids in bf16, where 257 == 256: spec B3). Letters: L tokens, D head dim.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """cos and sin of every token's angles, (L, D/2) each, for interleaved pairs."""

    cos: Tensor
    sin: Tensor


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How Wan splits a head over (time, height, width): 128 -> (44, 42, 42)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def _angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """(P,) float64 positions -> (P, dim/2) angles."""
    inverse = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(positions, inverse)


@lru_cache(maxsize=512)
def rope_table(
    frames: tuple[int, ...],
    height: int,
    width: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    theta: float = 10000.0,
) -> Rotary:
    """The table of ``len(frames) * height * width`` tokens, time slowest; ``frames`` are absolute frame indices."""
    with torch.inference_mode(False):  # cached: a table first needed while sampling must also serve training
        return _build_table(frames, height, width, head_dim, device, dtype, theta)


def _build_table(
    frames: tuple[int, ...],
    height: int,
    width: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    theta: float,
) -> Rotary:
    t_dim, h_dim, w_dim = axis_dims(head_dim)
    t = _angles(torch.tensor(frames, dtype=torch.float64), t_dim, theta)
    h = _angles(torch.arange(height, dtype=torch.float64), h_dim, theta)
    w = _angles(torch.arange(width, dtype=torch.float64), w_dim, theta)
    grid = (len(frames), height, width)
    angles = torch.cat(
        [
            t[:, None, None].expand(*grid, -1),
            h[None, :, None].expand(*grid, -1),
            w[None, None, :].expand(*grid, -1),
        ],
        dim=-1,
    ).flatten(0, 2)
    return Rotary(angles.cos().to(device, dtype), angles.sin().to(device, dtype))


def time_shift(
    frames: int, head_dim: int, device: torch.device, dtype: torch.dtype = torch.float32, theta: float = 10000.0
) -> Rotary:
    """(1, D/2): turns a rotated key into the key of the same place ``frames`` later (rotations add up)."""
    t_dim, _, _ = axis_dims(head_dim)
    angles = torch.zeros(1, head_dim // 2, dtype=torch.float64)
    angles[:, : t_dim // 2] = _angles(torch.tensor([frames], dtype=torch.float64), t_dim, theta)
    return Rotary(angles.cos().to(device, dtype), angles.sin().to(device, dtype))


def join(*tables: Rotary) -> Rotary:
    """Tables of consecutive token groups as one."""
    return Rotary(torch.cat([t.cos for t in tables]), torch.cat([t.sin for t in tables]))


def rotate(x_BNLD: Tensor, rotary: Rotary) -> Tensor:
    """Rotate interleaved pairs of the last axis; computed in at least fp32, returned in the input's dtype.

    One complex product instead of four real ones and a copy: 5x faster forward + backward on CPU.
    """
    pairs = x_BNLD.to(rotary.cos.dtype).unflatten(-1, (-1, 2)).contiguous()
    rotated = torch.view_as_complex(pairs) * torch.complex(rotary.cos, rotary.sin)
    return torch.view_as_real(rotated).flatten(-2).to(x_BNLD.dtype)
