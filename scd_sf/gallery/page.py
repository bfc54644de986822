"""The gallery's page: models' videos side by side per prompt, as one HTML file or a folder; nothing else is loaded.

The page opens from the disk (``file://``). Style and script are inline and allowed by their hashes in a
Content-Security-Policy that forbids everything else but the page's own videos. All text goes through Jinja2's
autoescape, so a prompt is shown and never run. A video element exists only near the screen: a thousand videos cost no
more than those one sees.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from scd_sf.data.prompt_files import visible
from scd_sf.metrics.protocols import COLUMNS, LEFT_ALIGNED, Row
from scd_sf.types import UserError

VIDEOS = "videos"  # beside a folder's index.html
MOST_CHOICES = 40  # values of a tag that a filter offers
LARGEST_FILE = 1 << 30  # bytes of video in one HTML file


@dataclass(frozen=True)
class Sample:
    """A video of one model under one prompt: its mp4 file, or None where it is missing. ``facts``: name -> text, such
    as seed, steps, sampler, checkpoint."""

    model: str
    prompt: int
    file: Path | None
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """``tags``: kind -> value, what the page can be filtered by. ``note``: shown under the text."""

    text: str
    tags: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Page:
    """Everything on it. ``models``: names in order, with facts of each. ``table``: measured rows above the videos.
    ``frames``: of the longest video, ``fps`` pixel frames per second."""

    title: str
    models: Mapping[str, Mapping[str, str]]
    prompts: Sequence[Prompt]
    samples: Sequence[Sample]
    fps: float
    frames: int
    table: Sequence[Row] = ()
    notes: Sequence[str] = ()


def write_page(page: Page, out: Path) -> Path:
    """``out`` ending in .html: one file with the videos inside; else a folder with index.html and ``videos/``. Returns
    the page's path; it appears whole or not at all. UserError: cannot be written, or too large for one file."""
    single = out.suffix.lower() in (".html", ".htm")
    files = list(dict.fromkeys(sample.file for sample in page.samples if sample.file is not None))
    numbers = {file: number for number, file in enumerate(files)}
    if single and (size := sum(file.stat().st_size for file in files)) > LARGEST_FILE:
        raise UserError(f"{out}: {size / 1e9:.2f} GB of videos are too much for one file; give --out a folder")
    index = out if single else out / "index.html"
    partial = index.with_name(index.name + ".tmp")
    try:
        if not single:
            (out / VIDEOS).mkdir(parents=True, exist_ok=True)
            for file, number in numbers.items():
                shutil.copyfile(file, out / VIDEOS / f"{number:05d}.mp4")
        embedded = [base64.b64encode(file.read_bytes()).decode("ascii") for file in files] if single else []
        partial.write_text(render(page, numbers, embedded), encoding="utf-8")
        os.replace(partial, index)
    except OSError as error:
        raise UserError(f"{index}: cannot be written ({error.strerror}); make the directory writable") from error
    return index


def render(page: Page, numbers: Mapping[Path, int], embedded: Sequence[str]) -> str:
    """The HTML. ``numbers``: of the video files; ``embedded``: their bytes as base64 (empty: they lie in a folder)."""
    environment = Environment(
        loader=PackageLoader("scd_sf.gallery", package_path=""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    style, script = (_inline(name) for name in ("page.css", "page.js"))
    cards: list[list[Sample]] = [[] for _ in page.prompts]
    for sample in page.samples:
        cards[sample.prompt].append(sample)
    order = {name: place for place, name in enumerate(page.models)}
    for card in cards:
        card.sort(key=lambda sample: order[sample.model])
    return environment.get_template("page.html.j2").render(
        title=visible(page.title), models=list(page.models.items()), notes=page.notes, fps=float(page.fps),
        cards=[(number, replace(p, text=visible(p.text)), cards[number]) for number, p in enumerate(page.prompts)],
        rows=page.table, columns=COLUMNS, left_aligned=LEFT_ALIGNED, filters=filters(page.prompts),
        frames=page.frames, order=order, numbers=numbers, embedded=embedded, style=Markup(style),
        script=Markup(script), policy=_policy(script, style, "data:" if embedded else "'self' file:"), visible=visible,
    )  # fmt: skip


def filters(prompts: Sequence[Prompt]) -> list[tuple[str, list[str]]]:
    """Kinds of tags with their values, as far as they tell prompts apart and fit a list."""
    kinds = dict.fromkeys(kind for prompt in prompts for kind in prompt.tags)
    found = [(kind, sorted({p.tags[kind] for p in prompts if kind in p.tags})) for kind in kinds]
    return [(kind, values) for kind, values in found if 1 < len(values) <= MOST_CHOICES]


def _inline(name: str) -> str:
    """Our own style or script; neither may end the element it stands in."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    assert "</" not in text and "<!--" not in text, name
    return text


def _policy(script: str, style: str, videos: str) -> str:
    """The Content-Security-Policy: only this script, this style and these videos; no network, frames or forms."""

    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") + "'"

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {digest(script)}",
            f"style-src {digest(style)}",
            f"media-src {videos}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
