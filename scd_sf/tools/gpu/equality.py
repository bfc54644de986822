"""Part 1: every path at tiny size on the device against the CPU, by the checks of
``tests/tools/gpu/checks.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from scd_sf.distributed import Ranks, init_distributed
from scd_sf.tools.gpu.parts import Figures, GpuRow, failed

Differences = dict[str, tuple[float, float]]  # what differs: by how much, and the most that it may
Comparison = Callable[[str, Ranks], Differences]


def equality_rows(names: Iterable[str], compare: Comparison) -> Sequence[GpuRow]:
    """One row for each check; ``compare`` runs it."""
    ranks = init_distributed()

    def measure(name: str) -> Figures:
        return measure_equality(name, compare(name, ranks))

    return [GpuRow(name, partial(measure, name)) for name in names]


def measure_equality(name: str, differences: Differences) -> Figures:
    """Lines of the table, and an error that names what is beyond its limit."""
    lines = [
        {
            "check": name,
            "what": quantity,
            "difference": value,
            "at most": limit,
            "fine": bool(value <= limit),
        }
        for quantity, (value, limit) in differences.items()
    ]
    beyond = [
        f"{line['what']} {line['difference']:g}, at most {line['at most']:g}"
        for line in lines
        if not line["fine"]
    ]
    return {"lines": lines} | (failed(f"differs: {'; '.join(beyond)}") if beyond else {})
