"""One run directory as it stands: how far, how fast, which checkpoints, and whether somebody is still at work on it.

Read here: ``config.yaml``, ``metrics.jsonl``, ``skipped.jsonl``, ``checkpoints/``, and for each rank
``heartbeat/rank_00000.json`` ({"time": unix seconds, "step": n, "pid": p, "host": h}); ``status.json`` says why a run
ended early, until it has gone on (train/control.py writes both).
Nothing is written, and nothing missing or damaged is an error except a path that is no run at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scd_sf.checkpoint import Checkpoints, read_provenance, sizes_agree
from scd_sf.config import plain_yaml
from scd_sf.monitor.curve import METRICS, Curve, read_tail
from scd_sf.types import UserError

State = Literal["finished", "running", "stale", "stopped"]
MINIMUM_STALE_SECONDS = 120.0
DEPTH = 4  # folders below ROOT in which `scd runs ls` looks


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of one rank; ``age`` in seconds."""

    rank: int
    age: float
    step: int
    host: str
    pid: int


@dataclass(frozen=True)
class Saved:
    """One checkpoint; ``intact``: every file of its manifest is there with its size (contents are not hashed)."""

    step: int
    path: Path
    intact: bool


@dataclass(frozen=True)
class RunView:
    """What the files of a run say. ``age``: seconds since its last sign of life (None: no sign at all).

    ``reason`` explains ``state``: why it stopped, which rank is silent (for more than ``limit`` seconds).
    """

    path: Path
    config: Mapping[str, object]
    curve: Curve
    checkpoints: list[Saved]
    origin: Mapping[str, object]
    skipped: list[int]
    heartbeats: list[Heartbeat]
    age: float | None
    limit: float
    state: State
    reason: str

    @property
    def total(self) -> int | None:
        """The configured number of steps."""
        return _total(self.config)

    @property
    def stage(self) -> str:
        """The recipe's stage; known from the first checkpoint on, until then ``-``."""
        return str(self.origin.get("stage", "-"))


def is_run(path: Path) -> bool:
    """Whether a recipe has used this directory: it has metrics, or a config and checkpoints."""
    return (path / METRICS).is_file() or ((path / "config.yaml").is_file() and (path / "checkpoints").is_dir())


def find_runs(root: Path) -> list[Path]:
    """Run directories at or below ``root``, by name; links to folders are not followed. UserError: no such folder."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds your runs")
    found: list[Path] = []
    for folder, children, _ in os.walk(root):
        here = Path(folder)
        if is_run(here):
            found.append(here)
            children.clear()
        elif len(here.relative_to(root).parts) >= DEPTH:
            children.clear()
    return sorted(found)


def read_run(path: Path, now: float, curve: Curve | None = None, stale_after: float | None = None) -> RunView:
    """Look at a run; ``now`` in unix seconds. ``curve``: already read, else only its end is.

    ``stale_after``: seconds without a sign of life (default: 10 steps of this run, at least 2 minutes).
    Raises UserError when ``path`` is no run directory.
    """
    if not is_run(path):
        raise UserError(f"{path}: no run directory (no {METRICS}, no config.yaml with checkpoints); see 'scd runs ls'")
    curve = read_tail(path / METRICS) if curve is None else curve
    config = _config(path)
    checkpoints = [Saved(step, p, sizes_agree(p)) for step, p in _steps(path)]
    heartbeats = _heartbeats(path, now)
    moments = [now - curve.times[curve.last]] if curve.last in curve.times else []
    ages = [max(0.0, age) for age in (*moments, *(beat.age for beat in heartbeats))]
    limit = stale_after or max(MINIMUM_STALE_SECONDS, 10 * (curve.seconds_per_step() or 0.0))
    age = min(ages, default=None)
    state, reason = _state(path, config, curve, checkpoints, heartbeats, age, limit)
    origin = _origin(checkpoints)
    skipped = _skipped(path)
    return RunView(path, config, curve, checkpoints, origin, skipped, heartbeats, age, limit, state, reason)


def stale_ranks(heartbeats: list[Heartbeat], limit: float) -> list[Heartbeat]:
    """Ranks without a sign of life for more than ``limit`` seconds, the longest silent first."""
    return sorted((beat for beat in heartbeats if beat.age > limit), key=lambda beat: -beat.age)


def _state(
    path: Path,
    config: Mapping[str, object],
    curve: Curve,
    checkpoints: list[Saved],
    heartbeats: list[Heartbeat],
    age: float | None,
    limit: float,
) -> tuple[State, str]:
    """Finished needs the last checkpoint, not only the last line: a run killed while saving it is not done."""
    total = _total(config)
    if total is not None and any(saved.intact and saved.step >= total for saved in checkpoints):
        return "finished", ""
    status = _json(path / "status.json")
    at, last = status.get("time"), curve.times.get(curve.last, 0.0)
    if status.get("state") in ("interrupted", "failed") and isinstance(at, float | int) and at >= last:
        return "stopped", str(status.get("reason", "no reason given"))
    if age is None or age > limit:
        return "stale", "no sign of life" if age is None else f"no sign of life for {describe_age(age)}"
    if silent := stale_ranks(heartbeats, limit):
        beat = silent[0]
        return "stale", f"rank {beat.rank} on {beat.host} silent for {describe_age(beat.age)} (step {beat.step})"
    return "running", ""


def describe_age(seconds: float) -> str:
    """``8 s``, ``5 min``, ``3.2 h``, ``4.0 days``: one number, as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def _total(config: Mapping[str, object]) -> int | None:
    train = config.get("train")
    steps = train.get("steps") if isinstance(train, Mapping) else None
    return steps if type(steps) is int else None


def _config(path: Path) -> Mapping[str, object]:
    try:
        return plain_yaml(path / "config.yaml")
    except (UserError, OSError):
        return {}


def _steps(path: Path) -> list[tuple[int, Path]]:
    checkpoints = Checkpoints(path / "checkpoints")
    return [(step, checkpoints.path(step)) for step in checkpoints.steps()]


def _origin(checkpoints: list[Saved]) -> Mapping[str, object]:
    """Provenance of the newest checkpoint that has a readable one."""
    for saved in reversed(checkpoints):
        try:
            return read_provenance(saved.path)
        except UserError:
            continue
    return {}


def _skipped(path: Path) -> list[int]:
    """Steps whose update was skipped; a step that was run again after a resume counts once."""
    try:
        lines = (path / "skipped.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    steps = set()
    for line in lines:
        try:
            steps.add(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return sorted(steps)


def _heartbeats(path: Path, now: float) -> list[Heartbeat]:
    found = []
    for file in sorted((path / "heartbeat").glob("rank_*.json")):
        beat = _json(file)
        moment, number = beat.get("time"), file.stem.removeprefix("rank_")
        if not isinstance(moment, float | int) or not number.isdigit():
            continue
        step, pid = (value if isinstance(value, int) else 0 for value in (beat.get("step"), beat.get("pid")))
        found.append(Heartbeat(int(number), max(0.0, now - moment), step, str(beat.get("host", "?")), pid))
    return found


def _json(file: Path) -> dict[str, object]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
