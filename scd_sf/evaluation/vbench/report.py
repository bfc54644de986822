"""A scored run beside published rows, as JSON, Markdown, and an HTML page with the videos that
works offline.

Totals of different laboratories are not comparable (prompts, seeds, decoding differ): score a
baseline yourself and give it as a further file. All text is escaped; videos are linked relative to
the page and loaded when they are near.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from scd_sf.evaluation.vbench.aggregate import Scores, aggregate, label, read_scores
from scd_sf.evaluation.vbench.prompts import dimensions, packaged
from scd_sf.evaluation.vbench.static_filter import STATIC
from scd_sf.evaluation.vbench.suite import VIDEOS
from scd_sf.files import locked, require_own_file, write_json, write_text
from scd_sf.types import UserError, printable

_NUMBER = re.compile(r"-\d+$")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#&~])")
NOTE = "Totals of different laboratories are not comparable; compare with a baseline scored by the same pipeline."


@dataclass(frozen=True)
class Row:
    """One line of the table, in points. ``totals``: empty where dimensions are missing.
    ``percent``: the dimensions before they are normalised."""

    name: str
    source: str
    totals: dict[str, float] = field(default_factory=dict)
    percent: dict[str, float] = field(default_factory=dict)
    note: str = ""


def own_row(name: str, scores: Scores) -> Row:
    """The row of a scored run; without totals if dimensions are missing."""
    percent = {key: 100 * value for key, value in scores.fractions.items()}
    missing_names = [d.name for d in dimensions() if d.name not in percent]
    if missing_names:
        notes = [f"no totals: {len(missing_names)} of 16 dimensions missing", label(scores)]
        note = "; ".join(text for text in notes if text)
        return Row(name, "this run", {}, percent, note)
    points = aggregate(scores.fractions, name)
    totals = {"total": points.total, "quality": points.quality, "semantic": points.semantic}
    return Row(name, "this run", totals, percent, label(scores))


def published_rows() -> list[Row]:
    """The shipped rows of papers."""
    rows = packaged("published.json")["rows"]
    assert isinstance(rows, list)
    return [
        Row(
            row["model"],
            row["source"],
            {name: row[name] for name in ("total", "quality", "semantic")},
            row["percent"],
        )
        for row in rows
    ]


def markdown(rows: Sequence[Row]) -> str:
    """A GitHub table; names are escaped."""
    names = ["total", "quality", "semantic", *(d.name for d in dimensions())]
    head = (
        "| model | source | " + " | ".join(name.replace("_", " ") for name in names) + " | note |"
    )
    lines = [head, "|---|---|" + "---|" * (len(names) + 1)]
    for row in rows:
        values = {**row.percent, **row.totals}
        cells = [f"{values[name]:.2f}" if name in values else "-" for name in names]
        lines.append(
            "| "
            + " | ".join([_plain(row.name), _plain(row.source), *cells, _plain(row.note) or "-"])
            + " |"
        )
    return "\n".join([*lines, "", NOTE, ""])


def _plain(text: str) -> str:
    """``text`` as printable characters with Markdown's signs escaped."""
    return _MARKDOWN.sub(r"\\\1", printable(text))


def find_videos(root: Path, limit: int) -> list[tuple[str, list[Path]]]:
    """(prompt, its videos) of a sample folder or a plain one, ``limit`` prompts at most, evenly
    spaced. UserError: no video."""
    folders = [root / name for name in (VIDEOS, STATIC) if (root / name).is_dir()] or [root]
    videos: dict[str, list[Path]] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.mp4")):
            videos.setdefault(_NUMBER.sub("", file.stem), []).append(file)
    if not videos:
        raise UserError(f"videos {root}: holds no mp4 file; give what vbench_eval/sample.py made")
    prompts = sorted(videos)
    step = max(1, math.ceil(len(prompts) / limit))
    return [(prompt, videos[prompt]) for prompt in prompts[::step]]


def html(
    rows: Sequence[Row],
    cards: Iterable[tuple[str, list[Path]]],
    page: Path,
    facts: Mapping[str, object],
) -> str:
    """The page: table, how the first row was made, videos."""
    environment = Environment(
        loader=PackageLoader("scd_sf.evaluation.vbench", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    video_links = [
        (
            printable(prompt),
            [quote(os.path.relpath(file, page.parent).replace(os.sep, "/")) for file in files],
        )
        for prompt, files in cards
    ]
    return environment.get_template("report.html.j2").render(
        rows=[
            Row(
                printable(row.name),
                printable(row.source),
                row.totals,
                row.percent,
                printable(row.note),
            )
            for row in rows
        ],
        totals=["total", "quality", "semantic"],
        dimensions=[d.name for d in dimensions()],
        cards=video_links,
        facts={printable(str(name)): printable(str(value)) for name, value in facts.items()},
        note=NOTE,
    )


def write_report(
    files: Mapping[str, Path], out: Path, videos: Path | None, limit: int = 60
) -> list[Row]:
    """``out/report.json``, ``.md`` and ``.html`` of the runs ``files`` (name -> scores) beside the
    published rows.

    ``videos``: the first run's; their page shows up to ``limit`` prompts. UserError before anything
    is written.
    """
    scores = {name: read_scores(path) for name, path in files.items()}
    rows = [*(own_row(name, run_scores) for name, run_scores in scores.items()), *published_rows()]
    cards = find_videos(videos.absolute(), limit) if videos is not None else []
    page = out.absolute() / "report.html"
    facts = _facts(next(iter(scores.values())).protocol)
    text = html(rows, cards, page, facts)
    for name in ("report.json", "report.md", "report.html"):
        require_own_file(out / name, NOTE, "use another out=")
    with locked(out, "this report"):
        write_json(
            out / "report.json",
            {"note": NOTE, "rows": [asdict(row) for row in rows], "protocol": facts},
        )
        write_text(out / "report.md", markdown(rows))
        write_text(page, text)
    return rows


def _facts(protocol: Mapping[str, object]) -> dict[str, object]:
    """Settings and protocol of a run as name -> value, nested names joined by dots."""
    facts: dict[str, object] = {}
    for name, value in protocol.items():
        if isinstance(value, dict):
            facts |= {
                f"{name}.{inner_name}": inner_value
                for inner_name, inner_value in _facts(value).items()
            }
        elif value is not None:
            facts[name] = value
    return facts
