"""Start files, an image or a video that a sampled video continues, and input videos, which are made
anew.

Letters: F pixel frames, H W pixel height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from scd_sf.data.sources.picture_reader import REMEDY, read_picture, shown_pixels
from scd_sf.files import foreign
from scd_sf.types import UserError, VideoShape

VIDEOS = (".mp4", ".m4v", ".webm", ".mov", ".mkv", ".avi", ".ts")


def read_start(path: Path, size: tuple[int, int], temporal: int, fps: float) -> Tensor:
    """(F, 3, H, W) in [0, 1]: an image, or a video's last 1 + temporal*k frames, cropped and
    resized to ``size``.

    A video is resampled to ``fps`` by its timestamps. Both are upright, as their files say.
    UserError: not readable, too large, or with transparent parts.
    """
    where = f"start {path}"
    if path.suffix.lower() not in VIDEOS:
        return _fit(read_picture(path, where), size, where)[None]
    from scd_sf.data.sources.video_reader import LARGEST_VIDEO  # needs PyAV

    frames: list[Tensor] = []
    for pixels in read_pictures(path, size, fps, where):
        frames.append(pixels)
        if len(frames) * frames[0].nbytes > LARGEST_VIDEO:
            raise UserError(
                f"{where}: {len(frames)} frames are more than a start can have; cut the video"
            )
    return torch.stack(frames[-(1 + (len(frames) - 1) // temporal * temporal) :])


def read_pictures(path: Path, size: tuple[int, int], fps: float, where: str) -> Iterator[Tensor]:
    """The pictures (3, H, W) in [0, 1] of a video, one after another: resampled to ``fps`` by its
    timestamps, cropped and resized to ``size``. UserError: not readable."""
    from scd_sf.data.sources.video_reader import frames_of

    for frame in frames_of(path, where, fps=fps, remedy=REMEDY):
        pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1).float() / 255
        yield _fit(pixels, size, where)


def count_pictures(path: Path, size: tuple[int, int], fps: float, where: str) -> int:
    """How many :func:`read_pictures` gives. All of them are decoded, so that damage and transparent
    parts show before a model works on them. UserError: no video, or one that cannot be read."""
    if path.suffix.lower() not in VIDEOS:
        raise UserError(f"{where}: is no video by its name; use {', '.join(VIDEOS)}")
    from scd_sf.data.sources.video_reader import at_rate, check_crop, pictures, video_info

    info = video_info(path, where, REMEDY)  # refuses frames that stand for very long
    check_crop(info.height, info.width, *size, where)
    with foreign(where, "write it again with timestamps"):
        return sum(len(p.pixels) > 0 for p in at_rate(pictures(path, where, REMEDY), fps))


def picture_pixels(picture: object, size: tuple[int, int], where: str) -> Tensor:
    """(3, *size) in [0, 1] of a picture in memory, cropped and resized as :func:`read_start` does.

    ``picture``: a PIL image, an array (H, W, 3) or a tensor (3, H, W), uint8 or float in [0, 1].
    UserError for anything else, and for transparent parts.
    """
    return _fit(_in_memory(picture, where), size, where)


def check_picture(picture: object, size: tuple[int, int], where: str) -> None:
    """The UserError that :func:`picture_pixels` would have, without its work."""
    from scd_sf.data.sources.video_reader import check_crop

    height, width = _in_memory(picture, where).shape[-2:]
    check_crop(height, width, *size, where)


def _in_memory(picture: object, where: str) -> Tensor:
    """(3, H, W) in [0, 1] of a picture in memory."""
    if isinstance(picture, Image.Image):
        with foreign(where, "save it as sRGB"):
            return shown_pixels(picture, where)
    if isinstance(picture, np.ndarray):
        with foreign(where, "give uint8, or float in [0, 1]"):
            pixels = torch.from_numpy(np.ascontiguousarray(picture))
        pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels
    elif isinstance(picture, Tensor):
        pixels = picture
    else:
        raise UserError(
            f"{where}: is a {type(picture).__name__}; give a PIL image, an array (H, W, 3) or a tensor (3, H, W)"
        )
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel():
        raise UserError(
            f"{where}: has shape {tuple(picture.shape)}; give an array (H, W, 3) or a tensor (3, H, W)"
        )
    if not pixels.is_floating_point() and pixels.dtype != torch.uint8:
        raise UserError(f"{where}: holds {pixels.dtype}; give uint8, or float in [0, 1]")
    pixels = pixels.cpu().float() / (1 if pixels.is_floating_point() else 255)
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise UserError(
            f"{where}: its values are {pixels.min():g} to {pixels.max():g}; give float in [0, 1]"
        )
    return pixels


def _fit(pixels_3HW: Tensor, size: tuple[int, int], where: str) -> Tensor:
    """The picture resized (bicubic, antialiased) so that it just covers ``size``, then cropped at
    the middle to (3, *size)."""
    height, width = pixels_3HW.shape[-2:]
    from scd_sf.data.sources.video_reader import check_crop

    check_crop(height, width, *size, where)
    scale = max(size[0] / height, size[1] / width)
    new_size = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    if new_size != (height, width):
        pixels_3HW = F.interpolate(pixels_3HW[None], size=new_size, mode="bicubic", antialias=True)[
            0
        ].clamp(0, 1)
    top, left = (new_size[0] - size[0]) // 2, (new_size[1] - size[1]) // 2
    return pixels_3HW[:, top : top + size[0], left : left + size[1]].clone()


def check_start(frames: int, chunk: int, shape: VideoShape, where: str) -> None:
    """UserError unless ``frames`` latent frames of a start file are whole chunks and leave
    something to generate."""
    if frames % chunk:
        raise UserError(
            f"start {where}: gives {frames} latent frames, the model makes {chunk} at a time: use a video of "
            f"{1 + (chunk - 1) * shape.temporal} frames, or a model of chunk 1"
        )
    if frames >= shape.frames:
        raise UserError(
            f"start {where}: fills all {shape.pixel_frames} frames; ask for more with frames="
        )
