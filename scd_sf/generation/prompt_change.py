"""Another prompt while a video runs, and what becomes of its past."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.types import Conditioning, UserError

HISTORIES = ("keep", "recache", "flush")


@dataclass(frozen=True)
class PromptChange:
    """Another prompt for the chunks to come. The last finished chunk has not been encoded yet, and
    is encoded under the new prompt. ``history``, what becomes of the past before it, whose keys and
    values were computed under the prompts before:

    - ``keep``: it stays as it is;
    - ``recache``: the chunks of which the cache holds a frame are encoded again under the new
      prompt, whole (the KV recache of LongLive, arXiv 2509.22622);
    - ``flush``: it is forgotten.

    After ``recache`` and ``flush`` the clip goes on as one that begins with the frames that are
    left.

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
    """The finished chunks of which the cache holds a frame, in its sink or its window, and the last
    one, which the cache has not read yet."""

    def __init__(self, cache: CacheConfig | None, chunk: int, known: Iterable[Tensor] = ()) -> None:
        self._num_sink, num_recent = 0, None
        if cache is not None and cache.window is not None:
            self._num_sink = math.ceil(cache.sink / chunk)
            num_recent = math.ceil(cache.window / chunk) + 1
        self._sink: list[Tensor] = []
        self._recent = deque[Tensor](maxlen=num_recent)
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
