"""Per-frame figures (sharpness, MSE, PSNR, SSIM) and the spread of any figure over seeds or over
resampled videos.

Videos are float tensors (V, F, 3, H, W) in [0, 1]: V videos of F pixel frames. No codec stands
between a video and its figure. Letters of images: N images (N, 3, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scd_sf.files import new_file
from scd_sf.types import UserError

VIDEO_DIMENSIONS = 5
RGB = 3
SSIM_WINDOW = 11  # pixels
SsimWindow = Literal["valid", "padded"]


def check_videos(videos: Tensor, name: str) -> None:
    """Raise UserError unless ``videos`` is float (V, F, 3, H, W), finite and inside [0, 1] (1e-3 of
    slack)."""
    if videos.ndim != VIDEO_DIMENSIONS or videos.shape[2] != RGB:
        raise UserError(
            f"{name}: shape {tuple(videos.shape)}; videos must be (videos, frames, 3, height, width)"
        )
    if not videos.is_floating_point():
        raise UserError(
            f"{name}: dtype {videos.dtype}; videos must be float in [0, 1]: divide uint8 by 255"
        )
    if videos.numel() == 0:
        raise UserError(
            f"{name}: shape {tuple(videos.shape)} holds no pixel; give at least one video of one frame"
        )
    low, high = float(videos.min()), float(videos.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails both comparisons
        raise UserError(
            f"{name}: values lie in [{low:.3g}, {high:.3g}]; map the decoder's [-1, 1] to [0, 1] first"
        )


def gradient_energy(videos: Tensor) -> Tensor:
    """Mean |dx| + mean |dy| of each video over frames, channels and pixels: (V, F, 3, H, W) -> (V,)
    float64."""
    check_videos(videos, "gradient energy")
    dx = (videos[..., 1:] - videos[..., :-1]).abs().double().mean(dim=(1, 2, 3, 4))
    dy = (videos[..., 1:, :] - videos[..., :-1, :]).abs().double().mean(dim=(1, 2, 3, 4))
    return dx + dy


def sharpness_ratio(videos: Tensor, reference: Tensor) -> float:
    """Gradient energy of ``videos`` over that of ``reference``; 1 = as sharp, below 1 = blurred,
    above 1 = noisy.

    The reference of the demo is what the VAE reconstructs of real clips: a sample cannot be sharper
    than the decoder that draws it. Raises UserError when the reference is flat (no gradient at
    all).
    """
    scale = float(gradient_energy(reference).mean())
    if scale == 0.0:
        raise UserError("sharpness: the reference videos are flat; give real clips")
    return float(gradient_energy(videos).mean()) / scale


def check_pair(videos: Tensor, reference: Tensor, name: str) -> None:
    """Raise UserError unless both pass :func:`check_videos` and have one shape."""
    check_videos(videos, f"{name} videos")
    check_videos(reference, f"{name} reference")
    if videos.shape != reference.shape:
        raise UserError(
            f"{name}: shapes {tuple(videos.shape)} and {tuple(reference.shape)} differ; pair the clips first"
        )


def mse_frames(videos: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error of each frame over channels and pixels: (V, F) fp64."""
    check_pair(videos, reference, "MSE")
    return (videos.double() - reference.double()).square().mean(dim=(2, 3, 4))


def psnr_frames(videos: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB, peak 1: (V, F) fp64, as torchmetrics'. Equal
    frames: inf."""
    check_pair(videos, reference, "PSNR")
    return -10.0 * torch.log10(mse_frames(videos, reference))


def ssim_frames(videos: Tensor, reference: Tensor, window: SsimWindow = "valid") -> Tensor:
    """Structural similarity of each frame by torchmetrics: (V, F) fp64. One value per channel, then
    their mean.

    Gaussian window of 11x11 pixels, sigma 1.5; data range 1. ``window``: "valid" counts the pixels
    around which the whole window lies in the picture (Wang et al., TECO). "padded" counts all
    pixels of the picture mirrored at its border, as torchmetrics' own mean does since 1.5 and
    therefore FAR's and SCD's releases; the two differ by hundredths. UserError below 11 pixels.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise UserError(
            f"SSIM needs the package torchmetrics ({error}); pip install 'scd-sf[eval]'"
        ) from error
    check_ssim_window(window)
    check_pair(videos, reference, "SSIM")
    if min(videos.shape[-2:]) < SSIM_WINDOW:
        raise UserError(
            f"SSIM: frames of {videos.shape[-1]}x{videos.shape[-2]}; it needs {SSIM_WINDOW} pixels a side"
        )
    border = 0 if window == "padded" else SSIM_WINDOW // 2
    rows = []
    # the window's five moments take fifteen times its memory
    for video, reference_video in zip(videos, reference, strict=True):
        _, pixels = structural_similarity_index_measure(
            video.float(),
            reference_video.float(),
            data_range=1.0,
            reduction="none",
            return_full_image=True,
        )
        assert pixels.shape == video.shape, "torchmetrics gives a value for every pixel"
        inner_pixels = pixels[
            ..., border : pixels.shape[-2] - border, border : pixels.shape[-1] - border
        ]
        rows.append(inner_pixels.double().mean(dim=(1, 2, 3)).cpu())
    return torch.stack(rows)


def check_ssim_window(window: str) -> None:
    """Raise UserError unless ``window`` is one of :data:`SsimWindow`."""
    if window not in get_args(SsimWindow):
        raise UserError(f"ssim is '{window}'; use one of {', '.join(get_args(SsimWindow))}")


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n-1; 0 for one value) of ``count`` repeats of one figure."""

    mean: float
    std: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """The spread of a figure over seeds (or over any other repeats)."""
    if not values:
        raise UserError("spread: no values; give at least one repeat")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, 0.0, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Spread(mean, math.sqrt(variance), len(values))


def bootstrap(
    statistic: Callable[[Tensor], float], videos: int, *, resamples: int = 20, seed: int = 0
) -> Spread:
    """Spread of ``statistic(indices)`` over draws of ``videos`` indices out of ``videos`` with
    replacement.

    Whole videos are drawn, because the frames of one video are not independent. Quote the ``std``
    beside the figure of the full set: the bootstrap ``mean`` of a Frechet distance is biased
    upwards (repeated videos thin the sample).
    """
    if videos < 1 or resamples < 1:
        raise UserError(
            f"bootstrap: videos={videos}, resamples={resamples}; both must be at least 1"
        )
    draws = np.random.Generator(np.random.PCG64(seed)).integers(0, videos, size=(resamples, videos))
    return spread([statistic(torch.from_numpy(row)) for row in draws])


# ------------------------------------------------------------ how well pictures survive a tokenizer

CEILING = 120.0  # dB, of an image without error


def reconstruction_figures(decoded_N3HW: Tensor, real_N3HW: Tensor) -> dict[str, float]:
    """Measures of N decoded images against the real ones: ``psnr`` (dB, peak 1) and ``ssim``, each
    a mean over images, and ``sharpness``, the :func:`sharpness_ratio`. UserError: as of these
    measures."""
    decoded, real = decoded_N3HW.unsqueeze(1), real_N3HW.unsqueeze(1)  # videos of one frame
    return {
        "psnr": float(psnr_frames(decoded, real).clamp_max(CEILING).mean()),
        "ssim": float(ssim_frames(decoded, real).mean()),
        "sharpness": sharpness_ratio(decoded, real),
    }


def write_sheet(path: Path, real_N3HW: Tensor, decoded_N3HW: Tensor, *, columns: int = 8) -> None:
    """Write pairs of images as a PNG, real above decoded, ``columns`` pairs in a row. UserError:
    fewer images than columns."""
    pairs = torch.cat([real_N3HW, decoded_N3HW], dim=2).clamp(0, 1)
    rows = [torch.cat(list(row), dim=2) for row in pairs.split(columns) if len(row) == columns]
    if not rows:
        raise UserError(
            f"{path}: {len(pairs)} images make no row of {columns}; ask for fewer columns"
        )
    sheet = (torch.cat(rows, dim=1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    with new_file(path) as file:
        Image.fromarray(sheet.contiguous().cpu().numpy()).save(file, format="PNG")
