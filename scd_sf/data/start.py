"""Start files: an image or a video that a sampled video continues.

Letters: F pixel frames, H W pixel height and width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from scd_sf.data.clips import read_video
from scd_sf.types import UserError, VideoShape

VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi")


def read_start(path: Path, size: tuple[int, int], temporal: int) -> Tensor:
    """(F, 3, H, W) in [0, 1]: an image, or a video's last 1 + temporal*k frames, cropped and resized to ``size``."""
    if path.suffix.lower() in VIDEOS:
        frames = read_video(path)
        frames = frames[-(1 + (len(frames) - 1) // temporal * temporal) :]
    else:
        try:
            with Image.open(path) as image:
                picture = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(
                f"start {path}: neither a video nor a readable image ({error}); use png, jpg or mp4"
            ) from error
        frames = torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(0)
    height, width = frames.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    resized = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    pixels = frames.float() / 255
    if resized != (height, width):
        pixels = F.interpolate(pixels, size=resized, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    return pixels[:, :, top : top + size[0], left : left + size[1]]


def check_start(frames: int, chunk: int, shape: VideoShape, where: str) -> None:
    """UserError unless ``frames`` latent frames of a start file are whole chunks and leave something to generate."""
    if frames % chunk:
        raise UserError(
            f"start {where}: gives {frames} latent frames, the model makes {chunk} at a time: use a video of "
            f"{1 + (chunk - 1) * shape.temporal} frames, or a model of chunk 1"
        )
    if frames >= shape.frames:
        raise UserError(f"start {where}: fills all {shape.pixel_frames} frames; ask for more with frames=")
