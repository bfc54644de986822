"""One self-contained HTML file: every row's videos side by side per prompt, played in step, and the measured table.

The file opens from disk (``file://``) and loads nothing: videos are base64 H.264, styles and script are inline and
allowed by their hashes in a Content-Security-Policy that forbids everything else. All text goes through Jinja2's
autoescape, so a prompt is shown and never run.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from torch import Tensor

from scd_sf.data.clips import write_video
from scd_sf.metrics.frames import as_uint8
from scd_sf.metrics.protocols import COLUMNS, LEFT_ALIGNED, Row
from scd_sf.types import UserError

FRAME_DIMENSIONS = 4


@dataclass(frozen=True)
class PromptCard:
    """One prompt of the gallery: its full text, the place and the motion it asks for, and whether training saw it."""

    text: str
    place: str
    motion: str
    held_out: bool = False


@dataclass(frozen=True)
class _Cell:
    """One video under one prompt: the row's name and the mp4 as base64."""

    name: str
    base64: str


def build_gallery(
    out_html: Path,
    title: str,
    rows: Sequence[Row],
    videos: Mapping[str, Sequence[tuple[int, Tensor]]],
    prompts: Sequence[PromptCard],
    notes: Sequence[str] = (),
    *,
    fps: float,
) -> Path:
    """Write the gallery and return its path; the file appears whole or not at all.

    ``videos[row name]`` holds (index into ``prompts``, frames (F, 3, H, W) as uint8 or float in [0, 1]); a row may
    have no videos, a prompt may miss some rows, and one row may show several videos of a prompt. ``notes`` are
    paragraphs under the table. ``fps``: pixel frames per second. UserError: a video of an unknown row or prompt,
    two rows of one name, wrong frames, a directory that cannot be written.
    """
    _check(rows, videos, prompts, fps)
    cells: list[list[_Cell]] = [[] for _ in prompts]
    longest = 1
    for row in rows:
        for index, frames in videos.get(row.name, ()):
            cells[index].append(_Cell(row.name, _mp4_base64(row.name, index, frames, fps)))
            longest = max(longest, frames.shape[0])
    html = _template().render(
        title=title,
        rows=rows,
        columns=COLUMNS,
        left_aligned=LEFT_ALIGNED,
        cards=[(index, card, cells[index]) for index, card in enumerate(prompts)],
        places=sorted({card.place for card in prompts}),
        motions=sorted({card.motion for card in prompts}),
        notes=notes,
        fps=float(fps),
        longest=longest,
        policy=_policy,
    )
    partial = out_html.with_name(out_html.name + ".tmp")
    try:
        partial.write_text(html, encoding="utf-8")
        os.replace(partial, out_html)
    except OSError as error:
        raise UserError(f"{out_html}: cannot be written ({error.strerror}); make the directory writable") from error
    return out_html


def _check(
    rows: Sequence[Row],
    videos: Mapping[str, Sequence[tuple[int, Tensor]]],
    prompts: Sequence[PromptCard],
    fps: float,
) -> None:
    names = [row.name for row in rows]
    if fps <= 0:
        raise UserError(f"gallery: fps is {fps}; it must be positive")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"gallery: two rows are named '{twice}'; give each row its own name")
    for name, entries in videos.items():
        if name not in names:
            raise UserError(f"gallery: videos of '{name}', which is no row; the rows are {', '.join(names)}")
        for index, frames in entries:
            if not 0 <= index < len(prompts):
                raise UserError(
                    f"gallery: row '{name}' has a video of prompt {index}; there are {len(prompts)} prompts"
                )
            if frames.ndim != FRAME_DIMENSIONS:
                raise UserError(
                    f"gallery: row '{name}', prompt {index}: frames {tuple(frames.shape)}, not (F, 3, H, W)"
                )


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("scd_sf.gallery", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html.j2")


def _mp4_base64(name: str, index: int, frames: Tensor, fps: float) -> str:
    """The bytes of an H.264 mp4 (it exists on disk only for as long as it takes to write it) as base64 text."""
    with tempfile.TemporaryDirectory(prefix="gallery-") as folder:
        path = Path(folder) / f"prompt{index}.mp4"
        try:
            write_video(path, as_uint8(frames), fps)
        except UserError as error:
            raise UserError(f"gallery: row '{name}', prompt {index}: {error}") from error
        return base64.b64encode(path.read_bytes()).decode("ascii")


def _policy(script: str, style: str) -> str:
    """The Content-Security-Policy: only this script, this style and data: videos; no network, frames or forms."""

    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") + "'"

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {digest(script)}",
            f"style-src {digest(style)}",
            "media-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
