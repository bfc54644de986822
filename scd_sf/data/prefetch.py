"""Batches read ahead by threads. The caller says which batches come next, so the order of data does
not depend on it, after a resume and with any number of processes.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")
Item = TypeVar("Item")


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


class ThreadedTasks(Generic[Item]):
    """The items of many tasks, in the order in which ``workers`` threads make them. A thread runs a
    task from its begin to its end, and at most ``ahead`` items wait to be read.

    A context: at its end the threads stop after the item that they are at. The first exception of a
    task is raised where the items are read.
    """

    def __init__(
        self, tasks: Iterable[Callable[[], Iterator[Item]]], workers: int, ahead: int = 1
    ) -> None:
        self._tasks, self._lock = iter(tasks), threading.Lock()
        self._ready: queue.Queue[Item | Future[None]] = queue.Queue()
        self._room, self._stop = threading.Semaphore(max(1, ahead)), threading.Event()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tasks")
        self._workers = [self._pool.submit(self._work) for _ in range(workers)]
        for worker in self._workers:
            worker.add_done_callback(self._ready.put)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for _worker in self._workers:
            self._room.release()
        self._pool.shutdown(wait=True)

    def __iter__(self) -> Iterator[Item]:
        ends = 0
        while ends < len(self._workers):
            entry = self._ready.get()
            if isinstance(entry, Future):
                entry.result()
                ends += 1
            else:
                self._room.release()
                yield entry

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                task = next(self._tasks, None)
            if task is None:
                return
            for item in task():
                self._room.acquire()
                if self._stop.is_set():
                    return
                self._ready.put(item)
