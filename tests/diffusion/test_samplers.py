"""Samplers against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import tiny
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from scd_sf.diffusion.samplers import (
    Euler,
    FewStepSampler,
    Sampler,
    UniPC,
    build_sampler,
    few_step_times,
    first_step,
    many_step_times,
)
from scd_sf.types import UserError

STD = 0.5


def gaussian(x_t: Tensor, t: float) -> Tensor:
    """E[eps - x_0 | x_t] for x_0 ~ N(0, STD^2): the exact velocity of a Gaussian; its ODE maps x_T
    to STD * x_T."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * x_t


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def test_few_step_list() -> None:
    assert few_step_times() == pytest.approx((1.0, 0.9375, 0.8333333, 0.625))
    assert FewStepSampler().times == pytest.approx(few_step_times())
    assert few_step_times(1.0) == (1.0, 0.75, 0.5, 0.25)


def test_many_step_times_fall_from_one_to_exactly_zero() -> None:
    times = many_step_times(50, 5.0)
    assert len(times) == 51 and times[0] == 1.0 and times[-1] == 0.0
    assert all(a > b for a, b in pairwise(times))


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_converges_to_the_analytic_map_at_first_order(shift: float) -> None:
    x_T = torch.randn(64, generator=tiny.generator(0), dtype=torch.float64)
    errors = [
        float((Euler(steps, shift)(gaussian, x_T, zeros) - STD * x_T).abs().max())
        for steps in (50, 200, 800)
    ]
    assert errors[2] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_unipc_needs_fewer_steps_than_euler(shift: float) -> None:
    x_T = torch.randn(4, 4, 4, generator=tiny.generator(0), dtype=torch.float64)
    seen: list[float] = []

    def counted(x: Tensor, t: float) -> Tensor:
        seen.append(t)
        return gaussian(x, t)

    multistep = float((UniPC(40, shift)(counted, x_T, zeros) - STD * x_T).abs().max())
    euler = float((Euler(40, shift)(gaussian, x_T, zeros) - STD * x_T).abs().max())
    assert multistep < euler / 4 and seen == list(many_step_times(40, shift)[:-1])
    with pytest.raises(UserError, match="no early exit"):
        UniPC(20, shift)(gaussian, x_T, zeros, 2)


def test_euler_is_exact_where_the_path_is_straight() -> None:
    x_T = torch.randn(5, generator=tiny.generator(0), dtype=torch.float64)
    assert torch.allclose(
        Euler(3, 5.0)(lambda x, t: x_T - 2.0, x_T, zeros), torch.full_like(x_T, 2.0)
    )


def test_renoise_predicts_then_adds_fresh_noise_at_the_next_time() -> None:
    seen: list[tuple[float, Tensor]] = []
    noises = [torch.tensor([1.0]), torch.tensor([-2.0])]

    def velocity(x: Tensor, t: float) -> Tensor:
        seen.append((t, x))
        return x + t

    out = FewStepSampler((1.0, 0.6, 0.3))(
        velocity, torch.tensor([4.0]), lambda _: noises[len(seen) - 1]
    )
    x_0 = 4.0 - 1.0 * (4.0 + 1.0)
    x_1 = 0.4 * x_0 + 0.6 * 1.0
    x_0 = x_1 - 0.6 * (x_1 + 0.6)
    x_2 = 0.7 * x_0 + 0.3 * -2.0
    assert [t for t, _ in seen] == [1.0, 0.6, 0.3]
    assert [float(x) for _, x in seen] == pytest.approx([4.0, x_1, x_2])
    assert float(out) == pytest.approx(x_2 - 0.3 * (x_2 + 0.3))


def test_renoise_on_the_exact_gaussian_keeps_mean_and_never_widens() -> None:
    """One step from pure noise predicts the mean; further steps bring variance back towards the
    data's."""
    x_T = torch.randn(20000, generator=tiny.generator(0), dtype=torch.float64)
    rng = tiny.generator(1)

    def fresh(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=rng, dtype=x.dtype)

    stds = [
        float(
            FewStepSampler(few_step_times(1.0, tuple(1 - i / n for i in range(n))))(
                gaussian, x_T, fresh
            ).std()
        )
        for n in (1, 4, 16)
    ]
    assert stds[0] == pytest.approx(0.0, abs=1e-12)
    assert stds[0] < stds[1] < stds[2] < STD + 0.02


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_exit_step_stops_there_with_gradients_of_that_step_only(exit_step: int) -> None:
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    grads: list[bool] = []
    inputs: list[Tensor] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        grads.append(torch.is_grad_enabled())
        inputs.append(x)
        return weight * x

    x_T = torch.tensor([2.0], dtype=torch.float64)
    times = (1.0, 0.6, 0.3)
    out = FewStepSampler(times)(velocity, x_T, torch.ones_like, exit_step)
    out.sum().backward()
    assert grads == [False] * exit_step + [True]
    assert not any(x.requires_grad for x in inputs)
    assert weight.grad is not None
    assert float(weight.grad) == pytest.approx(-times[exit_step] * float(inputs[-1]))


@pytest.mark.parametrize("exit_step", [-1, 4])
def test_exit_step_must_exist(exit_step: int) -> None:
    with pytest.raises(UserError, match=rf"exit step {exit_step} is outside 0\.\.3"):
        FewStepSampler()(gaussian, torch.zeros(1), zeros, exit_step)


@pytest.mark.parametrize(
    "times", [(), (0.9, 0.5), (1.0, 1.0), (1.0, 0.5, 0.7), (1.0, 0.0), (1.0, -0.5)]
)
def test_bad_renoise_times_are_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"they must fall from 1\.0 and stay above 0"):
        FewStepSampler(times)


def test_build_sampler() -> None:
    four = build_sampler("renoise", 4, 5.0)
    assert (four.name, four.steps) == ("renoise", 4)
    assert isinstance(four, FewStepSampler) and four.times == pytest.approx(
        (1, 0.9375, 5 / 6, 0.625)
    )
    fifty = build_sampler("euler", 50, 5.0)
    assert (fifty.name, fifty.steps, fifty) == ("euler", 50, Euler(50, 5.0))
    with pytest.raises(UserError, match=r"sampler.steps is 0; it must be at least 1"):
        build_sampler("euler", 0, 5.0)
    with pytest.raises(
        UserError, match=r"sampler.steps is 1000000000000; it must be at most 10,000"
    ):
        build_sampler("euler", 10**12, 5.0)
    assert build_sampler("unipc", 20, 3.0) == UniPC(20, 3.0)
    with pytest.raises(
        UserError, match=r"sampler.name is 'ddim'; use 'euler', 'unipc' or 'renoise'"
    ):
        build_sampler("ddim", 4, 5.0)
    with pytest.raises(UserError, match=r"sampler.shift is 0.0; it must be between 0.001 and 1000"):
        build_sampler("renoise", 4, 0.0)


@pytest.mark.parametrize("name", ["euler", "unipc", "renoise"])
def test_every_step_is_told_and_its_result_may_be_replaced(name: str) -> None:
    sampler, x_T = build_sampler(name, 3, 5.0), torch.randn(2, 1, 3, 2, 2)
    seen: list[tuple[int, float, Tensor]] = []

    def tell(step: int, t: float, x: Tensor) -> Tensor:
        seen.append((step, t, x))
        return x if step < 2 else x + 1

    def velocity(x: Tensor, t: float) -> Tensor:
        return 0.5 * x

    plain = sampler(velocity, x_T, torch.zeros_like)
    told = sampler(velocity, x_T, torch.zeros_like, on_step=tell)
    assert [step for step, _, _ in seen] == [0, 1, 2] and seen[0][1] == 1.0 > seen[1][1] > seen[2][
        1
    ]
    assert torch.equal(seen[-1][2], plain) and torch.equal(told, plain + 1)


# --------------------------------------------------------------------- from a video, not from noise


def test_the_first_step_is_the_first_time_at_or_below_the_strength() -> None:
    few = FewStepSampler()
    for strength, step in ((1, 0), (0.99, 1), (0.9375, 1), (0.8333, 2), (0.8, 3), (0.625, 3)):
        assert first_step(few, strength) == step, strength
    assert first_step(Euler(4, 1.0), 0.3) == 3 and first_step(UniPC(4, 1.0), 0.5) == 2
    assert few.times == (1.0, 0.9375, 5 / 6, 0.625)
    assert Euler(4, 1.0).times == UniPC(4, 1.0).times == (1.0, 0.75, 0.5, 0.25)
    with pytest.raises(UserError, match=r"below all noise levels .* 1, 0.9375, 0.8333, 0.625; use"):
        first_step(few, 0.6)
    for strength in (0.0, -1.0, 1.1, math.nan, math.inf):
        with pytest.raises(UserError, match="above 0 and at most 1"):
            first_step(few, strength)


@pytest.mark.parametrize(
    "sampler", [FewStepSampler(), Euler(6, 5.0), UniPC(6, 5.0)], ids=lambda sampler: sampler.name
)
def test_a_later_beginning_is_the_rest_of_the_steps(sampler: Sampler) -> None:
    """The model is asked at the later times alone. Samplers without a memory end where a whole run
    ends that came by the same x."""
    x_T = torch.randn(3, 4, generator=tiny.generator(0), dtype=torch.float64)
    asked: list[tuple[float, Tensor]] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        asked.append((t, x))
        return gaussian(x, t)

    def note(step: int, _: float, x: Tensor) -> Tensor:
        seen.append(step)
        return x

    seen: list[int] = []
    whole = sampler(velocity, x_T, zeros)
    states = list(asked)
    for begin in (0, 1, sampler.steps - 1):
        asked.clear()
        seen.clear()
        rest = sampler(velocity, states[begin][1], zeros, on_step=note, begin=begin)
        assert [t for t, _ in asked] == list(sampler.times[begin:])
        assert seen == list(range(begin, sampler.steps))
        if begin == 0 or not isinstance(sampler, UniPC):
            assert torch.equal(rest, whole)


@pytest.mark.parametrize("strength", [1.0, 0.9, 0.5, 0.36])
def test_unipc_from_a_video_is_diffusers_own(strength: float) -> None:
    """As WanVideoToVideoPipeline uses its scheduler: noise by ``add_noise`` at the first time, then
    the steps from a begin index."""
    sampler = UniPC(10, 5.0)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    linear = torch.linspace(1, 0, 11, dtype=torch.float64)[:-1]
    scheduler.set_timesteps(sigmas=linear.numpy(), device="cpu")
    begin = first_step(sampler, strength)
    assert begin == next(n for n, t in enumerate(sampler.times) if t <= strength)
    scheduler.set_begin_index(begin)
    x_0, eps = torch.randn(2, 1, 3, 4, 4, generator=tiny.generator(0))
    timesteps = scheduler.timesteps[begin:]
    noisy = x = scheduler.add_noise(x_0, eps, timesteps[:1])
    for timestep, t in zip(timesteps, sampler.times[begin:], strict=True):
        x = scheduler.step(gaussian(x, t), timestep, x, return_dict=False)[0]
    t = sampler.times[begin]
    torch.testing.assert_close((1 - t) * x_0 + t * eps, noisy, rtol=0, atol=1e-5)
    assert torch.equal(sampler(gaussian, noisy, zeros, begin=begin), x)


def test_an_exit_before_the_beginning_is_refused() -> None:
    with pytest.raises(UserError, match=r"exit step 1 is outside 2\.\.3"):
        FewStepSampler()(gaussian, torch.zeros(1), zeros, 1, begin=2)
