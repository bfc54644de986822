"""The engines' config, step report and protocol, and the module that makes a whole rollout one
call."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from scd_sf.distributed import Ranks
from scd_sf.files import read_typed
from scd_sf.train.shards import MASTER, MOMENTS, EngineState, Shard, gathered
from scd_sf.types import UserError, check_within

MOST_RANKS = 1_000_000
_log = logging.getLogger(__name__)


# Fields of EngineConfig that a frozen engine does not read.
TRAINING = ("lr", "betas", "eps", "weight_decay", "warmup", "anneal_from", "grad_clip", "lr_scale")


@dataclass
class EngineConfig:
    """One model's optimiser, precision and place."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed, or torch: plain PyTorch on each process."""
    zero_stage: int = 2
    """DeepSpeed: what is partitioned over the ranks: 0 nothing, 1 optimiser states, 2 gradients,
    too, 3 weights, too."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and computation; with bf16 the optimiser keeps fp32 master weights."""
    lr: float = 1e-4
    """Highest learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two decays."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    warmup: int = 0
    """Updates until the learning rate is reached."""
    anneal_from: float = 1.0
    """Fraction of all updates after which the learning rate falls linearly to 0; 1: never."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0: no limit."""
    offload: bool = False
    """Optimiser states (of a frozen engine: the parameters) on the CPU."""
    bucket: int = 50_000_000
    """DeepSpeed's buckets, in elements."""
    max_skips: int = 10
    """So many non-finite updates in a row stop the run."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Parameters whose name starts so learn at a multiple of ``lr``, e.g. {decoder: 2.0}."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3")
        if (
            self.backend == "deepspeed"
            and self.zero_stage == 0
            and (self.dtype == "bf16" or self.offload)
        ):
            raise ValueError(
                "zero_stage 0 is for fp32 without offload: there DeepSpeed keeps no fp32 masters beside bf16 weights "
                "and nothing is partitioned; use zero_stage=1, or backend=torch"
            )
        if self.lr < 0 or self.weight_decay < 0 or self.grad_clip < 0 or self.warmup < 0:
            raise ValueError("lr, weight_decay, grad_clip and warmup must be 0 or more")
        if any(scale < 0 for scale in self.lr_scale.values()):
            raise ValueError("every lr_scale must be 0 or more")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas are {tuple(self.betas)}; each must be in [0, 1)")
        if not 0.0 <= self.anneal_from <= 1.0:
            raise ValueError(
                f"anneal_from is {self.anneal_from}; it is a fraction of all updates, 0 to 1"
            )
        check_within(self, {"eps": (1e-30, 1), "weight_decay": (0, 1e3)})
        if self.backend == "torch" and self.offload:
            raise UserError(
                "offload is for backend=deepspeed; a local engine keeps everything where it computes"
            )
        if self.bucket < 1 or self.max_skips < 1:
            raise ValueError("bucket and max_skips must be at least 1")


@dataclass(frozen=True)
class StepInfo:
    """Result of ``Engine.step``. ``stepped``: whether weights changed. ``grad_norm``: norm of the
    gradient before clipping (0 between updates).

    ``finite`` False: some rank saw a non-finite loss or gradient, so all ranks skipped; keep the
    batch for inspection.
    """

    stepped: bool
    grad_norm: float
    finite: bool
    lr: float


class Engine(Protocol):
    """A model and its optimizer. One update: ``micro_batches`` x (call, ``backward``), then
    ``step``, all ranks."""

    module: nn.Module
    cfg: EngineConfig
    micro_batches: int
    updates: int

    @property
    def skipped(self) -> int:
        """Updates skipped so far because of a non-finite loss or gradient."""
        ...

    def __call__(self, *args: Any) -> Any:
        """Forward of the wrapped module; under ZeRO-3 the same number of calls on every rank."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of ``loss / micro_batches`` (scalar loss of one micro-batch)."""
        ...

    def step(self) -> StepInfo:
        """Apply the update when ``micro_batches`` backward calls are in; otherwise report and do
        nothing."""
        ...

    def state(self) -> EngineState:
        """This rank's part of the state for an exact resume, copied to the CPU. All ranks write
        theirs into one directory of this engine alone. All ranks call it."""
        ...

    def load(self, path: Path) -> None:
        """Continue from what :meth:`state` of all ranks wrote: of any engine of this model, of
        other kind, ZeRO stage, dtype or number of ranks too.

        Raises UserError when the directory does not fit this model.
        """
        ...

    def owned(self) -> Iterator[Shard]:
        """This rank's part of every parameter's fp32 master, in one order on all ranks. Not to be
        modified.

        The parts of all ranks cover each parameter once. No communication for parameters that are
        trained; all ranks walk it to the end, because frozen ones may be partitioned.
        """
        ...

    def fp32_masters(self) -> dict[str, Tensor]:
        """The whole fp32 masters by name, copied to the CPU of every rank; all ranks call it."""
        ...


class StepModule(nn.Module):
    """``forward(*args) = fn(model, *args)``: a whole rollout, or a loss, as ONE engine forward.

    ``fn`` is a plain function, so that only ``model``'s parameters belong to the engine.
    """

    def __init__(self, model: nn.Module, fn: Callable[..., Any]) -> None:
        super().__init__()
        if isinstance(fn, nn.Module):
            raise TypeError(
                "StepModule: fn must be a function, or its parameters would be trained as well"
            )
        self.model = model
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(self.model, *args)


def named_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters under the model's own names (without StepModule's 'model.' prefix)."""
    return list((module.model if isinstance(module, StepModule) else module).named_parameters())


def whole_fp32_masters(engine: Engine, ranks: Ranks) -> dict[str, Tensor]:
    """:meth:`Engine.fp32_masters` of any engine. One tensor at a time is whole on the device."""
    return {
        name: value.detach().to("cpu", copy=True) for name, value in gathered(engine.owned(), ranks)
    }


def accumulation(global_batch: int, micro_batch: int, world: int) -> int:
    """Micro-batches per update. Raises UserError unless world * micro_batch divides global_batch:
    it names the largest smaller micro_batch that does, where there is one."""
    if min(global_batch, micro_batch, world) < 1:
        raise UserError(
            f"global_batch {global_batch} and micro_batch {micro_batch} must be at least 1"
        )
    if global_batch % (micro_batch * world):
        smaller = ""
        if global_batch % world == 0:
            sizes = range(micro_batch, 0, -1)
            size = next(size for size in sizes if global_batch % (size * world) == 0)
            smaller = f"micro_batch={size}, "
        raise UserError(
            f"global_batch is {global_batch}, not a multiple of {world} processes x micro_batch "
            f"{micro_batch}; use global_batch={_nearest(global_batch, micro_batch * world)}, "
            f"{smaller}or another number of processes"
        )
    return global_batch // (micro_batch * world)


class Diverged(UserError):
    """Too many updates in a row had a non-finite loss or gradient. Every rank raises it at the same
    update."""


class SkipCounter:
    """Counts skipped updates, and gives up after too many in a row."""

    def __init__(self, limit: int) -> None:
        self.limit, self.total, self.in_row = limit, 0, 0

    def record(self, finite: bool, update: int) -> None:
        """Raises Diverged at the ``limit``-th non-finite update in a row (all ranks agree on
        ``finite``)."""
        if finite:
            self.in_row = 0
        else:
            self.in_row += 1
            self.total += 1
            message = "update %d: non-finite loss or gradient, skipped on all ranks (%d in a row)"
            _log.warning(message, update, self.in_row)
        if self.in_row >= self.limit:
            row, self.in_row = self.in_row, 0
            raise Diverged(
                f"{row} updates in a row had a non-finite loss or gradient (at update {update})"
            )


def first_skip_flag(loss: Tensor) -> Tensor:
    """1.0 where a loss is not finite, else 0.0; stays on the device (no synchronisation)."""
    if loss.numel() != 1:
        raise ValueError(f"backward wants a scalar loss, got shape {tuple(loss.shape)}")
    return (~torch.isfinite(loss.detach())).float().reshape(())


def engine_state(
    engine: Engine, ranks: Ranks, parts: Callable[[str], Iterable[Shard]]
) -> EngineState:
    """This rank's state for a resume: ``parts(kind)`` of masters and moments, counters, buffers."""
    # no moments before the first update
    kinds = (MASTER, *MOMENTS) if engine.updates else (MASTER,)
    counters = {"updates": engine.updates, "skipped": engine.skipped, "files": ranks.world}
    buffers = dict(engine.module.named_buffers())
    return EngineState.copied(ranks.rank, {kind: parts(kind) for kind in kinds}, buffers, counters)


@dataclass(frozen=True)
class Counters:
    """``engine.json``: numbers of applied and skipped updates, and of the ranks' state files."""

    updates: int
    skipped: int
    files: int


def read_counters(path: Path) -> Counters:
    """Read ``path/engine.json``. UserError when it is missing or its numbers are impossible."""
    remedy = "check the checkpoint, or start a new run from its model.safetensors"
    counters = read_typed(
        path / "engine.json", Counters, f"no engine state to resume from: {remedy}"
    )
    if not (counters.updates >= 0 and counters.skipped >= 0 and 1 <= counters.files <= MOST_RANKS):
        raise UserError(
            f"{path / 'engine.json'}: counts {counters.updates}, {counters.skipped}, {counters.files}; {remedy}"
        )
    return counters


def _nearest(value: int, multiple: int) -> int:
    return max(1, math.floor(value / multiple + 0.5)) * multiple
