"""Samplers: integrate a velocity model from t = 1 to t = 0. A model is a callable ``(x_t, t_scalar)
-> velocity``.

A student distilled by Self-Forcing must be sampled by :class:`FewStepSampler` with the times it was
trained with; Euler on it gives noise.

From a video instead of noise (SDEdit): ``x_t = (1 - t) x_0 + t eps`` at one of the sampler's times,
:func:`first_step`, then the steps from there on.
"""

from __future__ import annotations

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
OnStep = Callable[[int, float, Tensor], Tensor]  # (step, its time, x after it) -> x to go on with
FEW_STEP_LINEAR = (1.0, 0.75, 0.5, 0.25)


class Sampler(Protocol):
    """A sampler. Checkpoints and results record its ``name`` and ``steps``."""

    @property
    def name(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def times(self) -> tuple[float, ...]:
        """The time of each step, falling from 1."""
        ...

    def __call__(
        self,
        velocity: Velocity,
        x_T: Tensor,
        noise_like: Noise,
        exit_step: int | None = None,
        on_step: OnStep | None = None,
        begin: int = 0,
    ) -> Tensor:
        """Pure noise (any shape) -> x_0. ``exit_step``: stop there and return its x_0 estimate,
        with gradients at that step only (Self-Forcing, Algorithm 1). ``on_step``: called after
        every step, whose result it returns or replaces. ``begin``: the first step; x_T is noisy
        data of its time then."""
        ...


def _unchanged(step: int, t: float, x: Tensor) -> Tensor:
    return x


def first_step(sampler: Sampler, strength: float) -> int:
    """The first step whose time is at most ``strength``, the share of noise that is wanted. Times
    are compared as they are printed, to four decimals: 0.8333 means 5/6.

    UserError: not above 0 and at most 1, or below every time.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength is {strength}; it must be above 0 and at most 1 (pure noise)")
    for step, t in enumerate(sampler.times):
        if round(t, 4) <= round(strength, 4):
            return step
    times = ", ".join(f"{t:.4g}" for t in sampler.times[-4:])
    raise UserError(
        f"strength is {strength:g}, below all noise levels of the sampler, whose last are {times}; use one of them"
    )


def few_step_times(
    shift: float = 5.0, linear: tuple[float, ...] = FEW_STEP_LINEAR
) -> tuple[float, ...]:
    """[1000, 750, 500, 250] / 1000 warped by the shift: (1, .9375, .8333, .625) for k = 5, as
    Self-Forcing has it."""
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

    @property
    def times(self) -> tuple[float, ...]:
        return many_step_times(self.steps, self.shift)[:-1]

    def __call__(
        self,
        velocity: Velocity,
        x_T: Tensor,
        noise_like: Noise,
        exit_step: int | None = None,
        on_step: OnStep | None = None,
        begin: int = 0,
    ) -> Tensor:
        if exit_step is not None:
            raise UserError("sampler 'euler' has no early exit: stage 3 needs sampler 'renoise'")
        x, seen = x_T, on_step or _unchanged
        times = many_step_times(self.steps, self.shift)[begin:]
        for step, (t, t_next) in enumerate(pairwise(times), begin):
            x = seen(step, t, x + (t_next - t) * velocity(x, t))
        return x


@dataclass(frozen=True)
class FewStepSampler:
    """Predict x_0, add fresh noise at the next time, repeat (the consistency / SDE sampler of
    Self-Forcing)."""

    times: tuple[float, ...] = (1.0, 0.9375, 5 / 6, 0.625)

    def __post_init__(self) -> None:
        decreasing = all(a > b for a, b in pairwise(self.times))
        if not self.times or self.times[0] != 1.0 or not decreasing or self.times[-1] <= 0:
            raise UserError(
                f"sampler times are {list(self.times)}; they must fall from 1.0 and stay above 0"
            )

    @property
    def name(self) -> str:
        return "renoise"

    @property
    def steps(self) -> int:
        return len(self.times)

    def __call__(
        self,
        velocity: Velocity,
        x_T: Tensor,
        noise_like: Noise,
        exit_step: int | None = None,
        on_step: OnStep | None = None,
        begin: int = 0,
    ) -> Tensor:
        last = self.steps - 1 if exit_step is None else exit_step
        if not begin <= last < self.steps:
            raise UserError(f"exit step {last} is outside {begin}..{self.steps - 1}")
        x, seen = x_T, on_step or _unchanged
        for step in range(begin, last):
            t, t_next = self.times[step], self.times[step + 1]
            if exit_step is None:
                x_0 = x - t * velocity(x, t)
            else:
                with torch.no_grad():
                    x_0 = x - t * velocity(x, t)
            x = seen(step, t, (1 - t_next) * x_0 + t_next * noise_like(x_0))
        t = self.times[last]
        return seen(last, t, x - t * velocity(x, t))


@dataclass(frozen=True)
class UniPC:
    """diffusers' multistep UniPC on ``steps`` shifted times, Wan's own sampler. Its scheduler
    copies coefficients to the device at every step, and waits."""

    steps: int = 50
    shift: float = 5.0

    @property
    def name(self) -> str:
        return "unipc"

    @property
    def times(self) -> tuple[float, ...]:
        return many_step_times(self.steps, self.shift)[:-1]

    def __call__(
        self,
        velocity: Velocity,
        x_T: Tensor,
        noise_like: Noise,
        exit_step: int | None = None,
        on_step: OnStep | None = None,
        begin: int = 0,
    ) -> Tensor:
        if exit_step is not None:
            raise UserError("sampler 'unipc' has no early exit: stage 3 needs sampler 'renoise'")
        from diffusers import UniPCMultistepScheduler  # seconds to import, so only where it is used

        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=self.shift
        )
        linear = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)[:-1]
        scheduler.set_timesteps(sigmas=linear.numpy(), device="cpu")
        scheduler.set_begin_index(begin)
        x, seen = x_T, on_step or _unchanged
        steps = list(zip(self.times, scheduler.timesteps, strict=True))[begin:]
        for step, (t, timestep) in enumerate(steps, begin):
            new = scheduler.step(velocity(x, t).to(x.dtype), timestep, x, return_dict=False)[0]
            x = seen(step, t, new)
        return x


MOST_STEPS = 10_000  # ten times those of any published sampler


def build_sampler(name: str, steps: int, shift: float, times: tuple[float, ...] = ()) -> Sampler:
    """'euler' or 'unipc' with any number of steps, or 'renoise' at ``times`` (none: ``steps``
    linear times warped by the shift)."""
    if not 1e-3 <= shift <= 1e3:
        raise UserError(f"sampler.shift is {shift}; it must be between 0.001 and 1000 (5 for Wan)")
    if steps < 1:
        raise UserError(f"sampler.steps is {steps}; it must be at least 1")
    if steps > MOST_STEPS:
        raise UserError(f"sampler.steps is {steps}; it must be at most {MOST_STEPS:,}")
    if times and (name != "renoise" or len(times) != steps):
        raise UserError(
            f"sampler.times has {len(times)} times for {steps} steps of '{name}'; only renoise takes them"
        )
    if times:
        return FewStepSampler(times)
    if name == "euler":
        return Euler(steps, shift)
    if name == "unipc":
        return UniPC(steps, shift)
    if name == "renoise":
        return FewStepSampler(few_step_times(shift, tuple(1.0 - i / steps for i in range(steps))))
    raise UserError(f"sampler.name is '{name}'; use 'euler', 'unipc' or 'renoise'")
