"""Progress of a long job: a bar on a terminal, else a line now and then."""

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
    label: str, total: int | None = None, start: int = 0
) -> Iterator[Callable[[int], None]]:
    """Yield a function that shows a count of finished items. The time left is shown, too, where
    ``total`` is known. ``start``: items that were finished before.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=total, completed=start)
            yield lambda count: bar.update(task, completed=count)
        return
    start_time = printed_at = time.monotonic()

    def line(count: int) -> None:
        nonlocal printed_at
        now = time.monotonic()
        if now - printed_at < SECONDS_PER_LINE and count != total:
            return
        printed_at = now
        if total is None:
            say(f"{label} {count}")
        else:
            say(
                f"{label} {count}/{total}, {(now - start_time) / max(1, count - start) * (total - count):.0f} s left"
            )

    yield line
