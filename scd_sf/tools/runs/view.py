"""What a run looks like on a terminal: one line in a list, a page of its own, a table that follows it.

All text that comes from files is escaped (:func:`scd_sf.tools.runs.curve.clean`) and never read as rich markup.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from scd_sf.tools.runs.curve import Curve, clean
from scd_sf.tools.runs.state import RunView, Saved, State, describe_age

_STYLE: dict[State, str] = {"finished": "green", "running": "cyan", "stale": "bold red", "stopped": "yellow"}
_BARS = "▁▂▃▄▅▆▇█"
SPARK = 40  # characters of a sparkline
MOST_METRICS = 500  # that a page shows
MEAN_OF = 20  # records in "mean" and in `scd runs compare`


def sparkline(values: Sequence[float], width: int = SPARK) -> str:
    """The course of ``values`` in at most ``width`` characters, each the mean of its part; blank: nothing finite."""
    width = min(width, len(values))
    means: list[float] = []
    for index in range(width):
        part = values[index * len(values) // width : (index + 1) * len(values) // width]
        finite = [value for value in part if math.isfinite(value)]
        means.append(statistics.fmean(finite) if finite else math.nan)
    finite = [value for value in means if math.isfinite(value)]
    if not finite:
        return " " * width
    low, span = min(finite), max(finite) - min(finite)
    scale = (len(_BARS) - 1) / span if span > 0 and math.isfinite(span) else 0.0
    return "".join(_BARS[round((v - low) * scale)] if math.isfinite(v) else " " for v in means)


def number(value: float | None) -> str:
    """Four significant digits; ``-`` for none."""
    return "-" if value is None else f"{value:.4g}"


def mean_of_last(series: Sequence[tuple[int, float]], count: int = MEAN_OF) -> float | None:
    """Mean of the last ``count`` finite values of a metric's (step, value) pairs."""
    values = [value for _, value in series[-count:] if math.isfinite(value)]
    return statistics.fmean(values) if values else None


def list_table(views: Sequence[RunView], root: Path, unreadable: Mapping[Path, str] | None = None) -> Table:
    """One line per run; of those that cannot be read, why."""
    table = Table("run", "stage", "step", "last line", "loss", "checkpoint", "state", box=None, pad_edge=False)
    for view in views:
        name = clean(view.path.relative_to(root) if view.path != root else view.path.resolve().name)
        table.add_row(
            Text(name),
            Text(clean(view.stage)),
            _progress(view),
            "-" if view.age is None else f"{describe_age(view.age)} ago",
            Text(_loss(view.curve)),
            _saved(view.checkpoints[-1]) if view.checkpoints else Text("-"),
            _state(view),
        )
    for path, reason in (unreadable or {}).items():
        table.add_row(Text(clean(path)), *["-"] * 5, Text(f"unreadable: {clean(reason)}", "bold red"))
    return table


def page(view: RunView) -> Group:
    """Everything the files say about one run."""
    return Group(headline(view), Text(), _facts(view), Text(), metrics_table(view.curve))


def headline(view: RunView) -> Text:
    """Name, state and progress in one line."""
    left = _seconds_left(view)
    parts = [_state(view), Text(f"step {_progress(view)}")]
    if view.age is not None:
        parts.append(Text(f"last line {describe_age(view.age)} ago"))
    if left is not None and view.state == "running":
        parts.append(Text(f"about {describe_age(left)} left"))
    return Text.assemble(Text(clean(view.path), "bold"), ": ", Text(", ").join(parts))


def metrics_table(curve: Curve) -> RenderableType:
    """Every metric: last value, mean of the last records, its course."""
    table = Table("metric", "last", f"mean of {MEAN_OF}", "at step", "course", box=None, pad_edge=False)
    every = curve.series()
    for metric, series in islice(every.items(), MOST_METRICS):
        step, last = series[-1]
        course = sparkline([value for _, value in series])
        table.add_row(Text(clean(metric, 60)), number(last), number(mean_of_last(series)), str(step), course)
    if (more := len(every) - MOST_METRICS) > 0:
        table.add_row(Text(f"and {more:,} more metrics"))
    return table if curve.steps else Text("no metrics yet")


def _facts(view: RunView) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("stage", clean(view.stage)),
        *(("parent", clean(parent)) for parent in _parents(view.origin)),
        *((name, clean(view.origin[name])) for name in ("data_hash", "seed", "git_revision") if name in view.origin),
        ("versions", _versions(view.origin)),
        ("speed", _speed(view)),
        *(("checkpoint", _saved(saved)) for saved in reversed(view.checkpoints)),
        ("skipped", _skipped(view)),
        ("heartbeats", _heartbeats(view)),
        ("unreadable", f"{view.curve.unreadable} lines of the metrics" if view.curve.unreadable else ""),
        ("config", "  ".join(f"{clean(k, 60)}={clean(v, 120)}" for k, v in _flat(view.config))),
    ):
        if value:
            table.add_row(name, value if isinstance(value, Text) else Text(str(value)))
    return table


def _progress(view: RunView) -> str:
    return f"{view.curve.last}/{'?' if view.total is None else view.total}"


def _loss(curve: Curve) -> str:
    """The training loss's last value; its name where that is not plain ``loss`` (stage 3: the critic's)."""
    names = [name for name in curve.metrics() if name == "loss" or name.endswith("/loss")]
    name = next((name for name in names if not name.startswith("val/")), None)
    return "-" if name is None else f"{number(curve.newest(name))}{'' if name == 'loss' else f' {clean(name, 40)}'}"


def _state(view: RunView) -> Text:
    state = Text(view.state, _STYLE[view.state])
    return Text.assemble(state, f": {clean(view.reason)}") if view.reason else state


def _saved(saved: Saved) -> Text:
    return Text(f"{saved.step} (sizes agree)") if saved.intact else Text(f"{saved.step} DAMAGED", "bold red")


def _seconds_left(view: RunView) -> float | None:
    seconds = view.curve.seconds_per_step()
    return None if seconds is None or view.total is None else max(0, view.total - view.curve.last) * seconds


def _speed(view: RunView) -> str:
    seconds = view.curve.seconds_per_step()
    return "" if seconds is None else f"{seconds:.3g} s/step, {3600 / seconds:.4g} steps/h (median of the last 100)"


def _skipped(view: RunView) -> str:
    if not view.skipped:
        return "no update"
    return f"updates: {len(view.skipped)}, the last at step {', '.join(str(step) for step in view.skipped[-10:])}"


def _heartbeats(view: RunView) -> Text:
    if not view.heartbeats:
        return Text("no heartbeats")
    silent = {beat.rank for beat in view.silent}
    lines = []
    for beat in view.heartbeats:
        place = f"pid {beat.pid} on {clean(beat.host, 60)}"
        line = f"rank {beat.rank}: {describe_age(beat.age)} ago, step {beat.step}, {place}"
        lines.append(Text(f"{line} - STALE", "bold red") if beat.rank in silent else Text(line))
    return Text("\n").join(lines)


def _parents(origin: Mapping[str, object]) -> list[object]:
    parents = origin.get("parents")
    return [p.get("path", "?") for p in parents if isinstance(p, Mapping)] if isinstance(parents, list) else []


def _versions(origin: Mapping[str, object]) -> str:
    versions = origin.get("versions")
    items = versions.items() if isinstance(versions, dict) else ()
    return "  ".join(f"{clean(name, 40)} {clean(version, 40)}" for name, version in items)


def _flat(tree: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Dotted keys of a nested config."""
    rows: list[tuple[str, object]] = []
    for key, value in tree.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows
