"""Alarms in words: what a training looks like that collapses, and what to try.

Public reports of distillations that collapse tell of grey or over-coloured frames, of videos that
stand still, of noise, and of flicker. Each :class:`Alarm` watches one logged metric and is raised
once when it leaves its range, and again only after it has recovered. A metric that was never within
its range, as at the beginning, raises its alarm from half of the training on. ``RUN/alarms.json`` holds
what happened, for ``scd runs``; a resumed run forgets what came after its checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from scd_sf.checkpoint import PROVENANCE, read_provenance
from scd_sf.data.clip_statistics import CLIP_STATISTICS
from scd_sf.files import read_typed, typed, write_json
from scd_sf.train.run import Run
from scd_sf.types import Logs, say

ALARMS = "alarms.json"
# Bounds as multiples of the true clips' statistics. The demo's healthy runs end at 0.9 .. 1.1 times
# their clips' saturation, 0.7 .. 0.8 times their motion and 0.8 .. 1.4 times their flicker.
LEAST_SATURATION, MOST_SATURATION = 0.5, 1.8
LEAST_MOTION, MOST_MOTION = 0.25, 3.0
MOST_FLICKER = 5.0
EARLIEST = 20  # steps before a metric that was never within its range counts
RECOVERY = 1.1  # an alarm is over when the metric is within its range by this factor
FILE_BYTES = 2**22


@dataclass(frozen=True)
class Alarm:
    """A kind of alarm: it is raised below ``low`` or above ``high`` of ``metric``. ``looks``: what
    it looks like. ``remedy``: what to try."""

    kind: str
    metric: str
    looks: str
    remedy: str
    low: float | None = None
    high: float | None = None

    def is_outside(self, value: float) -> bool:
        """Whether a value raises the alarm."""
        return self._beyond(value, 1.0)

    def has_recovered(self, value: float) -> bool:
        """Whether a value ends the alarm; a value at the edge of the range does not."""
        return not self._beyond(value, RECOVERY)

    def _beyond(self, value: float, margin: float) -> bool:
        is_low = self.low is not None and value < self.low * margin
        return is_low or (self.high is not None and value > self.high / margin)

    @property
    def range(self) -> str:
        """The range in words."""
        if self.low is not None:
            return f"below {self.low:.3g}"
        return f"above {self.high:.3g}"


@dataclass(frozen=True)
class Event:
    """One alarm of a run: raised at ``step`` because of ``reason``; ``looks`` and ``remedy`` as the
    alarm has them. ``until``: the step at which it was over, None while it lasts."""

    kind: str
    step: int
    reason: str
    looks: str
    remedy: str
    until: int | None = None


@dataclass(frozen=True)
class AlarmRecord:
    """``alarms.json``. ``settled``: kind -> first step at which its metric was within its range."""

    settled: dict[str, int] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def until_step(self, step: int) -> AlarmRecord:
        """The record as it was after ``step``."""
        settled = {kind: first for kind, first in self.settled.items() if first <= step}
        events = [
            event if event.until is None or event.until <= step else replace(event, until=None)
            for event in self.events
            if event.step <= step
        ]
        return AlarmRecord(settled, events)

    @property
    def active(self) -> list[Event]:
        """The alarms that last."""
        return [event for event in self.events if event.until is None]


def read_alarms(run_dir: Path) -> AlarmRecord:
    """The alarms of a run; empty without a file. UserError if the file is damaged."""
    file = run_dir / ALARMS
    if not file.exists():
        return AlarmRecord()
    return read_typed(file, AlarmRecord, "remove it: alarms begin anew", FILE_BYTES)


class Alarms:
    """The alarms of a run on rank 0; elsewhere it does nothing.

    ``start``: finished updates; ``total``: of the whole training."""

    def __init__(self, run: Run, alarms: Iterable[Alarm], start: int, total: int) -> None:
        self.run, self.alarms, self.total = run, list(alarms), total
        self.record = run.ranks.on_main(lambda: read_alarms(run.dir).until_step(start))

    def check(self, step: int, logs: Mapping[str, float]) -> Logs:
        """Compare the logged values of ``step`` with all ranges. Prints what begins and what is over;
        returns ``alarm/KIND`` as 1 and 0 for these."""
        if not self.run.ranks.is_main:
            return {}
        changes: Logs = {}
        record = self.record
        for alarm in self.alarms:
            if math.isnan(logs.get(alarm.metric, math.nan)):  # neither within the range nor outside
                continue
            record, change = _after(record, alarm, step, logs[alarm.metric], self.total)
            if change is not None:
                changes[f"alarm/{alarm.kind}"] = change
        if record != self.record:
            self.record = record
            write_json(self.run.dir / ALARMS, asdict(record))
        return changes


def _after(
    record: AlarmRecord, alarm: Alarm, step: int, value: float, total: int
) -> tuple[AlarmRecord, float | None]:
    """The record after one value, and 1, 0 or None: raised, over, or no change."""
    lasting = [event for event in record.active if event.kind == alarm.kind]
    if lasting:
        if not alarm.has_recovered(value):
            return record, None
        say(f"alarm over at step {step}: {alarm.kind} ({alarm.metric} {value:.3g})")
        events = [
            replace(event, until=step) if event in lasting else event for event in record.events
        ]
        return replace(record, events=events), 0.0
    if not alarm.is_outside(value):
        if alarm.kind in record.settled:
            return record, None
        return replace(record, settled={**record.settled, alarm.kind: step}), None
    if alarm.kind not in record.settled and step < max(EARLIEST, total / 2):
        return record, None
    reason = f"{alarm.metric} is {value:.3g}, {alarm.range}"
    event = Event(alarm.kind, step, reason, alarm.looks, alarm.remedy)
    for line in alarm_lines(event):
        say(line)
    return replace(record, events=[*record.events, event]), 1.0


def alarm_lines(event: Event) -> list[str]:
    """An alarm in three lines."""
    return [
        f"ALARM {event.kind}, since step {event.step}: {event.reason}",
        f"  looks like  {event.looks}",
        f"  try         {event.remedy}",
    ]


# ------------------------------------------------------------------------------------ the alarms


DISTILLATION = (
    "sample weights=best or an earlier checkpoint; go on from there in a new run with a lower "
    "learning rate, more critic updates (ratio), a larger global batch, or less teacher guidance "
    "(loss.guidance.scale)."
)
TUNING = (
    "look at videos/; if they confirm it, start a new run from an earlier checkpoint with a lower "
    "engine.lr."
)


def video_alarms(reference: Mapping[str, tuple[float, float]], remedy: str) -> list[Alarm]:
    """Alarms on the preview videos.

    ``reference``: the least and the largest of the same statistics (``quick/saturation`` ..) of true
    clips, which the ranges are relative to. Where it lacks one, the bounds are so wide that only an
    empty, glaring, still or noisy video is outside. ``remedy``: what to try.
    """

    def low(metric: str, factor: float, absolute: float) -> float:
        return factor * reference[metric][0] if metric in reference else absolute

    def high(metric: str, factor: float, absolute: float) -> float:
        return factor * reference[metric][1] if metric in reference else absolute

    motion, saturation = "quick/motion", "quick/saturation"
    return [
        Alarm(
            "grey",
            saturation,
            "grey or washed-out frames: the preview videos lose their colours.",
            remedy,
            low=low(saturation, LEAST_SATURATION, 0.02),
        ),
        Alarm(
            "saturated",
            saturation,
            "glaring frames of few colours: the preview videos are over-saturated.",
            remedy,
            high=high(saturation, MOST_SATURATION, 0.9),
        ),
        Alarm(
            "static",
            motion,
            "still pictures: the preview videos hardly move.",
            remedy,
            low=low(motion, LEAST_MOTION, 0.001),
        ),
        Alarm(
            "noise",
            motion,
            "noise, or pictures that jump: the preview videos change too much from frame to frame.",
            remedy,
            high=high(motion, MOST_MOTION, 0.25),
        ),
        Alarm(
            "flicker",
            "quick/flicker",
            "flicker: the preview videos' brightness jumps from frame to frame.",
            remedy,
            high=high("quick/flicker", MOST_FLICKER, 0.08),
        ),
    ]


def clip_statistics_of(checkpoint: Path) -> dict[str, tuple[float, float]]:
    """Least and largest of each statistic over the true clips that a checkpoint was trained on, as
    its provenance has them; empty where it has none. UserError: damaged."""
    if not checkpoint.is_dir():
        return {}
    ranges = read_provenance(checkpoint).get(CLIP_STATISTICS, {})
    kind = dict[str, tuple[float, float]]
    return typed(ranges, kind, checkpoint / PROVENANCE, "use another step, or copy this one again")


def rollout_alarms(std_range: Sequence[float]) -> list[Alarm]:
    """Alarms on the spread of the student's latents. ``std_range``: least and largest ratio to the
    data's."""
    low, high = std_range
    return [
        Alarm(
            "faded",
            "monitor/std_mean",
            "blurred, washed-out or empty frames: the student's latents spread less than the data's.",
            DISTILLATION,
            low=low,
        ),
        Alarm(
            "overdriven",
            "monitor/std_mean",
            "glaring colours, then noise: the student's latents spread more than the data's.",
            DISTILLATION,
            high=high,
        ),
    ]
