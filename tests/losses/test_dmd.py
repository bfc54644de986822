"""The DMD gradient against its formula, the critic's loss, and what must be exactly zero."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from scd_sf.diffusion.flow import add_noise, broadcast_time
from scd_sf.diffusion.guidance import GuidanceConfig
from scd_sf.losses.dmd import DmdConfig, critic_loss, dmd_loss
from scd_sf.losses.flow_matching import denoiser_flow_loss
from scd_sf.types import Conditioning, Denoiser, UserError

UNGUIDED = DmdConfig(guidance=GuidanceConfig(1.0))


def predicting(x_0: Tensor) -> Denoiser:
    """A denoiser whose x_0 estimate is a given clip, whatever it sees."""

    def denoise(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return (x_t - x_0.repeat(x_t.shape[0] // x_0.shape[0], 1, 1, 1, 1)) / broadcast_time(t, x_t)

    return denoise


def clips() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(tiny.latents(2, 3, seed, torch.float32) for seed in range(3))  # type: ignore[return-value]


def gradient_of(x: Tensor, teacher: Denoiser, critic: Denoiser, cfg: DmdConfig) -> Tensor:
    x = x.clone().requires_grad_()
    cond, uncond = (
        tiny.prompts(2, dtype=torch.float32),
        tiny.prompts(1, seed=5, dtype=torch.float32),
    )
    loss, _ = dmd_loss(x, teacher, critic, cond, uncond, cfg, tiny.generator(0))
    (gradient,) = torch.autograd.grad(loss, x)
    assert float(loss.detach()) == pytest.approx(
        0.5 * float((gradient * x.numel()).pow(2).mean()), rel=1e-5
    )
    return gradient


def test_gradient_is_fake_minus_real_over_the_normaliser_over_numel() -> None:
    x, fake, real = clips()
    gradient = gradient_of(x, predicting(real), predicting(fake), UNGUIDED)
    normaliser = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    expected = (fake - real) / normaliser / x.numel()
    assert torch.allclose(gradient, expected, rtol=2e-3, atol=1e-7)


def test_gradient_with_guidance_uses_the_guided_teacher() -> None:
    """A teacher whose estimate is the clip plus the prompt's mean: w = 4 extrapolates it."""
    x, fake, real = clips()
    cond, uncond = (
        tiny.prompts(2, dtype=torch.float32),
        tiny.prompts(1, seed=5, dtype=torch.float32),
    )

    def mean(cond: Conditioning) -> Tensor:
        return cond.text_BLE.mean(dim=(1, 2)).reshape(-1, 1, 1, 1, 1)

    def teacher(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return predicting(real)(x_t, t, cond) - mean(cond) / broadcast_time(t, x_t)

    gradient = gradient_of(x, teacher, predicting(fake), DmdConfig())
    guided_real = real + mean(uncond) + 4.0 * (mean(cond) - mean(uncond))
    normaliser = (x - guided_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    assert torch.allclose(
        gradient, (fake - guided_real) / normaliser / x.numel(), rtol=5e-3, atol=1e-6
    )


def test_gradient_is_zero_when_teacher_is_critic_without_guidance() -> None:
    model, x = tiny.wan(dtype=torch.float32), clips()[0]
    assert not gradient_of(x, model, model, UNGUIDED).any()
    assert gradient_of(x, model, model, DmdConfig()).any()
    assert gradient_of(x, tiny.wan(1, torch.float32), model, UNGUIDED).any()


def test_no_network_gets_a_gradient_but_the_students() -> None:
    teacher, critic, x = (
        tiny.wan(0, torch.float32),
        tiny.wan(1, torch.float32),
        clips()[0].requires_grad_(),
    )
    cond, uncond = tiny.prompts(2, dtype=torch.float32), tiny.prompts(1, dtype=torch.float32)
    loss, logs = dmd_loss(x * 2, teacher, critic, cond, uncond, DmdConfig(), tiny.generator(0))
    loss.backward()
    assert x.grad is not None and float(x.grad.abs().max()) > 0
    assert all(p.grad is None for model in (teacher, critic) for p in model.parameters())
    assert set(logs) == {"dmd/fake_real", "dmd/normaliser", "dmd/gradient", "rollout/std"}
    assert logs["rollout/std"] == pytest.approx(float((2 * x).detach().std()))
    assert loss.dtype == torch.float32


def test_critic_loss_is_flow_matching_on_detached_samples() -> None:
    critic, x = tiny.wan(dtype=torch.float32), clips()[0].requires_grad_()
    cond, cfg = tiny.prompts(2, dtype=torch.float32), DmdConfig()
    loss, logs = critic_loss(critic, x, cond, cfg, tiny.generator(0))
    rng = tiny.generator(0)
    expected = denoiser_flow_loss(critic, x.detach(), cond, cfg.times(2, rng), rng)
    assert torch.equal(loss, expected) and logs == {"critic/loss": float(loss.detach())}
    loss.backward()
    assert x.grad is None
    assert all(p.grad is not None for p in critic.parameters())


def test_exact_noise_level_is_shared_by_all_frames_of_a_clip() -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    x, fake, real = clips()

    def spy(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append((x_t, t))
        return predicting(fake)(x_t, t, cond)

    gradient_of(x, predicting(real), spy, UNGUIDED)
    rng = tiny.generator(0)
    t = UNGUIDED.times(2, rng)
    eps = torch.randn(x.shape, generator=rng)
    assert seen[0][1].shape == (2,) and torch.equal(seen[0][1], t)
    assert torch.equal(seen[0][0], add_noise(x, eps, t))


def test_times_follow_the_shifted_clipped_law() -> None:
    t = DmdConfig().times(20000, tiny.generator(0))
    assert float(t.median()) == pytest.approx(0.833, abs=0.01)
    assert float(t.mean()) == pytest.approx(0.746, abs=0.01)
    assert float((t == 0.98).double().mean()) == pytest.approx(0.092, abs=0.01)
    assert float(t.min()) == pytest.approx(0.02) and float(t.max()) == pytest.approx(0.98)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.98), (0.5, 0.5), (0.6, 0.2), (0.1, 1.1)])
def test_bad_time_ranges_are_refused(low: float, high: float) -> None:
    with pytest.raises(UserError, match=r"loss\.t_min, loss\.t_max are"):
        DmdConfig(t_min=low, t_max=high)


def test_default_guidance_is_table_7_in_self_forcings_convention() -> None:
    assert DmdConfig().guidance.w == 4.0
