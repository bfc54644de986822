"""``scd gallery``: folders of samples side by side, and a contact sheet of them.

A folder is what ``scd sample`` (recipes/sample.py, vbench_eval/sample.py) writes: ``manifest.json`` with settings and
every video's prompt and seed. What a manifest says is not trusted: its files must lie in its folder, its text is text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

from scd_sf.data.manifest import read_json
from scd_sf.data.prompt_files import visible
from scd_sf.gallery.page import Page, Prompt, Sample
from scd_sf.types import UserError

INDEX = "manifest.json"
REMEDY = "give folders that scd sample has written"
TILE, LABEL = 160, 34  # pixels of the contact sheet
SHEET_PROMPTS = 40  # rows of a contact sheet


@dataclass(frozen=True)
class Folder:
    """A model's samples. ``videos``: (prompt, file or None where it is missing, facts)."""

    name: str
    facts: Mapping[str, str]
    fps: float
    frames: int
    videos: tuple[tuple[str, Path | None, Mapping[str, str]], ...]


def read_folder(root: Path, name: str = "") -> Folder:
    """UserError: no manifest, a foreign one, a file outside the folder."""
    document = read_json(root / INDEX, REMEDY)
    settings, videos = document.get("settings"), document.get("videos")
    if not isinstance(settings, dict) or not isinstance(videos, dict):
        raise UserError(f"{root / INDEX}: no sample manifest ('settings' and 'videos'); {REMEDY}")
    fps, size = settings.get("fps"), settings.get("size")
    if not isinstance(fps, int | float) or not 0 < fps <= 1000:
        raise UserError(f"{root / INDEX}: settings.fps is {fps!r}, not frames per second; {REMEDY}")
    frames = size[0] if isinstance(size, list) and size and isinstance(size[0], int) and 0 < size[0] < 1 << 20 else 0
    found = [_video(root, str(file), entry) for file, entry in sorted(videos.items())]
    longest = frames or max((_length(file) for _, file, _ in found if file is not None), default=1)
    return Folder(name or root.resolve().name, _facts(settings), float(fps), longest, tuple(found))


def _video(root: Path, file: str, entry: object) -> tuple[str, Path | None, Mapping[str, str]]:
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(prompt, str):
        raise UserError(f"{root / INDEX}: videos[{file!r}] has no prompt; {REMEDY}")
    path = (root / file).resolve() if "\0" not in file else root.parent
    if not path.is_relative_to(root.resolve()) or path.suffix != ".mp4":
        raise UserError(f"{root / INDEX}: {file!r} is not an mp4 file inside the folder; {REMEDY}")
    title = entry.get("title")
    facts = {key: str(entry[key]) for key in ("seed", "sample", "start") if key in entry}
    facts["file"] = file
    return title if isinstance(title, str) and title else prompt, path if path.is_file() else None, facts


def _facts(settings: Mapping[str, object]) -> dict[str, str]:
    """What one wants to know of a model, as text."""
    sampler = settings.get("sampler")
    found = {
        name: settings[name] for name in ("checkpoint", "weights", "dtype", "window", "seed") if settings.get(name)
    }
    if isinstance(sampler, dict):
        found |= {"sampler": sampler.get("name"), "steps": sampler.get("steps")}
    if digest := settings.get("checkpoint_sha256"):
        found["sha256"] = str(digest)[:16]
    if guidance := settings.get("guidance"):
        found["guidance"] = guidance
    return {name: str(value) for name, value in found.items()}


def _length(file: Path) -> int:
    """Frames that a video says it has; 1 where it cannot be read (the page marks it)."""
    try:
        with av.open(str(file)) as container:
            return max(1, container.streams.video[0].frames)
    except (av.FFmpegError, OSError, IndexError):
        return 1


def page_of(folders: Sequence[Folder], title: str) -> Page:
    """Prompts in the order they are first seen, equal texts together. UserError: nothing, or equal names."""
    names = [folder.name for folder in folders]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two folders are named '{min(twice)}'; give --names, one per folder")
    prompts = list(dict.fromkeys(prompt for folder in folders for prompt, _, _ in folder.videos))
    if not prompts:
        raise UserError("the folders hold no videos; " + REMEDY)
    number = {prompt: place for place, prompt in enumerate(prompts)}
    samples = [
        Sample(folder.name, number[prompt], file, {**facts, **_short(folder.facts)})
        for folder in folders
        for prompt, file, facts in folder.videos
    ]
    models = {folder.name: folder.facts for folder in folders}
    fps = max(folder.fps for folder in folders)
    longest = max(folder.frames / folder.fps for folder in folders)
    return Page(title, models, [Prompt(prompt) for prompt in prompts], samples, fps, max(1, round(longest * fps)))


def _short(facts: Mapping[str, str]) -> dict[str, str]:
    """Of a model's facts those that every sample repeats."""
    found = {name: facts[name] for name in ("sampler", "steps") if name in facts}
    if "checkpoint" in facts:
        found["checkpoint"] = Path(facts["checkpoint"]).name
    return found


def contact_sheet(page: Page, out: Path) -> Path:
    """A PNG: prompts down (the first :data:`SHEET_PROMPTS`), models across, the middle frame of each first video."""
    names = list(page.models)
    rows = range(min(len(page.prompts), SHEET_PROMPTS))
    first = {(sample.prompt, sample.model): sample.file for sample in reversed(page.samples)}
    height = LABEL + len(rows) * (TILE + LABEL)
    sheet = Image.new("RGB", (len(names) * (TILE + 8) + 8, height), "#f6f6f4")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, name in enumerate(names):
        draw.text((8 + column * (TILE + 8), 10), _fit(draw, visible(name), font, TILE), fill="#1b1c1e", font=font)
    for place in rows:
        top = LABEL + place * (TILE + LABEL)
        text = _fit(draw, visible(page.prompts[place].text), font, sheet.width - 16)
        draw.text((8, top + 4), text, fill="#5d6066", font=font)
        for column, name in enumerate(names):
            tile = middle_frame(first.get((place, name)))
            tile.thumbnail((TILE, TILE))
            left = 8 + column * (TILE + 8) + (TILE - tile.width) // 2
            sheet.paste(tile, (left, top + LABEL - 10 + (TILE - tile.height) // 2))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return out


def middle_frame(file: Path | None) -> Image.Image:
    """Grey where there is no video, or none that can be read."""
    empty = Image.new("RGB", (TILE, TILE), "#c9c9c5")
    if file is None:
        return empty
    try:
        with av.open(str(file)) as container:
            total = container.streams.video[0].frames
            frames: Iterator[av.VideoFrame] = islice(container.decode(video=0), max(0, total // 2), None)
            return next(iter(frames)).to_image()
    except (av.FFmpegError, OSError, IndexError, StopIteration):
        return empty


def _fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """As much of the text as ``width`` pixels hold."""
    text = text[:300]
    while text and draw.textlength(text, font) > width:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    return text
