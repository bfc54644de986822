"""The project's only reader of still pictures: upright, of any bit depth, in the colours of an ordinary
screen (sRGB).

Files are untrusted: sizes are compared before anything is decoded. What cannot be brought to sRGB with
certainty is refused in words. Letters: H W pixel height and width.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT
from torch import Tensor

from scd_sf.files import foreign, refuse_lfs_pointer
from scd_sf.types import UserError

PICTURES = ("PNG", "JPEG", "WEBP", "TIFF")  # others start programs (EPS), or are rare
LARGEST_PICTURE = 2**26  # pixels: 8192 x 8192; whole, in fp32, they take 0.8 GB
LARGEST_PROFILE = 2**23  # bytes; those of presses have up to 3 MB
REMEDY = "use png, jpg, webp, tiff, mp4, mov, mkv, webm or avi"
TO_SRGB = "save it as sRGB, as most programs do by default"
TO_8_BITS = "save it with 8 or 16 bits"
# Pillow's modes of pictures by what a profile of theirs describes; it converts all of them to RGB
GREYS, INKS = ("1", "L", "LA", "La"), ("CMYK",)
COLOURS = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "HSV")
PROFILE_MODES = {"GRAY": "L", "CMYK": "CMYK", "RGB": "RGB"}
# A PNG's white, red, green, blue (x, y each) and gamma. ffmpeg writes those of BT.709 and BT.601, whose
# colours are taken as they are in videos, too.
SCREEN = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
SAME_COLOUR = 0.015  # BT.601 differs by 0.01, Adobe RGB and Display P3 by more than 0.03
SCREEN_GAMMAS = ((0.435, 0.475), (0.505, 0.515))  # sRGB's and BT.709's
# the same as numbers of ITU-T H.273, in a PNG's cICP
SCREEN_PRIMARIES, SCREEN_TRANSFERS = (1, 5, 6), (1, 4, 6, 13, 14, 15)
UNKNOWN = 2  # primaries of ffmpeg where a video names its transfer alone
WEAKER = ("icc_profile", "gamma", "chromaticity")  # Pillow's names of what counts only without cICP


def read_picture(path: Path, where: str) -> Tensor:
    """(3, H, W) in [0, 1] of an image, upright as its EXIF orientation says, in sRGB.

    UserError: missing, damaged, too large, of several pictures, with transparent parts, with values
    that have no known scale, or with colours that are not known.
    """
    if not path.is_file():
        raise UserError(f"{where}: no such file; check the path")
    refuse_lfs_pointer(path)
    # Pillow gets an open file, because it maps plain TIFFs of a path, and then mixes the pixels of
    # those that are to be turned.
    with foreign(f"{where}: neither a video nor a readable image", REMEDY), path.open("rb") as file:
        return picture_of(file, where, LARGEST_PICTURE, PICTURES)


def picture_of(file: BinaryIO, where: str, largest: int, formats: tuple[str, ...]) -> Tensor:
    """(3, H, W) in [0, 1] of the bytes of an image of at most ``largest`` pixels in one of
    ``formats``, as :func:`read_picture` reads a file of them.

    UserError likewise, but for bytes that are no image: wrap it in :func:`~scd_sf.files.foreign`.
    """
    colours = _cicp(file)
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
        if colours is not None:
            primaries, transfer, matrix, is_full = colours
            if (matrix, is_full) != (0, 1) or not (
                primaries in (*SCREEN_PRIMARIES, UNKNOWN) and transfer in SCREEN_TRANSFERS
            ):
                raise UserError(
                    f"{where}: is made for another screen, HDR or wide perhaps (cICP {primaries}-{transfer}); {TO_SRGB}"
                )
            if primaries != UNKNOWN:
                for name in WEAKER:
                    image.info.pop(name, None)
        return shown_pixels(image, where)


def shown_pixels(image: Image.Image, where: str) -> Tensor:
    """(3, H, W) in [0, 1] of an open image, upright and in sRGB. UserError as
    :func:`read_picture`."""
    is_deep = image.mode.startswith("I") or image.mode == "F"
    if not is_deep and image.mode not in GREYS + INKS + COLOURS:
        raise UserError(f"{where}: is stored as {image.mode}, which is not read; {TO_SRGB}")
    transparency = image.info.get("transparency")  # a colour of 16 bits is compared with none of 8
    if image.has_transparency_data and (
        is_deep
        or (isinstance(transparency, tuple) and max(transparency) > 255)
        or _least_alpha(image) < 255
    ):
        raise UserError(
            f"{where}: has transparent parts (alpha), and a video has none; flatten it on a background"
        )
    _check_png_colours(image, where)
    if is_deep:
        values_HW3 = _deep(image, where)
    else:
        tags = getattr(image, "tag_v2", {})
        if tags.get(SAMPLEFORMAT, (1,))[0] == 2:
            raise UserError(f"{where}: signed numbers have no known scale; {TO_8_BITS}")
        picture = _srgb(ImageOps.exif_transpose(image), where)
        values_HW3 = np.asarray(picture).astype(np.float32) / np.float32(255)
    return torch.from_numpy(values_HW3).permute(2, 0, 1)


def _cicp(file: BinaryIO) -> tuple[int, int, int, int] | None:
    """Primaries, transfer, matrix and range flag of a PNG's cICP, which Pillow does not read; None
    where there is none. The file is where it was."""
    begin = file.tell()
    try:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return None
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name == b"cICP":
                data = file.read(4)
                return (data[0], data[1], data[2], data[3]) if len(data) == 4 else None
            if name in (b"IDAT", b"IEND"):
                return None
            file.seek(length + 4, io.SEEK_CUR)
        return None
    finally:
        file.seek(begin)


def _opened(file: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """ValueError in words for people: Pillow's own names the object in memory."""
    try:
        return Image.open(file, formats=formats)
    except UnidentifiedImageError as error:
        raise ValueError(f"no picture of the formats {', '.join(formats)}") from error


def _check_png_colours(image: Image.Image, where: str) -> None:
    """UserError for a PNG whose gAMA or cHRM describe another screen, where nothing that counts more
    is there."""
    if "icc_profile" in image.info or "srgb" in image.info:
        return
    gamma, chromaticity = image.info.get("gamma"), image.info.get("chromaticity")
    is_screen = gamma is None or any(least <= gamma <= most for least, most in SCREEN_GAMMAS)
    if chromaticity is not None:
        is_screen &= all(
            abs(value - own) < SAME_COLOUR for value, own in zip(chromaticity, SCREEN, strict=True)
        )
    if not is_screen:
        words = "" if gamma is None else f" with a gamma of {1 / gamma if gamma else 0:.3g}"
        raise UserError(
            f"{where}: is made for another screen (PNG's gAMA and cHRM){words}; {TO_SRGB}"
        )


def _srgb(image: Image.Image, where: str) -> Image.Image:
    """The picture as RGB in sRGB: by its ICC profile, relative colorimetric with black point
    compensation, or as it is without one. UserError: the profile cannot be used, or one is needed."""
    if not image.info.get("icc_profile", b"none"):  # Pillow's None for one that is damaged
        raise UserError(f"{where}: its colour profile (ICC) is damaged; {TO_SRGB}")
    data = image.info.get("icc_profile")
    if data is None:
        if image.mode in INKS:
            raise UserError(
                f"{where}: is made for print (CMYK), without a colour profile; {TO_SRGB}"
            )
        if _is_adobe_by_exif(image):
            raise UserError(
                f"{where}: is Adobe RGB by its EXIF, without a colour profile; {TO_SRGB}"
            )
        return image.convert("RGB")
    with foreign(f"{where}: its colour profile (ICC) cannot be used", TO_SRGB):
        if len(data) > LARGEST_PROFILE:
            raise ValueError(f"it has {len(data):,} bytes, {LARGEST_PROFILE:,} are read at most")
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = profile.profile.xcolor_space.strip()
        mode = PROFILE_MODES.get(space, "")
        own = "CMYK" if image.mode in INKS else "L" if image.mode in GREYS else "RGB"
        if mode != own and (mode, own) != ("RGB", "L"):  # a grey is a colour of a screen
            raise ValueError(f"it is for {space}, the picture is {own}")
        picture = ImageCms.profileToProfile(
            image.convert(mode),
            profile,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    assert picture is not None  # not in place
    return picture


def _is_adobe_by_exif(image: Image.Image) -> bool:
    """Whether a camera says so (DCF 2.0), which leaves the profile out."""
    try:
        interop = image.getexif().get_ifd(ExifTags.IFD.Interop)
    except KeyError:  # of Pillow before 11 where there is none
        return False
    return interop.get(ExifTags.Interop.InteropIndex) == "R03"


def _deep(image: Image.Image, where: str) -> np.ndarray:
    """fp32 (H, W, 3) in [0, 1] of greys of more than 8 bits. UserError: no known scale."""
    tags = getattr(image, "tag_v2", {})
    bits, kind = tags.get(BITSPERSAMPLE, (16,))[0], tags.get(SAMPLEFORMAT, (1,))[0]
    # older Pillow holds a PNG's 16 bits as "I"
    has_scale = image.mode == "F" or image.mode.startswith("I;") or image.format == "PNG"
    if not has_scale or kind == 2 or (image.mode != "F" and bits > 16):
        raise UserError(
            f"{where}: whole numbers of 32 bits, and signed ones, have no known scale; {TO_8_BITS}"
        )
    upright = ImageOps.exif_transpose(image)
    values = np.asarray(upright).astype(np.float64)
    grey = values if image.mode == "F" else values / (2.0**bits - 1)
    if not (np.isfinite(grey).all() and grey.min() >= 0 and grey.max() <= 1):
        least, most = values.min(), values.max()
        raise UserError(
            f"{where}: its values, {least:g} to {most:g}, have no known scale; {TO_8_BITS}"
        )
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white
        grey = 1 - grey
    if "icc_profile" not in image.info:
        return np.repeat(grey[..., None].astype(np.float32), 3, axis=2)
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    ramp.info["icc_profile"] = image.info["icc_profile"]
    table = np.asarray(_srgb(ramp, where))[0] / 255
    shades = [np.interp(grey, np.linspace(0, 1, 256), table[:, part]) for part in range(3)]
    return np.stack(shades, axis=2).astype(np.float32)


def _least_alpha(image: Image.Image) -> int:
    least: int = np.asarray(image.convert("RGBA").getchannel("A")).min()
    return least
