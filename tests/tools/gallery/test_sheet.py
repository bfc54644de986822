"""The contact sheet: its tiles are the videos' own middle frames, in their places; what is not
shown is said."""

from __future__ import annotations

from pathlib import Path

import gallery_world
import numpy as np
import pytest
from PIL import Image

from scd_sf.data.clips import read_video
from scd_sf.tools.gallery import sheet
from scd_sf.tools.gallery.folders import page_of, read_folder
from scd_sf.types import UserError


def test_tiles_are_frames_of_the_videos(tmp_path: Path) -> None:
    """Prompts down, models across; the second model has no video of the first prompt."""
    folders = [
        gallery_world.write_folder(tmp_path / f"m{i}", ["p", "q"][i:], frames=9) for i in range(2)
    ]
    page = page_of([read_folder(folder) for folder in folders], "T")
    with Image.open(sheet.contact_sheet(page, tmp_path / "new" / "sheet.png")) as image:
        pixels = np.asarray(image.convert("RGB")).astype(float)
    assert pixels.shape[1] == sheet.GAP + 2 * (sheet.TILE + sheet.GAP)
    for prompt, model, name in ((0, 0, "0000-00"), (1, 0, "0001-00"), (1, 1, "0000-00")):
        top = sheet.LINE + prompt * (sheet.LINE + sheet.TILE + sheet.GAP) + sheet.LINE
        left = sheet.GAP + model * (sheet.TILE + sheet.GAP)
        tile = pixels[top : top + sheet.TILE, left : left + sheet.TILE].mean((0, 1))
        frames = read_video(folders[model] / f"{name}.mp4").float().mean((2, 3)).numpy()
        assert np.abs(tile - frames[4]).max() < 3, (prompt, model)
    assert pixels[2 * sheet.LINE + 2, -sheet.GAP - 2].tolist() == [0xC9, 0xC9, 0xC5]
    with Image.open(sheet.contact_sheet(page, tmp_path / "moving.webp")) as image:
        assert (image.format, getattr(image, "n_frames", 1), image.size) == (
            "WEBP",
            9,
            pixels.shape[1::-1],
        )
        for number in (0, 4, 8):
            image.seek(number)
            moving = np.asarray(image.convert("RGB")).astype(float)
            top, left = 2 * sheet.LINE, sheet.GAP
            tile = moving[top : top + sheet.TILE, left : left + sheet.TILE].mean((0, 1))
            frames = read_video(folders[0] / "0000-00.mp4").float().mean((2, 3)).numpy()
            assert np.abs(tile - frames[number]).max() < 8, number
    with pytest.raises(UserError, match="not of ours; nothing is overwritten"):
        sheet.contact_sheet(page, tmp_path / "moving.webp")


def test_prompts_left_out_and_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(sheet.ROWS + 2)]
    page = page_of(
        [read_folder(gallery_world.write_folder(tmp_path / "x", prompts, padding=8))], "T"
    )
    with Image.open(sheet.contact_sheet(page, tmp_path / "sheet.png")) as image:
        assert np.asarray(image.convert("L"))[-sheet.LINE :, : 8 * sheet.LINE].min() < 200, (
            "a line says how many"
        )
    with pytest.raises(UserError, match="give --sheet another place"):
        sheet.contact_sheet(page, tmp_path / "sheet.png" / "below.png")
