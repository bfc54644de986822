"""Start files, an image or a video that a sampled video continues, and input videos, which are made
anew.

Letters: F pixel frames, H W pixel height and width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT
from torch import Tensor

from scd_sf.files import foreign, refuse_lfs_pointer
from scd_sf.types import UserError, VideoShape

VIDEOS = (".mp4", ".m4v", ".webm", ".mov", ".mkv", ".avi", ".ts")
PICTURES = ("PNG", "JPEG", "WEBP", "TIFF")  # others start programs (EPS), or are rare
LARGEST_PICTURE = 2**26  # pixels: 8192 x 8192; whole, in fp32, they take 0.8 GB
REMEDY = "use png, jpg, webp, tiff, mp4, mov, mkv, webm or avi"


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
        return torch.from_numpy(_values(picture, where)).permute(2, 0, 1)
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


def read_picture(path: Path, where: str) -> Tensor:
    """(3, H, W) in [0, 1] of an image of any bit depth, upright as its EXIF orientation says.

    UserError: missing, damaged, too large, of several pictures, with transparent parts, or with
    values that have no known scale.
    """
    if not path.is_file():
        raise UserError(f"{where}: no such file; check the path")
    refuse_lfs_pointer(path)
    # Pillow gets an open file, because it maps plain TIFFs of a path, and then mixes the pixels of
    # those that are to be turned.
    with foreign(f"{where}: neither a video nor a readable image", REMEDY), path.open("rb") as file:
        return picture_of(file, where, LARGEST_PICTURE, PICTURES)


def picture_of(
    file: BinaryIO,
    where: str,
    largest: int,
    formats: tuple[str, ...],
) -> Tensor:
    """(3, H, W) in [0, 1] of the bytes of an image of at most ``largest`` pixels in one of
    ``formats``, as :func:`read_picture` reads a file of them.

    UserError likewise, but for bytes that are no image: wrap it in :func:`~scd_sf.files.foreign`.
    """
    with (
        # sizes are compared below
        warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
        _opened(file, formats) as image,
    ):
        if image.width * image.height > largest:
            raise UserError(
                f"{where}: {image.width}x{image.height} is too large, {largest:,} pixels are read at most; "
                "make it smaller"
            )
        # of an MPO the first is the photograph
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise UserError(f"{where}: holds several pictures; give one of them, or a video")
        return torch.from_numpy(_values(image, where)).permute(2, 0, 1)


def _opened(file: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """ValueError in words for people: Pillow's own names the object in memory."""
    try:
        return Image.open(file, formats=formats)
    except UnidentifiedImageError as error:
        raise ValueError(f"no picture of the formats {', '.join(formats)}") from error


def _values(image: Image.Image, where: str) -> np.ndarray:
    """The pixels of an open image, fp32 (H, W, 3) in [0, 1]. UserError as :func:`read_picture`."""
    is_deep = image.mode.startswith("I") or image.mode == "F"
    transparency = image.info.get("transparency")  # a colour of 16 bits is compared with none of 8
    if image.has_transparency_data and (
        is_deep
        or (isinstance(transparency, tuple) and max(transparency) > 255)
        or _least_alpha(image) < 255
    ):
        raise UserError(
            f"{where}: has transparent parts (alpha), and a video has none; flatten it on a background"
        )
    tags = getattr(image, "tag_v2", {})
    bits, kind = tags.get(BITSPERSAMPLE, (16,))[0], tags.get(SAMPLEFORMAT, (1,))[0]
    if not is_deep:
        if kind == 2:
            raise UserError(
                f"{where}: signed numbers of {bits} bits have no known scale; save it with 8 or 16 bits"
            )
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(
            np.float32
        ) / np.float32(255)
    values = np.asarray(ImageOps.exif_transpose(image)).astype(np.float64)
    if image.mode == "I" and kind == 1:
        values %= 2.0**bits  # Pillow holds unsigned numbers of 32 bits in signed ones
    value_bits = bits - 1 if kind == 2 else bits  # signed numbers have one bit for the sign
    grey = values if image.mode == "F" else values / (2.0**value_bits - 1)
    if not (np.isfinite(grey).all() and grey.min() >= 0 and grey.max() <= 1):
        least, most = values.min(), values.max()
        raise UserError(
            f"{where}: its values, {least:g} to {most:g}, have no known scale; save it with 8 or 16 bits"
        )
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white
        grey = 1 - grey
    return np.repeat(grey[..., None].astype(np.float32), 3, axis=2)


def _least_alpha(image: Image.Image) -> int:
    least: int = np.asarray(image.convert("RGBA").getchannel("A")).min()
    return least


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
