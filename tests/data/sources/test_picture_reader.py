"""Colours of pictures: brought to sRGB, as a browser shows them, or refused in words."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from raw_pictures import ADOBE, P3, grey_profile, iccp, ink_profile, png, rgb_profile

from scd_sf.data.sources.picture_reader import LARGEST_PROFILE, read_picture
from scd_sf.data.start import picture_pixels
from scd_sf.types import UserError

SCREEN = ImageCms.createProfile("sRGB")


def patches(colours: np.ndarray) -> np.ndarray:
    """Squares of 16 pixels, side by side."""
    return np.repeat(np.repeat(colours[None], 16, 0), 16, 1)


def seen(path: Path) -> np.ndarray:
    """The colour (0 .. 255) of each square."""
    pixels = read_picture(path, path.name).permute(1, 2, 0).numpy() * 255
    return pixels[8, 8::16]


def write(path: Path, picture: Image.Image, profile: bytes) -> Path:
    quality: dict[str, dict[str, Any]] = {
        ".jpg": {"quality": 100, "subsampling": 0},
        ".webp": {"lossless": True},
    }
    picture.save(path, icc_profile=profile, **quality.get(path.suffix, {}))
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
@pytest.mark.parametrize(
    ("profile", "published", "shown"),
    [
        (rgb_profile(ADOBE, 563 / 256), (144, 255, 60), (0, 255, 0)),
        (rgb_profile(P3, 2.2), (234, 51, 35), (255, 0, 0)),
    ],
)
def test_screens(
    tmp_path: Path, name: str, profile: bytes, published: tuple[int], shown: tuple[int]
) -> None:
    """Random colours of sRGB, through a wide screen's profile and back, and a published one."""
    colours = np.random.default_rng(0).integers(64, 240, (200, 3), np.uint8)
    own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    picture = ImageCms.profileToProfile(Image.fromarray(patches(colours)), SCREEN, own)
    assert picture is not None
    values = np.asarray(picture).copy()
    values[:, :16] = published
    colours[0] = shown
    difference = np.abs(seen(write(tmp_path / name, Image.fromarray(values), profile)) - colours)
    assert difference.max() <= (4 if name == "a.jpg" else 2)
    assert difference.mean() < 0.7
    assert np.abs(values[8, 8::16].astype(int) - colours).max() > 40, "without its profile"
    if name == "a.png":
        with Image.open(tmp_path / name) as image:
            pixels = picture_pixels(image.convert("RGBA"), image.size[::-1], "image")
        assert torch.equal(pixels, read_picture(tmp_path / name, name))


def test_an_ordinary_profile_changes_nothing(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(SCREEN).tobytes()
    path = write(tmp_path / "a.png", Image.fromarray(values), profile)
    pixels = read_picture(path, "a").permute(1, 2, 0).numpy() * 255
    assert np.abs(pixels - values).max() < 0.01


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_inks(tmp_path: Path, name: str) -> None:
    """A press with inks of its own, whose mixtures have any colour."""
    colours = np.random.default_rng(1).integers(60, 230, (16, 3), np.uint8)
    colours[0] = 255  # no ink
    inks = np.array([[255 * (n >> place & 1) for place in (3, 2, 1, 0)] for n in range(16)])
    picture = Image.fromarray(patches(inks.astype(np.uint8)), "CMYK")
    path = write(tmp_path / name, picture, ink_profile(colours))
    assert np.abs(seen(path) - colours).max() <= 3
    picture.save(path)
    with pytest.raises(UserError, match=rf"{name}: is made for print \(CMYK\).*save it as sRGB"):
        read_picture(path, name)


def test_greys(tmp_path: Path) -> None:
    """Linear greys of 8 and 16 bits, with a profile of greys or of a screen's colours."""
    colours = np.array([0, 55, 128, 188, 255])
    linear = np.where(colours > 10, ((colours / 255 + 0.055) / 1.055) ** 2.4, 0)
    for number, profile in enumerate((grey_profile(1), rgb_profile(ADOBE, 1))):
        for kind, most in ((np.uint8, 255), (np.uint16, 65535)):
            path = tmp_path / f"{number}-{most}.png"
            values = patches((linear * most).round().astype(kind))
            path.write_bytes(png(values, {b"iCCP": iccp(profile)}))
            assert np.abs(seen(path) - colours[:, None]).max() <= 2, path
    grey = patches(np.array([7, 9], np.uint8))
    path = write(
        tmp_path / "a.png", Image.fromarray(grey), ImageCms.ImageCmsProfile(SCREEN).tobytes()
    )
    assert np.abs(seen(path)[:, 0] - (7, 9)).max() < 1, "as programs leave it after colours"


def numbers(*values: float) -> bytes:
    return struct.pack(f">{len(values)}I", *(round(value * 100000) for value in values))


WHITE, RED, BLUE = (0.3127, 0.329), (0.64, 0.33), (0.15, 0.06)
SRGB_CHRM = numbers(*WHITE, *RED, 0.3, 0.6, *BLUE)
ADOBE_CHRM = numbers(*WHITE, *RED, 0.21, 0.71, *BLUE)


def test_colour_chunks_of_png(tmp_path: Path) -> None:
    """What ffmpeg and others write for an ordinary screen is taken as it is, what describes another
    one is refused, unless something that counts more is there."""
    colours = np.array([[250, 3, 3], [40, 80, 200], [20, 20, 20]], np.uint8)
    profile = iccp(rgb_profile(ADOBE, 563 / 256))
    for chunks in (
        {b"gAMA": numbers(0.45455), b"cHRM": SRGB_CHRM},
        {b"gAMA": numbers(0.50994), b"cHRM": numbers(*WHITE, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07)},
        {b"sRGB": b"\0", b"gAMA": numbers(1), b"cHRM": ADOBE_CHRM},
        {b"cICP": bytes((1, 13, 0, 1)), b"iCCP": profile},
        {b"cICP": bytes((1, 1, 0, 1)), b"gAMA": numbers(1)},
        {b"cICP": bytes((1, 4, 0, 1))},  # a gamma of 2.2, as gAMA's 0.45455
        {b"cICP": bytes((2, 13, 0, 1)), b"gAMA": numbers(0.45455)},  # ffmpeg, of unknown primaries
    ):
        (tmp_path / "a.png").write_bytes(png(patches(colours), chunks))
        assert np.array_equal(seen(tmp_path / "a.png").round(), colours), chunks
    for chunks, message in (
        ({b"gAMA": numbers(1)}, r"is made for another screen .*a gamma of 1;"),
        ({b"gAMA": numbers(0.55556), b"cHRM": SRGB_CHRM}, "a gamma of 1.8;"),
        ({b"gAMA": numbers(0)}, "is made for another screen"),
        ({b"cHRM": ADOBE_CHRM}, "is made for another screen"),
        ({b"cICP": bytes((9, 16, 0, 1))}, r"another screen, HDR or wide perhaps \(cICP 9-16\)"),
        ({b"cICP": bytes((12, 13, 0, 1))}, "another screen, HDR"),
        ({b"cICP": bytes((2, 13, 0, 1)), b"gAMA": numbers(1)}, "another screen"),
    ):
        (tmp_path / "a.png").write_bytes(png(patches(colours), chunks))
        with pytest.raises(UserError, match=f"still: .*{message}.*save it as sRGB"):
            read_picture(tmp_path / "a.png", "still")


def test_profiles_that_cannot_be_used(tmp_path: Path) -> None:
    """Browsers pass over them; the colours would be wrong without a word."""
    colours, good = patches(np.array([[200, 60, 30]], np.uint8)), rgb_profile(ADOBE, 2.2)
    for data, message in (
        (iccp(good[:200]), "cannot be used"),
        (iccp(b"x" * 300), "cannot be used"),
        (b"x\0\0" + b"no zlib", "is damaged"),
        (iccp(grey_profile(2.2)), "it is for GRAY, the picture is RGB"),
        (iccp(ink_profile(np.zeros((16, 3), np.uint8))), "it is for CMYK, the picture is RGB"),
    ):
        (tmp_path / "a.png").write_bytes(png(colours, {b"iCCP": data}))
        with pytest.raises(UserError, match=rf"still: its colour profile \(ICC\).*{message}.*sRGB"):
            read_picture(tmp_path / "a.png", "still")
    large = good + bytes(LARGEST_PROFILE)
    path = write(tmp_path / "a.jpg", Image.fromarray(colours), large)
    with pytest.raises(UserError, match=r"it has 8,38.*bytes, 8,388,608 are read at most"):
        read_picture(path, "still")
    folders = [(0x8769, 4, 1, 26), (0xA005, 4, 1, 44), (1, 2, 4, int.from_bytes(b"R03\0"))]
    parts = [struct.pack(">HHHIII", 1, *entry, 0) for entry in folders]
    exif = b"Exif\0\0MM\0*" + struct.pack(">I", 8) + b"".join(parts)
    Image.fromarray(colours).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(UserError, match="is Adobe RGB by its EXIF"):
        read_picture(tmp_path / "a.jpg", "still")
    image = ImageCms.profileToProfile(
        Image.fromarray(colours), SCREEN, ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    with pytest.raises(UserError, match="image: is stored as LAB"):
        picture_pixels(image, (16, 16), "image")
