"""What the filter writes: prompts.jsonl, prompts.txt, and a report for programs and for people."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scd_sf.files import Json, locked, new_file, read_typed, require_own_folder, sha256_file, write_json, write_text
from scd_sf.tools.prompts.filter.chain import VIDPROM_LICENCE, Chain, FilterConfig, Step
from scd_sf.tools.prompts.filter.optional import EXTRA, require
from scd_sf.tools.prompts.filter.table import find_list
from scd_sf.tools.prompts.filter.workers import open_workers
from scd_sf.types import UserError, say

PROMPTS, TEXT, REPORT, PAGE = "prompts.jsonl", "prompts.txt", "report.json", "report.md"
BEGUN = "building.json"  # while the others are written
SLICE = 50_000  # rows written at a time


@dataclass(frozen=True)
class Record:
    """What a folder of this command says of itself; ``sha256`` once it is complete."""

    settings: Json
    sha256: dict[str, str] = field(default_factory=dict)


def run_filter(cfg: FilterConfig) -> Path:
    """Filter ``cfg.inputs`` into the folder ``cfg.out`` and return its report; a finished one is left alone.

    UserError before anything is written: a package missing, a folder that holds or is given something else; after
    reading: too many bad rows.
    """
    require(*EXTRA)
    started, out = time.monotonic(), Path(cfg.out)
    files = [find_list(Path(path)) for path in cfg.inputs]
    if inside := [file for file in files if file.resolve().parent == out.resolve()]:
        raise UserError(f"out={out}: holds {inside[0].name}, one of the inputs; use another out=")
    hashes = [sha256_file(file) for file in files]
    decisive = {name: value for name, value in asdict(cfg).items() if name not in ("out", "workers", "examples")}
    settings = decisive | {"inputs": hashes}
    require_own_folder(out, (REPORT, BEGUN))
    with locked(out, "filter_vidprom"):
        if _finished(out, settings):
            say(f"{out}: already complete")
            return out / REPORT
        _filter(cfg, out, settings, hashes, started)
    return out / REPORT


def _filter(cfg: FilterConfig, out: Path, settings: Json, hashes: list[str], started: float) -> None:
    with open_workers(cfg.workers) as workers:
        chain = Chain(cfg, workers)
        kept = chain.run()
    if not kept:
        raise UserError(
            f"inputs: none of {chain.steps[0].rows_in} prompts passed ({_lossiest(chain.steps)}); nothing kept"
        )
    write_json(out / BEGUN, {"settings": settings})  # from here to the end the folder is ours and not complete
    (out / REPORT).unlink(missing_ok=True)
    before = time.monotonic()
    _write_rows(out, chain)
    seconds = chain.seconds | {"write": round(time.monotonic() - before, 2)}
    report: Json = {
        "settings": settings,
        "inputs": {Path(path).name: sha for path, sha in zip(cfg.inputs, hashes, strict=True)},
        "licence": _licence(cfg),
        "kept": kept,
        "steps": [asdict(step) for step in chain.steps],
        "seconds": seconds | {"all": round(time.monotonic() - started, 2)},
        "sha256": {name: sha256_file(out / name) for name in (PROMPTS, TEXT)},
    }
    write_text(out / PAGE, page(report, chain.steps))
    write_json(out / REPORT, report)
    (out / BEGUN).unlink()


def _finished(out: Path, settings: Json) -> bool:
    """Whether ``out`` holds just this already. UserError where it holds something else, or was changed since.

    A folder that was begun holds nothing of others: it was empty then, or had a report."""
    remedy = "nothing is overwritten: use another out="
    file = out / BEGUN if (out / BEGUN).is_file() else out / REPORT
    if not file.is_file():
        return False
    record = read_typed(file, Record, "use another out=")
    if other := [name for name in settings if record.settings.get(name) != _plain(settings[name])]:
        raise UserError(f"{file}: made with other {other[0]}; {remedy}")
    if file.name == BEGUN:
        return False
    names = [entry.name for entry in out.iterdir() if entry.name in (PROMPTS, TEXT)]
    if changed := [name for name in names if sha256_file(out / name) != record.sha256.get(name)]:
        raise UserError(
            f"{out / changed[0]}: was changed since {REPORT} was written; move it away, or use another out="
        )
    return len(names) == 2


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _write_rows(out: Path, chain: Chain) -> None:
    """Both lists, in the rows' order. Each appears whole or not at all."""
    with ExitStack() as files:
        parts = [files.enter_context(new_file(out / name)) for name in (PROMPTS, TEXT)]
        lines, text = (files.enter_context(part.open("wb")) for part in parts)
        for table in chain.rows():
            for first in range(0, len(table), SLICE):
                part = table.slice(first, SLICE)
                part.write_ndjson(lines)
                text.write("".join(f"{line}\n" for line in part["prompt"]).encode())


def _licence(cfg: FilterConfig) -> str:
    if cfg.licence:
        return cfg.licence
    if any(path.lower().endswith(".csv") for path in cfg.inputs):
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
