"""The gallery of an evaluation: every row's videos, still in memory, and the measured table, in one
HTML file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from scd_sf.data.clips import write_video
from scd_sf.evaluation.table import ResultRow
from scd_sf.generation.generate import as_uint8
from scd_sf.tools.gallery.page import Page, PagePrompt, Sample, write_page
from scd_sf.types import UserError


@dataclass(frozen=True)
class PromptCard:
    """One prompt of the gallery: its full text, the place and the motion it asks for, and whether
    training saw it."""

    text: str
    place: str
    motion: str
    held_out: bool = False

    def prompt(self) -> PagePrompt:
        note = "wording never seen in training" if self.held_out else ""
        return PagePrompt(self.text, {"place": self.place, "motion": self.motion}, note)


def build_gallery(
    out_html: Path,
    title: str,
    rows: Sequence[ResultRow],
    videos: Mapping[str, Sequence[tuple[int, Tensor]]],
    prompts: Sequence[PromptCard],
    notes: Sequence[str] = (),
    *,
    fps: float,
) -> Path:
    """Write the gallery and return its path. The file appears whole or not at all.

    ``videos[row name]`` holds (index into ``prompts``, frames (F, 3, H, W) as uint8 or float from 0
    to 1); a row may have no videos, a prompt may miss some rows, and one row may show several
    videos of a prompt. ``notes`` are paragraphs under the table. ``fps``: pixel frames per second.
    UserError: a video of an unknown row, two rows of one name, wrong frames, a directory that
    cannot be written.
    """
    names = [row.name for row in rows]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"gallery: two rows are named '{min(duplicates)}'; give each row its own name"
        )
    if unknown_rows := videos.keys() - set(names):
        raise UserError(
            f"gallery: videos of '{min(unknown_rows)}', which is no row; the rows are {', '.join(names)}"
        )
    with tempfile.TemporaryDirectory(prefix="gallery-") as folder:
        samples: list[Sample] = []
        for row in rows:
            facts = {"sampler": row.sampler, "steps": str(row.steps)} if row.steps else {}
            if row.seed is not None:
                facts["seed"] = str(row.seed)
            for index, frames in videos.get(row.name, ()):
                file = Path(folder) / f"{len(samples)}.mp4"
                try:
                    write_video(file, as_uint8(frames), fps)
                except UserError as error:
                    raise UserError(
                        f"gallery: row '{row.name}', prompt {index}: {error}"
                    ) from error
                samples.append(Sample(row.name, index, file, facts))
        longest = max(
            (len(frames) for entries in videos.values() for _, frames in entries), default=1
        )
        models: dict[str, Mapping[str, str]] = {
            row.name: {} for row in rows if videos.get(row.name)
        }
        page_prompts = [card.prompt() for card in prompts]
        return write_page(
            Page(title, models, page_prompts, samples, fps, longest, rows, notes), out_html
        )
