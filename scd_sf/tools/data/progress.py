"""How far a long job is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from scd_sf.types import say

SECONDS_PER_LINE = 20.0  # without a terminal


@contextmanager
def progress_of(
    what: str, total: int | None = None, start: int = 0
) -> Iterator[Callable[[int], None]]:
    """A function that takes how many are done: a bar on a terminal, else a line now and then.

    Both say the time left where ``total`` is known.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total, completed=start)
            yield lambda done: bar.update(task, completed=done)
        return
    began = last = time.monotonic()

    def line(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_PER_LINE and done != total:
            return
        last = now
        if total is None:
            say(f"{what} {done}")
        else:
            say(
                f"{what} {done}/{total}, {(now - began) / max(1, done - start) * (total - done):.0f} s left"
            )

    yield line
