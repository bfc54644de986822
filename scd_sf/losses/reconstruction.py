"""Losses of an image tokenizer: pixels, edges at several scales, perceptual, adversarial.

Letters: N images, H W height and width; pixels are fp32 in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn
from torch.nn import functional

from scd_sf.models.tokenizers.training import Components, frozen, last_weight
from scd_sf.types import Logs

Distance = Callable[[Tensor, Tensor], Tensor]  # two batches of images (N, 3, H, W) -> a scalar


@dataclass
class ReconstructionConfig:
    """Weights of a tokenizer's losses. DC-AE and FAR: l1 1, perceptual 1, all else 0."""

    l1: float = 1.0
    """Absolute error of the pixels."""
    mse: float = 0.0
    """Squared error of the pixels."""
    gradient: float = 0.0
    """Absolute error of the differences between neighbouring pixels."""
    scales: int = 3
    """Sizes of the picture that ``gradient`` is taken at, each half the one before."""
    perceptual: float = 0.0
    """LPIPS."""
    anchor: float = 0.0
    """Squared distance of the latents from the principal components of their patches."""
    anchor_floor: float = 0.2
    """Least deviation of a component, as a share of the strongest one's."""
    noise: float = 0.0
    """Standard deviation of noise on the latents before they are decoded."""

    def __post_init__(self) -> None:
        for name in ("l1", "mse", "gradient", "perceptual", "anchor", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.scales < 1:
            raise ValueError(f"scales is {self.scales}; it must be at least 1")
        if not 0 < self.anchor_floor <= 1:
            raise ValueError(
                f"anchor_floor is {self.anchor_floor}; it must be more than 0, at most 1"
            )
        if self.l1 + self.mse <= 0:
            raise ValueError("l1 and mse are both 0: nothing says what the pixels should be")


@dataclass
class GanConfig:
    """The adversarial loss."""

    weight: float = 0.0
    """Its weight; 0: none."""
    start: int = 0
    """Step from which it counts."""
    freeze_encoder: bool = True
    """The encoder stands still from then on (as in FAR)."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.start < 0:
            raise ValueError("weight and start must be 0 or more")

    def on(self, step: int) -> bool:
        """Whether step ``step`` (the first is 1) has it."""
        return self.weight > 0 and step > self.start


def pixel_loss(
    decoded_N3HW: Tensor,
    real_N3HW: Tensor,
    cfg: ReconstructionConfig,
    perceptual: Distance | None = None,
) -> tuple[Tensor, Logs]:
    """The weighted sum of all losses but anchor and GAN, a scalar. The logs hold the unweighted
    losses that have a weight."""
    error = decoded_N3HW - real_N3HW
    parts: dict[str, tuple[float, Tensor]] = {}
    if cfg.l1:
        parts["l1"] = (cfg.l1, error.abs().mean())
    if cfg.mse:
        parts["mse"] = (cfg.mse, error.square().mean())
    if cfg.gradient:
        parts["gradient"] = (cfg.gradient, gradient_error(error, cfg.scales))
    if cfg.perceptual and perceptual is not None:
        parts["perceptual"] = (cfg.perceptual, perceptual(decoded_N3HW, real_N3HW))
    total = torch.stack([weight * value for weight, value in parts.values()]).sum()
    return total, {name: float(value.detach()) for name, (_, value) in parts.items()}


def gradient_error(error_N3HW: Tensor, scales: int) -> Tensor:
    """Mean |dx| + mean |dy| of an error, averaged over the picture at full size, half, ...; too
    small ones are left out. Differences are linear: this is the L1 distance of the gradients."""
    values = []
    for _ in range(scales):
        values.append(error_N3HW.diff(dim=2).abs().mean() + error_N3HW.diff(dim=3).abs().mean())
        if min(error_N3HW.shape[2:]) < 4:
            break
        error_N3HW = functional.avg_pool2d(error_N3HW, 2)
    return torch.stack(values).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The decoder's adversarial loss: minus the mean logit of its pictures. Scalar."""
    return -fake_logits.mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the hinge loss of the discriminator's logits. Scalar."""
    return 0.5 * (functional.relu(1 - real_logits).mean() + functional.relu(1 + fake_logits).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """Factor of the adversarial loss at which both losses have equally large gradients in the
    kernel ``last`` (VQGAN, arXiv:2012.09841, equation 7). It is at most 1e4, without gradient."""
    reconstruction_grad, adversarial_grad = (
        torch.autograd.grad(loss, last, retain_graph=True)[0]
        for loss in (reconstruction, adversarial)
    )
    return (
        (reconstruction_grad.float().norm() / (adversarial_grad.float().norm() + 1e-4))
        .clamp(0, 1e4)
        .detach()
    )


class TokenizerObjective:
    """The loss of one micro-batch, for :class:`scd_sf.train.base.StepModule`.

    ``components``: what the anchor holds latents to. ``discriminator``: evaluated, never trained,
    by this loss.
    """

    def __init__(
        self,
        cfg: ReconstructionConfig,
        gan: GanConfig,
        components: Components | None = None,
        perceptual: Distance | None = None,
        discriminator: nn.Module | None = None,
    ) -> None:
        self.cfg = cfg
        self.gan = gan
        self.components = components
        self.perceptual = perceptual
        self.discriminator = discriminator

    def __call__(
        self, model: AutoencoderDC, pixels_N3HW: Tensor, noise_NCHW: Tensor, adversarial: bool
    ) -> tuple[Tensor, Tensor, Logs]:
        """Pixels in [-1, 1], standard normal noise in the shape of the latents -> (loss, pictures
        without gradient, logs of the parts)."""
        frozen_encoder = adversarial and self.gan.freeze_encoder
        weight = last_weight(model)
        x = pixels_N3HW.to(weight.dtype).contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen_encoder):
            latents = model.encoder(x)
        pictures = model.decoder(latents + self.cfg.noise * noise_NCHW.to(latents.dtype)).float()
        loss, logs = pixel_loss(pictures, pixels_N3HW, self.cfg, self.perceptual)
        if adversarial and self.discriminator is not None:
            adversarial_loss = generator_loss(
                frozen(self.discriminator)(pictures.to(weight.dtype)).float()
            )
            balance = adaptive_weight(loss, adversarial_loss, weight)
            loss = loss + self.gan.weight * balance * adversarial_loss
            logs |= {"gan": float(adversarial_loss.detach()), "gan_balance": float(balance)}
        if self.cfg.anchor and self.components is not None and not frozen_encoder:
            anchor = functional.mse_loss(latents.float(), self.components(pixels_N3HW))
            loss = loss + self.cfg.anchor * anchor
            logs["anchor"] = float(anchor.detach())
        return loss, pictures.detach(), logs


def judge(discriminator: nn.Module, real_N3HW: Tensor, decoded_N3HW: Tensor) -> Tensor:
    """The discriminator's own loss, for :class:`scd_sf.train.base.StepModule`."""
    dtype = next(discriminator.parameters()).dtype
    logits = [discriminator(pixels.to(dtype)).float() for pixels in (real_N3HW, decoded_N3HW)]
    return discriminator_loss(logits[0], logits[1])
