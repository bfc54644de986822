"""Batches read ahead by threads. It decides nothing: what comes next is said by the one who asks, so the order of data,
and with it resuming and other numbers of processes, is as without it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from scd_sf.data.latents import LatentBatch, LatentClips


class Prefetch:
    """``clips.stored(indices)``, begun early for the batches that :meth:`expect` names.

    At most ``depth`` batches are read or held at a time (0: none ahead), by ``threads`` threads, which share no batch:
    reading and copying leave Python's lock. An error of a batch is raised when that batch is asked for.
    """

    def __init__(self, clips: LatentClips, depth: int = 2, threads: int = 2) -> None:
        self.clips, self.depth = clips, depth
        self._pool = ThreadPoolExecutor(max(1, min(threads, depth)), thread_name_prefix="prefetch")
        self._begun: OrderedDict[tuple[int, ...], Future[LatentBatch]] = OrderedDict()
        self._wanted: list[tuple[int, ...]] = []

    def expect(self, batches: Iterable[Sequence[int]]) -> None:
        """The next batches, in the order in which they will be asked for; replaces what was expected before."""
        self._wanted = list(dict.fromkeys(tuple(indices) for indices in batches))
        for key in [key for key in self._begun if key not in self._wanted]:
            self._begun.pop(key).cancel()
        self._wanted = [key for key in self._wanted if key not in self._begun]
        self._fill()

    def batch(self, indices: Sequence[int]) -> LatentBatch:
        """As :meth:`LatentClips.stored`: read ahead, or now where it was not expected."""
        key = tuple(indices)
        if key in self._wanted:
            self._wanted.remove(key)
        begun = self._begun.pop(key, None)
        self._fill()
        return self.clips.stored(indices) if begun is None else begun.result()

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self) -> None:
        while self._wanted and len(self._begun) < self.depth:
            key = self._wanted.pop(0)
            self._begun[key] = self._pool.submit(self.clips.stored, key)
