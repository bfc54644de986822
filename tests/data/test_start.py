"""Start files: images of every depth and orientation, videos at the sample's rate, and what is
refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from raw_pictures import png
from raw_videos import corners, grey, levels, write

from scd_sf.data import start
from scd_sf.data.sources import picture_reader, video_reader
from scd_sf.data.sources.picture_reader import read_picture
from scd_sf.data.start import picture_pixels, read_start
from scd_sf.files import LFS_POINTER
from scd_sf.generation.request import start_pixels
from scd_sf.types import UserError, VideoShape

SIZE = (32, 48)


def shown(path: Path) -> torch.Tensor:
    return read_start(path, SIZE, 4, 16)


def save(path: Path, values: np.ndarray, **options: Any) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


SHORT, PART = (np.full(SIZE, value) for value in (30000, 0.25))


@pytest.mark.parametrize(
    ("name", "values", "mean"),
    [
        ("a.png", SHORT.astype(np.uint16), 30000 / 65535),
        ("a.tif", SHORT.astype(np.uint16), 30000 / 65535),
        ("big.tif", SHORT.astype(">u2"), 30000 / 65535),
        ("float.tif", PART.astype(np.float32), 0.25),
        ("bit.png", np.ones(SIZE, bool), 1.0),
        ("byte.png", np.full(SIZE, 51, np.uint8), 0.2),
        ("colour.webp", np.full((*SIZE, 3), 102, np.uint8), 0.4),
        ("opaque.png", np.full((*SIZE, 4), 255, np.uint8), 1.0),
    ],
)
def test_every_depth_is_scaled(tmp_path: Path, name: str, values: np.ndarray, mean: float) -> None:
    pixels = shown(save(tmp_path / name, values))
    assert pixels.shape == (1, 3, *SIZE) and pixels.dtype == torch.float32
    assert float(pixels.mean()) == pytest.approx(mean, abs=0.005)


def test_white_is_zero_and_palettes(tmp_path: Path) -> None:
    """TIFF may count 16 bits from white on; a palette's numbers are no greys."""
    path = save(tmp_path / "a.tif", SHORT.astype(np.uint16), tiffinfo={262: 0})
    with Image.open(path) as image:
        assert image.tag_v2[262] == 0 and image.mode == "I;16"  # type: ignore[attr-defined]
    assert float(shown(path).mean()) == pytest.approx(1 - 30000 / 65535, abs=0.001)
    picture = Image.new("P", SIZE[::-1], 7)
    picture.putpalette([value for number in range(256) for value in (255 - number, number, 0)])
    picture.save(tmp_path / "p.png")
    assert shown(tmp_path / "p.png").mean((0, 2, 3)).mul(255).round().tolist() == [248, 7, 0]


def test_what_a_video_cannot_show_is_said(tmp_path: Path) -> None:
    clear = np.full((*SIZE, 4), 255, np.uint8)
    clear[:, :9, 3] = 0
    save(tmp_path / "rgba.png", clear)
    save(tmp_path / "rgba.webp", clear, lossless=True)
    save(tmp_path / "la.png", clear[..., 2:])
    Image.new("P", SIZE[::-1], 0).save(tmp_path / "p.png", transparency=0)
    for name in ("rgba.png", "rgba.webp", "la.png", "p.png"):
        with pytest.raises(UserError, match=r"has transparent parts \(alpha\).*flatten it"):
            shown(tmp_path / name)
    for name, values in (
        ("long.tif", SHORT.astype(np.int32)),
        ("long.tif", SHORT.astype(np.uint32)),
        ("signed.tif", SHORT.astype(np.int16)),
        ("bright.tif", PART.astype(np.float32) * 9),
    ):
        with pytest.raises(UserError, match=f"{name}: .* have no known scale; save it with 8 or"):
            shown(save(tmp_path / name, values))
    with pytest.raises(UserError, match=r"image: whole numbers of 32 bits.* have no known scale"):
        picture_pixels(Image.fromarray(SHORT.astype(np.int32) + 2**16), SIZE, "image")


def test_what_pillow_reads_wrongly_is_refused(tmp_path: Path) -> None:
    """Signed bytes of a TIFF, a transparent colour of 16 bits, a pointer of Git LFS."""
    signed = save(tmp_path / "signed.tif", np.full(SIZE, 51, np.uint8), tiffinfo={339: 2})
    with pytest.raises(UserError, match=r"signed.tif: signed numbers have no known scale"):
        shown(signed)
    deep = np.full((*SIZE, 3), 30000, np.uint16)
    (tmp_path / "deep.png").write_bytes(png(deep, {b"tRNS": struct.pack(">3H", *deep[0, 0])}))
    with pytest.raises(UserError, match=r"deep.png: has transparent parts \(alpha\)"):
        shown(tmp_path / "deep.png")
    for name in ("pointer.png", "pointer.mp4"):
        (tmp_path / name).write_bytes(LFS_POINTER + b".github.com/spec/v1\noid sha256:00\nsize 9\n")
        with pytest.raises(UserError, match=rf"{name}: a Git LFS pointer.*git lfs pull"):
            shown(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_orientation_of_plain_tiffs(tmp_path: Path, dtype: type[np.generic]) -> None:
    """Every quarter turn and mirror, for numbers that Pillow maps into memory where it opens the
    path itself."""
    left, right = {np.uint8: (51, 204), np.uint16: (2**14, 2**15)}.get(dtype, (0.2, 0.8))
    values = np.full(SIZE, right, dtype)
    values[:, :24] = left
    values[:16] = left
    turned = {
        1: values,
        2: values[:, ::-1],
        3: values[::-1, ::-1],
        4: values[::-1],
        5: values.T,
        6: np.rot90(values, -1),
        7: values[::-1, ::-1].T,
        8: np.rot90(values),
    }
    for orientation, wanted in turned.items():
        path = save(tmp_path / f"{orientation}.tif", values, tiffinfo={274: orientation})
        grey = read_picture(path, "still")[0].numpy()
        assert grey.shape == wanted.shape
        assert np.array_equal(grey == grey.max(), wanted == right), orientation


def test_orientation_of_stills(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise
    path = save(tmp_path / "a.jpg", corners(), exif=exif, quality=95, subsampling=0)
    pixels = read_start(path, (48, 32), 4, 16)[0].permute(1, 2, 0).numpy() * 255
    wanted = np.rot90(corners(), -1).astype(float)
    assert np.abs(pixels[4:20, 4:12] - wanted[4:20, 4:12]).mean() < 10


def test_a_video_is_turned_and_resampled(tmp_path: Path) -> None:
    """The last 1 + 4k frames at 16 per second of a phone's clip of 32 per second."""
    path = write(
        tmp_path / "a.mp4", [grey(10 * n) for n in range(22)], rate=32, matrix=(0, 1, -1, 0)
    )
    pixels = read_start(path, (48, 32), 4, 16)
    assert pixels.shape == (9, 3, 48, 32)
    assert [round(level / 10) for level in levels(pixels * 255)] == list(range(4, 22, 2))


def test_other_formats_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPS would start Ghostscript; an animation is no still; a header may promise any size."""
    eps = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(eps, "EPS")
    monkeypatch.setenv("PATH", str(tmp_path))
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    gs.chmod(0o755)
    save(
        tmp_path / "b.png",
        np.zeros((8, 8), np.uint8),
        append_images=[Image.new("L", (8, 8), 9)],
        save_all=True,
    )
    (tmp_path / "c.png").write_bytes(b"png")
    for name, message in (
        ("a.png", "neither a video nor a readable image"),
        ("b.png", "holds several pictures"),
        ("c.png", "neither a video nor a readable image"),
        ("none.png", "no such file"),
    ):
        with pytest.raises(UserError, match=f"start .*{name}: {message}"):
            shown(tmp_path / name)
    assert not (tmp_path / "started").exists()
    path = save(tmp_path / "d.png", np.zeros((64, 65), np.uint8))
    monkeypatch.setattr(picture_reader, "LARGEST_PICTURE", 64 * 64)
    monkeypatch.setattr(
        Image.Image, "load", lambda self: pytest.fail("decoded before its size was compared")
    )
    with pytest.raises(UserError, match=r"65x64 is too large, 4,096 pixels"):
        shown(path)
    monkeypatch.undo()
    monkeypatch.setattr(video_reader, "LARGEST_VIDEO", 3 * 32 * 48 * 3 * 4)
    with pytest.raises(UserError, match="more than a start can have"):
        shown(write(tmp_path / "long.mp4", [grey(n) for n in range(9)]))


def test_pictures_in_memory_and_long_ones(tmp_path: Path) -> None:
    rows = np.linspace(0, 255, 8 * 12 * 3).astype(np.uint8).reshape(8, 12, 3)
    turned = picture_pixels(rows[::-1], (8, 12), "image")
    assert torch.equal(turned, picture_pixels(rows, (8, 12), "image").flip(1))
    for array, message in (
        (np.zeros((0, 0, 3), np.uint8), "has shape"),
        (np.zeros((4, 4, 3), complex), "holds torch.complex"),
        (np.zeros((4, 4, 3), "U1"), "give uint8"),
        (np.zeros((8, 8 * 21, 3), np.uint8), "image: a picture of 168x8 is too long for 8x8"),
    ):
        with pytest.raises(UserError, match=message):
            picture_pixels(array, (8, 8), "image")
    Image.new("RGB", (1, 30000)).save(tmp_path / "strip.png")
    with pytest.raises(UserError, match="a picture of 1x30000 is too long for 480x480"):
        read_start(tmp_path / "strip.png", (480, 480), 4, 8)


def test_a_picture_in_a_list_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [save(tmp_path / f"{level}.png", grey(level)) for level in (20, 90)]
    decoded = []

    def counted(path: Path, where: str) -> torch.Tensor:
        decoded.append(path)
        return read_picture(path, where)

    monkeypatch.setattr(start, "read_picture", counted)
    shape = VideoShape(frames=2, channels=4, height=4, width=6, temporal=4, spatial=8)
    pixels = start_pixels([*paths, str(paths[0])], 3, shape, "image")
    assert levels(pixels[:, 0] * 255) == [20, 90, 20] and decoded == paths


def test_an_input_videos_frames_are_counted_as_they_are_read(tmp_path: Path) -> None:
    """Short, long, of other rates, odd and upright sizes; transparent parts at the end alone are
    refused before the first frame is read."""
    for number, rate, size, expected in (
        (1, 16, (32, 48), 1),
        (60, 30, (32, 48), 32),
        (24, 12, (32, 48), 32),
        (20, 16, (77, 31), 20),
        (9, 25, (101, 77), 6),
    ):
        pictures = [np.full((*size, 3), 9 * i % 256, np.uint8) for i in range(number)]
        file = write(tmp_path / "a.mkv", pictures, rate=rate, codec="ffv1", pixels="bgr0")
        read = list(start.read_pictures(file, SIZE, 16, "video"))
        assert start.count_pictures(file, SIZE, 16, "video") == len(read) == expected
        assert all(picture.shape == (3, *SIZE) for picture in read)
    clear = [np.dstack([corners(), np.full((32, 48), 255, np.uint8)]) for _ in range(9)]
    clear[-1] = clear[-1].copy()
    clear[-1][0, 0, 3] = 0
    file = write(tmp_path / "b.mkv", clear, rate=16, codec="ffv1", pixels="bgra")
    with pytest.raises(UserError, match=r"has transparent parts \(alpha\)"):
        start.count_pictures(file, SIZE, 16, "video")
