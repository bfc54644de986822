"""The contact sheet: its tiles are the videos' own frames, in their places; what is not shown is said."""

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


@pytest.mark.parametrize(("models", "places"), [(1, (0, 2, 3, 5, 6, 8)), (3, (0, 8)), (4, (4,))])
def test_tiles_are_frames_of_the_videos(tmp_path: Path, models: int, places: tuple[int, ...]) -> None:
    """9 frames spread over the tiles of a video; prompts down, models across."""
    folders = [gallery_world.write_folder(tmp_path / f"m{i}", ["p", "q"][i % 2 :], frames=9) for i in range(models)]
    page = page_of([read_folder(folder) for folder in folders], "T")
    with Image.open(sheet.contact_sheet(page, tmp_path / "new" / "sheet.png")) as image:
        pixels = np.asarray(image.convert("RGB")).astype(float)
    step, across = sheet.TILE + sheet.GAP, len(places)
    assert pixels.shape[1] == sheet.GAP + models * across * step
    top, seen = sheet.LINE + 2 * sheet.GAP, 0
    for prompt in page.prompts:
        tiles_top = top + sheet.LINE + sheet.GAP // 2
        for model, folder in enumerate(folders):
            sample = next((s for s in page.samples if (s.model, page.prompts[s.prompt]) == (folder.name, prompt)), None)
            if sample is None or sample.file is None:
                continue
            frames = read_video(sample.file).float().mean((2, 3)).numpy()
            for tile, place in enumerate(places):
                left = sheet.GAP + (model * across + tile) * step
                found = pixels[tiles_top : tiles_top + sheet.TILE, left : left + sheet.TILE].mean((0, 1))
                assert np.abs(found - frames[place]).max() < 3, (prompt.text, folder.name, place)
                seen += 1
        top += sheet.LINE + 2 * sheet.GAP + sheet.TILE
    assert seen == len(page.samples) * across


def test_places_without_a_video_and_prompts_left_out(tmp_path: Path) -> None:
    """Grey tiles; a line for the prompts beyond the sheet; an unwritable place is named."""
    prompts = [f"prompt {number}" for number in range(sheet.ROWS + 2)]
    root = gallery_world.write_folder(tmp_path / "x", prompts, padding=8)
    (root / "0000-00.mp4").write_bytes(b"x")
    page = page_of([read_folder(root)], "T")
    with Image.open(sheet.contact_sheet(page, tmp_path / "sheet.png")) as image:
        top = sheet.LINE * 2 + 2 * sheet.GAP + sheet.GAP // 2
        assert image.getpixel((sheet.GAP + sheet.TILE - 2, top + 2)) == (0xC9, 0xC9, 0xC5)
        bottom = np.asarray(image.convert("L"))[-sheet.LINE :, : 8 * sheet.LINE]
        assert bottom.min() < 200, "the line for the prompts left out"
    with pytest.raises(UserError, match="give --sheet another place"):
        sheet.contact_sheet(page, tmp_path / "sheet.png" / "below.png")
