"""A CUDA device without a GPU: tensors on it carry shapes, types and devices, those on the CPU stay
real.

Under :class:`FakeCuda` the real code runs at real sizes in seconds. What a GPU would refuse raises
:class:`Mix` (a tensor of another device or type, a generator of another device); what makes the
host wait is counted by the line of the project that asked: reads of the device (``.item()``,
``bool()``, ``.cpu()``, ``nonzero``), copies to it, and among those the ones that block (memory that
is not pinned, or without ``non_blocking``). Data-dependent reads are answered with ones. Kernels,
memory, speed and the backward pass are not shown.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed.fsdp  # torch would import it later, beside the replaced torch.Generator
import torch.nn.functional as F
from rehearsal.budgets import Budget
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from scd_sf.nn import attention

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = tuple(str(ROOT / folder) for folder in ("scd_sf", "recipes"))
MOVES = str(ROOT / "scd_sf" / "types.py")  # on_device, for others
DEVICE = torch.device("cuda", 0)
# elements that are laid out when a tensor comes back to the host; of more, one that is expanded
LARGE = 10_000_000
_ATEN = torch.ops.aten
_SAME_TYPE = {
    _ATEN.mm,
    _ATEN.bmm,
    _ATEN.addmm,
    _ATEN.baddbmm,
    _ATEN.convolution,
    _ATEN.native_group_norm,
    _ATEN._fused_rms_norm,
    _ATEN.index_put,
    _ATEN.index_put_,
    _ATEN.index_add_,
    _ATEN.scatter_,
    _ATEN.linalg_solve,
    _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_efficient_attention,
}


class Mix(RuntimeError):
    """Devices, types or generators that a GPU would not take together."""


class _Shape(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class FakeTensor(Tensor):
    """A tensor on the device: no values, no memory."""

    @staticmethod
    def __new__(cls, shape: _Shape, requires_grad: bool = False) -> FakeTensor:
        made: FakeTensor = Tensor._make_wrapper_subclass(
            cls,
            shape.shape,
            shape.stride,
            dtype=shape.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} on a tensor of the rehearsal outside of it")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FakeTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    def tolist(self) -> Any:
        return self.to("cpu").tolist()


class Counts:
    """What happened inside :meth:`FakeCuda.counted`, by place: "file:line of the project"."""

    def __init__(self) -> None:
        self.reads, self.copies, self.blocking = Counter[str](), Counter[str](), Counter[str]()

    @property
    def totals(self) -> Budget:
        return Budget(self.reads.total(), self.copies.total(), self.blocking.total())

    def __str__(self) -> str:
        parts = [
            f"{name}: "
            + (", ".join(f"{place} x{times}" for place, times in sorted(found.items())) or "none")
            for name, found in (
                ("host reads", self.reads),
                ("copies", self.copies),
                ("blocking", self.blocking),
            )
        ]
        return "; ".join(parts)


class FakeCuda(TorchDispatchMode):
    """``with FakeCuda() as cuda: ...``; ``cuda.device`` is the device. Not to be nested."""

    device = DEVICE

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts = [Counts()]
        self._made: dict[Any, Any] = {}
        self._pinned: dict[int, weakref.ref[Any]] = {}
        self._generators: dict[int, torch.Generator] = {}
        self._patches = ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled here, and the guard against it costs more than an operator
        return False

    def __enter__(self) -> FakeCuda:
        torch._C._ensureCUDADeviceGuardSet()
        lifted = torch._C._only_lift_cpu_tensors()
        # torch.tensor(.., device=): made on the host, then copied
        torch._C._set_only_lift_cpu_tensors(True)
        self._patches.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        future, overwrite = (
            torch.__future__,
            torch.__future__.get_overwrite_module_params_on_conversion(),
        )
        # module.to(): new parameters, not other data in the old
        future.set_overwrite_module_params_on_conversion(True)
        self._patches.callback(future.set_overwrite_module_params_on_conversion, overwrite)
        for where, name, stand_in in (
            (torch.cuda, "_lazy_init", _nothing),
            (torch.cuda, "empty_cache", _nothing),
            (torch.cuda, "synchronize", lambda *_: self._note("reads")),
            (torch.cuda, "Stream", _nothing),
            (torch.cuda, "stream", lambda *_: nullcontext()),
            (torch, "Generator", self._generator),
            (F, "scaled_dot_product_attention", self._attention(F.scaled_dot_product_attention)),
            (attention, "compiled_flex", lambda: self._flex),
        ):
            self._patches.enter_context(patch.object(where, name, stand_in))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.close()

    @contextmanager
    def counted(self) -> Iterator[Counts]:
        counts = Counts()
        self._counts.append(counts)
        try:
            yield counts
        finally:
            self._counts.remove(counts)

    @contextmanager
    def budget(self, allowed: Budget) -> Iterator[Counts]:
        """Exactly so many; AssertionError naming the places otherwise."""
        with self.counted() as counts:
            yield counts
        assert counts.totals == allowed, f"{counts.totals}, the list allows {allowed}; {counts}"

    def _note(self, kind: str) -> None:
        place = _place()
        for counts in self._counts:
            getattr(counts, kind)[place] += 1

    def _copied(self, source: Tensor, non_blocking: bool) -> None:
        """From the host."""
        self._note("copies")
        if not (non_blocking and source.untyped_storage()._cdata in self._pinned):
            self._note("blocking")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = any(kind is FakeTensor for kind in types)
        device = kwargs.get("device")
        if not here and (device is None or torch.device(device).type != "cuda"):
            return self._on_host(func, args, kwargs)
        packet = func.overloadpacket
        if packet in _SPECIAL:
            out = _SPECIAL[packet](self, func, args, kwargs)
            if out is not NotImplemented:
                return out
        return self._shaped(func, args, kwargs)

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is _ATEN.is_pinned.default:
            return args[0].untyped_storage()._cdata in self._pinned
        if func is _ATEN._pin_memory.default:
            copy = args[0].clone()
            storage = copy.untyped_storage()
            key = storage._cdata
            self._pinned[key] = weakref.ref(storage, lambda _: self._pinned.pop(key, None))
            return copy
        if (
            generator := kwargs.get("generator")
        ) is not None and generator._cdata in self._generators:
            raise Mix(f"{func}: a CUDA generator for a CPU tensor, at {_place()}")
        return func(*args, **kwargs)

    def _check(self, func: Any, args: Any, kwargs: Any) -> None:
        """Mix: what the GPU would refuse."""
        if (
            generator := kwargs.get("generator")
        ) is not None and generator._cdata not in self._generators:
            raise Mix(f"{func}: a CPU generator for a CUDA tensor, at {_place()}")
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"the rehearsal has no {func}")
        tensors = list(_tensors((args, kwargs.values())))
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                continue
            scalar = (
                tensor.ndim == 0
                and tensor.device.type == "cpu"
                and torch.Tag.pointwise in func.tags
            )
            if not scalar or (func._schema.is_mutable and tensor is args[0]):
                raise Mix(
                    f"{func}: cuda:0 and {tensor.device}, shapes {_shapes(tensors)}, at {_place()}"
                )
        if func.overloadpacket in _SAME_TYPE:
            found = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
            if len(found) > 1:
                raise Mix(
                    f"{func}: {', '.join(sorted(map(str, found)))}, shapes {_shapes(tensors)}, at {_place()}"
                )
        if func is _ATEN.native_layer_norm.default and args[0].dtype == torch.float32:
            if any(part is not None and part.dtype != torch.float32 for part in args[2:4]):
                raise Mix(f"{func}: torch.float32 by weights of another type, at {_place()}")

    def _shaped(self, func: Any, args: Any, kwargs: Any, *, check: bool = True) -> Any:
        """What the operator makes of these shapes; from the second time on it is known, and known
        to be allowed."""
        key = (
            func,
            _described(args),
            tuple([(name, self._option(value)) for name, value in kwargs.items()]),
        )
        described = self._made.get(key)
        if described is None:
            if check:
                self._check(func, args, kwargs)
            moved = {
                name: "meta" if name == "device" else _to_meta(value)
                for name, value in kwargs.items()
            }
            if "generator" in moved:
                moved["generator"] = None
            if moved.get("pin_memory"):
                raise Mix(f"{func}: pinned memory is the host's, at {_place()}")
            try:
                out = func(*_to_meta(args), **moved)
            except RuntimeError as error:
                raise Mix(
                    f"{func}: {error} (shapes {_shapes(_tensors((args, kwargs.values())))}, at {_place()})"
                ) from error
            described = _Outcome.of(out)
            self._made[key] = described
        changed = _changed(func)
        if changed is None:
            return described.again()
        made = described.again()
        if not func._schema.returns:
            return None
        parts = list(made) if isinstance(made, tuple) else [made]
        for number, argument in changed:
            parts[number] = (
                args[argument]
                if isinstance(argument, int) and argument < len(args)
                else kwargs[argument]
            )
        return parts[0] if len(parts) == 1 else tuple(parts)

    def _option(self, value: Any) -> Hashable:
        return (
            value._cdata in self._generators  # type: ignore[attr-defined]
            if isinstance(value, torch._C.Generator)
            else _described(value)
        )

    def _generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        made = torch._C.Generator()
        if torch.device(device).type == "cuda":
            self._generators[made._cdata] = made  # type: ignore[attr-defined]
        return made

    def _attention(self, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> Tensor:
            parts = [part for part in (query, key, value, attn_mask) if part is not None]
            if not any(isinstance(part, FakeTensor) for part in parts):
                return real(
                    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa=enable_gqa
                )
            return self._attended(query, key, value, attn_mask)

        return attend

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """A fused operator's shapes: FlashAttention, or the memory-efficient one for fp32 and
        masks."""
        parts = [query, key, value] + ([] if mask is None else [mask])
        if any(part.device != DEVICE for part in parts):
            raise Mix(f"attention on {[str(part.device) for part in parts]}, at {_place()}")
        if len({query.dtype, key.dtype, value.dtype}) > 1 or (
            mask is not None and mask.dtype not in (torch.bool, query.dtype)
        ):
            raise Mix(f"attention of {[part.dtype for part in parts]}, at {_place()}")
        batch, heads, length, dim = query.shape
        if key.shape != (batch, heads, key.shape[2], dim) or value.shape[:3] != key.shape[:3]:
            raise Mix(f"attention of shapes {_shapes(parts)}, at {_place()}")
        if mask is not None:
            torch.broadcast_shapes(mask.shape, (batch, heads, length, key.shape[2]))
        if query.dtype == torch.float32 or mask is not None:
            out = torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, None, torch.is_grad_enabled()
            )
        else:
            out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
        attended: Tensor = out[0]
        return attended

    def _flex(self, query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask) -> Tensor:
        """FlexAttention's shapes; its tables and what its predicate reads must be on the device."""
        tables = [part for part in block_mask.as_tuple() if isinstance(part, Tensor)]
        if any(part.device != DEVICE for part in tables):
            raise Mix(
                f"FlexAttention: a block mask on {[str(part.device) for part in tables]}, at {_place()}"
            )
        if block_mask.seq_lengths != (query.shape[2], key.shape[2]):
            raise Mix(
                f"FlexAttention: {_shapes([query, key])} under a mask of {block_mask.seq_lengths}, at {_place()}"
            )
        seen = block_mask.mask_mod(
            *(torch.zeros(1, dtype=torch.int32, device=DEVICE) for _ in range(4))
        )
        assert seen.dtype == torch.bool and seen.device == DEVICE
        return self._attended(query, key, value, None)


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what needs a driver."""


class _Outcome(NamedTuple):
    """What an operator returned, by shapes."""

    value: Any

    @classmethod
    def of(cls, value: Any) -> _Outcome:
        if isinstance(value, Tensor):
            return cls(_Shape(tuple(value.shape), value.stride(), value.dtype))
        if isinstance(value, tuple | list):
            return cls(tuple(cls.of(part) for part in value))
        return cls(value)

    def again(self) -> Any:
        value = self.value
        if isinstance(value, _Shape):
            return FakeTensor(value)
        return tuple(part.again() for part in value) if isinstance(value, tuple) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, str | int | float | None) and isinstance(
        value, tuple | list | type({}.values())
    ):
        for part in value:
            yield from _tensors(part)


def _described(value: Any) -> Hashable:
    """A key: tensors by their shapes."""
    kind = type(value)
    if kind is FakeTensor:
        return value.shape, value.stride(), value.dtype
    if kind is tuple or kind is list:
        return tuple([_described(part) for part in value])
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    return kind, value


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, tuple | list):
        return type(value)(_to_meta(part) for part in value)
    return torch.device("meta") if isinstance(value, torch.device) else value


@cache
def _changed(func: Any) -> list[tuple[int, int | str]] | None:
    """Which returns are arguments that were written to: (number of the return, argument); None:
    none."""
    if not func._schema.is_mutable:
        return None
    found: list[tuple[int, int | str]] = []
    for number, returned in enumerate(func._schema.returns):
        if returned.alias_info is None or not returned.alias_info.is_write:
            continue
        for position, argument in enumerate(func._schema.arguments):
            if (
                argument.alias_info is not None
                and argument.alias_info.before_set & returned.alias_info.before_set
            ):
                found.append((number, argument.name if argument.kwarg_only else position))
    return found


def _shapes(tensors: Any) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in tensors)


def _place() -> str:
    """The innermost line of the project, else of a test."""
    frame: FrameType | None = sys._getframe(1)
    test = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PRODUCT) and file != MOVES:
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        if not test and file.startswith(str(ROOT / "tests")) and file != __file__:
            test = f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return test or "?"


def _value(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _ones(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """On the host."""
    return (
        torch.ones(shape, dtype=dtype)
        if math.prod(shape) <= LARGE
        else torch.ones((), dtype=dtype).expand(shape)
    )


def _scalar(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    cuda._note("reads")
    return _value(args[0].dtype)


def _errors(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """``torch.linalg`` asks the device whether all went well."""
    cuda._note("reads")


def _equal(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    cuda._check(func, args, kwargs)
    cuda._note("reads")
    return True


def _to_copy(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    source, device = args[0], kwargs.get("device")
    if not isinstance(source, FakeTensor):
        cuda._copied(source, kwargs.get("non_blocking", False))
        return cuda._shaped(func, args, kwargs, check=False)
    if device is not None and torch.device(device).type == "cpu":
        cuda._note("reads")
        return _ones(source.shape, kwargs.get("dtype") or source.dtype)
    return NotImplemented


def _copy_into(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    if isinstance(target, FakeTensor) and isinstance(source, FakeTensor):
        return NotImplemented
    if isinstance(target, FakeTensor):
        cuda._copied(source, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        torch.broadcast_shapes(source.shape, target.shape)
        return target
    cuda._note("reads")
    return target.fill_(_value(target.dtype))


def _counted_shape(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """All elements are taken."""
    cuda._check(func, args, kwargs)
    cuda._note("reads")
    count = args[0].numel()
    if func.overloadpacket is _ATEN.nonzero:
        return FakeTensor(_Shape((count, args[0].ndim), (1, count), torch.int64))
    return FakeTensor(_Shape((count,), (1,), args[0].dtype))


def _indexed(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Indices on the host are copied first, masks are counted first; both make the host wait."""
    indices: list[Tensor | None] = []
    for index in args[1]:
        if index is None:
            indices.append(None)
            continue
        if not isinstance(index, FakeTensor):
            cuda._copied(index, False)
        shape, dtype = tuple(index.shape), index.dtype
        if dtype in (torch.bool, torch.uint8):
            cuda._note("reads")
            count = math.prod(shape)
            indices += [FakeTensor(_Shape((count,), (1,), torch.int64)) for _ in shape]
        else:
            indices.append(
                FakeTensor(_Shape(shape, tuple(torch.empty(shape, device="meta").stride()), dtype))
            )
    args = (args[0], indices, *args[2:])
    return cuda._shaped(func, args, kwargs)


def _repeated(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """By counts on the device: their sum is read, unless it is given."""
    return (
        NotImplemented
        if kwargs.get("output_size") is not None
        else _unknown_shape(cuda, func, args, kwargs)
    )


def _unknown_shape(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    raise NotImplementedError(
        f"{func}: it depends on values, and the rehearsal has no answer; at {_place()}"
    )


_SPECIAL: dict[Any, Callable[..., Any]] = {
    _ATEN._local_scalar_dense: _scalar,
    _ATEN.equal: _equal,
    _ATEN._linalg_check_errors: _errors,
    _ATEN._to_copy: _to_copy,
    _ATEN.copy_: _copy_into,
    _ATEN.nonzero: _counted_shape,
    _ATEN.masked_select: _counted_shape,
    _ATEN.index: _indexed,
    _ATEN.index_put: _indexed,
    _ATEN.index_put_: _indexed,
    _ATEN._unique2: _unknown_shape,
    _ATEN.unique_dim: _unknown_shape,
    _ATEN.bincount: _unknown_shape,
    _ATEN.histc: _unknown_shape,
    _ATEN.multinomial: _unknown_shape,
    _ATEN.unique_consecutive: _unknown_shape,
    _ATEN.repeat_interleave: _repeated,
}
