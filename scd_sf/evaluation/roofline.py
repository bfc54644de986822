"""The floor of a computation: the seconds that its own matmuls take, which no arrangement of the
same calls can beat.

The floor is the sum over every matmul, convolution and attention call actually made (backward ones
too), each timed alone, at its best, in the same process. A ratio near 1 says that there is little
overhead; it does not say that the calls were needed.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_HEAVY = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
_ATTENTION = "_scaled_dot_product"
_CALLS_PER_TIMING = 10  # calls that a GPU is given at once, so that launching them does not count


@dataclass(frozen=True)
class TensorSpec:
    """A tensor argument of a recorded call."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def tensor(self) -> Tensor:
        size = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        storage = torch.empty(size, dtype=self.dtype, device=self.device)
        storage = storage.normal_() if self.dtype.is_floating_point else storage.fill_(1)
        return storage.as_strided(self.shape, self.stride)


# operator, arguments, keyword arguments
Call = tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]


class HeavyCalls(TorchDispatchMode):
    """Counts the heavy calls made inside the ``with`` by their arguments' shapes and devices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _HEAVY or name.startswith(_ATTENTION):
            keywords = tuple((key, _spec(value)) for key, value in sorted((kwargs or {}).items()))
            self.calls[(func, tuple(_spec(value) for value in args), keywords)] += 1
        return func(*args, **(kwargs or {}))

    def floor(self, repeats: int = 2) -> float:
        """Seconds of all recorded calls, each call's best of ``repeats`` times its count."""
        return sum(count * _seconds_alone(call, repeats) for call, count in self.calls.items())


def _spec(value: Any) -> Any:
    """``value`` with every tensor replaced by its :class:`TensorSpec`, lists by tuples."""
    if isinstance(value, Tensor):
        return TensorSpec(tuple(value.shape), value.stride(), value.dtype, value.device)
    return tuple(_spec(item) for item in value) if isinstance(value, list) else value


def _materialise(spec: Any) -> Any:
    """The reverse of :func:`_spec`, with new tensors of random numbers."""
    if isinstance(spec, TensorSpec):
        return spec.tensor()
    return [_materialise(item) for item in spec] if isinstance(spec, tuple) else spec


@torch.no_grad()
def _seconds_alone(call: Call, repeats: int) -> float:
    """Seconds of one call, the best of ``repeats`` timings."""
    func, specs, keywords = call
    arguments = [_materialise(spec) for spec in specs]
    keyword_arguments = {key: _materialise(spec) for key, spec in keywords}
    device = next(
        (spec.device for spec in specs if isinstance(spec, TensorSpec)), torch.device("cpu")
    )
    if device.type == "cuda":
        func(*arguments, **keyword_arguments)  # the library chooses its kernel
    call_count = _CALLS_PER_TIMING if device.type == "cuda" else 1
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(call_count):
            func(*arguments, **keyword_arguments)
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / call_count)
    return best


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Peak:
    """The most memory in use at once, in bytes: on a GPU that of tensors since the last
    :meth:`reset`, on a CPU the process's largest resident set."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def now(self) -> int:
        """Bytes that tensors take on the GPU; 0 on a CPU."""
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF)[2]


def peak_gib(reset: bool = False) -> float:
    """Peak resident memory of this process in GiB since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 2**20
