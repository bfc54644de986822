"""The gallery's page: models' videos side by side per prompt, as one HTML file or a folder.

The page opens from the disk (``file://``). Style and script are inline and allowed by their hashes
in a Content-Security-Policy that forbids everything else but the page's own videos. All text goes
through Jinja2's autoescape, so a prompt is shown and never run. A video element exists only near
the screen: a thousand videos cost no more than those one sees.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from scd_sf.evaluation.table import COLUMNS, LEFT_ALIGNED, ResultRow
from scd_sf.files import (
    locked,
    new_file,
    own_file,
    require_own_file,
    require_own_folder,
    sha256_file,
)
from scd_sf.types import UserError, printable

INDEX, VIDEOS = "index.html", "videos"  # of a gallery that is a folder
VIDEO_NAME = re.compile(r"[0-9a-f]{16}\.mp4")  # by content
MARK = '<meta name="generator" content="scd gallery">'
MOST_CHOICES = 40  # values of a tag that a filter offers
LARGEST_FILE = 1 << 29  # bytes of video in one HTML file
FAULTS = {
    "missing": "video is missing",
    "damaged": "video is damaged",
    "absent": "no video of this prompt",
}  # instead of a video


@dataclass(frozen=True)
class Sample:
    """A video of one model under one prompt: its mp4 file, or None and the ``fault`` (of
    :data:`FAULTS`). ``facts``: name -> text, such as seed, steps, sampler, checkpoint. ``remark``:
    a warning under the video."""

    model: str
    prompt: int
    file: Path | None
    facts: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""
    remark: str = ""

    @property
    def brief(self) -> str:
        """The facts that are always shown under a video."""
        steps = f"{self.facts['steps']} steps" if "steps" in self.facts else ""
        seed = f"seed {self.facts['seed']}" if "seed" in self.facts else ""
        return " · ".join(part for part in (steps, self.facts.get("sampler", ""), seed) if part)


@dataclass(frozen=True)
class PagePrompt:
    """A prompt. ``tags``: kind -> value, by which the page is filtered. ``note``: shown under the
    text. ``words``: the prompts that were sampled with, where ``text`` is a benchmark's name."""

    text: str
    tags: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A place for a video. ``label``: unique on its card. ``video``: its name, '' for none."""

    sample: Sample
    label: str
    model: int
    video: str


@dataclass(frozen=True)
class Page:
    """The page's contents. ``models``: names in order, with facts of each. ``table``: measured rows
    below the videos. ``frames``: of the longest video, ``fps`` pixel frames per second."""

    title: str
    models: Mapping[str, Mapping[str, str]]
    prompts: Sequence[PagePrompt]
    samples: Sequence[Sample]
    fps: float
    frames: int
    table: Sequence[ResultRow] = ()
    notes: Sequence[str] = ()


def write_page(page: Page, out: Path) -> Path:
    """Write a page and return its path. ``out`` ending in .html: one file with the videos inside;
    else a folder with index.html and ``videos/``.

    UserError where it cannot be written, is too large for one file, or ``out`` is no gallery."""
    files = list(dict.fromkeys(sample.file for sample in page.samples if sample.file is not None))
    names = {file: sha256_file(file)[:16] for file in files}
    try:
        if out.suffix.lower() in (".html", ".htm"):
            return _write_file(page, out, names)
        require_own_folder(out, [INDEX], "give --out another folder")
        require_own_file(out / INDEX, MARK, "give --out another folder")
        with locked(out, "this gallery"):
            return _write_folder(page, out, names)
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror}; the gallery cannot be written"
        ) from error


def _write_file(page: Page, out: Path, names: Mapping[Path, str]) -> Path:
    if (size := sum(file.stat().st_size for file in names)) > LARGEST_FILE:
        raise UserError(
            f"{out}: {size / 1e9:.2f} GB of videos are too much for one file; give --out a folder"
        )
    require_own_file(out, MARK, "give --out another name")
    with own_file(out) as part, part.open("w", encoding="utf-8") as text:
        text.writelines(render(page, names, single=True))
    return out


def _write_folder(page: Page, out: Path, names: Mapping[Path, str]) -> Path:
    """Write the page, then its videos, and remove those of an earlier page. The page comes first,
    so that the folder is recognised as a gallery."""
    with new_file(out / INDEX) as part, part.open("w", encoding="utf-8") as text:
        text.writelines(render(page, names, single=False))
    (out / VIDEOS).mkdir(exist_ok=True)
    for file, name in names.items():
        with new_file(out / VIDEOS / f"{name}.mp4") as part:
            shutil.copyfile(file, part)
    for stray in (out / VIDEOS).iterdir():
        if VIDEO_NAME.fullmatch(stray.name) and stray.stem not in names.values():
            stray.unlink()
    return out / INDEX


def render(page: Page, names: Mapping[Path, str], *, single: bool) -> Iterator[str]:
    """The HTML in pieces. ``names``: of the video files; ``single``: with them inside."""
    environment = Environment(
        loader=PackageLoader("scd_sf.tools.gallery", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_inline(name) for name in ("page.css", "page.js"))
    videos = {name: file for file, name in names.items()} if single else {}
    embedded = (
        (name, base64.b64encode(file.read_bytes()).decode("ascii")) for name, file in videos.items()
    )
    return environment.get_template("page.html.j2").generate(
        title=printable(page.title),
        models=list(page.models.items()),
        notes=page.notes,
        fps=float(page.fps),
        cards=_cards(page, names),
        rows=page.table,
        columns=COLUMNS,
        left_aligned=LEFT_ALIGNED,
        filters=filters(page.prompts),
        frames=page.frames,
        single=single,
        embedded=embedded,
        mark=Markup(MARK),  # noqa: S704
        faults=FAULTS,
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        policy=_policy(script, style, "blob:" if single else "'self' file:"),
        printable=printable,
    )


def _cards(page: Page, names: Mapping[Path, str]) -> list[tuple[PagePrompt, list[Figure]]]:
    """Each prompt with its figures, model by model, at least one for each."""
    samples: list[dict[str, list[Sample]]] = [
        {name: [] for name in page.models} for _ in page.prompts
    ]
    for sample in page.samples:
        samples[sample.prompt][sample.model].append(sample)
    cards = []
    for place, prompt in enumerate(page.prompts):
        figures = []
        for model, (name, model_samples) in enumerate(samples[place].items()):
            for number, sample in enumerate(
                model_samples or [Sample(name, place, None, {}, "absent")], 1
            ):
                label = (
                    printable(name)
                    if len(model_samples) < 2
                    else f"{printable(name)}, sample {number}"
                )
                figures.append(
                    Figure(sample, label, model, "" if sample.file is None else names[sample.file])
                )
        words = [printable(words) for words in prompt.words]
        cards.append((replace(prompt, text=printable(prompt.text), words=words), figures))
    return cards


def filters(prompts: Sequence[PagePrompt]) -> list[tuple[str, list[str]]]:
    """Kinds of tags with their values, as far as they tell prompts apart and fit a list."""
    kinds = dict.fromkeys(kind for prompt in prompts for kind in prompt.tags)
    tags = [(kind, sorted({p.tags[kind] for p in prompts if kind in p.tags})) for kind in kinds]
    return [(kind, values) for kind, values in tags if 1 < len(values) <= MOST_CHOICES]


def _inline(name: str) -> str:
    """The text of our style or script, which must not end the element that it is put in."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    assert "</" not in text and "<!--" not in text, name
    return text


def _policy(script: str, style: str, videos: str) -> str:
    """The Content-Security-Policy: only this script, this style and these videos; no network,
    frames or forms."""

    def digest(text: str) -> str:
        return (
            "'sha256-"
            + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
            + "'"
        )

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {digest(script)}",
            f"style-src {digest(style)}",
            f"media-src {videos}",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
