"""Requests to a running job from people, schedulers and watchdogs, and the job's heartbeat.

    touch RUN/save               save after the current step and go on
    touch RUN/stop, or TERM, USR1, INT to any rank
                                 finish the step, save, leave with exit code 75: "run me again"
    kill -USR2 PID               append that process's stacks to RUN/heartbeat/rank_NNNNN.stacks

A request is an empty regular file, as ``touch`` makes it; anything else of that name is somebody's
and stays. Rank 0 alone looks at the files, and all ranks agree after each step, so none leaves
alone. Every rank rewrites ``RUN/heartbeat/rank_NNNNN.json`` (time, step, pid, host) from a thread:
a time that stands still means a process that is gone or frozen, a step that stands still one that
is stuck. ``RUN/status.json`` says how the job stands or ended.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from scd_sf.distributed import Ranks
from scd_sf.files import process_lives, read_typed, write_json
from scd_sf.types import UserError

EXIT_AGAIN = 75
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_log = logging.getLogger(__name__)


class Request(IntEnum):
    """A request to a job. Of several, the largest counts."""

    NONE = 0
    SAVE = 1
    STOP = 2


@dataclass(frozen=True)
class Beat:
    """One rank's last sign of life; ``time`` in unix seconds."""

    time: float
    step: int
    pid: int
    host: str


class Control:
    """Listens to requests and writes the heartbeat, on every rank. Call ``beat`` and ``request``
    once per step."""

    def __init__(self, directory: Path, ranks: Ranks, interval: float = 10.0) -> None:
        self.dir, self.ranks, self.interval = directory, ranks, interval
        self.reason = ""
        self._step, self._old_handlers = 0, dict[signal.Signals, Any]()
        self._stacks: TextIO | None = None
        self._seen_files = {"save", "stop"}  # requests that ``fulfilled`` removes
        self._closed = threading.Event()
        self._pulse = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def start(self, step: int, total: int) -> None:
        """Start to listen and to beat. A request file of an earlier job is removed."""
        (self.dir / "heartbeat").mkdir(parents=True, exist_ok=True)
        self.fulfilled()
        self.total = total
        for number in _STOP_SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._handle_signal)
        self._stacks = self._file("stacks").open("a", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, self._stacks)
        self.beat(step)
        self.say("running")
        self._pulse.start()

    def beat(self, step: int) -> None:
        """Record that this rank begins ``step``."""
        self._step = step
        record = {
            "time": round(time.time(), 3),
            "step": step,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        write_json(self._file("json"), record, durable=False)

    def say(self, state: str, reason: str = "") -> None:
        """Write ``status.json`` on rank 0. ``state`` is running, finished, interrupted (run it
        again) or failed."""
        if self.ranks.is_main:
            record = {
                "state": state,
                "reason": reason,
                "step": self._step,
                "total": self.total,
                "time": time.time(),
            }
            write_json(self.dir / "status.json", record, durable=False)

    def request(self) -> Request:
        """The largest request to any rank since the last call, the same on all ranks. All ranks
        call it."""
        request = Request.STOP if self.reason else Request.NONE
        if self.ranks.is_main:
            for name, meaning in (("save", Request.SAVE), ("stop", Request.STOP)):
                if _is_request(self.dir / name):
                    self._seen_files.add(name)
                    request = max(request, meaning)
                    self.reason = self.reason or (
                        f"{self.dir / name}" if meaning is Request.STOP else ""
                    )
        return Request(self.ranks.max(request))

    def fulfilled(self) -> None:
        """Remove the request files that ``request`` has seen (rank 0). Call it when the request has
        been carried out. A file that came in the meantime stays for the next step."""
        if self.ranks.is_main:
            for name in self._seen_files:
                if _is_request(self.dir / name):
                    (self.dir / name).unlink(missing_ok=True)
        self._seen_files.clear()

    def blame(self, error: BaseException, patience: float = 5.0) -> UserError | None:
        """An error that names the ranks whose processes are gone; None when all are alive and
        ``error`` has another cause.

        On this host a rank is gone when its process is; elsewhere, when its heartbeat is three
        intervals old. The others learn of a death by a broken connection, a moment before it shows
        here: look for ``patience`` seconds.
        """
        if self.ranks.world == 1:
            return None
        deadline = time.monotonic() + patience
        while not (missing_ranks := self._missing_ranks()) and time.monotonic() < deadline:
            time.sleep(0.2)
        if not missing_ranks:
            return None
        first = str(error).strip().splitlines()[:1]
        return UserError(
            f"{'; '.join(missing_ranks)}: the job cannot go on without it ({type(error).__name__}: {''.join(first)}); "
            "look at that process's own output, then run the same command again to resume"
        )

    def close(self) -> None:
        """Stop listening and beating, and restore the earlier signal handlers."""
        self._closed.set()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers.clear()
        if self._stacks is not None:
            faulthandler.unregister(signal.SIGUSR2)
            self._stacks.close()
            self._stacks = None

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        """A first signal is a request; a second Ctrl-C ends the process at once."""
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def _beat_on(self) -> None:
        while not self._closed.wait(self.interval):
            try:
                self.beat(self._step)
            except OSError as error:  # a full or absent disk must not end the training
                _log.warning("heartbeat: %s", error)

    def _missing_ranks(self) -> list[str]:
        hostname, now, descriptions = socket.gethostname(), time.time(), []
        for rank in range(self.ranks.world):
            try:
                beat = read_typed(self._file("json", rank), Beat, "remove it")
            except UserError:
                continue
            age = now - beat.time
            alive = process_lives(beat.pid) if beat.host == hostname else age < 3 * self.interval
            if not alive:
                descriptions.append(
                    f"rank {rank} (process {beat.pid} on {beat.host}) is gone, last seen at step {beat.step}, "
                    f"{age:.0f} s ago"
                )
        return descriptions

    def _file(self, suffix: str, rank: int | None = None) -> Path:
        return (
            self.dir
            / "heartbeat"
            / f"rank_{self.ranks.rank if rank is None else rank:05d}.{suffix}"
        )


def leave(code: int) -> NoReturn:
    """End this process now with this exit code: interpreters that unload gloo's threads sometimes
    abort instead."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_request(path: Path) -> bool:
    """Whether a path is a file as ``touch`` makes it."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == 0
