"""Two curves compared step by step: whether they are bit-equal, and where and by how much they
differ.

A step counts as different beyond ``tolerance`` when |a - b| > tolerance * max(1, |a|): absolute for
values below 1, relative above. Two nan are equal; nan and a number differ by infinity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from scd_sf.tools.runs.curve import Curve, is_portable
from scd_sf.types import as_cell

MEAN_OF = 20  # records in a mean
MOST_METRICS = 500  # that a table shows
Series = Sequence[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class Difference:
    """One metric of two curves over their common steps, of which there are ``count``.

    ``worst``: largest |a - b|, at step ``worst_at``. ``first``: first step whose values are not
    bit-equal. ``excess``: largest |a - b| / max(1, |a|), which is compared with the tolerance. All
    are zero or None when the values are identical.
    """

    metric: str
    last: tuple[float | None, float | None]
    mean: tuple[float | None, float | None]
    count: int = 0
    worst: float = 0.0
    worst_at: int | None = None
    first: int | None = None
    excess: float = 0.0

    def exceeds(self, tolerance: float) -> bool:
        """Whether a metric fails a check: too far apart, or never in both curves at one step."""
        return self.count == 0 or self.excess > tolerance


def compare(
    left: Curve, right: Curve, metrics: Sequence[str] = (), mean_of: int = MEAN_OF
) -> list[Difference]:
    """Every portable metric of ``left`` (or those named), aligned by step with ``right``; ``left``
    is the reference."""
    left_series, right_series = left.series(), right.series()
    names = metrics or [metric for metric in left_series if is_portable(metric)]
    return [
        _difference(metric, left_series.get(metric, []), right_series.get(metric, []), mean_of)
        for metric in names
    ]


def _difference(metric: str, left: Series, right: Series, mean_of: int) -> Difference:
    right_values = dict(right)
    common = [(step, a, right_values[step]) for step, a in left if step in right_values]
    unequal = [
        (step, a, b) for step, a, b in common if a != b and not (math.isnan(a) and math.isnan(b))
    ]
    gaps = [(math.inf if math.isnan(a - b) else abs(a - b), step) for step, a, b in unequal]
    excess = [
        gap if math.isnan(a) else gap / max(1.0, abs(a))
        for (gap, _), (_, a, _) in zip(gaps, unequal, strict=True)
    ]
    last = (left[-1][1] if left else None, right[-1][1] if right else None)
    mean = (mean_of_last(left, mean_of), mean_of_last(right, mean_of))
    if not unequal:
        return Difference(metric, last, mean, len(common))
    worst, worst_at = max(gaps, key=lambda item: item[0])
    return Difference(metric, last, mean, len(common), worst, worst_at, unequal[0][0], max(excess))


def mean_of_last(series: Series, count: int = MEAN_OF) -> float | None:
    """Mean of the last ``count`` finite values of a metric."""
    values = [value for _, value in series[-count:] if math.isfinite(value)]
    return sum(values) / len(values) if values else None


def number(value: float | None) -> str:
    """Four significant digits; ``-`` for none."""
    return "-" if value is None else f"{value:.4g}"


def comparison_table(
    differences: Sequence[Difference], mean_of: int, tolerance: float | None
) -> Table:
    """One line per metric, those beyond the tolerance in red; of very many those that differ come
    first."""
    mean = f"mean of {mean_of}"
    table = Table(
        "metric",
        "last",
        "",
        mean,
        "",
        "difference",
        "largest",
        "first differs",
        box=None,
        pad_edge=False,
    )
    rows = (
        sorted(differences, key=lambda item: item.first is None)
        if len(differences) > MOST_METRICS
        else differences
    )
    for item in rows[:MOST_METRICS]:
        a, b = item.mean
        remark = f"same bits, {item.count} steps" if item.count else "never in both"
        table.add_row(
            as_cell(item.metric[:60]),
            *(
                number(value)
                for value in (*item.last, a, b, None if a is None or b is None else b - a)
            ),
            "-" if item.worst_at is None else f"{number(item.worst)} at {item.worst_at}",
            remark if item.first is None else f"step {item.first}",
            style="bold red" if tolerance is not None and item.exceeds(tolerance) else "",
        )
    if len(differences) > MOST_METRICS:
        table.add_row(Text(f"and {len(differences) - MOST_METRICS:,} more metrics"))
    return table
