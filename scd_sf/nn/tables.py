"""Tables that many steps share (rotary positions, masks), kept within a number of bytes: random sets of targets would
fill a cache that counts entries with gigabytes of them."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
LIMIT = 128 * 2**20  # bytes of each kind of table on each device; `scd plan` counts the kinds of a training


def kept_within(size: Callable[[T], int], limit: int = LIMIT) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Remember what a function returned, the latest calls first, while all of it (``size`` in bytes) stays within
    ``limit``; the latest is always kept. Arguments are hashable; an entry counts for a KiB at least."""

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        held = 0

        @functools.wraps(make)
        def _remembered(*args: P.args, **kwargs: P.kwargs) -> T:
            nonlocal held
            key = (args, tuple(sorted(kwargs.items())))
            if key in kept:
                kept.move_to_end(key)
                return kept[key][0]
            value = make(*args, **kwargs)
            kept[key] = value, max(1024, size(value))
            held += kept[key][1]
            while held > limit and len(kept) > 1:
                held -= kept.popitem(last=False)[1][1]
            return value

        return _remembered

    return decorate


def bytes_of(*tensors: Tensor | None) -> int:
    """What tensors hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
