"""`scd runs ..`: list, show, follow, compare and export what trainings wrote to disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from scd_sf.tools.runs.compare import common_steps, compare, comparison_table, exceeds
from scd_sf.tools.runs.curve import METRICS, Curve, Follower, clean, export_curve, read_curve
from scd_sf.tools.runs.state import find_runs, is_run, read_run
from scd_sf.tools.runs.view import MEAN_OF, MOST_METRICS, headline, list_table, metrics_table, page
from scd_sf.types import UserError, say

app = typer.Typer(no_args_is_help=True, help="What trainings wrote to disk: list, show, follow, compare, export.")
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
StaleOption = Annotated[
    float | None,
    typer.Option("--stale", help="Seconds of silence that count as stale; default: from the run's own pace."),
]


@app.command(name="ls")
def list_runs(
    root: Annotated[Path, typer.Argument(help="The folder that holds the runs.")] = Path("runs"),
    stale: StaleOption = None,
) -> None:
    """One line per run below a folder: stage, step, last loss, newest checkpoint, and whether anybody is at work."""
    now = time.time()
    views, unreadable = [], {}
    for path in find_runs(root):
        try:
            views.append(read_run(path, now, stale_after=stale))
        except UserError as error:  # one damaged run hides no other
            unreadable[path] = str(error)
    if not views and not unreadable:
        raise UserError(f"{root}: no run below it (no {METRICS}); give the folder that holds your runs")
    _console().print(list_table(views, root, unreadable))


@app.command()
def show(run: RunArgument, stale: StaleOption = None) -> None:
    """All about one run: origin, config, speed, checkpoints, skipped updates, heartbeats and metrics."""
    _console().print(page(read_run(run, time.time(), _curve(run), stale)))


@app.command()
def watch(
    run: RunArgument,
    once: Annotated[bool, typer.Option("--once", help="Draw once and stop.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks.")] = 2.0,
    stale: StaleOption = None,
) -> None:
    """Follow a run until it ends or Ctrl-C: metrics with their course, redrawn as they are written."""
    follower = Follower(run / METRICS)

    def draw() -> tuple[Group, bool]:
        curve = follower.update() if (run / METRICS).is_file() else Curve()
        view = read_run(run, time.time(), curve, stale)
        return Group(headline(view), Text(), metrics_table(curve)), view.state in ("finished", "stopped")

    picture, over = draw()
    if once or over:
        _console().print(picture)
        return
    with Live(picture, console=_console(), auto_refresh=False) as live:
        try:
            while not over:
                time.sleep(every)
                picture, over = draw()
                live.update(picture, refresh=True)
        except KeyboardInterrupt:
            return


@app.command(name="compare")
def compare_runs(
    reference: Annotated[Path, typer.Argument(metavar="A", help="The reference: a run, or a curve FILE.jsonl.")],
    others: Annotated[list[Path], typer.Argument(metavar="B [C ..]", help="Runs or curve files to hold against it.")],
    tolerance: Annotated[
        float | None, typer.Option(help="Exit code 1 when |a - b| > TOLERANCE x max(1, |a|) at any common step.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Only this metric; may be given again.")] = None,
    mean_of: Annotated[int, typer.Option("--last", min=1, help="Records in the mean.")] = MEAN_OF,
) -> None:
    """Runs side by side, aligned by step: last values, means, and the first step whose values are not bit-equal."""
    console, left, failed = _console(), read_curve(reference), False
    for other in others:
        right = read_curve(other)
        steps = common_steps(left, right)
        if not steps:
            raise UserError(f"{other}: no step in common with {reference} (1..{left.last} against 1..{right.last})")
        differences = compare(left, right, metric or (), mean_of)
        names = f"{clean(reference)} (a) and {clean(other)} (b)"
        console.print(Text(f"{names}: {len(steps)} common steps, {steps[0]} to {steps[-1]}", "bold"))
        console.print(comparison_table(differences, mean_of, tolerance))
        if only := list(dict.fromkeys(right.metrics()).keys() - dict.fromkeys(left.metrics()).keys()):
            console.print(Text(f"only in b: {', '.join(clean(name, 60) for name in sorted(only)[:MOST_METRICS])}"))
        failed |= tolerance is not None and any(exceeds(item, tolerance) for item in differences)
    if failed:
        console.print(Text(f"different: beyond tolerance {tolerance}", "bold red"))
        raise typer.Exit(1)


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="A new file.")],
) -> None:
    """A run's curve as a reference: step and metrics, without times, speeds and memory (they belong to the machine)."""
    steps = export_curve(run, out)
    say(f"{clean(out)}: {steps} steps; compare with: scd runs compare {clean(out)} RUN")


def _curve(run: Path) -> Curve | None:
    return Follower(run / METRICS).update() if is_run(run) and (run / METRICS).is_file() else None


def _console() -> Console:
    """On a terminal its own width; into a file or pipe wide enough that nothing is cut."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)
