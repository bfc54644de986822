"""A contact sheet: one PNG of a page's videos, prompts down, models across, a few frames of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from scd_sf.data.sources.video_reader import AS_CODED, frame_count, frames_of
from scd_sf.files import own_file, require_own_file
from scd_sf.tools.gallery.page import FAULTS, Page, Sample
from scd_sf.types import UserError, printable

TILE, GAP, LINE = 192, 8, 18  # pixels
ROWS = 40  # prompts of a sheet
MADE_BY = "scd gallery"
FRAMES = 6  # across the sheet: one model shows so many frames of a video, two models half as many each
PAPER, INK, SOFT, EMPTY = "#f6f6f4", "#1b1c1e", "#5d6066", "#c9c9c5"

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def contact_sheet(page: Page, out: Path) -> Path:
    """Of the first :data:`ROWS` prompts; each model's first video of a prompt. UserError: something else is there."""
    require_own_sheet(out)
    names = list(page.models)
    each = max(1, FRAMES // len(names))
    width = GAP + len(names) * each * (TILE + GAP)
    rows = [_row(page, prompt, names, each, width) for prompt in range(min(len(page.prompts), ROWS))]
    left_out = len(page.prompts) - len(rows)
    sheet = Image.new("RGB", (width, LINE + 2 * GAP + sum(row.height for row in rows) + LINE * bool(left_out)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, name in enumerate(names):
        left = GAP + column * each * (TILE + GAP)
        draw.text((left, GAP), fit(draw, printable(name), font, each * (TILE + GAP) - GAP), fill=INK, font=font)
    top = LINE + 2 * GAP
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    if left_out:
        draw.text((GAP, top), f"and {left_out} more prompts, not shown here", fill=SOFT, font=font)
    about = PngInfo()
    about.add_text("Software", MADE_BY)
    try:
        with own_file(out) as part, part.open("wb") as file:
            sheet.save(file, "PNG", pnginfo=about)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); give --sheet another place") from error
    return out


def require_own_sheet(out: Path) -> None:
    """UserError when something else is there."""
    require_own_file(out, f"tEXtSoftware\0{MADE_BY}", "give --sheet another name")


def _row(page: Page, prompt: int, names: Sequence[str], each: int, width: int) -> Image.Image:
    """A prompt and its videos' frames, as wide as the sheet."""
    first: dict[str, Sample] = {}
    for sample in page.samples:
        if sample.prompt == prompt:
            first.setdefault(sample.model, sample)
    tiles = [tile for name in names for tile in _tiles(first.get(name), each)]
    row = Image.new("RGB", (width, LINE + 2 * GAP + max(tile.height for tile in tiles)), PAPER)
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(13)
    text = fit(draw, printable(page.prompts[prompt].text).replace("\n", " / "), font, width - 2 * GAP)
    draw.text((GAP, 2), text, fill=SOFT, font=font)
    for column, tile in enumerate(tiles):
        row.paste(tile, (GAP + column * (TILE + GAP), LINE + GAP // 2))
    return row


def _tiles(sample: Sample | None, count: int) -> list[Image.Image]:
    """``count`` frames, :data:`TILE` wide; grey with the reason where there is no video."""
    fault = "absent" if sample is None else sample.fault
    frames = [] if sample is None or sample.file is None else spread_frames(sample.file, count)
    if frames:
        height = max(1, round(TILE * frames[0].height / frames[0].width))
        how = Image.Resampling.NEAREST if frames[0].width < TILE else Image.Resampling.LANCZOS
        return [frame.resize((TILE, min(height, 2 * TILE)), how) for frame in frames]
    empty = Image.new("RGB", (TILE, TILE * 9 // 16), EMPTY)
    ImageDraw.Draw(empty).text((GAP, GAP), FAULTS[fault or "damaged"], fill=SOFT, font=ImageFont.load_default(13))
    return [empty] * count


def spread_frames(file: Path, count: int) -> list[Image.Image]:
    """``count`` frames of a video, from the first to the last; of one, the middle. Empty where it cannot be read."""
    try:
        total = frame_count(file, str(file))
        wanted = [round(i * (total - 1) / (count - 1)) for i in range(count)] if count > 1 else [total // 2]
        shown: dict[int, Image.Image] = {}
        for number, frame in enumerate(frames_of(file, str(file), fps=AS_CODED)):
            if number in wanted:
                shown[number] = Image.fromarray(np.ascontiguousarray(frame))
            if number >= wanted[-1]:
                break
    except UserError:
        return []
    last = shown[max(shown)]
    return [shown.get(number, last) for number in wanted]


def fit(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    """As much of the text as ``width`` pixels hold."""
    text = text[:600]
    while text and draw.textlength(text, font) > width:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    return text
