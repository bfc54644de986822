"""Random numbers: the device they are drawn on, and the seeds they depend on.

What must be the same on every device and number of ranks is drawn on the CPU and reaches a GPU from
pinned memory, so that the host does not wait for the GPU. Other noise (the corruption of
contexts while training, 33 million numbers a micro-batch at Wan's size) is drawn where it is used,
from a seed of the same place in the training. The noise of each frame of a sampled video is
``ClipNoise`` in generation/generate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scd_sf.files import place_digest
from scd_sf.types import on_device

Noise = Callable[[Tensor], Tensor]


def generator(seed: int, *position: int | str) -> torch.Generator:
    """A CPU generator for one place, e.g. (seed, "noise", step, micro): no state to save, no
    collisions."""
    return torch.Generator().manual_seed(int.from_bytes(place_digest(seed, *position), "big") >> 1)


def cpu_noise(rng: torch.Generator) -> Noise:
    """Standard normal noise like a tensor, drawn on the CPU: the same on every device and number of
    ranks."""

    def like(x: Tensor) -> Tensor:
        return on_device(
            torch.randn(x.shape, generator=rng, dtype=torch.float32), x.device, x.dtype
        )

    return like


def row_noise(seeds: Sequence[int]) -> Noise:
    """Noise whose row b depends on ``seeds[b]`` alone: samples do not change with batch, rank or
    order."""
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def like(x: Tensor) -> Tensor:
        rows = [torch.randn(x.shape[1:], generator=stream) for stream in streams]
        return on_device(torch.stack(rows), x.device, x.dtype)

    return like


def local_noise(x: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal noise like x, drawn on x's own device. It depends on ``rng``'s state alone,
    but differs between GPU and CPU."""
    if x.device.type == "cpu":
        return torch.randn(x.shape, generator=rng).to(x.dtype)
    if x.is_meta:  # scd plan only counts
        return torch.empty_like(x)
    seed = int(torch.randint(2**62, (), generator=rng))
    device_rng = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, generator=device_rng, device=x.device, dtype=x.dtype)
