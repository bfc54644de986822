"""Networks for the training of an image tokenizer: an ``AutoencoderDC`` of any size, and a
discriminator.

No batch norms, in either: what a frame becomes does not depend on the frames beside it, on the
number of processes, or on a module's mode. (FAR's DC-AE has batch norms in the decoder's
convolutional stages; ours has RMS norms there.)

Letters: N images, C latent channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from scd_sf.types import check_within


@dataclass
class TokenizerConfig:
    """Sizes of a DC-AE; the defaults are the f16c32 that FAR trains on Minecraft.

    A stage per entry of ``widths``, each but the first after a halving: the factor is 2^(stages -
    1).
    """

    widths: tuple[int, ...] = (128, 256, 512, 512, 1024)
    """Channels of each stage."""
    encoder_layers: tuple[int, ...] = (0, 4, 8, 2, 2)
    """Blocks of each stage; 0 in the first joins it with the halving (pixels become the second
    width at once)."""
    decoder_layers: tuple[int, ...] = (0, 5, 10, 2, 2)
    """The same for the decoder."""
    res_stages: int = 3
    """So many first stages are residual convolutions, the rest EfficientViT blocks."""
    head_dim: int = 32
    """Width of an attention head in those."""
    channels: int = 32
    """Channels of the latents."""
    shortcuts: bool = True
    """Averages into the latents and copies out of them, beside the layers (DC-AE)."""

    def __post_init__(self) -> None:
        check_within(self, {"channels": (1, 2**12), "head_dim": (1, 2**12)})
        stages = len(self.widths)
        for name, layers in (
            ("encoder_layers", self.encoder_layers),
            ("decoder_layers", self.decoder_layers),
        ):
            if len(layers) != stages or min(layers[1:], default=1) < 1 or layers[0] < 0:
                raise ValueError(
                    f"{name} is {layers}; it must have {stages} entries, all but the first at least 1"
                )
        if not 0 <= self.res_stages <= stages:
            raise ValueError(f"res_stages is {self.res_stages}; it must be 0 to {stages}")
        if self.channels < 1 or (self.shortcuts and self.widths[-1] % self.channels):
            raise ValueError(
                f"channels is {self.channels}; it must divide the last width, {self.widths[-1]}, or shortcuts be false"
            )
        for small, large in pairwise(self.widths):
            if large % 4 or 4 * small % large or large % small:
                raise ValueError(
                    f"widths {small}, {large}: the next must be the same, twice or four times, and 4k"
                )
        if self.res_stages < stages and any(
            width % self.head_dim for width in self.widths[self.res_stages :]
        ):
            raise ValueError(
                f"head_dim is {self.head_dim}; it must divide the widths after stage {self.res_stages}"
            )

    @property
    def spatial(self) -> int:
        return 2 ** (len(self.widths) - 1)


def build_tokenizer(cfg: TokenizerConfig, seed: int) -> AutoencoderDC:
    """A fresh network, a function of (cfg, seed)."""
    stages = len(cfg.widths)
    types = ["ResBlock"] * cfg.res_stages + ["EfficientViTBlock"] * (stages - cfg.res_stages)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderDC(
            latent_channels=cfg.channels,
            attention_head_dim=cfg.head_dim,
            encoder_block_types=tuple(types),
            decoder_block_types=tuple(types),
            encoder_block_out_channels=tuple(cfg.widths),
            decoder_block_out_channels=tuple(cfg.widths),
            encoder_layers_per_block=tuple(cfg.encoder_layers),
            decoder_layers_per_block=tuple(cfg.decoder_layers),
            encoder_qkv_multiscales=((),) * stages,
            decoder_qkv_multiscales=((),) * stages,
            encoder_out_shortcut=cfg.shortcuts,
            decoder_in_shortcut=cfg.shortcuts,
        )


def last_weight(model: AutoencoderDC) -> Tensor:
    """The kernel of the decoder's last convolution, at which the gradients of two losses are
    compared."""
    end = model.decoder.conv_out
    weight: Tensor = (end if isinstance(end, nn.Conv2d) else end.conv).weight
    return weight


@dataclass
class DiscriminatorConfig:
    """A patch discriminator."""

    width: int = 64
    """Channels after the first halving; they double up to 8 times that."""
    layers: int = 3
    """Halvings."""

    def __post_init__(self) -> None:
        if self.width < 8 or self.width % 8 or self.layers < 1:
            raise ValueError(
                f"width is {self.width}, layers {self.layers}: a multiple of 8, and at least 1"
            )


class Discriminator(nn.Module):
    """Pixels (N, 3, H, W) in [-1, 1] -> logits (N, 1, H', W'), one per overlapping patch (70 pixels
    by default)."""

    def __init__(self, cfg: DiscriminatorConfig) -> None:
        super().__init__()
        widths = [cfg.width * min(2**index, 8) for index in range(cfg.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            stride = 2 if index < cfg.layers - 1 else 1
            layers += [
                nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False),
                nn.GroupNorm(8, outputs),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        logits: Tensor = self.layers(pixels_N3HW)
        return logits


def build_discriminator(cfg: DiscriminatorConfig, seed: int) -> Discriminator:
    """A fresh discriminator, a function of (cfg, seed)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Discriminator(cfg)


def frozen(discriminator: nn.Module) -> Callable[[Tensor], Tensor]:
    """The discriminator with constant parameters: gradients reach its input and nothing else."""
    constants = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    return lambda pixels: torch.func.functional_call(discriminator, constants, (pixels,))


@dataclass(frozen=True)
class Components:
    """Principal components of patches as a convolution that stands still: weight (C, 3, P, P), bias
    (C,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, pixels_N3HW: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H / P, W / P)."""
        return nn.functional.conv2d(
            pixels_N3HW, self.weight, self.bias, stride=self.weight.shape[-1]
        )
