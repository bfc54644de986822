"""Initial weights for a small tokenizer's training: the linear autoencoder that its architecture
can hold.

Trained from random weights such a network spends most of a short training on what principal
components of patches do from the first step. :func:`linear_start` sets the weights of an
``AutoencoderDC`` so that its latents are those components and its pictures their reconstruction,
nearly: blocks between the resolutions start as the identity, each convolution that changes the
resolution keeps the strongest directions (encoder) or is the least-squares map to the components of
the next smaller patches (decoder), the shortcuts taken into account. Training goes on from there.

The decoder's end is a norm and a ReLU. A large constant channel keeps the norm near linear; pixels
pass the ReLU as a positive and a negative part.

The latents of such a training stay near the components, in falling order: :func:`first_channels`
makes a narrower tokenizer of a trained one.

Letters: N images, C channels, H W height and width; P pixels along a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d
from torch import Tensor, nn

from scd_sf.models.tokenizers.training import Components
from scd_sf.models.tokenizers.vae_training import patch_components

CONSTANT = 8.0  # of the channel that holds the norm; the parts beside it are about 1
MOST_ROWS = 100_000  # places that a least-squares fit looks at


@torch.no_grad()
def linear_start(model: AutoencoderDC, pixels_N3HW: Tensor, floor: float) -> Components:
    """Set ``model``'s weights as above, from fp32 pixels in [-1, 1]; some hundred varied frames are
    enough.

    Returns the components, each divided by its deviation, at least ``floor`` times the largest one.
    ValueError: the last features are too narrow for the pixels they hold, twice, and the constant.
    """
    channels = int(model.config["latent_channels"])
    patch = 2 ** (len(model.config["encoder_block_out_channels"]) - 1)
    components = Components(**patch_components(pixels_N3HW, channels, floor, patch))
    for side in (model.encoder, model.decoder):
        for name, parameter in side.named_parameters():
            if "blocks" in name and name.endswith(("norm.weight", "norm_out.weight")):
                parameter.zero_()  # with a zero norm the block is the identity
    latents = _encoder(model.encoder, pixels_N3HW, components(pixels_N3HW))
    _decoder(model.decoder, latents, pixels_N3HW, patch)
    return components


@torch.no_grad()
def first_channels(model: AutoencoderDC, count: int, mean: Sequence[float]) -> dict[str, Tensor]:
    """Weights of ``model`` without shortcuts at the latents, and with ``count`` of its channels
    alone.

    The encoder gives its first ``count`` latents; the decoder gives what it makes of them with the
    others at their ``mean`` (length C, in the network's own units). Exact but for the picture's
    border.
    """
    tensors, encoder, decoder = dict(model.state_dict()), model.encoder, model.decoder
    end, start = encoder.conv_out.weight.clone(), decoder.conv_in.weight.clone()
    channels, width = end.shape[:2]
    copies = torch.eye(channels).repeat_interleave(width // channels, dim=1)  # (C, width)
    if encoder.out_shortcut:
        end[:, :, 1, 1] += copies * channels / width
    if decoder.in_shortcut:
        start[:, :, 1, 1] += copies.T
    constant = start[:, count:].sum((2, 3)) @ torch.tensor(mean, dtype=start.dtype)[count:]
    tensors["encoder.conv_out.weight"] = end[:count]
    tensors["encoder.conv_out.bias"] = encoder.conv_out.bias[:count]
    tensors["decoder.conv_in.weight"] = start[:, :count]
    tensors["decoder.conv_in.bias"] = decoder.conv_in.bias + constant
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _encoder(encoder: Any, x: Tensor, components: Tensor) -> Tensor:
    """Set the encoder's weights so that its latents are ``components``. Returns its latents of the
    pixels ``x``."""
    first = _conv(encoder.conv_in)
    first.weight.zero_()
    assert first.bias is not None
    first.bias.zero_()
    first.weight[:3, :, 1, 1] = torch.eye(3)
    x = encoder.conv_in(x)
    for stage in encoder.down_blocks:
        for block in stage:
            if isinstance(block, DCDownBlock2d):
                num_channels = min(block.conv.out_channels, x.shape[1])
                block.conv.weight.zero_()
                block.conv.weight[:num_channels, :, 1, 1] = _directions(x)[:num_channels]
                block.conv.bias.zero_()
            x = block(x)
    shortcut = 0.0
    if encoder.out_shortcut:
        shortcut = x.unflatten(1, (-1, encoder.out_shortcut_average_group_size)).mean(2)
    _fit(encoder.conv_out, x, components - shortcut)
    return encoder.conv_out(x) + shortcut


def _decoder(decoder: Any, latents: Tensor, pixels: Tensor, patch: int) -> None:
    x = decoder.conv_in(latents)
    if decoder.in_shortcut:
        x = x + latents.repeat_interleave(decoder.in_shortcut_repeats, dim=1)
    for stage in reversed(decoder.up_blocks):
        for block in stage:
            if isinstance(block, DCUpBlock2d):
                patch //= 2
                block.conv.weight.zero_()
                block.conv.bias.zero_()
                shortcut = block(x)
                channels = shortcut.shape[1]
                last = pixels.shape[-1] // patch == _last_width(decoder, pixels)
                target = (
                    _halves(pixels, patch, channels)
                    if last
                    else _strongest(pixels, patch, channels)
                )
                _fit(block.conv, x, F.pixel_unshuffle(target - shortcut, 2))
            x = block(x)
    decoder.norm_out.weight.fill_(CONSTANT / x.shape[1] ** 0.5)
    decoder.norm_out.bias.zero_()
    x = decoder.conv_act(decoder.norm_out(x.movedim(1, -1)).movedim(-1, 1))
    _fit(
        _conv(decoder.conv_out),
        x,
        pixels if isinstance(decoder.conv_out, nn.Conv2d) else F.pixel_unshuffle(pixels, 2),
    )


def _last_width(decoder: Any, pixels: Tensor) -> int:
    """Width of the features before the last convolution."""
    return pixels.shape[-1] // (1 if isinstance(decoder.conv_out, nn.Conv2d) else 2)


def _conv(end: Any) -> nn.Conv2d:
    """The outermost convolution, which a first stage without blocks wraps."""
    conv = end if isinstance(end, nn.Conv2d) else end.conv
    assert isinstance(conv, nn.Conv2d)
    return conv


def _directions(x_NCHW: Tensor) -> Tensor:
    """(C, C): principal directions of the channels as rows, the strongest first."""
    rows = _rows(x_NCHW)
    return torch.linalg.eigh((rows - rows.mean(0)).T @ (rows - rows.mean(0)))[1].flip(1).T


def _strongest(pixels: Tensor, patch: int, channels: int) -> Tensor:
    """(N, channels, H / P, W / P): the strongest components of PxP patches, padded with zeros to
    ``channels``."""
    components = Components(
        **patch_components(pixels, min(channels, 3 * patch * patch), 1.0, patch)
    )(pixels)
    return F.pad(components, (0, 0, 0, 0, 0, channels - components.shape[1]))


def _halves(pixels: Tensor, patch: int, channels: int) -> Tensor:
    """(N, channels, H / P, W / P): each patch's pixels less their mean, the same negated, and the
    constant channel. ValueError: too few ``channels``."""
    parts = F.pixel_unshuffle(pixels, patch) if patch > 1 else pixels
    parts = parts - parts.mean((0, 2, 3), keepdim=True)
    if 2 * parts.shape[1] + 1 > channels:
        raise ValueError(
            f"a linear start needs {2 * parts.shape[1] + 1} channels before the last convolution"
        )
    constant = torch.full_like(parts[:, :1], CONSTANT)
    features = torch.cat([parts, -parts, constant], dim=1)
    return F.pad(features, (0, 0, 0, 0, 0, channels - features.shape[1]))


def _rows(x_NCHW: Tensor) -> Tensor:
    """(places, C) in fp64, at most :data:`MOST_ROWS` of them."""
    rows = x_NCHW.movedim(1, -1).flatten(0, 2)
    return rows[:: 1 + len(rows) // MOST_ROWS].double()


def _fit(conv: nn.Conv2d, x_NCHW: Tensor, target_NCHW: Tensor) -> None:
    """The middle tap and bias of a 3x3 convolution from ``x`` to ``wanted``: least squares,
    slightly ridged."""
    inputs, outputs = _rows(x_NCHW), _rows(target_NCHW)
    inputs = F.pad(inputs, (0, 1), value=1.0)
    gram = inputs.T @ inputs
    ridge = 1e-6 * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram + ridge, inputs.T @ outputs)
    conv.weight.zero_()
    conv.weight[:, :, 1, 1] = solution[:-1].T.to(conv.weight.dtype)
    assert conv.bias is not None
    conv.bias.copy_(solution[-1])
