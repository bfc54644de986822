"""The curve of a run: ``metrics.jsonl`` as a mapping step -> values, also of a running training.

    curve = read_curve(Path("runs/stage2"))  # or a reference curve FILE.jsonl
    curve.steps[100]["loss"]

Files may be foreign, so a line that is no record is counted and left out.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from scd_sf.files import loads, own_file
from scd_sf.types import UserError

METRICS = "metrics.jsonl"
TAIL_BYTES = 1 << 16
# Words of a metric's name that say "this machine, this moment": never part of a reference curve.
_MACHINE = re.compile(
    r"(^|[/_])(time|seconds?|memory|gib|speed|fps|per_second|mfu|tflops|hours?)($|[/_])"
)


@dataclass
class Curve:
    """``steps``: step -> metric -> value (nan where the run recorded null), ascending; ``times``:
    step -> unix seconds.

    ``unreadable`` counts lines that are no records; a last line without its end is still being
    written and no fault.
    """

    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)
    unreadable: int = 0

    def add(self, record: object) -> bool:
        """Add a record and return whether it is one. At a step that is not after the last one the
        run was resumed from before, so later steps are removed."""
        if not isinstance(record, dict) or type(step := record.pop("step", None)) is not int:
            return False
        while self.steps and self.last >= step:
            self.times.pop(self.last, None)
            self.steps.popitem()
        if isinstance(moment := record.pop("time", None), float):
            self.times[step] = moment
        self.steps[step] = {
            name: math.nan if value is None else float(value)
            for name, value in record.items()
            if value is None or type(value) in (int, float)
        }
        return True

    @property
    def last(self) -> int:
        """The last step, 0 when there is none."""
        return next(reversed(self.steps), 0)

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """Metric -> (step, value) wherever it was recorded; metrics in the order in which they
        first appear."""
        series: dict[str, list[tuple[int, float]]] = {}
        for step, values in self.steps.items():
            for name, value in values.items():
                series.setdefault(name, []).append((step, value))
        return series

    def seconds_per_step(self, last: int = 100) -> float | None:
        """Median over the ``last`` records, so that a pause (a restart, a validation) does not
        count; None: unknown."""
        pairs = pairwise(list(self.times.items())[-last - 1 :])
        gaps = [(t1 - t0) / (s1 - s0) for (s0, t0), (s1, t1) in pairs if t1 > t0]
        return statistics.median(gaps) if gaps else None


def _parse(data: bytes) -> Curve:
    curve, lines = Curve(), data.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            is_record = curve.add(loads(line)) if line.strip() else True
        except (ValueError, RecursionError, MemoryError):
            is_record = False
        if not is_record and number < len(lines):
            curve.unreadable += 1
    return curve


def read_curve(path: Path) -> Curve:
    """The whole curve of a run directory or a .jsonl file. Raises UserError when there is none or
    it has no record."""
    file, remedy = path / METRICS if path.is_dir() else path, "give a run directory or FILE.jsonl"
    try:
        curve = _parse(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: no curve to read ({error.strerror}); {remedy}") from error
    if not curve.steps:
        raise UserError(f"{file}: no record with a step in it; {remedy}")
    return curve


def read_tail(file: Path) -> Curve:
    """The end of a curve, which is enough for the last values and the speed. Empty when the file is
    missing."""
    try:
        with file.open("rb") as stream:
            start = max(0, file.stat().st_size - TAIL_BYTES)
            stream.seek(start)
            data = stream.read()
    except OSError:
        return Curve()
    return _parse(data if start == 0 else data.partition(b"\n")[2])


def is_portable(metric: str) -> bool:
    """Whether a metric depends on the training alone, not on the machine and the moment."""
    return not _MACHINE.search(metric)


def export_curve(run: Path, out: Path) -> int:
    """Write a run's portable metrics to a new file and return the number of steps. Raises UserError
    if the file exists."""
    curve = read_curve(run)
    with own_file(out, fresh=True) as part, part.open("w", encoding="utf-8") as file:
        for step, values in curve.steps.items():
            metrics = {
                name: value if math.isfinite(value) else None
                for name, value in values.items()
                if is_portable(name)
            }
            file.write(json.dumps({"step": step, **metrics}) + "\n")
    return len(curve.steps)
