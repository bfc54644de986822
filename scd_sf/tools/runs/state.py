"""The state of a run directory: its progress, speed and checkpoints, and whether a process still
works on it.

Read here: ``config.yaml``, ``metrics.jsonl``, ``skipped.jsonl``, ``alarms.json``, ``checkpoints/``, and for each
rank ``heartbeat/rank_00000.json`` ({"time": unix seconds, "step": n, "pid": p, "host": h});
``status.json`` says why a run ended early, until it has gone on (train/stop.py writes both).
Nothing is written, and nothing missing or damaged is an error except a path that is no run at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from scd_sf.checkpoint import Checkpoints, read_provenance, sizes_agree
from scd_sf.config import plain_yaml
from scd_sf.files import read_typed
from scd_sf.tools.runs.curve import METRICS, Curve, read_curve, read_tail
from scd_sf.train.alarms import Event, read_alarms
from scd_sf.train.stop import Beat
from scd_sf.types import UserError

State = Literal["finished", "running", "stale", "stopped"]
# a rank whose heartbeat is older, or a run without heartbeats whose last line is
SILENT_SECONDS = 120.0
# a run whose ranks live but whose last line is older: a validation or a save is shorter
STUCK_SECONDS = 600.0
SMALL = 2**20  # bytes of the JSON files that a job rewrites
RANK = re.compile(r"[0-9]{1,9}")
DEPTH = 4  # folders below ROOT in which `scd runs ls` looks


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of one rank, ``age`` seconds ago. A rank whose training stands still
    sends it, too."""

    rank: int
    age: float
    step: int
    host: str
    pid: int


@dataclass(frozen=True)
class Status:
    """``status.json``; ``time`` in unix seconds."""

    state: str = ""
    reason: str = "no reason given"
    time: float = 0.0


@dataclass(frozen=True)
class SavedStep:
    """One checkpoint; ``intact``: every file of its manifest is there with its size (contents are
    not hashed)."""

    step: int
    intact: bool


@dataclass(frozen=True)
class RunView:
    """The contents of a run's files. ``age``: seconds since the last line of its metrics, None
    before the first.

    ``reason`` explains ``state``: why it stopped, which rank is in ``silent_ranks`` (of its last
    job; the longest silent first)."""

    path: Path
    config: Mapping[str, object]
    curve: Curve
    checkpoints: list[SavedStep]
    origin: Mapping[str, object]
    skipped_steps: list[int]
    heartbeats: list[Heartbeat]
    silent_ranks: list[Heartbeat]
    age: float | None
    state: State
    reason: str
    alarms: list[Event]

    @property
    def total(self) -> int | None:
        """The configured number of steps."""
        steps = section(self.config, "train").get("steps")
        return steps if type(steps) is int else None

    @property
    def stage(self) -> str:
        """The recipe's stage; known from the first checkpoint on, until then ``-``."""
        return str(self.origin.get("stage", "-"))


def is_run(path: Path) -> bool:
    """Whether a recipe has used this directory: it has metrics, or a config and checkpoints."""
    # os.path, because Path.is_file raises for a folder that may not be read
    config, checkpoints = path / "config.yaml", path / "checkpoints"
    return os.path.isfile(path / METRICS) or (os.path.isfile(config) and os.path.isdir(checkpoints))


def find_runs(root: Path) -> list[Path]:
    """Run directories at or below ``root``, by name; links to folders are not followed. UserError:
    no such folder."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds your runs")
    runs: list[Path] = []
    for folder, children, _ in os.walk(root):
        path = Path(folder)
        if is_run(path):
            runs.append(path)
        if is_run(path) or len(path.relative_to(root).parts) >= DEPTH:
            children.clear()
    return sorted(runs)


def read_run(path: Path, now: float, stale_after: float | None = None) -> RunView:
    """The state of a run at ``now`` (unix seconds). Of its curve only the end is read.

    ``stale_after``: seconds of silence that count as stale. Defaults: for a rank SILENT_SECONDS, at
    least 3 heartbeats; for the metrics 10 steps, at least STUCK_SECONDS (without heartbeats
    SILENT_SECONDS). UserError: no run directory.
    """
    if not is_run(path):
        raise UserError(
            f"{path}: no run directory (no {METRICS}, no config.yaml with checkpoints); see 'scd runs ls'"
        )
    curve = read_tail(path / METRICS)
    config = _config(path)
    status = _status(path)
    store = Checkpoints(path / "checkpoints")
    folders = {step: store.path(step) for step in store.steps()}
    checkpoints = [SavedStep(step, sizes_agree(folder)) for step, folder in folders.items()]
    start = status.time if status.state == "running" else None
    heartbeats = _heartbeats(path, now, start or 0.0)
    last_time = curve.times.get(curve.last)
    age = None if last_time is None else max(0.0, now - last_time)
    view = RunView(
        path=path,
        config=config,
        curve=curve,
        checkpoints=checkpoints,
        origin=_origin(folders),
        skipped_steps=_skipped_steps(path),
        heartbeats=heartbeats,
        silent_ranks=[],
        age=age,
        state="running",
        reason="",
        alarms=_alarms(path),
    )
    # The last line alone does not finish a run, which may be killed while it saves.
    if view.total is not None and any(
        checkpoint.intact and checkpoint.step >= view.total for checkpoint in checkpoints
    ):
        return replace(view, state="finished")
    if status.state in ("interrupted", "failed") and status.time >= (last_time or 0.0):
        return replace(view, state="stopped", reason=f"{status.state}: {status.reason}")
    interval = section(config, "run").get("heartbeat_seconds")
    patience = stale_after or max(
        SILENT_SECONDS, 3 * interval if isinstance(interval, float | int) else 0.0
    )
    silent_ranks = sorted(
        (beat for beat in heartbeats if beat.age > patience), key=lambda beat: -beat.age
    )
    moments = [moment for moment in (last_time, start) if moment is not None]
    stuck = stale_after or max(
        STUCK_SECONDS if heartbeats else SILENT_SECONDS, 10 * (curve.seconds_per_step() or 0.0)
    )
    reason = _trouble(
        heartbeats, silent_ranks, max(0.0, now - max(moments)) if moments else None, stuck
    )
    return replace(
        view, silent_ranks=silent_ranks, state="stale" if reason else "running", reason=reason
    )


def _trouble(
    heartbeats: list[Heartbeat],
    silent_ranks: list[Heartbeat],
    standstill: float | None,
    stuck: float,
) -> str:
    """The reason why an unfinished run counts as stale; empty when it does not."""
    if silent_ranks and len(silent_ranks) < len(heartbeats):
        beat = silent_ranks[0]
        return f"rank {beat.rank} on {beat.host} silent for {describe_age(beat.age)} (step {beat.step})"
    if silent_ranks:
        return f"no sign of life for {describe_age(min(beat.age for beat in silent_ranks))}"
    if standstill is None:
        return "" if heartbeats else "no sign of life"
    if standstill > stuck:
        return f"{'ranks live, but no step' if heartbeats else 'no sign of life'} for {describe_age(standstill)}"
    return ""


def describe_age(seconds: float) -> str:
    """``8 s``, ``5 min``, ``3.2 h``, ``4.0 days``: one number, as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def section(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    """A part of a config; empty where there is none."""
    part = config.get(name)
    return part if isinstance(part, Mapping) else {}


def _config(path: Path) -> Mapping[str, object]:
    try:
        return plain_yaml(path / "config.yaml")
    except (UserError, OSError):
        return {}


def _origin(folders: Mapping[int, Path]) -> Mapping[str, object]:
    """Provenance of the newest checkpoint that has a readable one."""
    for folder in reversed(list(folders.values())):
        with suppress(UserError):
            return read_provenance(folder)
    return {}


def _skipped_steps(path: Path) -> list[int]:
    """Steps whose update was skipped; a step that was run again after a resume counts once."""
    try:
        return list(read_curve(path / "skipped.jsonl").steps)
    except UserError:
        return []


def _alarms(path: Path) -> list[Event]:
    """The alarms that last."""
    try:
        return read_alarms(path).active
    except UserError:
        return []


def _heartbeats(path: Path, now: float, start: float) -> list[Heartbeat]:
    """Ranks of the job that began at ``start`` (unix seconds). Files of an earlier job with more
    ranks are left out."""
    beats = []
    for file in sorted((path / "heartbeat").glob("rank_*.json")):
        number = file.stem.removeprefix("rank_")
        try:
            beat = read_typed(file, Beat, "", SMALL)
        except UserError:
            continue
        if RANK.fullmatch(number) and beat.time >= start - SILENT_SECONDS:
            beats.append(
                Heartbeat(int(number), max(0.0, now - beat.time), beat.step, beat.host, beat.pid)
            )
    return beats


def _status(path: Path) -> Status:
    try:
        return read_typed(path / "status.json", Status, "", SMALL)
    except UserError:
        return Status()
