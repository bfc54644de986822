"""A contact sheet: one PNG of a page's videos, prompts down, models across, the middle frame of
each."""

from __future__ import annotations

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
CHARACTERS = TILE // 7  # of a line of text above a tile
MADE_BY = "scd gallery"
PAPER, INK, EMPTY = "#f6f6f4", "#1b1c1e", "#c9c9c5"


def contact_sheet(page: Page, out: Path) -> Path:
    """Write the sheet of the first :data:`ROWS` prompts, with each model's first video of a prompt,
    and return ``out``. UserError where another file is there."""
    require_own_sheet(out)
    names, prompts = list(page.models), page.prompts[:ROWS]
    first_samples: dict[tuple[int, str], Sample] = {}
    for sample in page.samples:
        first_samples.setdefault((sample.prompt, sample.model), sample)
    rows = [
        [_tile(first_samples.get((number, name))) for name in names]
        for number in range(len(prompts))
    ]
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
    metadata = PngInfo()
    metadata.add_text("Software", MADE_BY)
    try:
        with own_file(out) as part:
            sheet.save(part, "PNG", pnginfo=metadata)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); give --sheet another place"
        ) from error
    return out


def require_own_sheet(out: Path) -> None:
    """UserError where ``out`` is a file that is no sheet."""
    require_own_file(out, f"tEXtSoftware\0{MADE_BY}", "give --sheet another name")


def _tile(sample: Sample | None) -> Image.Image:
    """A middle frame, :data:`TILE` wide; grey with the reason where there is no video."""
    fault = "absent" if sample is None else sample.fault
    if sample is not None and sample.file is not None:
        name = str(sample.file)
        middle = frame_count(sample.file, name) // 2
        for number, frame in enumerate(frames_of(sample.file, name, fps=AS_CODED)):
            if number == middle:
                picture = Image.fromarray(np.ascontiguousarray(frame))
                return picture.resize((TILE, max(1, round(TILE * picture.height / picture.width))))
        fault = "damaged"
    empty = Image.new("RGB", (TILE, TILE * 9 // 16), EMPTY)
    ImageDraw.Draw(empty).text((GAP, GAP), FAULTS[fault], fill=INK, font=ImageFont.load_default(13))
    return empty
