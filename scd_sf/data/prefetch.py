"""Batches read ahead by threads. It decides nothing: what comes next is said by the one who asks, so the order of data,
and with it resuming and other numbers of processes, is as without it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """``read(indices)``, begun early for the batches that :meth:`expect` names, always in one of ``threads`` threads.

    At most ``depth`` batches are read or held at a time (0: none ahead); threads share no batch: reading and copying
    leave Python's lock. An error of a batch is raised when that batch is asked for.
    """

    def __init__(self, read: Callable[[Sequence[int]], T], depth: int = 2, threads: int = 2) -> None:
        self.read, self.depth = read, depth
        self._pool = ThreadPoolExecutor(max(1, min(threads, depth)), thread_name_prefix="prefetch")
        self._begun: OrderedDict[tuple[int, ...], Future[T]] = OrderedDict()
        self._wanted: list[tuple[int, ...]] = []

    def expect(self, batches: Iterable[Sequence[int]]) -> None:
        """The next batches, in the order in which they will be asked for; replaces what was expected before."""
        self._wanted = list(dict.fromkeys(tuple(indices) for indices in batches))
        for key in [key for key in self._begun if key not in self._wanted]:
            self._begun.pop(key).cancel()
        self._wanted = [key for key in self._wanted if key not in self._begun]
        self._fill()

    def batch(self, indices: Sequence[int]) -> T:
        """What ``read`` returns: read ahead, or now where it was not expected."""
        key = tuple(indices)
        if key in self._wanted:
            self._wanted.remove(key)
        begun = self._begun.pop(key, None) or self._pool.submit(self.read, key)
        self._fill()
        return begun.result()

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self) -> None:
        while self._wanted and len(self._begun) < self.depth:
            key = self._wanted.pop(0)
            self._begun[key] = self._pool.submit(self.read, key)
