"""What the filter writes: prompts.jsonl, prompts.txt, and a report for programs and for people."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

from scd_sf.files import read_json, sha256_file, write_json, write_text
from scd_sf.prompt_filter.chain import VIDPROM_LICENCE, Chain, FilterConfig, Step
from scd_sf.prompt_filter.optional import EXTRA, require
from scd_sf.prompt_filter.workers import open_workers
from scd_sf.types import UserError

PROMPTS, TEXT, REPORT, PAGE = "prompts.jsonl", "prompts.txt", "report.json", "report.md"
SLICE = 50_000  # rows written at a time


def run_filter(cfg: FilterConfig) -> Path:
    """Filter ``cfg.inputs`` into the folder ``cfg.out`` and return its report; a finished one is left alone.

    UserError before anything is written: a bad row, a package missing, a folder that holds something else.
    """
    require(*EXTRA)
    started, out = time.monotonic(), Path(cfg.out)
    inputs = {path: sha256_file(Path(path)) for path in cfg.inputs}
    told = {name: value for name, value in asdict(cfg).items() if name not in ("out", "workers", "examples")}
    settings = told | {"inputs": list(inputs.values())}
    if _finished(out, settings):
        print(f"{out}: already complete")
        return out / REPORT
    with open_workers(cfg.workers) as workers:
        chain = Chain(cfg, workers)
        kept = chain.run()
    if not kept:
        raise UserError(
            f"inputs: none of {chain.steps[0].rows_in} prompts passed ({_lossiest(chain.steps)}); nothing kept"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error}); use another out=") from error
    with suppress(FileNotFoundError):  # from here to the end the folder is not complete
        (out / REPORT).unlink()
    before = time.monotonic()
    _write_rows(out, chain)
    seconds = chain.seconds | {"write": round(time.monotonic() - before, 2)}
    report = {
        "settings": settings,
        "inputs": {Path(path).name: sha for path, sha in inputs.items()},
        "licence": _licence(cfg),
        "kept": kept,
        "steps": [asdict(step) for step in chain.steps],
        "seconds": seconds | {"all": round(time.monotonic() - started, 2)},
        "sha256": {name: sha256_file(out / name) for name in (PROMPTS, TEXT)},
    }
    write_text(out / PAGE, page(report, chain.steps))
    write_json(out / REPORT, report)
    return out / REPORT


def _finished(out: Path, settings: Mapping[str, object]) -> bool:
    """Whether ``out`` holds just this already. UserError where it holds something else."""
    file = out / REPORT
    if file.is_file():
        old = read_json(file, "use another out=")
        was, sums = old.get("settings"), old.get("sha256")
        if not isinstance(was, dict) or not isinstance(sums, dict):
            raise UserError(f"{file}: not a filter's report; use another out=")
        if other := [name for name in settings if was.get(name) != _plain(settings[name])]:
            raise UserError(f"{file}: made with other {other[0]}; nothing is overwritten: use another out=")
        return all((out / name).is_file() and sha256_file(out / name) == sums.get(name) for name in (PROMPTS, TEXT))
    known = {PROMPTS, TEXT, PAGE, REPORT} | {f"{name}.tmp" for name in (PROMPTS, TEXT, PAGE, REPORT)}
    if out.exists() and (not out.is_dir() or any(entry.name not in known for entry in out.iterdir())):
        raise UserError(f"{out}: holds something else; nothing is overwritten: use another out=")
    return False


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _write_rows(out: Path, chain: Chain) -> None:
    """Both lists, in the rows' order. Each appears whole or not at all."""
    with ExitStack() as files:
        lines, text = (files.enter_context((out / f"{name}.tmp").open("wb")) for name in (PROMPTS, TEXT))
        for table in chain.rows():
            for first in range(0, len(table), SLICE):
                part = table.slice(first, SLICE)
                part.write_ndjson(lines)
                text.write("".join(f"{line}\n" for line in part["prompt"]).encode())
        for file in (lines, text):
            file.flush()
            os.fsync(file.fileno())
    for name in (PROMPTS, TEXT):
        (out / f"{name}.tmp").replace(out / name)


def _licence(cfg: FilterConfig) -> str:
    if cfg.licence:
        return cfg.licence
    if any(path.endswith(".csv") for path in cfg.inputs):
        return f"{VIDPROM_LICENCE}: no commercial use; name the source; what is derived stays under it"
    return "not stated; set licence="


def _lossiest(steps: list[Step]) -> str:
    step = max(steps, key=lambda step: step.rows_in - step.rows_out)
    return f"{step.name} dropped {step.rows_in - step.rows_out}"


def page(report: Mapping[str, object], steps: list[Step]) -> str:
    """The report as Markdown."""
    first, kept = steps[0].rows_in, steps[-1].rows_out
    lines = [
        "# Prompt filter",
        "",
        f"{first} prompts in, {kept} kept ({kept / first:.1%}). Licence of the prompts: {report['licence']}.",
        "",
        "| step | in | out | dropped | of those in | settings and counts |",
        "|---|---|---|---|---|---|",
    ]
    for step in steps:
        gone = step.rows_in - step.rows_out
        told = "; ".join(f"{name}: {value}" for name, value in (step.settings | step.counts).items())
        share = gone / step.rows_in if step.rows_in else 0.0
        lines.append(f"| {step.name} | {step.rows_in} | {step.rows_out} | {gone} | {share:.2%} | {_cell(told)} |")
    lines += ["", "## Examples of what was dropped", "", "NSFW prompts are named by uuid and score only."]
    for step in steps:
        if step.examples:
            lines += ["", f"### {step.name}", ""]
            lines += [f"- {'; '.join(f'{k}: `{_cell(v)}`' for k, v in example.items())}" for example in step.examples]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    text = str(value).replace("|", "\\|").replace("`", "'")
    return text if len(text) <= 300 else f"{text[:300]} ..."
