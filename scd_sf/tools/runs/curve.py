"""The curve of a run: ``metrics.jsonl`` as a mapping step -> values, also while it is being written.

    curve = read_curve(Path("runs/stage2"))         # a run directory, or a reference curve FILE.jsonl
    curve.steps[100]["loss"]

Files come from anywhere: a line that is not a record is counted, not trusted; :func:`clean` makes their text printable.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from scd_sf.files import own_file
from scd_sf.types import UserError

METRICS = "metrics.jsonl"
TAIL = 1 << 16
MOST_STEPS = 2**53
LARGEST = 1e290  # of a value: the sum of all that fit into a file is finite
_BLOCK = 256  # lines that are parsed together
# Words of a metric's name that say "this machine, this moment": never part of a reference curve.
_MACHINE = re.compile(r"(^|[/_])(time|seconds?|memory|gib|speed|fps|per_second|mfu|tflops|hours?)($|[/_])")


@dataclass
class Curve:
    """``steps``: step -> metric -> value (nan where the run recorded null), ascending; ``times``: step -> unix seconds.

    ``unreadable`` counts lines that are no records; a last line without its end is still being written and no fault.
    """

    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)
    unreadable: int = 0

    def add(self, lines: Sequence[bytes]) -> None:
        """Take in lines. A step that is not after the last one: the run went on from before it, and later wins."""
        for start in range(0, len(lines), _BLOCK):
            block = lines[start : start + _BLOCK]
            records = _parse(b"[" + b",".join(block) + b"]")  # many at once: half the time of one by one
            if not isinstance(records, list) or len(records) != len(block):
                records = [_parse(line) for line in block]
            for record in records:
                self._add(record)

    def _add(self, record: object) -> None:
        step = record.pop("step", None) if isinstance(record, dict) else None
        if not isinstance(record, dict) or type(step) is not int or abs(step) > MOST_STEPS:
            self.unreadable += 1
            return
        while self.steps and (last := next(reversed(self.steps))) >= step:
            del self.steps[last]
            self.times.pop(last, None)
        moment = record.pop("time", None)
        if type(moment) is float and abs(moment) <= LARGEST:
            self.times[step] = moment
        plain = all(type(value) is float and abs(value) <= LARGEST for value in record.values())
        self.steps[step] = record if plain else _numbers(record)

    @property
    def last(self) -> int:
        """The last step, 0 when there is none."""
        return next(reversed(self.steps), 0)

    def metrics(self) -> list[str]:
        """Names of all metrics, in the order in which they first appear."""
        return list(dict.fromkeys(name for values in self.steps.values() for name in values))

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """Metric -> (step, value) wherever it was recorded, in the order of :meth:`metrics`."""
        found: dict[str, list[tuple[int, float]]] = {}
        for step, values in self.steps.items():
            for name, value in values.items():
                found.setdefault(name, []).append((step, value))
        return found

    def newest(self, metric: str) -> float | None:
        """The metric's last recorded value."""
        return next((values[metric] for values in reversed(self.steps.values()) if metric in values), None)

    def seconds_per_step(self, last: int = 100) -> float | None:
        """Median over the ``last`` records, so that a pause (a restart, a validation) does not count; None: unknown."""
        pairs = pairwise(list(self.times.items())[-last - 1 :])
        gaps = [(t1 - t0) / (s1 - s0) for (s0, t0), (s1, t1) in pairs if t1 > t0]
        return statistics.median(gaps) if gaps else None


def _parse(text: bytes) -> object:
    """The JSON value; None where the text is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _numbers(record: dict[str, object]) -> dict[str, float]:
    """The numbers of a record; null, and what is too large to add up, is nan."""
    values: dict[str, float] = {}
    for name, value in record.items():
        if value is None:
            values[name] = math.nan
        elif type(value) is float or (type(value) is int and abs(value) < 2**53):
            values[name] = float(value) if abs(value) <= LARGEST else math.nan
    return values


class Follower:
    """Reads a curve file as it grows: each :meth:`update` takes in only what is new."""

    def __init__(self, file: Path, start: int = 0) -> None:
        """``start``: byte to start from; the line it falls into is left out (0: the whole file)."""
        self.file, self.curve = file, Curve()
        self._position, self._identity, self._skip = start, -1, start > 0
        self._rest = b""

    def update(self) -> Curve:
        """The curve so far. Starts over when the file was replaced or cut (a run that resumes does that).

        Raises UserError when there is no such file.
        """
        try:
            with self.file.open("rb") as stream:
                status = os.fstat(stream.fileno())
                if self._identity not in (-1, status.st_ino) or status.st_size < self._position:
                    self.curve, self._position, self._rest, self._skip = Curve(), 0, b"", False
                self._identity = status.st_ino
                stream.seek(self._position)
                new = stream.read()
        except OSError as error:
            remedy = "give a run directory or FILE.jsonl"
            raise UserError(f"{self.file}: no curve to read ({error.strerror}); {remedy}") from error
        self._position += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        self.curve.add([line for line in (lines[1:] if self._skip else lines) if line.strip()])
        self._skip = self._skip and not lines
        return self.curve

    def finish(self) -> Curve:
        """The curve with a last line that lacks its end, if it is a whole record: for files nobody writes any more."""
        faults = self.curve.unreadable
        self.curve.add([self._rest])
        self.curve.unreadable, self._rest = faults, b""
        return self.curve


def curve_file(path: Path) -> Path:
    """The curve's file: ``path`` itself, or the metrics of a run directory."""
    return path / METRICS if path.is_dir() else path


def read_curve(path: Path) -> Curve:
    """The whole curve of a run directory or a .jsonl file. Raises UserError when there is none or it has no record."""
    file = curve_file(path)
    follower = Follower(file)
    follower.update()
    curve = follower.finish()
    if not curve.steps:
        raise UserError(f"{file}: no record with a step in it; give a run directory or FILE.jsonl")
    return curve


def read_tail(file: Path) -> Curve:
    """Only the end of a curve, however long it is: enough for the last values and the speed. Empty when missing."""
    try:
        return Follower(file, max(0, file.stat().st_size - TAIL)).update()
    except (OSError, UserError):
        return Curve()


def is_portable(metric: str) -> bool:
    """Whether a metric says something of the training, not of the machine and the moment."""
    return not _MACHINE.search(metric)


def portable(curve: Curve) -> Iterator[str]:
    """The curve as JSON lines, without the clock and whatever else depends on the machine."""
    for step, values in curve.steps.items():
        kept = {name: value if math.isfinite(value) else None for name, value in values.items() if is_portable(name)}
        yield json.dumps({"step": step, **kept}) + "\n"


def export_curve(run: Path, out: Path) -> int:
    """Write :func:`portable` of ``run`` to a new file; returns the number of steps. Raises UserError if it is there."""
    curve = read_curve(run)
    with own_file(out, fresh=True) as part:
        part.write_text("".join(portable(curve)), encoding="utf-8")
    return len(curve.steps)


def clean(text: object, limit: int = 200) -> str:
    """Text from a file for a terminal: escapes what is not printable (escape codes, line ends, bidirectional marks)."""
    start = str(text)[: limit + 1]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in start)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
