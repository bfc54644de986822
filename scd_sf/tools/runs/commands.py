"""`scd runs ..`: list, show, follow, compare and export what trainings wrote to disk. Curves:
TensorBoard, or wandb."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scd_sf.tools.runs.compare import (
    MEAN_OF,
    MOST_METRICS,
    compare,
    comparison_table,
    mean_of_last,
    number,
)
from scd_sf.tools.runs.curve import METRICS, export_curve, is_portable, read_curve
from scd_sf.tools.runs.state import RunView, SavedStep, State, describe_age, find_runs, read_run
from scd_sf.train.alarms import alarm_lines
from scd_sf.train.metric_names import meaning
from scd_sf.types import UserError, as_cell, printable, say

app = typer.Typer(
    no_args_is_help=True, help="What trainings wrote to disk: list, show, follow, compare, export."
)
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
StaleOption = Annotated[
    float | None,
    typer.Option(
        "--stale", help="Seconds of silence that count as stale; default: from the run's own pace."
    ),
]
STYLE: dict[State, str] = {
    "finished": "green",
    "running": "cyan",
    "stale": "bold red",
    "stopped": "yellow",
}
SHOWN = 120  # characters of a value


@app.command(name="ls")
def list_runs(
    root: Annotated[Path, typer.Argument(help="The folder that holds the runs.")] = Path("runs"),
    stale: StaleOption = None,
) -> None:
    """One line per run below a folder: stage, step, last loss, newest checkpoint, and whether
    anybody is at work."""
    table = Table(
        "run", "stage", "step", "last line", "loss", "checkpoint", "state", box=None, pad_edge=False
    )
    for path in find_runs(root):
        name = as_cell(path.relative_to(root) if path != root else path.resolve().name)
        try:
            view = read_run(path, time.time(), stale)
        except UserError as error:  # one damaged run hides no other
            table.add_row(name, *["-"] * 5, Text(printable(f"unreadable: {error}"), "bold red"))
            continue
        age = "-" if view.age is None else f"{describe_age(view.age)} ago"
        checkpoint = _checkpoint_text(view.checkpoints[-1]) if view.checkpoints else Text("-")
        table.add_row(
            name,
            as_cell(view.stage),
            _progress(view),
            age,
            as_cell(_loss(view)),
            checkpoint,
            _state(view),
        )
    if not table.row_count:
        raise UserError(
            f"{root}: no run below it (no {METRICS}); give the folder that holds your runs"
        )
    _console().print(table)


@app.command()
def show(run: RunArgument, stale: StaleOption = None) -> None:
    """All about one run: origin, config, speed, checkpoints, skipped updates, heartbeats, alarms and
    metrics with their meaning."""
    view = read_run(run, time.time(), stale)
    console = _console()
    console.print(_headline(view))
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(view):
        facts.add_row(name, value if isinstance(value, Text) else as_cell(value))
    console.print(facts)
    metrics = Table(
        "metric", "last", f"mean of {MEAN_OF}", "at step", "meaning", box=None, pad_edge=False
    )
    every = read_curve(run).series() if (run / METRICS).is_file() and view.curve.steps else {}
    for metric, series in list(every.items())[:MOST_METRICS]:
        step, newest = series[-1]
        metrics.add_row(
            as_cell(metric[:60]),
            number(newest),
            number(mean_of_last(series)),
            str(step),
            meaning(metric),
        )
    console.print(metrics if every else "no metrics yet")
    if len(every) > MOST_METRICS:
        console.print(f"and {len(every) - MOST_METRICS:,} more metrics")


@app.command()
def watch(
    run: RunArgument,
    once: Annotated[bool, typer.Option("--once", help="Print the line once and stop.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks.")] = 2.0,
    stale: StaleOption = None,
) -> None:
    """Follow a run until it ends or Ctrl-C: state, step, time left and last metrics in one line."""
    view = read_run(run, time.time(), stale)
    with Live(_line(view), console=_console(), auto_refresh=False) as live:
        try:
            while not once and view.state not in ("finished", "stopped"):
                time.sleep(every)
                view = read_run(run, time.time(), stale)
                live.update(_line(view), refresh=True)
        except KeyboardInterrupt:
            return


@app.command(name="compare")
def compare_runs(
    reference: Annotated[
        Path, typer.Argument(metavar="A", help="The reference: a run, or a curve FILE.jsonl.")
    ],
    others: Annotated[
        list[Path],
        typer.Argument(metavar="B [C ..]", help="Runs or curve files to hold against it."),
    ],
    tolerance: Annotated[
        float | None,
        typer.Option(help="Exit code 1 when |a - b| > TOLERANCE x max(1, |a|) at any common step."),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Only this metric; may be given again.")
    ] = None,
    mean_of: Annotated[int, typer.Option("--last", min=1, help="Records in the mean.")] = MEAN_OF,
) -> None:
    """Runs side by side, aligned by step: last values, means, and the first step whose values are
    not bit-equal."""
    console = _console()
    left = read_curve(reference)
    is_different = False
    for other in others:
        right = read_curve(other)
        steps = [step for step in left.steps if step in right.steps]
        if not steps:
            raise UserError(
                f"{other}: no step in common with {reference} (1..{left.last} against 1..{right.last})"
            )
        differences = compare(left, right, metric or (), mean_of)
        title = (
            f"{reference} (a) and {other} (b): {len(steps)} common steps, {steps[0]} to {steps[-1]}"
        )
        console.print(Text(printable(title), "bold"))
        console.print(comparison_table(differences, mean_of, tolerance))
        if only := sorted(right.series().keys() - left.series().keys()):
            console.print(
                as_cell(f"only in b: {', '.join(name[:60] for name in only[:MOST_METRICS])}")
            )
        if tolerance is not None and any(item.exceeds(tolerance) for item in differences):
            is_different = True
    if is_different:
        console.print(Text(f"different: beyond tolerance {tolerance}", "bold red"))
        raise typer.Exit(1)


@app.command("export")
def export_command(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="A new file.")],
) -> None:
    """A run's curve as a reference: step and metrics, without times, speeds and memory (they belong
    to the machine)."""
    say(f"{out}: {export_curve(run, out)} steps; compare with: scd runs compare {out} RUN")


def _headline(view: RunView) -> Text:
    """Name, state and progress in one line."""
    parts = [_state(view), Text(f"step {_progress(view)}")]
    if view.age is not None:
        parts.append(Text(f"last line {describe_age(view.age)} ago"))
    seconds = view.curve.seconds_per_step()
    if view.state == "running" and seconds is not None and view.total is not None:
        parts.append(
            Text(f"about {describe_age(max(0, view.total - view.curve.last) * seconds)} left")
        )
    return Text.assemble(Text(printable(str(view.path)), "bold"), ": ", Text(", ").join(parts))


def _line(view: RunView) -> Text:
    newest = {
        name: series[-1][1] for name, series in view.curve.series().items() if is_portable(name)
    }
    metrics = (f"{printable(name[:60])} {number(value)}" for name, value in newest.items())
    alarms = [f"ALARM {event.kind} since step {event.step}" for event in view.alarms]
    return Text.assemble(
        _headline(view),
        *((Text(printable(f"  {alarm}"), "bold red")) for alarm in alarms),
        Text("  " + "  ".join(metrics)),
    )


def _facts(view: RunView) -> list[tuple[str, str | Text]]:
    origin, seconds = view.origin, view.curve.seconds_per_step()
    parents, versions = origin.get("parents"), origin.get("versions")
    facts: list[tuple[str, str | Text]] = [
        ("alarm", Text(printable(line), "bold red"))
        for event in view.alarms
        for line in alarm_lines(event)
    ]
    facts.append(("stage", view.stage))
    if isinstance(parents, list):
        facts += [
            ("parent", str(parent.get("path", "?")))
            for parent in parents
            if isinstance(parent, Mapping)
        ]
    facts += [
        (name, str(origin[name]))
        for name in ("data_hash", "seed", "git_revision")
        if name in origin
    ]
    if isinstance(versions, Mapping):
        facts.append(
            ("versions", "  ".join(f"{name} {version}" for name, version in versions.items()))
        )
    if seconds is not None:
        facts.append(
            (
                "speed",
                f"{seconds:.3g} s/step, {3600 / seconds:.4g} steps/h (median of the last 100)",
            )
        )
    facts += [
        ("checkpoint", _checkpoint_text(checkpoint)) for checkpoint in reversed(view.checkpoints)
    ]
    last_steps = ", ".join(str(step) for step in view.skipped_steps[-10:])
    facts.append(
        (
            "skipped",
            f"updates: {len(view.skipped_steps)}, the last at step {last_steps}"
            if last_steps
            else "no update",
        )
    )
    silent_numbers = {beat.rank for beat in view.silent_ranks}
    for beat in view.heartbeats:
        line = f"rank {beat.rank}: {describe_age(beat.age)} ago, step {beat.step}, pid {beat.pid} on {beat.host[:60]}"
        is_silent = beat.rank in silent_numbers
        facts.append(
            ("heartbeat", Text(printable(f"{line} - STALE"), "bold red") if is_silent else line)
        )
    if not view.heartbeats:
        facts.append(("heartbeat", "no heartbeats"))
    if view.curve.unreadable:
        facts.append(("unreadable", f"{view.curve.unreadable} lines at the end of the metrics"))
    settings = (f"{name[:60]}={str(value)[:SHOWN]}" for name, value in _flat(view.config))
    return [*facts, ("config", "  ".join(settings))]


def _flat(tree: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """(dotted key, value) of a nested config."""
    rows: list[tuple[str, object]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _progress(view: RunView) -> str:
    return f"{view.curve.last}/{'?' if view.total is None else view.total}"


def _loss(view: RunView) -> str:
    """The training loss's last value, with its name where that is not plain ``loss`` (in stage 3
    the critic's)."""
    for name, series in view.curve.series().items():
        if name == "loss" or (name.endswith("/loss") and not name.startswith("val/")):
            return number(series[-1][1]) + ("" if name == "loss" else f" {name[:40]}")
    return "-"


def _state(view: RunView) -> Text:
    state = Text(view.state, STYLE[view.state])
    return Text.assemble(state, printable(f": {view.reason[:SHOWN]}")) if view.reason else state


def _checkpoint_text(checkpoint: SavedStep) -> Text:
    return (
        Text(f"{checkpoint.step} (sizes agree)")
        if checkpoint.intact
        else Text(f"{checkpoint.step} DAMAGED", "bold red")
    )


def _console() -> Console:
    """A console of the terminal's width, or 160 characters wide for a file or pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)
