"""Run a chain of commands as one resumable job. Finished steps are not run again, and the time left
is shown: one line a step.

A step is finished when its marker under ``<run>/.done`` holds exactly the command it was run with,
and every file that it left is still there. What a step prints goes to ``<run>/logs/<step>.log``.
Steps of one group run at the same time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn

from scd_sf.files import files_below, locked, read_typed, require_own_folder, write_json
from scd_sf.types import UserError, printable

MARKERS = ".done"
AGAIN = "choose another --run"
LIFE_SECONDS = 60.0  # without a terminal: a sign of life of a step this often
COUNT = re.compile(r"\b(\d+)/(\d+)\b")  # how far a step is, in its own words


@dataclass(frozen=True)
class Step:
    """``seconds``: how long it took when last measured, for the time left. ``env``: added to the
    environment. ``outputs``: files and folders that it leaves; when one of their files is
    missing later, the step runs again."""

    name: str
    command: Sequence[str]
    seconds: float
    env: dict[str, str] = field(default_factory=dict)
    outputs: Sequence[Path] = ()

    def files(self) -> list[str]:
        """The present files in ``outputs`` without hidden ones. UserError where one of ``outputs``
        does not exist."""
        for place in self.outputs:
            if not place.exists():
                raise UserError(
                    f"step '{self.name}' ended without {place}; look at its log, and run it again"
                )
        places = [
            path
            for place in self.outputs
            for path in (files_below(place) if place.is_dir() else [place])
        ]
        return [str(path) for path in places if not path.name.startswith(".")]


Group = Sequence[Step]


@contextmanager
def chain(run: Path) -> Iterator[None]:
    """Hold the run directory of a chain. UserError where another chain works in it, or it holds
    other files and no ``.done``."""
    require_own_folder(run, (MARKERS,), AGAIN)
    with locked(run, "this chain"):
        # first, so that the folder of a killed chain is recognised
        (run / MARKERS).mkdir(exist_ok=True)
        try:
            yield
        except UserError:
            with suppress(OSError):  # refused before a step was finished
                (run / MARKERS).rmdir()
            raise


def run_steps(run: Path, groups: Sequence[Group], at_once: int = 8) -> dict[str, float]:
    """Run all groups in order, within :func:`chain`. Returns seconds per step (from its marker if
    it was finished before).

    ``at_once``: at most so many steps of a group run at a time.

    Raises UserError naming the step and its log when a command fails. Finished steps stay
    finished."""
    for folder in ("logs", MARKERS):
        try:
            (run / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{run}: cannot write the run directory ({error}); {AGAIN}") from error
    seconds_by_step: dict[str, float] = {}
    with _Display(run, groups, at_once) as display:
        for group in groups:
            seconds_by_step |= _run_group(run, group, at_once, display)
    return seconds_by_step


class _Display:
    """One line a step: live on a terminal, below those that are done; elsewhere when it is done,
    with a sign of life each minute. No line is cut: on a narrow terminal it says less."""

    def __init__(self, run: Path, groups: Sequence[Group], at_once: int) -> None:
        names = [step.name for group in groups for step in group]
        self.numbers = {name: number for number, name in enumerate(names, 1)}
        self.width = max(map(len, names), default=0)
        self.left = {
            step.name: _group_seconds(group, at_once) / len(group)
            for group in groups
            for step in group
        }
        self.console = Console()
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._lines: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}
        if names:
            about = f"about {_clock(sum(self.left.values()))}"
            self._print(f"{len(names)} steps, {about} in all; what they print: {run}/logs")

    def __enter__(self) -> _Display:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def tick(self, processes: Sequence[_StepProcess]) -> None:
        """Show how far the steps in progress are."""
        for process in processes:
            step, seconds = process.step, process.elapsed
            text = self._progress(process, seconds)
            if step.name not in self._lines:
                self._lines[step.name] = self._live.add_task(text)
            self._live.update(self._lines[step.name], description=text)
            if (
                not self.console.is_terminal
                and seconds - self._said.get(step.name, 0) > LIFE_SECONDS
            ):
                self._said[step.name] = seconds
                self._print(text)

    def done(self, step: Step, result: str) -> None:
        """Say that a step is done, and how long the others will take."""
        if step.name in self._lines:
            self._live.remove_task(self._lines.pop(step.name))
        self.left.pop(step.name, None)
        rest = f", about {_clock(sum(self.left.values()))} to go" if self.left else ""
        self._print(f"{self._head(step)}  {result}{rest}")

    def _head(self, step: Step) -> str:
        count = len(self.numbers)
        return f"[{self.numbers[step.name]:>{len(str(count))}}/{count}] {step.name:<{self.width}}"

    def _progress(self, process: _StepProcess, seconds: float) -> str:
        times = f"{_clock(seconds)} of about {_clock(process.step.seconds)}"
        head, count = self._head(process.step), process.count
        wide = f"{head}  {count:>9}  {times}"
        fits = not self.console.is_terminal or len(wide) < self.console.width
        return printable(wide if fits else f"{process.step.name} {count or _clock(seconds)}")

    def _print(self, text: str) -> None:
        self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)


class _StepProcess:
    """A step in progress: its process, and a thread that copies its output until the process closes
    it."""

    def __init__(self, run: Path, step: Step) -> None:
        self.step = step
        self.log = run / "logs" / f"{step.name}.log"
        self.last_line = "no output"
        self.count = ""  # the last "120/165" of its output
        self.seconds = 0.0
        self._start = time.monotonic()
        try:
            self.process = subprocess.Popen(
                step.command,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **step.env},
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            raise UserError(
                f"step '{step.name}': cannot start '{step.command[0]}' ({error.strerror})"
            ) from error
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._copy, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    @property
    def elapsed(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._start

    def wait(self) -> int:
        """Wait until all output is in the log, and return the exit code."""
        self._reader.join()
        return self.process.wait()

    def _copy(self, stream: IO[str]) -> None:
        """Write every line to the log, and keep the last one."""
        with stream, self.log.open("a", encoding="utf-8") as log:
            for line in stream:
                log.write(line)
                log.flush()
                if line.strip():
                    self.last_line = line.strip()
                    if counts := COUNT.findall(line):
                        self.count = "/".join(counts[0])
        self.seconds = round(time.monotonic() - self._start, 1)


def _group_seconds(group: Group, at_once: int) -> float:
    """Estimated seconds of a group."""
    return max(
        *(step.seconds for step in group),
        sum(step.seconds for step in group) / min(at_once, len(group)),
    )


def _run_group(run: Path, group: Group, at_once: int, display: _Display) -> dict[str, float]:
    seconds_by_step = _finished_before(run, group, display)
    queue = [step for step in group if step.name not in seconds_by_step]
    processes: list[_StepProcess] = []
    failures: list[_StepProcess] = []
    try:
        while processes or (queue and not failures):
            while queue and len(processes) < at_once and not failures:
                processes.append(_StepProcess(run, queue.pop(0)))
            time.sleep(0.1)
            display.tick(processes)
            for item in [item for item in processes if item.process.poll() is not None]:
                processes.remove(item)
                if item.wait() != 0:
                    failures.append(item)
                    continue
                seconds_by_step[item.step.name] = item.seconds
                record = {
                    "command": list(item.step.command),
                    "seconds": item.seconds,
                    "files": item.step.files(),
                }
                write_json(_marker(run, item.step), record)
                display.done(item.step, f"done in {_clock(item.seconds)}")
    except BaseException:
        for item in processes:
            item.process.terminate()
        for item in processes:  # a training saves before it goes
            item.process.wait()
        raise
    for item in failures:
        raise UserError(
            f"step '{item.step.name}' failed (exit {item.process.returncode}): {item.last_line} - see {item.log}; "
            "run the same command again to go on from here"
        )
    return seconds_by_step


def _finished_before(run: Path, group: Group, display: _Display) -> dict[str, float]:
    """Seconds of the steps that need not run; they are said."""
    seconds_by_step = {
        step.name: seconds for step in group if (seconds := finished_seconds(run, step)) is not None
    }
    for step in group:
        if step.name in seconds_by_step:
            display.done(step, "finished before")
    return seconds_by_step


def _marker(run: Path, step: Step) -> Path:
    return run / MARKERS / f"{step.name}.json"


@dataclass(frozen=True)
class _Marker:
    """Record of a finished step under ``.done``."""

    command: list[str]
    seconds: float
    files: list[str] = field(default_factory=list)


def finished_seconds(run: Path, step: Step) -> float | None:
    """Seconds that the step took when this very command finished. None where it has to run, because
    it never finished, its marker is damaged, or one of its files is missing."""
    try:
        marker = read_typed(_marker(run, step), _Marker, "")
    except UserError:
        return None
    files_exist = all(os.path.exists(file) for file in [*map(str, step.outputs), *marker.files])
    return marker.seconds if marker.command == list(step.command) and files_exist else None


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def python_command(script: str, *arguments: str) -> list[str]:
    """A command that runs a script of this repository with the current interpreter."""
    return [sys.executable, script, *arguments]
