"""Rectified flow's algebra and the shifted time law."""

from __future__ import annotations

import pytest
import tiny
import torch

from scd_sf.diffusion.flow import (
    add_noise,
    broadcast_time,
    shift_time,
    shifted_uniform,
    velocity_target,
    x_0_from_velocity,
)
from scd_sf.types import UserError


def pair(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return tiny.latents(2, 3, 0, dtype), tiny.latents(2, 3, 1, dtype)


def test_ends_are_exact() -> None:
    x_0, eps = pair()
    assert torch.equal(add_noise(x_0, eps, torch.zeros(2)), x_0)
    assert torch.equal(add_noise(x_0, eps, torch.ones(2)), eps)
    mixed = add_noise(x_0, eps, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]))
    assert torch.equal(mixed[0, 0], x_0[0, 0]) and torch.equal(mixed[0, 1], eps[0, 1])


@pytest.mark.parametrize("t", [1e-3, 0.02, 0.5, 0.98, 1.0])
def test_x_0_round_trip_in_fp32(t: float) -> None:
    x_0, eps = pair()
    times = torch.full((2,), t)
    back = x_0_from_velocity(add_noise(x_0, eps, times), velocity_target(x_0, eps), times)
    assert back.dtype == torch.float32
    assert float((back - x_0).abs().max()) < 1e-6


def test_velocity_is_the_derivative_of_the_path() -> None:
    x_0, eps = pair(torch.float64)
    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    slope = (add_noise(x_0, eps, t + 1e-3) - add_noise(x_0, eps, t - 1e-3)) / 2e-3
    assert torch.allclose(slope, velocity_target(x_0, eps), rtol=0, atol=1e-10)


def test_time_is_never_less_than_fp32() -> None:
    x_0, _ = pair()
    assert broadcast_time(torch.tensor([0.999], dtype=torch.bfloat16), x_0).dtype == torch.float32
    assert broadcast_time(torch.zeros(2, 3, dtype=torch.float64), x_0).shape == (2, 3, 1, 1, 1)
    assert broadcast_time(torch.zeros(1, dtype=torch.float64), x_0).dtype == torch.float64


def test_shift_is_5t_over_1_plus_4t() -> None:
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(shift_time(u, 5.0), 5 * u / (1 + 4 * u))
    assert float(shift_time(torch.tensor(0.5), 5.0)) == pytest.approx(0.8333, abs=1e-4)
    assert torch.equal(shift_time(u, 1.0), u)
    for shift in (0.0, -1.0):
        with pytest.raises(UserError, match=r"timestep shift is .*; it must be positive"):
            shift_time(u, shift)


def test_shifted_uniform_has_the_shifted_quantiles_and_is_reproducible() -> None:
    t = shifted_uniform((20000,), 5.0, tiny.generator(0))
    assert t.dtype == torch.float32 and float(t.min()) >= 0 and float(t.max()) <= 1
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    assert torch.allclose(t.quantile(levels), shift_time(levels, 5.0), atol=0.01)
    assert float(t.mean()) == pytest.approx(0.747, abs=0.01)
    assert torch.equal(t, shifted_uniform((20000,), 5.0, tiny.generator(0)))
