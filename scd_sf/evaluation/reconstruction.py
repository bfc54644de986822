"""How well pictures survive a tokenizer: PSNR, SSIM, sharpness, and a sheet to look at.

Letters: N images, H W height and width; images are fp32 (N, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from scd_sf.evaluation.frames import psnr_frames, sharpness_ratio, ssim_frames
from scd_sf.files import new_file
from scd_sf.types import UserError

CEILING = 120.0  # dB, of an image without error


def reconstruction_figures(made_N3HW: Tensor, real_N3HW: Tensor) -> dict[str, float]:
    """``psnr`` (dB, the mean over images; peak 1), ``ssim``, and ``sharpness``: what is left of the mean difference
    between neighbours (1: all, less: blurred). UserError: see evaluation/frames.py."""
    made, real = made_N3HW.unsqueeze(1), real_N3HW.unsqueeze(1)  # videos of one frame
    return {
        "psnr": float(psnr_frames(made, real).clamp_max(CEILING).mean()),
        "ssim": float(ssim_frames(made, real).mean()),
        "sharpness": sharpness_ratio(made, real),
    }


def write_sheet(path: Path, real_N3HW: Tensor, made_N3HW: Tensor, *, columns: int = 8) -> None:
    """A PNG of pairs, real above made, ``columns`` pairs in a row."""
    pairs = torch.cat([real_N3HW, made_N3HW], dim=2).clamp(0, 1)
    rows = [torch.cat(list(row), dim=2) for row in pairs.split(columns) if len(row) == columns]
    if not rows:
        raise UserError(f"{path}: {len(pairs)} images make no row of {columns}; ask for fewer columns")
    sheet = (torch.cat(rows, dim=1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    with new_file(path) as part:
        Image.fromarray(sheet.contiguous().cpu().numpy()).save(part, format="PNG")
