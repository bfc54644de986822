"""Engines: build one for a trainable model or a frozen teacher. The only module that imports
deepspeed.

Several engines live in one process (student and critic ZeRO-2, teacher ZeRO-3 without optimizer),
each with its own config and save directory. DeepSpeed is imported when the first engine of that
kind is built. Rules kept here:

- always ``engine.backward`` and DeepSpeed's own ``gradient_accumulation_steps``: hand-made
  accumulation silently drops gradients on ZeRO-1/2;
- a non-finite loss anywhere turns the last micro-batch's gradient into NaN on every rank, so that
  DeepSpeed's global norm check discards the update everywhere: no rank skips alone and no optimizer
  state is touched;
- masters start from the module's fp32 weights, not from their bf16 rounding.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scd_sf.distributed import Ranks, ensure_process_group
from scd_sf.tensor_files import dtype_of
from scd_sf.train.base import (
    Engine,
    EngineConfig,
    SkipCounter,
    StepInfo,
    accumulation,
    engine_state,
    first_skip_flag,
    named_parameters,
    read_counters,
    whole_fp32_masters,
)
from scd_sf.train.local import LocalEngine
from scd_sf.train.optim import LearningRate, Schedule, param_groups, set_learning_rate
from scd_sf.train.shards import MASTER, MOMENTS, EngineState, Shard, StateFiles, gathered, share

_log = logging.getLogger(__name__)


def build_engine(
    module: nn.Module,
    cfg: EngineConfig,
    ranks: Ranks,
    *,
    global_batch: int,
    micro_batch: int,
    total_updates: int,
    schedule: LearningRate | None = None,
) -> Engine:
    """An engine for a trainable module. Raises UserError when world * micro_batch does not divide
    global_batch.

    ``total_updates`` of this engine's optimizer places the learning rate decay
    (``cfg.anneal_from``). ``schedule`` replaces what ``cfg`` says of the learning rate.
    """
    micro_batches = accumulation(global_batch, micro_batch, ranks.world)
    schedule = schedule or Schedule(cfg.lr, cfg.warmup, cfg.anneal_from, total_updates)
    if cfg.backend == "torch":
        return LocalEngine(module, cfg, ranks, micro_batches=micro_batches, schedule=schedule)
    return DeepSpeedEngine(
        module, cfg, ranks, micro_batch=micro_batch, micro_batches=micro_batches, schedule=schedule
    )


def frozen_engine(
    build: Callable[[], nn.Module],
    readers: Mapping[str, Callable[[], Tensor]],
    cfg: EngineConfig,
    ranks: Ranks,
) -> nn.Module:
    """A teacher: called like the module, never trained. backend deepspeed: ZeRO-3 without
    optimizer, else plain torch.

    ``build`` makes the module, ``readers`` return its parameters by name. Under ZeRO-3
    every module is partitioned as it is built, and rank 0 alone reads, one parameter at a time:
    nobody ever holds the whole (28 GB for Wan 14B in bf16). All ranks must call the teacher equally
    often (ZeRO-3 gathers weights together). ``cfg.offload`` keeps weights on the CPU.
    """
    dtype = dtype_of(cfg.dtype)
    if cfg.backend == "torch":
        with torch.device("meta"):
            module = build()
        module.load_state_dict(
            {name: tensor().to(ranks.device, dtype) for name, tensor in readers.items()},
            assign=True,
        )
        return module.requires_grad_(False)
    zero: dict[str, Any] = {"stage": 3, **_stage3_buckets(cfg)}
    if cfg.offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": ranks.device.type == "cuda"}
    config = {**_common(cfg), "train_batch_size": ranks.world, "zero_optimization": zero}
    deepspeed = _import_deepspeed(ranks)
    # without dtype=, which would mean bf16 on a CPU
    with deepspeed.zero.Init(config_dict_or_path=config, mem_efficient_linear=False):
        module = build().requires_grad_(False)
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if ranks.is_main:
                parameter.copy_(readers[name]())
    engine: nn.Module = _initialize(module, config, ranks, None)
    return engine


class DeepSpeedEngine:
    """See :class:`scd_sf.train.base.Engine`."""

    def __init__(
        self,
        module: nn.Module,
        cfg: EngineConfig,
        ranks: Ranks,
        *,
        micro_batch: int,
        micro_batches: int,
        schedule: LearningRate,
    ) -> None:
        self.cfg, self.ranks, self.micro_batches = cfg, ranks, micro_batches
        self.updates = 0
        self._schedule, self._skips = schedule, SkipCounter(cfg.max_skips)
        self._micro = 0
        self._bad = torch.zeros((), device=ranks.device)
        originals: dict[str, Tensor] = {}
        if cfg.dtype == "bf16":
            originals = {
                n: p.detach().cpu().clone() for n, p in named_parameters(module) if p.requires_grad
            }
        config = _training_config(cfg, ranks, micro_batch, micro_batches)
        groups = param_groups(named_parameters(module), cfg.weight_decay, cfg.lr_scale)
        self._engine = _initialize(module, config, ranks, groups)
        self.module: nn.Module = self._engine.module
        if cfg.dtype == "bf16":
            self._set_masters(originals)

    @property
    def skipped(self) -> int:
        return self._skips.total

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        if self._micro == self.micro_batches:
            raise RuntimeError(
                f"backward called more than micro_batches={self.micro_batches} times without step"
            )
        self._bad = torch.maximum(self._bad, first_skip_flag(loss))
        self._micro += 1
        if self._micro == self.micro_batches:
            dist.all_reduce(self._bad, op=dist.ReduceOp.MAX)
            loss = loss * torch.where(self._bad > 0, torch.nan, 1.0).to(loss.dtype)
        self._engine.backward(loss)
        if self._micro < self.micro_batches:
            self._engine.step()  # between updates this only counts the micro-batch

    def step(self) -> StepInfo:
        lr = self._schedule.at(self.updates)
        if self._micro < self.micro_batches:
            return StepInfo(stepped=False, grad_norm=0.0, finite=True, lr=lr)
        set_learning_rate(self._engine.optimizer.param_groups, lr)
        if self.cfg.zero_stage == 0:
            norm = self._clip_replicated()
            self._engine.step()
            finite = math.isfinite(norm)
        else:
            self._engine.step()
            finite = bool(self._engine.was_step_applied())
            norm = float(self._engine.get_global_grad_norm()) if finite else float("nan")
        self._micro = 0
        self._bad.zero_()
        self._skips.record(finite, self.updates)
        if finite:
            self.updates += 1
        return StepInfo(stepped=finite, grad_norm=norm, finite=finite, lr=lr)

    def _clip_replicated(self) -> float:
        """The gradient norm, and clipping, at stage 0. DeepSpeed reports no norm there and applies
        whatever it gets, so gradients that are not finite are dropped: AdamW leaves a parameter
        without gradient alone."""
        parameters = [
            parameter for _, parameter in named_parameters(self.module) if parameter.requires_grad
        ]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.cfg.grad_clip or math.inf))
        if not math.isfinite(norm):
            self._engine.zero_grad()
        return norm

    def fp32_masters(self) -> dict[str, Tensor]:
        return whole_fp32_masters(self, self.ranks)

    def owned(self) -> Iterator[Shard]:
        from deepspeed.runtime.zero import GatheredParameters

        master_shards = {shard.name: shard for shard in self._parts(MASTER)}
        for name, parameter in named_parameters(self.module):
            if name in master_shards:
                yield master_shards[name]
            else:
                with GatheredParameters([parameter]):
                    shard = share(name, parameter.detach().clone(), self.ranks)
                yield shard

    def _parts(self, kind: str) -> Iterator[Shard]:
        """This rank's parts of the masters or of one moment. At stage 0 every rank has everything
        and yields an even share."""
        for shard in self._local_shards(kind):
            is_replicated = self.cfg.zero_stage == 0
            yield (
                share(shard.name, shard.values.view(shard.shape), self.ranks)
                if is_replicated
                else shard
            )

    def _local_shards(self, kind: str) -> Iterator[Shard]:
        """Masters or a moment of the trained parameters as this rank stores them: views into
        DeepSpeed's flat tensors.

        The one place that reads DeepSpeed's own bookkeeping: its public functions gather whole
        tensors at stages 1 and 2, and give no position at stage 3 (0.19.8).
        """
        zero = self._engine.optimizer
        stage = self.cfg.zero_stage
        state = self._engine.basic_optimizer.state
        flats = self._flats()
        trainable: list[tuple[str, Any]] = [
            (n, p) for n, p in named_parameters(self.module) if p.requires_grad
        ]
        for name, parameter in trainable:
            offset, start, length, shape = 0, 0, parameter.numel(), parameter.shape
            if stage == 0:
                flat = parameter
            elif stage == 3:
                group, offset, rank_length = zero.grad_position[zero.get_param_id(parameter)]
                flat, start, shape = flats[group], self.ranks.rank * rank_length, parameter.ds_shape
                length = min(rank_length, max(0, parameter.ds_numel - start))
            elif parameter._hp_mapping is None:  # this rank has no part of it
                flat, length = flats[0], 0
            else:
                fragment = parameter._hp_mapping
                flat, offset = flats[fragment.param_group_index], fragment.hp_fragment_address.start
                start = fragment.lp_fragment_address.start
                length = fragment.lp_fragment_address.numel
            values = flat if kind == MASTER else state[flat][kind]
            yield Shard(
                name, values.detach().view(-1).narrow(0, offset, length), start, tuple(shape)
            )

    def _flats(self) -> list[Tensor]:
        """The fp32 tensors that DeepSpeed's AdamW updates: one per group, at stage 3 one per
        sub-group."""
        if self.cfg.zero_stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [
            tensor
            for group in self._engine.basic_optimizer.param_groups
            for tensor in group["params"]
        ]

    def state(self) -> EngineState:
        if self._micro:
            raise RuntimeError("state asked for between micro-batches; save after step")
        return engine_state(self, self.ranks, self._parts)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        counters = read_counters(path)
        files, state = StateFiles(path, counters.files), self._engine.basic_optimizer.state
        state.clear()
        if counters.updates:
            for flat in self._flats():
                step = torch.tensor(float(counters.updates), device=flat.device)
                state[flat] = {"step": step, **{kind: torch.zeros_like(flat) for kind in MOMENTS}}
        for kind in (MASTER, *MOMENTS) if counters.updates else (MASTER,):
            for shard in self._local_shards(kind):
                shard.values.copy_(files.read(kind, shard))
        for name, value in self.module.named_buffers():
            value.copy_(files.whole(name, value))
        self._refresh_weights()
        self.updates, self._skips.total = counters.updates, counters.skipped

    def _refresh_weights(self) -> None:
        """Copy the masters into the weights that the forward uses."""
        from deepspeed.runtime.zero import GatheredParameters

        parameters = dict(named_parameters(self.module))
        for name, master in gathered(self._parts(MASTER), self.ranks):
            with GatheredParameters([parameters[name]], modifier_rank=0):
                parameters[name].copy_(master)

    @torch.no_grad()
    def _set_masters(self, originals: dict[str, Tensor]) -> None:
        """Set the masters on all ranks to rank 0's fp32 weights ``originals``, which is emptied."""
        for shard in self._local_shards(MASTER):
            value = originals.pop(shard.name).float().to(self.ranks.device)
            dist.broadcast(value, src=0)
            shard.values.copy_(shard.of(value))


def _initialize(
    module: nn.Module, config: dict[str, Any], ranks: Ranks, groups: list[dict[str, Any]] | None
) -> Any:
    engine, *_ = _import_deepspeed(ranks).initialize(
        model=module, model_parameters=groups, config=config
    )
    return engine


def _import_deepspeed(ranks: Ranks) -> Any:
    """The library, with a process group already there, so that it looks for neither MPI nor a
    launcher."""
    if ranks.device.type == "cpu":
        _prepare_cpu_collectives(ranks)
    ensure_process_group(ranks)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    return deepspeed


def _prepare_cpu_collectives(ranks: Ranks) -> None:
    """Make DeepSpeed use gloo's CPU collectives, with a warning, where ninja or g++ is missing. It
    compiles its own otherwise."""
    # pip installs ninja beside Python
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    missing_tools = [
        tool for tool in ("ninja", os.environ.get("CXX", "g++")) if shutil.which(tool) is None
    ]
    if missing_tools:
        from deepspeed import ops

        # the table that DeepSpeed's build reports fill
        ops.__compatible_ops__.update({"deepspeed_shm_comm": False})
        if ranks.is_main:
            _log.warning(
                "%s not found: DeepSpeed uses gloo's collectives (slower; same numbers)",
                missing_tools[0],
            )
    elif ranks.is_main:
        _explain_compilation()


def _explain_compilation() -> None:
    """Warn that the first start on a CPU is slow, because DeepSpeed compiles its collectives once
    per machine."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache / "torch_extensions"))
    if not list(root.glob("**/deepspeed_shm_comm/*.so")):
        _log.warning(
            "compiling DeepSpeed's CPU collectives, once per machine: half a minute, more when it is busy"
        )


def _common(cfg: EngineConfig) -> dict[str, Any]:
    return {
        "bf16": {"enabled": cfg.dtype == "bf16"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _training_config(
    cfg: EngineConfig, ranks: Ranks, micro_batch: int, micro_batches: int
) -> dict[str, Any]:
    on_gpu = ranks.device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": cfg.zero_stage,
        "reduce_bucket_size": cfg.bucket,
        "allgather_bucket_size": cfg.bucket,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
    }
    if cfg.zero_stage == 3:
        zero.update(_stage3_buckets(cfg))
    if cfg.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    adam = {
        "lr": cfg.lr,
        "betas": list(cfg.betas),
        "eps": cfg.eps,
        "weight_decay": cfg.weight_decay,
    }
    config = {
        **_common(cfg),
        "train_batch_size": micro_batch * micro_batches * ranks.world,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": cfg.grad_clip if cfg.zero_stage else 0.0,
        "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": True, "fused": True}},
        "zero_optimization": zero,
    }
    if cfg.dtype == "bf16":
        config["communication_data_type"] = "fp32"
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _stage3_buckets(cfg: EngineConfig) -> dict[str, Any]:
    """Without ``memory_efficient_linear``, by which one ZeRO-3 engine replaces F.linear for the
    whole process."""
    return {
        "memory_efficient_linear": False,
        "stage3_prefetch_bucket_size": cfg.bucket,
        "stage3_max_live_parameters": 2 * cfg.bucket,
        # smaller ones stay whole; DeepSpeed's 1e5 by default
        "stage3_param_persistence_threshold": cfg.bucket // 500,
    }
