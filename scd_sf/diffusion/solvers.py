"""Samplers: integrate a velocity model from t = 1 to t = 0. A model is a callable ``(x_t, t_scalar) -> velocity``.

A student distilled by Self-Forcing must be sampled by :class:`Renoise` with the times it was trained with; Euler on
it gives noise (spec/demo.md part c).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from scd_sf.diffusion.flow import shift_time
from scd_sf.diffusion.noise import Noise
from scd_sf.types import UserError

Velocity = Callable[[Tensor, float], Tensor]
FEW_STEP_LINEAR = (1.0, 0.75, 0.5, 0.25)


class Sampler(Protocol):
    """``name`` and ``steps`` are recorded in checkpoints and results."""

    @property
    def name(self) -> str: ...
    @property
    def steps(self) -> int: ...
    def __call__(self, velocity: Velocity, x_T: Tensor, noise_like: Noise, exit_step: int | None = None) -> Tensor:
        """Pure noise (any shape) -> x_0. ``exit_step``: stop there and return its x_0 estimate, with gradients at
        that step only (Self-Forcing, Algorithm 1)."""
        ...


def few_step_times(shift: float = 5.0, linear: tuple[float, ...] = FEW_STEP_LINEAR) -> tuple[float, ...]:
    """[1000, 750, 500, 250] / 1000 warped by the shift: (1, .9375, .8333, .625) for k = 5 (spec/scd.md W16)."""
    return tuple(shift_time(torch.tensor(linear, dtype=torch.float64), shift).tolist())


def many_step_times(steps: int, shift: float) -> tuple[float, ...]:
    """steps + 1 shifted times from 1 to exactly 0."""
    return tuple(shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist())


@dataclass(frozen=True)
class Euler:
    """Euler on ``steps`` shifted times."""

    steps: int = 50
    shift: float = 5.0

    @property
    def name(self) -> str:
        return "euler"

    def __call__(self, velocity: Velocity, x_T: Tensor, noise_like: Noise, exit_step: int | None = None) -> Tensor:
        if exit_step is not None:
            raise UserError("sampler 'euler' has no early exit: stage 3 needs sampler 'renoise'")
        x = x_T
        times = many_step_times(self.steps, self.shift)
        for now, later in pairwise(times):
            x = x + (later - now) * velocity(x, now)
        return x


@dataclass(frozen=True)
class Renoise:
    """Predict x_0, add fresh noise at the next time, repeat (the consistency / SDE sampler of Self-Forcing)."""

    times: tuple[float, ...] = (1.0, 0.9375, 5 / 6, 0.625)

    def __post_init__(self) -> None:
        decreasing = all(a > b for a, b in pairwise(self.times))
        if not self.times or self.times[0] != 1.0 or not decreasing or self.times[-1] <= 0:
            raise UserError(f"sampler times are {list(self.times)}; they must fall from 1.0 and stay above 0")

    @property
    def name(self) -> str:
        return "renoise"

    @property
    def steps(self) -> int:
        return len(self.times)

    def __call__(self, velocity: Velocity, x_T: Tensor, noise_like: Noise, exit_step: int | None = None) -> Tensor:
        last = self.steps - 1 if exit_step is None else exit_step
        if not 0 <= last < self.steps:
            raise UserError(f"exit step {last} is outside 0..{self.steps - 1}")
        x = x_T
        for step in range(last):
            now, later = self.times[step], self.times[step + 1]
            if exit_step is None:
                x_0 = x - now * velocity(x, now)
            else:
                with torch.no_grad():
                    x_0 = x - now * velocity(x, now)
            x = (1 - later) * x_0 + later * noise_like(x_0)
        return x - self.times[last] * velocity(x, self.times[last])


@dataclass(frozen=True)
class UniPC:
    """Multistep UniPC of second order on ``steps`` shifted times, Wan's own sampler (arXiv:2302.04867, B(h) = exp(h) -
    1, predicting x_0). The same as diffusers', whose coefficients are tensors of the device: its every step waits for
    the GPU. Here they are the host's numbers, from the same fp32 times."""

    steps: int = 50
    shift: float = 5.0

    @property
    def name(self) -> str:
        return "unipc"

    def __call__(self, velocity: Velocity, x_T: Tensor, noise_like: Noise, exit_step: int | None = None) -> Tensor:
        if exit_step is not None:
            raise UserError("sampler 'unipc' has no early exit: stage 3 needs sampler 'renoise'")
        times = many_step_times(self.steps, self.shift)
        levels = torch.tensor((times[0] - 1e-6, *times[1:]), dtype=torch.float32).tolist()  # t = 1 has no log SNR
        if any(now <= later for now, later in pairwise(levels)):
            raise UserError(f"sampler.shift is {self.shift}: steps of 'unipc' are the same in fp32; use a smaller one")
        x, known = x_T, list[Tensor]()  # what x_0 was said to be at the steps before
        started = x  # where the step before began
        for step, (now, level) in enumerate(zip(times[:-1], levels, strict=False)):
            x_0 = x - level * velocity(x, now).to(x.dtype)
            if step:
                x = _unipc_step(started, levels[: step + 1], known[-min(2, step) :], x_0)
            known = [*known[-1:], x_0]
            order = min(2, step + 1, self.steps - step)
            started, x = x, _unipc_step(x, levels[: step + 2], known[-order:])
        return x


def _unipc_step(x: Tensor, levels: list[float], known: list[Tensor], x_0: Tensor | None = None) -> Tensor:
    """From the last but one of ``levels`` to the last. ``known``: x_0 as said at the last but one, after that of the
    level before it (second order) or alone. ``x_0``: as said at the last level, to correct the step by."""
    now, later = levels[-2:]
    if later == 0.0:
        return known[-1]
    h = _log_snr(later) - _log_snr(now)
    phi = math.expm1(-h)
    moved = (later / now) * x - (1 - later) * phi * known[-1]
    share = weight = 0.5  # of the differences to the level before, and to the last
    slope: Tensor | float = 0.0
    if len(known) > 1:
        ratio = (_log_snr(levels[-3]) - _log_snr(now)) / h
        if x_0 is not None:  # the two that meet both order conditions
            first = -phi / h - 1
            second = -first / h - 0.5
            share = (first - 2 * second) / phi / (1 - ratio)
            weight = first / phi - share
        slope = share / ratio * (known[-2] - known[-1])
    if x_0 is not None:
        slope = slope + weight * (x_0 - known[-1])
    return moved - (1 - later) * phi * slope


def _log_snr(level: float) -> float:
    return math.log(1 - level) - math.log(level)


MOST_STEPS = 10_000  # ten times those of any published sampler


def build_sampler(name: str, steps: int, shift: float, times: tuple[float, ...] = ()) -> Sampler:
    """'euler' or 'unipc' with any number of steps, or 'renoise' at ``times`` (none: ``steps`` linear times warped by
    the shift)."""
    if not 1e-3 <= shift <= 1e3:
        raise UserError(f"sampler.shift is {shift}; it must be between 0.001 and 1000 (5 for Wan)")
    if steps < 1:
        raise UserError(f"sampler.steps is {steps}; it must be at least 1")
    if steps > MOST_STEPS:
        raise UserError(f"sampler.steps is {steps}; it must be at most {MOST_STEPS:,}")
    if times and (name != "renoise" or len(times) != steps):
        raise UserError(f"sampler.times has {len(times)} times for {steps} steps of '{name}'; only renoise takes them")
    if times:
        return Renoise(times)
    if name == "euler":
        return Euler(steps, shift)
    if name == "unipc":
        return UniPC(steps, shift)
    if name == "renoise":
        return Renoise(few_step_times(shift, tuple(1.0 - i / steps for i in range(steps))))
    raise UserError(f"sampler.name is '{name}'; use 'euler', 'unipc' or 'renoise'")
