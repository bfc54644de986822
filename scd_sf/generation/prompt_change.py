"""Another prompt while a video runs, and what becomes of its past."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.types import Conditioning, UserError

HISTORIES = ("keep", "recache", "flush")


@dataclass(frozen=True)
class PromptChange:
    """Another prompt for the chunks to come. ``history``, what becomes of the past, whose keys and
    values were computed under the prompts before:

    - ``keep``: it stays as it is;
    - ``recache``: the frames that the cache holds are encoded again under the new prompt (the KV
      recache of LongLive, arXiv 2509.22622);
    - ``flush``: all but the last chunk is forgotten, and that one encoded again.

    UserError: no such history, or one that is encoded again under actions, which count frames.
    """

    cond: Conditioning
    history: str = "keep"

    def __post_init__(self) -> None:
        check_history(self.history)
        if self.history != "keep" and self.cond.actions_BF is not None:
            raise UserError(f"history '{self.history}' is for prompts, not for actions; use keep")


def check_history(history: str) -> None:
    """UserError unless it is one of :data:`HISTORIES`."""
    if history not in HISTORIES:
        raise UserError(f"history is '{history}'; use {', '.join(HISTORIES)}")


class KeptChunks:
    """The finished chunks, as the cache keeps them: those of the sink and of the window."""

    def __init__(self, cache: CacheConfig | None, chunk: int, known: Iterable[Tensor] = ()) -> None:
        window = None if cache is None else cache.window
        self._num_sink = 0 if window is None or cache is None else -(-cache.sink // chunk)
        self._sink: list[Tensor] = []
        self._recent = deque[Tensor](maxlen=None if window is None else -(-window // chunk))
        for known_chunk in known:
            self.add(known_chunk)

    def add(self, chunk: Tensor) -> None:
        if len(self._sink) < self._num_sink:
            self._sink.append(chunk)
        else:
            self._recent.append(chunk)

    def after(self, history: str) -> list[Tensor]:
        """What is left of them where the prompt changes; the others are forgotten."""
        chunks = [*self._sink, *self._recent]
        left = chunks if history == "recache" else chunks[-1:]
        self._sink = []
        self._recent.clear()
        for chunk in left:
            self.add(chunk)
        return left
