"""How well pictures survive a tokenizer: PSNR, SSIM, sharpness, and a sheet to look at.

Letters: N images, H W height and width; images are fp32 (N, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from scd_sf.types import UserError

WINDOW, SIGMA = 11, 1.5  # of SSIM, as its authors have it (Wang et al. 2004), and the constants of a range of 1:
C1, C2 = 0.01**2, 0.03**2


def ssim(made_N3HW: Tensor, real_N3HW: Tensor) -> Tensor:
    """Structural similarity of each image, (N,): Gaussian window, only where it fits, mean over channels and places.

    UserError: an image smaller than the window.
    """
    if min(made_N3HW.shape[2:]) < WINDOW or made_N3HW.shape != real_N3HW.shape:
        shapes = f"{tuple(made_N3HW.shape)} and {tuple(real_N3HW.shape)}"
        raise UserError(f"SSIM: images of {shapes}; they must be equal and at least {WINDOW} pixels high and wide")
    line = torch.exp(-((torch.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    kernel = (line / line.sum()).to(made_N3HW)

    def local_mean(x: Tensor) -> Tensor:
        x = x.flatten(0, 1).unsqueeze(1)
        x = functional.conv2d(functional.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
        return x.view(len(made_N3HW), -1, *x.shape[2:])

    a, b = local_mean(made_N3HW), local_mean(real_N3HW)
    aa, bb = (local_mean(x * x) - m * m for x, m in ((made_N3HW, a), (real_N3HW, b)))
    ab = local_mean(made_N3HW * real_N3HW) - a * b
    value = (2 * a * b + C1) * (2 * ab + C2) / ((a * a + b * b + C1) * (aa + bb + C2))
    return value.flatten(1).mean(1)


def reconstruction(made_N3HW: Tensor, real_N3HW: Tensor) -> dict[str, float]:
    """``psnr`` (dB, the mean over images; peak 1), ``ssim``, and ``sharpness``: what is left of the mean difference
    between neighbours (1: all, less: blurred)."""
    error = (made_N3HW - real_N3HW).square().flatten(1).mean(1).clamp_min(1e-12)
    edges = [x.diff(dim=3).abs().mean() + x.diff(dim=2).abs().mean() for x in (made_N3HW, real_N3HW)]
    return {
        "psnr": float((-10 * torch.log10(error)).mean()),
        "ssim": float(ssim(made_N3HW, real_N3HW).mean()),
        "sharpness": float(edges[0] / edges[1].clamp_min(1e-12)),
    }


def write_sheet(path: Path, real_N3HW: Tensor, made_N3HW: Tensor, *, columns: int = 8) -> None:
    """A PNG of pairs, real above made, ``columns`` pairs in a row."""
    pairs = torch.cat([real_N3HW, made_N3HW], dim=2).clamp(0, 1)
    rows = [torch.cat(list(row), dim=2) for row in pairs.split(columns) if len(row) == columns]
    if not rows:
        raise UserError(f"{path}: {len(pairs)} images make no row of {columns}; ask for fewer columns")
    sheet = (torch.cat(rows, dim=1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    part = path.with_name(path.name + ".tmp")
    Image.fromarray(sheet.contiguous().cpu().numpy()).save(part, format="PNG")
    part.replace(path)
