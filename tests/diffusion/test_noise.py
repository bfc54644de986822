"""Where noise is drawn, and that a place in the training decides it."""

from __future__ import annotations

import torch

from scd_sf.diffusion.noise import generator, local_noise


def test_local_noise_is_of_its_place() -> None:
    x = torch.empty(64, 32, dtype=torch.bfloat16)
    first, again, other = (local_noise(x, generator(0, "step", n)) for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.dtype == x.dtype
    assert abs(float(first.float().std()) - 1) < 0.05
    counted = local_noise(torch.empty(8, 4, device="meta"), generator(0))
    assert counted.is_meta and counted.shape == (8, 4)
