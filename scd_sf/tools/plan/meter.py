"""Run a computation on the meta device and count its FLOPs and the most bytes alive at once.

Nothing is computed or allocated, every operator reports shapes alone. The real forward, loss
and ``backward`` of a training step run under :class:`Meter`, activation checkpointing and all, so
that what is kept for the backward pass is what PyTorch would keep.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Hashable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten


class Meter(TorchDispatchMode):
    """``with Meter() as meter: ...`` counts ``meter.flops``, ``meter.peak`` (most bytes alive at
    once of the meta tensors that the block made) and ``meter.host_normals`` (normal numbers that
    the host drew).

    Meta kernels are slow Python and a model's layers are alike. So results are cached by operator
    and shapes, unless the operator returns its arguments or views of them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.host_normals = 0
        self.by_operator = Counter[str]()
        self._cache: dict[Any, tuple[Any, int]] = {}
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATEN._local_scalar_dense.default and args[0].is_meta:
            return 1.0  # any number, for a log
        if (
            func is _ATEN._to_copy.default
            and args[0].is_meta
            and str(kwargs.get("device", "meta")) == "cpu"
        ):
            return torch.ones(args[0].shape)
        if func.overloadpacket is _ATEN.randn and str(kwargs.get("device", "cpu")) == "cpu":
            self.host_normals += math.prod(args[0])
        if not _makes(func):
            return func(*args, **kwargs)
        key = _spec((func, args, tuple(kwargs.items())))
        if key is not None and key in self._cache:
            spec, flops = self._cache[key]
            out = _rebuild(spec)
        else:
            out = func(*args, **kwargs)
            count = flop_registry.get(func.overloadpacket)
            flops = 0 if count is None else count(*args, **kwargs, out_val=out)
            spec = _spec(out)
            if key is not None and spec is not None:
                self._cache[key] = (spec, flops)
        if flops:
            self.by_operator[func.overloadpacket.__name__] += flops
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        for tensor in outputs:
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._add(tensor)
        self.peak = max(self.peak, self.live)
        return out

    @property
    def flops(self) -> int:
        """FLOPs of all matmuls, convolutions and attention so far."""
        return self.by_operator.total()

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def release(_: Any) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, release)
        self.live += size


@cache
def _makes(func: Any) -> bool:
    """Whether an operator returns new tensors, neither views nor its changed arguments."""
    if func is _ATEN._unsafe_view.default:
        return False
    return not func._schema.is_mutable and all(
        part.alias_info is None for part in func._schema.returns
    )


class _TensorSpec(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _spec(value: Any) -> Any:
    """A hashable description of a value, with shapes for meta tensors. None where the result
    depends on more, such as the numbers of a real tensor."""
    if isinstance(value, Tensor):
        return (
            _TensorSpec(tuple(value.shape), value.stride(), value.dtype) if value.is_meta else None
        )
    if isinstance(value, (tuple, list)):
        parts = []
        for item in value:
            part = ("none",) if item is None else _spec(item)
            if part is None:
                return None
            parts.append(part)
        return tuple(parts)
    return value if isinstance(value, Hashable) else None


def _rebuild(spec: Any) -> Any:
    """New meta tensors of the described shapes, strides and types, in the same nesting."""
    if isinstance(spec, _TensorSpec):
        return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta")
    if spec == ("none",):
        return None
    return tuple(_rebuild(part) for part in spec) if isinstance(spec, tuple) else spec
