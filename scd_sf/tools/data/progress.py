"""How far a long job is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scd_sf.types import say

SECONDS_PER_LINE = 20.0  # without a terminal


@contextmanager
def progress_of(what: str, total: int, start: int) -> Iterator[Callable[[int], None]]:
    """A function to be told how many are done: a bar on a terminal, else a line now and then, both with time left."""
    if Console(stderr=True).is_terminal:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, completed=start)
            yield lambda done: bar.update(task, completed=done)
        return
    began = last = time.monotonic()

    def line(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_PER_LINE or done == total:
            left = (now - began) / max(1, done - start) * (total - done)
            say(f"{what} {done}/{total}, {left:.0f} s left")
            last = now

    yield line
