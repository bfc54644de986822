"""Tables that many steps share (rotary positions, masks), kept within a number of bytes (random
sets of targets would fill a cache that counts entries with gigabytes of them) and of entries (a
video without end asks for the table of every position once)."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
LIMIT = 128 * 2**20  # bytes of each kind of table; `scd plan` counts the kinds of a training
MOST = 1024  # entries of each kind


class Kept(Generic[P, T]):
    """A cache of the results of ``make``. The oldest are removed when all results (``size`` in
    bytes, each counted as at least 1 KiB) exceed ``limit``, or are more than :data:`MOST`; the latest
    result always stays. Arguments must be hashable."""

    def __init__(self, make: Callable[P, T], size: Callable[[T], int], limit: int) -> None:
        functools.update_wrapper(self, make)
        self._make, self._size, self._limit = make, size, limit
        self.clear()

    def clear(self) -> None:
        """Remove all entries."""
        self._entries: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._total_bytes = 0

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        key = (args, tuple(sorted(kwargs.items())))
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key][0]
        value = self._make(*args, **kwargs)
        self._entries[key] = value, max(1024, self._size(value))
        self._total_bytes += self._entries[key][1]
        while len(self._entries) > MOST or (
            self._total_bytes > self._limit and len(self._entries) > 1
        ):
            self._total_bytes -= self._entries.popitem(last=False)[1][1]
        return value


def kept_within(
    size: Callable[[T], int], limit: int = LIMIT
) -> Callable[[Callable[P, T]], Kept[P, T]]:
    """Decorator that turns a function into a :class:`Kept` of at most ``limit`` bytes."""
    return lambda make: Kept(make, size, limit)


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes of all elements of the tensors; None counts 0."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
