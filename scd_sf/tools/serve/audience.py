"""Those who watch along: they get the viewer's clip as JPEGs, and change nothing.

A watcher has a credit of its own. One that has not shown :data:`BEHIND` chunks misses whole chunks
until it has: it slows nobody, and nothing piles up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from scd_sf.tools.serve.protocol import (
    Chunk,
    Ended,
    Error,
    Missed,
    Paused,
    Reply,
    Say,
    SeatState,
    Started,
    Switched,
)

BEHIND = 6  # chunks that were sent to a watcher and not shown


@dataclass(eq=False)
class Watcher:
    """A watcher's connection: the chunks that it was sent and has not ``shown``, and how many were
    left out since the last one."""

    say: Say
    unshown: deque[int] = field(default_factory=deque)
    num_missed: int = 0


class Audience:
    """All watchers, ``most`` at a time. Every method may be called from any thread, and none of
    them waits."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._watchers: list[Watcher] = []
        self._is_free, self._is_paused = True, False
        self._clip: list[Reply] = []  # what was said of the present clip: start, prompt, end

    def __len__(self) -> int:
        return len(self._watchers)

    @property
    def has_room(self) -> bool:
        return len(self) < self._most

    def join(self, say: Say, welcome: Reply) -> Watcher | None:
        """A watcher who was told ``welcome``, who has the seat, and what plays; None where there are
        too many."""
        with self._lock:
            if not self.has_room:
                return None
            watcher = Watcher(say)
            self._watchers.append(watcher)
            paused = [Paused(True)] if self._is_paused else []
            for reply in (welcome, SeatState(self._is_free), *self._clip, *paused):
                say(reply, ())
            return watcher

    def leave(self, watcher: Watcher) -> None:
        with self._lock:
            self._watchers.remove(watcher)

    def shown(self, watcher: Watcher, chunk: int) -> None:
        """All chunks up to this one: credit for more."""
        with self._lock:
            while watcher.unshown and watcher.unshown[0] <= chunk:
                watcher.unshown.popleft()

    def seat(self, is_free: bool) -> None:
        """The viewer left, or there is one."""
        with self._lock:
            self._is_free, self._is_paused, self._clip = is_free, False, []
            self._say(SeatState(is_free))

    def pause(self, on: bool) -> None:
        """The viewer pauses, or goes on."""
        with self._lock:
            if on != self._is_paused:
                self._is_paused = on
                self._say(Paused(on))

    def _say(self, reply: Reply) -> None:
        for watcher in self._watchers:
            watcher.say(reply, ())

    def tell(self, reply: Reply, frames: Sequence[bytes] = ()) -> None:
        """What the viewer is told. ``frames``: a chunk's, as JPEGs."""
        with self._lock:
            if isinstance(reply, Chunk):
                for watcher in self._watchers:
                    _send(watcher, reply, frames)
                return
            if isinstance(reply, Started):
                self._clip = [reply]
                for watcher in self._watchers:
                    watcher.unshown.clear()
                    watcher.num_missed = 0
            elif isinstance(reply, Switched):
                self._clip = [*self._clip[:1], reply]
            elif isinstance(reply, Ended | Error):
                self._clip = [one for one in self._clip if isinstance(one, Started | Switched)]
                self._clip.append(reply)
            self._say(reply)
            if isinstance(reply, Started) and self._is_paused:
                self._say(Paused(True))  # which was said before the clip began


def _send(watcher: Watcher, chunk: Chunk, frames: Sequence[bytes]) -> None:
    """A chunk, if the watcher has credit and there are JPEGs of it."""
    if len(watcher.unshown) >= BEHIND or not frames:
        watcher.num_missed += 1
        return
    if watcher.num_missed:
        watcher.say(Missed(watcher.num_missed), ())
        watcher.num_missed = 0
    watcher.unshown.append(chunk.chunk)
    watcher.say(chunk, frames)
