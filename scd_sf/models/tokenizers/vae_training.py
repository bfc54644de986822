"""Training of an ``AutoencoderKLWan``: a differentiable forward over the whole sequence, and two
initialisations.

:func:`whole_encode` and :func:`whole_decode` are the network on all frames at once, without
diffusers' frame cache and without its final clamp; they equal ``encode()`` / ``decode()`` to
rounding (tested for Wan 2.1's flat layout and for the residual one). :func:`patch_components` and
:func:`inflate` are the two starts: with plain reconstruction losses a small network stops at fog.

Letters: B batch, T frames, C channels, H W height and width; modules work on (B, C, T, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanRMS_norm,
    WanUpBlock,
    patchify,
    unpatchify,
)
from torch import Tensor, nn

from scd_sf.models.wan.vae import FRAME_GROUP
from scd_sf.nn.layers import channels_last
from scd_sf.types import check_within

PATCH = 8  # pixels on a side of one latent position
STILL = 1 / 255  # mean change below half a grey level (pixels span 2): nothing to compare with


@dataclass
class SmallVaeConfig:
    """Sizes of a small ``AutoencoderKLWan``: ``patch_size`` times two halvings is the spatial
    factor 8; both halve time, too."""

    base_dim: int = 12
    """Width of the encoder."""
    decoder_base_dim: int = 16
    """Width of the decoder."""
    channels: int = 16
    """Channels of the latents."""
    dim_mult: tuple[int, ...] = (1, 4, 4)
    """Width of each stage, as a multiple; the last two are equal."""
    num_res_blocks: int = 1
    """Residual blocks per stage."""

    def __post_init__(self) -> None:
        sizes = ("base_dim", "decoder_base_dim", "channels", "num_res_blocks")
        check_within(self, dict.fromkeys(sizes, (1, 2**12)), "model.")
        if len(self.dim_mult) != 3 or self.dim_mult[1] != self.dim_mult[2]:
            raise ValueError(
                f"dim_mult is {self.dim_mult}; it needs three entries, the last two equal"
            )


def build_vae(cfg: SmallVaeConfig) -> AutoencoderKLWan:
    """A fresh network, weights in the memory order that makes CPU convolutions fast; the variance
    head is constant."""
    model = AutoencoderKLWan(
        base_dim=cfg.base_dim,
        decoder_base_dim=cfg.decoder_base_dim,
        z_dim=cfg.channels,
        dim_mult=list(cfg.dim_mult),
        num_res_blocks=cfg.num_res_blocks,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * cfg.channels,
        latents_std=[1.0] * cfg.channels,
    )
    nn.init.zeros_(model.quant_conv.weight.data[cfg.channels :])
    nn.init.constant_(model.quant_conv.bias.data[cfg.channels :], -6.0)
    return channels_last(model)


@torch.no_grad()
def inflate(model: AutoencoderKLWan) -> None:
    """From a network of single frames to one of clips: every output frame copies what its newest
    frame would give."""
    for module in model.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size == (3, 3, 3):
            module.weight[:, :, :2] = 0.0
        if isinstance(module, WanResample) and module.mode.endswith("3d"):
            conv = module.time_conv
            conv.weight.zero_()
            conv.bias.zero_()
            eye = torch.eye(conv.in_channels)
            conv.weight[:, :, -1, 0, 0] = eye.repeat(conv.out_channels // conv.in_channels, 1)


@torch.no_grad()
def patch_components(
    pixels_N3HW: Tensor, count: int, floor: float, patch: int = PATCH
) -> dict[str, Tensor]:
    """Principal components of PxP patches of pixels (N, 3, H, W), as a stride-P convolution: weight
    (C, 3, P, P), bias.

    Each is divided by its standard deviation, at least ``floor`` times the largest, so weak ones
    stay weak.
    """
    patches = F.unfold(pixels_N3HW, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    deviation = values.flip(0)[:count].clamp_min(0).sqrt()
    rows = vectors.flip(1)[:, :count].T / deviation.clamp_min(
        floor * float(deviation[0])
    ).unsqueeze(1)
    return {"weight": rows.reshape(count, 3, patch, patch).contiguous(), "bias": -(rows @ mean)}


def psnr_of_error(squared_error: Tensor) -> float:
    """dB of a mean squared error between pixels in [-1, 1] (peak 2)."""
    return 10 * math.log10(4.0 / max(1e-12, float(squared_error.mean())))


def reconstruction(real_BFCHW: Tensor, decoded_BFCHW: Tensor) -> dict[str, object]:
    """Quality of decoded clips, pixels in [-1, 1]: PSNR in dB of all frames, of the first, and by
    place in the group of four.

    ``sharpness`` and ``change_over_time`` are mean absolute differences between neighbours (in
    width, in time) over those of the real clips: 1 keeps all detail and motion, 0 is a flat or a
    frozen picture, None: the real one is.
    """
    error = (real_BFCHW - decoded_BFCHW).square()

    def ratio(dim: int) -> float | None:
        real = float(real_BFCHW.diff(dim=dim).abs().mean())
        return (
            round(float(decoded_BFCHW.diff(dim=dim).abs().mean()) / real, 4)
            if real > STILL
            else None
        )

    return {
        "psnr": round(psnr_of_error(error), 3),
        "psnr_first_frame": round(psnr_of_error(error[:, 0]), 3),
        "psnr_by_phase": [
            round(psnr_of_error(error[:, 1 + phase :: FRAME_GROUP]), 3)
            for phase in range(FRAME_GROUP)
        ],
        "sharpness": ratio(4),
        "change_over_time": ratio(1),
    }


# ----------------------------------------------------------------------- the whole sequence at once


def whole_encode(model: AutoencoderKLWan, pixels_BCTHW: Tensor) -> Tensor:
    """Posterior mean (B, C, 1+k, H', W') of pixels (B, 3, 1+4k, H, W), as ``model.encode()`` (not
    normalised)."""
    patch = model.config["patch_size"]
    x = patchify(pixels_BCTHW, patch) if patch else pixels_BCTHW
    encoder = model.encoder
    x = _conv(encoder.conv_in, x)
    for block in encoder.down_blocks:
        x = _block(block, x)
    x = _mid(encoder.mid_block, x)
    x = _conv(encoder.conv_out, F.silu(_norm(encoder.norm_out, x)))
    return _conv(model.quant_conv, x).chunk(2, dim=1)[0]


def whole_decode(model: AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    """Pixels (B, 3, 1+4k, H, W) of latents (B, C, 1+k, H', W'); ``model.decode()`` before its clamp
    to [-1, 1]."""
    decoder = model.decoder
    x = _conv(decoder.conv_in, _conv(model.post_quant_conv, latents_BCTHW))
    x = _mid(decoder.mid_block, x)
    for block in decoder.up_blocks:
        x = _block(block, x)
    x = _conv(decoder.conv_out, F.silu(_norm(decoder.norm_out, x)))
    patch = model.config["patch_size"]
    return unpatchify(x, patch) if patch else x


def _block(block: nn.Module, x: Tensor) -> Tensor:
    """One entry of ``down_blocks`` or ``up_blocks``: a layer of Wan 2.1's flat list, or a
    residual-layout block."""
    if isinstance(block, WanResidualBlock):
        return _residual(block, x)
    if isinstance(block, WanResample):
        return _resample(block, x)
    if isinstance(block, WanAttentionBlock):
        return _call(block, x)
    if isinstance(block, WanUpBlock):
        return _layers(block.resnets, None if block.upsamplers is None else block.upsamplers[0], x)
    if isinstance(block, WanResidualDownBlock):
        return _layers(block.resnets, block.downsampler, x) + _call(block.avg_shortcut, x)
    if not isinstance(block, WanResidualUpBlock):
        raise TypeError(f"no whole-sequence form for {type(block).__name__}")
    y = _layers(block.resnets, block.upsampler, x)
    shortcut: Tensor | float = (
        0.0 if block.avg_shortcut is None else block.avg_shortcut(x, first_chunk=True)
    )
    return y + shortcut


def _layers(resnets: Iterable[WanResidualBlock], resample: WanResample | None, x: Tensor) -> Tensor:
    for resnet in resnets:
        x = _residual(resnet, x)
    return x if resample is None else _resample(resample, x)


def _mid(block: WanMidBlock, x: Tensor) -> Tensor:
    x = _residual(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _residual(resnet, _call(attention, x))
    return x


def _residual(block: WanResidualBlock, x: Tensor) -> Tensor:
    shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x)
    x = _conv(block.conv1, F.silu(_norm(block.norm1, x)))
    return shortcut + _conv(block.conv2, block.dropout(F.silu(_norm(block.norm2, x))))


def _norm(norm: WanRMS_norm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-12) * norm.gamma


def _conv(conv: WanCausalConv3d, x: Tensor) -> Tensor:
    """Causal convolution; a single frame meets only the last temporal tap, which is an ordinary 2-D
    convolution."""
    if x.shape[2] == 1 and conv.stride[0] == 1:
        pad = (conv._padding[2], conv._padding[0])
        return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=pad).unsqueeze(2)
    if conv._padding[4]:
        x = F.pad(x, (0, 0, 0, 0, conv._padding[4], 0))
    return F.conv3d(
        x,
        conv.weight,
        conv.bias,
        stride=conv.stride,
        padding=(0, conv._padding[2], conv._padding[0]),
    )


def _resample(layer: WanResample, x: Tensor) -> Tensor:
    """Space for every frame; time for all but the first, which passes alone (as the chunk loop
    does)."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        B, C, T, H, W = x.shape
        tail = _conv(layer.time_conv, x[:, :, 1:]).view(B, 2, C, T - 1, H, W)
        tail = torch.stack((tail[:, 0], tail[:, 1]), dim=3).reshape(B, C, 2 * (T - 1), H, W)
        x = torch.cat((x[:, :, :1], tail), dim=2)
    B, C, T, H, W = x.shape
    frames: Tensor = layer.resample(x.transpose(1, 2).reshape(B * T, C, H, W))
    x = frames.unflatten(0, (B, T)).transpose(1, 2)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat((x[:, :, :1], _conv(layer.time_conv, x)), dim=2)
    return x


def _call(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = module(x)
    return result
