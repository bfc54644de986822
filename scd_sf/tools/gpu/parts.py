"""A measurement in parts, kept in one JSON document: resumable, each part in processes of its own,
within its budget.

A part is a list of rows. A row that was measured is not measured again; one that failed, or was
left out because the budget was spent, is tried by the next call. A row that kills its process
(memory, a fault of the GPU) is recorded with the last lines of its output, and a new process goes
on with the next row. Only one process writes the document at a time: the part's while it runs, the
caller's otherwise.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from scd_sf.files import read_json, typed, write_json
from scd_sf.types import UserError, printable, say

SCHEMA = 1
AGAIN = 75  # the exit code of a process that leaves the next rows to a fresh one
LINES = 15  # of its output that are kept of a row that failed
Figures = dict[str, Any]
# of a machine: what one document's figures share
SAME = ("device", "memory_gib", "driver", "cuda", "toy", "versions")


class _PartOnDisk(TypedDict):
    title: str
    budget_seconds: float
    seconds: float
    rows: dict[str, dict[str, Any]]
    left_out: list[str]


class _Document(TypedDict):
    machine: dict[str, Any] | None
    parts: dict[str, _PartOnDisk]


@dataclass(frozen=True)
class GpuRow:
    """``measure`` returns JSON values; ``lines`` among them are the row's lines in the table, by
    column."""

    name: str
    measure: Callable[[], Figures]


@dataclass(frozen=True)
class Part:
    """``seconds``: the budget, after which no further row begins; ``grace`` seconds later a row
    that still runs is stopped. ``rows`` is called in the part's own process."""

    number: int
    title: str
    seconds: float
    rows: Callable[[], Sequence[GpuRow]]
    grace: float = 180.0


@dataclass(frozen=True)
class GpuRecord:
    """The document at ``path``."""

    path: Path

    def read(self) -> Figures:
        """The whole document; an empty one where there is none yet. UserError: it is another kind
        of file."""
        if not self.path.exists():
            return {"schema": SCHEMA, "machine": None, "parts": {}}
        remedy = "name another file with --out"
        document = read_json(self.path, remedy)
        if document.get("schema") != SCHEMA:
            raise UserError(f"{self.path}: not a document of this script; {remedy}")
        typed(document, _Document, self.path, remedy)
        return document

    def on(self, machine: Figures) -> None:
        """Store the machine. UserError where the stored rows are of another machine or of other
        versions."""
        document = self.read()
        recorded_machine = document["machine"]
        changed_names = [
            name
            for name in SAME
            if recorded_machine is not None and recorded_machine.get(name) != machine.get(name)
        ]
        if (
            recorded_machine is not None
            and changed_names
            and any(part["rows"] for part in document["parts"].values())
        ):
            name = changed_names[0]
            raise UserError(
                f"{self.path}: holds figures of {name} '{recorded_machine.get(name)}', this is '{machine.get(name)}'; "
                "name another file with --out"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, document | {"machine": machine})

    def part(self, part: Part) -> Figures:
        """The stored contents of a part, or an empty part."""
        content: Figures = self.read()["parts"].get(str(part.number), self.blank(part))
        return content

    @staticmethod
    def blank(part: Part) -> Figures:
        """The contents of a part without any measurement."""
        about = {"title": part.title, "budget_seconds": part.seconds, "seconds": 0.0}
        return about | {"rows": {}, "left_out": [], "running": None, "error": None}

    def put(self, part: Part, values: Mapping[str, object]) -> None:
        """Replace fields of a part."""
        document = self.read()
        document["parts"][str(part.number)] = {**self.part(part), **values}
        document["parts"] = dict(sorted(document["parts"].items()))
        write_json(self.path, document)

    def finish(self, part: Part, name: str, figures: Figures) -> None:
        """Store the figures of a row that is done or failed."""
        self.put(part, {"rows": self.part(part)["rows"] | {name: figures}, "running": None})

    def begin_again(self, part: Part, everything: bool, only: str = "") -> None:
        """Remove the rows that are to be measured again: those that failed or were left out, or
        with ``everything`` all, if their names contain ``only``."""
        content = self.part(part)
        rows = {
            name: row
            for name, row in content["rows"].items()
            if only not in name or not (everything or "error" in row)
        }
        left_out = [name for name in content["left_out"] if only not in name]
        seconds = content["seconds"] if rows else 0.0
        self.put(part, self.blank(part) | {"rows": rows, "left_out": left_out, "seconds": seconds})


def measure_rows(
    part: Part, record: GpuRecord, stamp: Figures, seconds: float, only: str = ""
) -> int:
    """Measure the missing rows of a part in its own process, for ``seconds``. ``stamp``: fields
    added to every row; ``only``: part of the rows' names. Returns the process's exit code."""
    start = time.monotonic()
    rows = part.rows()
    content = record.part(part)
    names = [row.name for row in rows]
    # without rows that the part no longer has
    results = {name: row for name, row in content["rows"].items() if name in names}
    skipped_names = [name for name in content["left_out"] if name in names and only not in name]
    record.put(part, {"rows": results})
    for row in rows:
        if row.name in results or only not in row.name:
            continue
        if time.monotonic() - start >= seconds:
            skipped_names.append(row.name)
            continue
        record.put(part, {"running": row.name})
        say(f"{row.name} ..")
        row_start, fatal = time.monotonic(), False
        try:
            figures = whole(row.measure())
        except Exception as error:  # noqa: BLE001
            figures, fatal = failure(error), spoils_the_process(error)
        row_seconds = round(time.monotonic() - row_start, 2)
        record.finish(part, row.name, figures | {"row_seconds": row_seconds} | stamp)
        say(f"{row.name}: {figures.get('error', 'measured')} ({row_seconds:.1f} s)")
        if fatal:
            return AGAIN
    record.put(part, {"left_out": skipped_names})
    return 0


def whole(figures: Figures) -> Figures:
    """A row's figures as JSON can hold them, with None for numbers that are not finite. An error is
    added for such numbers, and for a row without lines."""
    bad: list[str] = []

    def finite(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(part, str(key)) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [finite(part, name) for part in value]
        if isinstance(value, float) and not math.isfinite(value):
            bad.append(name)
            return None
        return value

    figures = finite(figures, "")
    words = "" if figures.get("lines") else "nothing was measured"
    if bad:
        words = f"not finite: {', '.join(bad)}"
    return failed(words) | figures if words else figures


def failed(words: str, last_lines: Iterable[str] = ()) -> Figures:
    """Fields of a row that failed or is beyond a limit."""
    return {"error": words, "last_lines": list(last_lines)}


def failure(error: Exception) -> Figures:
    """Fields of a row that raised: the error and the last lines of its traceback, which a UserError
    does not need."""
    words = printable(" ".join(str(error).split()))[:600] or type(error).__name__
    if isinstance(error, UserError):
        return failed(words)
    lines = [printable(line) for line in traceback.format_exc().splitlines()[-LINES:]]
    return failed(f"{type(error).__name__}: {words}", lines)


def spoils_the_process(error: Exception) -> bool:
    """Whether later rows would suffer: memory that is not given back, a CUDA context that is
    lost."""
    words = re.search("cuda|cudnn|cublas|nccl", str(error), re.IGNORECASE)
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and words is not None
    )


def run_child(command: Sequence[str], limit: float) -> tuple[int, Figures]:
    """Run a process of a part and pass on its output. Returns its exit code, and the fields of a
    row that it did not survive. After ``limit`` seconds it is killed with all its children."""
    lines, timeout_event = deque[str](maxlen=LINES), threading.Event()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def stop() -> None:
        with suppress(ProcessLookupError):  # it ended just now
            os.killpg(process.pid, signal.SIGKILL)
            timeout_event.set()

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                lines.append(printable(line.rstrip("\n")))
                say(f"  {line.rstrip()}")
        code = process.wait()
    finally:
        timer.cancel()
        timer.join()
        assert process.stdin is not None
        process.stdin.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if timeout_event.is_set():
        return code, failed(f"stopped after {limit:.0f} s", lines)
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"exit code {code}"
    return code, failed(f"its process ended: {name}", lines)


def run_part(
    part: Part, record: GpuRecord, command: Sequence[str], everything: bool = False, only: str = ""
) -> None:
    """Run processes of a part, ``command`` and the remaining seconds each, until all its rows are
    done, failed or left out. ``everything``, ``only``: see :meth:`GpuRecord.begin_again`."""
    record.begin_again(part, everything, only)
    start = time.monotonic()
    while True:
        elapsed = time.monotonic() - start
        seconds_left = max(0.0, part.seconds - elapsed)
        code, figures = run_child([*command, f"{seconds_left:.1f}"], seconds_left + part.grace)
        row = record.part(part).get("running")
        if row is not None:
            record.finish(part, row, figures)
        elif code not in (0, AGAIN):
            record.put(part, figures)
        if row is None and code != AGAIN:
            break
    earlier_seconds = record.part(part)["seconds"]
    record.put(part, {"seconds": round(earlier_seconds + time.monotonic() - start, 1)})


def end_with_the_caller() -> None:
    """Let a part's process be killed with all its children when its caller ends. The caller holds
    the other end of stdin and writes nothing."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
