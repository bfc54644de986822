"""Two curves side by side, step by step: are they the same to the last bit, and if not, where and by how much.

A step counts as different beyond ``tolerance`` when |a - b| > tolerance * max(1, |a|): absolute for values below 1,
relative above. Two nan are equal; nan and a number differ by infinity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from scd_sf.tools.runs.curve import Curve, clean, is_portable
from scd_sf.tools.runs.view import MEAN_OF, MOST_METRICS, mean_of_last, number

Series = Sequence[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class Difference:
    """One metric of two curves over their common steps (``count``); all zero or None when the values are identical.

    ``worst``: largest |a - b|, at step ``worst_at``; ``first``: first step whose values are not bit-equal;
    ``excess``: largest |a - b| / max(1, |a|), what a tolerance is held against.
    """

    metric: str
    count: int
    last: tuple[float | None, float | None]
    mean: tuple[float | None, float | None]
    worst: float
    worst_at: int | None
    first: int | None
    excess: float


def common_steps(left: Curve, right: Curve) -> list[int]:
    """Steps that both have, ascending."""
    return [step for step in left.steps if step in right.steps]


def compare(left: Curve, right: Curve, metrics: Sequence[str] = (), mean_of: int = MEAN_OF) -> list[Difference]:
    """Every portable metric of ``left`` (or those named), aligned by step with ``right``; ``left`` is the reference."""
    ours, theirs = left.series(), right.series()
    chosen = metrics or [metric for metric in ours if is_portable(metric)]
    return [_difference(metric, ours.get(metric, []), theirs.get(metric, []), mean_of) for metric in chosen]


def exceeds(difference: Difference, tolerance: float) -> bool:
    """Whether a metric fails a check: too far apart, or never in both curves at one step."""
    return difference.count == 0 or difference.excess > tolerance


def _difference(metric: str, left: Series, right: Series, mean_of: int) -> Difference:
    worst, excess, first, worst_at, count, others = 0.0, 0.0, None, None, 0, dict(right)
    for step, a in left:
        if step not in others:
            continue
        b = others[step]
        count += 1
        if a == b or (math.isnan(a) and math.isnan(b)):
            continue
        gap = math.inf if math.isnan(a - b) else abs(a - b)
        first = step if first is None else first
        excess = max(excess, gap if math.isnan(a) else gap / max(1.0, abs(a)))
        if worst_at is None or gap > worst:
            worst, worst_at = gap, step
    last = (left[-1][1] if left else None, right[-1][1] if right else None)
    mean = (mean_of_last(left, mean_of), mean_of_last(right, mean_of))
    return Difference(metric, count, last, mean, worst, worst_at, first, excess)


def comparison_table(differences: Sequence[Difference], mean_of: int, tolerance: float | None) -> Table:
    """One line per metric, those beyond the tolerance in red; of very many those that differ come first."""
    mean = f"mean of {mean_of}"
    table = Table("metric", "last", "", mean, "", "difference", "largest", "first differs", box=None, pad_edge=False)
    more = len(differences) - MOST_METRICS
    shown = differences if more <= 0 else sorted(differences, key=lambda item: item.worst_at is None)[:MOST_METRICS]
    for item in shown:
        bad = tolerance is not None and exceeds(item, tolerance)
        a, b = item.mean
        table.add_row(
            Text(clean(item.metric, 60)),
            *(number(value) for value in (*item.last, a, b, None if a is None or b is None else b - a)),
            "-" if item.worst_at is None else f"{number(item.worst)} at {item.worst_at}",
            _first(item),
            style="bold red" if bad else "",
        )
    if more > 0:
        table.add_row(Text(f"and {more:,} more metrics"))
    return table


def _first(item: Difference) -> str:
    if item.count == 0:
        return "never in both"
    return f"same bits, {item.count} steps" if item.first is None else f"step {item.first}"
