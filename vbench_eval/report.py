"""Scored runs beside published rows (Wan 2.1, Self-Forcing, CausVid, SCD, ..): report.json,
report.md, report.html.

    python vbench_eval/report.py scores='{ours: runs/vbench/scores/summary.json}' \\
        videos=runs/vbench out=runs/report
    python vbench_eval/report.py scores='{ours: a/summary.json, "our Wan 2.1": b/summary.json}' \\
        out=runs/report

The page works offline and shows videos of up to ``prompts`` prompts, linked relative to it. Totals
are shown only for all 16 dimensions; a reduced run is marked as not comparable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from scd_sf.config import from_command_line
from scd_sf.evaluation.vbench.report import write_report
from scd_sf.types import UserError, exit_on_user_error, say


@dataclass
class ReportConfig:
    """Which scores are put side by side."""

    out: str
    """Folder of the report."""
    scores: dict[str, str] = field(default_factory=dict)
    """Name -> summary.json; the first one's videos are shown."""
    videos: str = ""
    """Folder of these videos; empty: no videos."""
    prompts: int = 60
    """At most so many prompts are shown."""

    def __post_init__(self) -> None:
        if not self.scores:
            raise UserError("scores is empty; give scores='{name: summary.json}'")
        if self.prompts < 1:
            raise UserError(f"prompts is {self.prompts}; it must be at least 1")


def main() -> None:
    cfg = from_command_line(ReportConfig, __doc__ or "")
    files = {name: Path(file) for name, file in cfg.scores.items()}
    rows = write_report(files, Path(cfg.out), Path(cfg.videos) if cfg.videos else None, cfg.prompts)
    for row in rows[: len(files)]:
        total = f"total {row.totals['total']:.2f}" if row.totals else "no total"
        say(f"{row.name}: {total}{f' ({row.note})' if row.note else ''}; see {cfg.out}/report.html")


if __name__ == "__main__":
    exit_on_user_error(main)
