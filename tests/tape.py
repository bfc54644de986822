"""A tape stands for the CUDA graph: it notes every operator with the very tensors it read and wrote,
and runs them again. Python is not run again, so numbers that Python counts are baked in as a graph
bakes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


class Tape(TorchDispatchMode):
    """What was run: operator, arguments, results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()  # a graph asks no tensor where it was made
    def play(self) -> None:
        for func, args, kwargs, out in self.calls:
            returned = func._schema.returns
            if func._schema.is_mutable:
                func(*args, **kwargs)
            # views of what is recorded need nothing
            elif all(part.alias_info is None for part in returned):
                again = func(*args, **kwargs)
                pairs = (
                    zip(out, again, strict=True)
                    if isinstance(out, (tuple, list))
                    else [(out, again)]
                )
                for old, new in pairs:
                    if isinstance(old, Tensor):
                        old.copy_(new)


def record(step: Callable[[], T]) -> tuple[Callable[[], None], T]:
    step()
    with Tape() as tape:
        out = step()
    return tape.play, out
