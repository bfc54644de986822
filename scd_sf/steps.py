"""Run a chain of commands as one resumable job: what is finished is not run again, and the time left is shown.

A step is finished when its marker under ``<run>/.done`` holds exactly the command it was run with. Every step's output
goes to ``<run>/logs/<step>.log``. Steps of one group run at the same time. Used by recipes/demo.py and make_teacher.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scd_sf.types import UserError

QUIET_SECONDS = 15.0  # without a terminal: at most one line per step in this time


@dataclass(frozen=True)
class Step:
    """``seconds``: how long it took when last measured, for the time left. ``env``: added to the environment."""

    name: str
    command: Sequence[str]
    seconds: float
    env: dict[str, str] = field(default_factory=dict)


Group = Sequence[Step]


def run_steps(run: Path, groups: Sequence[Group]) -> dict[str, float]:
    """Run all groups in order; returns seconds per step (from its marker if it was finished before).

    Raises UserError naming the step and its log when a command fails; what it had done is kept.
    """
    for folder in ("logs", ".done"):
        try:
            (run / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{run}: cannot write the run directory ({error}); choose another --run") from error
    total = sum(max(step.seconds for step in group) for group in groups)
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    taken: dict[str, float] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total)
        before = 0.0
        for number, group in enumerate(groups, 1):
            expected = max(step.seconds for step in group)
            title = f"{number}/{len(groups)} {', '.join(step.name for step in group)}"
            bar.update(task, description=escape(title), completed=before)
            _say(console, f"[{title}] about {_clock(expected)}, then about {_clock(total - before - expected)} more")
            taken |= _run_group(
                run,
                group,
                console,
                lambda done, base=before, most=expected: bar.update(
                    task, completed=base + min(done, most)
                ),
            )
            before += expected
        bar.update(task, completed=total)
    return taken


def _run_group(run: Path, group: Group, console: Console, tick: object) -> dict[str, float]:
    waiting = [step for step in group if _finished(run, step) is None]
    taken = {step.name: seconds for step in group if (seconds := _finished(run, step)) is not None}
    for name in taken:
        _say(console, f"  {name}: finished before")
    started = time.monotonic()
    running = [_start(run, step, console) for step in waiting]
    try:
        while any(child.poll() is None for child, _ in running):
            time.sleep(0.2)
            tick(time.monotonic() - started)  # type: ignore[operator]
    except BaseException:
        for child, _ in running:
            child.terminate()
        raise
    for step, (child, reader) in zip(waiting, running, strict=True):
        reader.join()
        if child.returncode != 0:
            log = run / "logs" / f"{step.name}.log"
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise UserError(
                f"step '{step.name}' failed (exit {child.returncode}): {last[0]} - see {log}; "
                "run the same command again to go on from here"
            )
        taken[step.name] = round(time.monotonic() - started, 1)
        _marker(run, step).write_text(json.dumps({"command": list(step.command), "seconds": taken[step.name]}))
    return taken


def _start(run: Path, step: Step, console: Console) -> tuple[subprocess.Popen[str], threading.Thread]:
    child = subprocess.Popen(
        step.command,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **step.env},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert child.stdout is not None
    reader = threading.Thread(target=_forward, args=(run, step, child.stdout, console), daemon=True)
    reader.start()
    return child, reader


def _forward(run: Path, step: Step, stream: IO[str], console: Console) -> None:
    """Every line to the log; to the screen one line now and then."""
    shown = 0.0
    with (run / "logs" / f"{step.name}.log").open("a", encoding="utf-8") as log:
        for line in stream:
            log.write(line)
            log.flush()
            if line.strip() and time.monotonic() - shown > QUIET_SECONDS:
                shown = time.monotonic()
                _say(console, f"  {step.name}: {line.rstrip()[:160]}")


def _marker(run: Path, step: Step) -> Path:
    return run / ".done" / f"{step.name}.json"


def _finished(run: Path, step: Step) -> float | None:
    file = _marker(run, step)
    if not file.is_file():
        return None
    saved = json.loads(file.read_text())
    return float(saved["seconds"]) if saved["command"] == list(step.command) else None


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def python(script: str, *arguments: str) -> list[str]:
    """A command that runs a script of this repository with the current interpreter."""
    return [sys.executable, script, *arguments]
