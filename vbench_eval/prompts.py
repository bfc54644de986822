"""VBench's prompts as sampling takes them: one line per entry, for a look or for a prompt extender.

    # the 946 lines, in the order of all_dimension.txt
    python vbench_eval/prompts.py
    # line number, dimensions and prompt, tab separated
    python vbench_eval/prompts.py dimensions='[scene]' lines=true
    python vbench_eval/prompts.py extended=all_dimension_extended.txt

With ``extended`` (a file with one wording per line) the lines are checked and shown in their place.
The list is the one of the vbench 0.1.5 wheel; ``full_info=VBench_full_info.json`` takes another.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path

from scd_sf.config import from_command_line
from scd_sf.evaluation.vbench.prompts import (
    chosen_dimensions,
    load_entries,
    read_extended,
    video_name,
)
from scd_sf.types import exit_on_user_error, printable


@dataclass
class PromptsConfig:
    """Which prompts are printed."""

    full_info: str = ""
    """Another VBench_full_info.json; empty: the list that is shipped."""
    extended: str = ""
    """File whose line k replaces line k of the list; empty: VBench's own prompts."""
    dimensions: list[str] = field(default_factory=list)
    """Only prompts of these; empty: all."""
    lines: bool = False
    """Print line numbers (from 0) and dimensions, too."""


def main() -> None:
    cfg = from_command_line(PromptsConfig, __doc__ or "")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may go
    names = set(chosen_dimensions(cfg.dimensions))
    entries = load_entries(cfg.full_info)
    texts = (
        read_extended(Path(cfg.extended), entries)
        if cfg.extended
        else [entry.prompt for entry in entries]
    )
    for entry, text in zip(entries, texts, strict=True):
        video_name(entry.prompt, 0)
        if names & set(entry.dimensions):
            columns = [str(entry.line), ",".join(entry.dimensions), text] if cfg.lines else [text]
            print("\t".join(map(printable, columns)))


if __name__ == "__main__":
    exit_on_user_error(main)
