"""A contact sheet: a page's videos in one picture, prompts down, models across. A PNG shows the
middle frame of each, an animated WebP plays them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from scd_sf.data.sources.video_reader import AS_CODED, frame_count, frames_of
from scd_sf.files import own_file, require_own_file
from scd_sf.tools.gallery.page import FAULTS, Page, Sample
from scd_sf.types import UserError, printable

TILE, GAP, LINE = 256, 8, 18  # pixels
ROWS = 40  # prompts of a sheet
SECONDS = 10  # of a moving sheet
CHARACTERS = TILE // 7  # of a line of text above a tile
MADE_BY = "scd gallery"
PAPER, INK, EMPTY = "#f6f6f4", "#1b1c1e", "#c9c9c5"


def contact_sheet(page: Page, out: Path) -> Path:
    """Write the sheet of the first :data:`ROWS` prompts, with each model's first video of a prompt,
    and return ``out``: a PNG of middle frames, or with the ending ``.webp`` a moving picture of the
    first :data:`SECONDS` seconds. UserError where another file is there."""
    require_own_sheet(out)
    moving = out.suffix == ".webp"
    names, prompts = list(page.models), page.prompts[:ROWS]
    first_samples: dict[tuple[int, str], Sample] = {}
    for sample in page.samples:
        first_samples.setdefault((sample.prompt, sample.model), sample)
    limit = max(1, min(page.frames, round(SECONDS * page.fps))) if moving else 0
    rows = [
        [_tiles(first_samples.get((number, name)), limit) for name in names]
        for number in range(len(prompts))
    ]
    count = max((len(tiles) for row in rows for tiles in row), default=1)
    sheets = [
        _draw(page, [[tiles[min(k, len(tiles) - 1)] for tiles in row] for row in rows])
        for k in range(count)
    ]
    try:
        if moving:
            options = {"save_all": True, "append_images": sheets[1:], "loop": 0, "quality": 80}
            with own_file(out, fresh=True) as part:
                sheets[0].save(part, "WEBP", duration=round(1000 / page.fps), **options)
        else:
            metadata = PngInfo()
            metadata.add_text("Software", MADE_BY)
            with own_file(out) as part:
                sheets[0].save(part, "PNG", pnginfo=metadata)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); give --sheet another place"
        ) from error
    return out


def require_own_sheet(out: Path) -> None:
    """UserError where ``out`` is a file that is no sheet, or where a moving one is there."""
    require_own_file(out, f"tEXtSoftware\0{MADE_BY}", "give --sheet another name")


def _draw(page: Page, rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """One sheet of tiles: ``rows`` by prompt, each by model."""
    names, prompts = list(page.models), page.prompts[: len(rows)]
    heights = [LINE + max(tile.height for tile in row) + GAP for row in rows]
    omitted_count = len(page.prompts) - len(rows)
    size = (GAP + len(names) * (TILE + GAP), LINE + sum(heights) + (LINE if omitted_count else 0))
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, name in enumerate(names):
        draw.text(
            (GAP + column * (TILE + GAP), 2), printable(name)[:CHARACTERS], fill=INK, font=font
        )
    top = LINE
    for prompt, row, height in zip(prompts, rows, heights, strict=True):
        text = printable(prompt.text).replace("\n", " / ")[: CHARACTERS * len(names)]
        draw.text((GAP, top + 2), text, fill=INK, font=font)
        for column, tile in enumerate(row):
            sheet.paste(tile, (GAP + column * (TILE + GAP), top + LINE))
        top += height
    if omitted_count:
        draw.text(
            (GAP, top), f"and {omitted_count} more prompts, not shown here", fill=INK, font=font
        )
    return sheet


def _tiles(sample: Sample | None, limit: int) -> list[Image.Image]:
    """The first ``limit`` frames of a video, or with 0 its middle one, :data:`TILE` wide; a grey
    tile with the reason where there is no video."""
    fault = "absent" if sample is None else sample.fault
    if sample is not None and sample.file is not None:
        name = str(sample.file)
        first = 0 if limit else frame_count(sample.file, name) // 2
        frames = frames_of(sample.file, name, fps=AS_CODED)
        if tiles := [_tile(frame) for frame in islice(frames, first, first + (limit or 1))]:
            return tiles
        fault = "damaged"
    empty = Image.new("RGB", (TILE, TILE * 9 // 16), EMPTY)
    ImageDraw.Draw(empty).text((GAP, GAP), FAULTS[fault], fill=INK, font=ImageFont.load_default(13))
    return [empty]


def _tile(frame: np.ndarray) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(frame))
    return picture.resize((TILE, max(1, round(TILE * picture.height / picture.width))))
