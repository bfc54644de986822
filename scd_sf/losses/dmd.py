"""Distribution matching distillation (DMD) as in Self-Forcing: supplement Table 7;
docs/deviations.md.

``gradient = (fake - real) / mean|x - real|``: the student's clip x is noised anew, at one level per
clip, and ``fake`` and ``real`` are the x_0 that the critic and the guided teacher estimate from it.
Everything except the networks is fp32; sigma is exact; no ``nan_to_num``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from scd_sf.diffusion.flow import add_noise, shifted_uniform, x_0_from_velocity
from scd_sf.diffusion.guidance import GuidanceConfig, guided
from scd_sf.diffusion.noise import cpu_noise
from scd_sf.losses.flow_matching import denoiser_flow_loss
from scd_sf.types import Conditioning, Denoiser, Logs, UserError, check_within, on_device


@dataclass(frozen=True)
class DmdConfig:
    """Distribution matching: noise levels and the teacher's guidance."""

    shift: float = 5.0
    """Timestep shift of the noise levels t ~ shift(U(0, 1))."""
    t_min: float = 0.02
    """Least noise level; smaller ones are clipped."""
    t_max: float = 0.98
    """Highest noise level."""
    guidance: GuidanceConfig = field(default_factory=lambda: GuidanceConfig(3.0, "additive"))
    """Classifier-free guidance of the teacher (Table 7: CFG 3.0)."""

    def __post_init__(self) -> None:
        check_within(self, {"shift": (1e-3, 1e3)}, "loss.")
        if not 0 < self.t_min < self.t_max <= 1:
            raise UserError(
                f"loss.t_min, loss.t_max are {self.t_min}, {self.t_max}; they must satisfy 0 < min < max <= 1"
            )

    def times(self, batch: int, rng: torch.Generator) -> Tensor:
        """(B,) fp32, the same for all frames of a clip."""
        return shifted_uniform((batch,), self.shift, rng).clamp(self.t_min, self.t_max)


def dmd_loss(
    x: Tensor,
    teacher: Denoiser,
    critic: Denoiser,
    cond: Conditioning,
    uncond: Conditioning,
    cfg: DmdConfig,
    rng: torch.Generator,
) -> tuple[Tensor, Logs]:
    """x (B, F, C, H, W): the student's rollout, with its graph -> (loss whose gradient in x is the
    DMD gradient, logs).

    The loss value is half the mean square of that gradient: a bookkeeping number, not a measure of
    progress. Watch ``dmd/fake_real`` (mean |x0_fake - x0_real|) and ``rollout/std`` instead.
    """
    clean = x.detach().float()
    with torch.no_grad():
        t = on_device(cfg.times(x.shape[0], rng), x.device)
        eps = cpu_noise(rng)(clean)
        x_t = add_noise(clean, eps, t)
        fake = x_0_from_velocity(x_t, critic(x_t, t, cond).float(), t)
        real = x_0_from_velocity(
            x_t, guided(teacher, uncond, cfg.guidance.w)(x_t, t, cond).float(), t
        )
        scale = (clean - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        gradient = (fake - real) / scale
    loss = 0.5 * (x.float() - (clean - gradient)).pow(2).mean()
    logs = {
        "dmd/fake_real": float((fake - real).abs().mean()),
        "dmd/normaliser": float(scale.mean()),
        "dmd/gradient": float(gradient.abs().mean()),
        "rollout/std": float(clean.std()),
    }
    return loss, logs


def critic_loss(
    critic: Denoiser, x: Tensor, cond: Conditioning, cfg: DmdConfig, rng: torch.Generator
) -> tuple[Tensor, Logs]:
    """The critic's flow loss on the student's own samples x (B, F, C, H, W), detached; no prompt
    dropout, no CFG."""
    t = on_device(cfg.times(x.shape[0], rng), x.device)
    loss = denoiser_flow_loss(critic, x.detach().float(), cond, t, rng)
    return loss, {"critic/loss": float(loss.detach())}
