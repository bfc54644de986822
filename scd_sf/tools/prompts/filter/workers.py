"""A few processes that share the two costly steps. Results come back in order, whatever their number."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

A = TypeVar("A")
B = TypeVar("B")


class Workers(Protocol):
    """Applies a function to every item, in order."""

    def map(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterable[B]: ...


class Here:
    """No other process."""

    def map(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterable[B]:
        return map(function, items)


class Pool:
    """Some processes. One item more than they are is on its way, so that a long list is not copied at once."""

    def __init__(self, pool: ProcessPoolExecutor, count: int) -> None:
        self.pool, self.ahead = pool, count

    def map(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterable[B]:
        waiting: deque[Future[B]] = deque()
        for item in items:
            waiting.append(self.pool.submit(function, item))
            if len(waiting) > self.ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def open_workers(count: int) -> Iterator[Workers]:
    """``count`` processes (0: one per core this process may use; 1: none but this one).

    Language identification and shingling hold the interpreter's lock, so threads do not help. Processes come from a
    fork server: a fork of this one could copy a lock that one of polars' threads holds.
    """
    number = count or len(os.sched_getaffinity(0))
    if number == 1:
        yield Here()
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(number, mp_context=context, initializer=_begin) as pool:
        yield Pool(pool, number)


def _begin() -> None:
    """One thread each (rensa's many threads would copy what they read). And: a parent that is killed cannot say so;
    watch it, instead of waiting for work for ever."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
