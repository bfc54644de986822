"""Batches read ahead by threads. The caller says which batches come next, so the order of data does
not depend on it, after a resume and with any number of processes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """``read(key)``, begun early for the batches that :meth:`expect` names, always in one of
    ``threads`` threads.

    A key says what is in a batch: the clips' indices, or any tuple.

    At most ``depth`` batches are read or held at a time (0: none ahead). Each thread reads whole
    batches, because reading and copying release Python's lock. An error of a batch is raised when
    that batch is asked for.
    """

    def __init__(self, read: Callable[[Any], T], depth: int = 2, threads: int = 2) -> None:
        self.read, self.depth = read, depth
        self._pool = ThreadPoolExecutor(max(1, min(threads, depth)), thread_name_prefix="prefetch")
        self._futures: OrderedDict[tuple[object, ...], Future[T]] = OrderedDict()
        self._next_keys: list[tuple[object, ...]] = []

    def expect(self, keys: Iterable[Sequence[object]]) -> None:
        """The next batches, in the order in which they will be asked for; replaces what was
        expected before."""
        self._next_keys = list(dict.fromkeys(tuple(key) for key in keys))
        for key in [key for key in self._futures if key not in self._next_keys]:
            self._futures.pop(key).cancel()
        self._next_keys = [key for key in self._next_keys if key not in self._futures]
        self._fill()

    def batch(self, key: Sequence[object]) -> T:
        """The batch of ``key``, read ahead, or now if it was not expected."""
        place = tuple(key)
        if place in self._next_keys:
            self._next_keys.remove(place)
        future = self._futures.pop(place, None) or self._pool.submit(self.read, place)
        self._fill()
        return future.result()

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self) -> None:
        while self._next_keys and len(self._futures) < self.depth:
            key = self._next_keys.pop(0)
            self._futures[key] = self._pool.submit(self.read, key)
