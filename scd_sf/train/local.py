"""An engine in plain torch with the clipping, the AdamW and the skip rule of the DeepSpeed engine.

Weights are fp32 masters; with dtype bf16 the module holds bf16 copies, refreshed after each update.
With several processes every rank keeps everything and gradients are averaged in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scd_sf.distributed import Ranks
from scd_sf.train.base import (
    EngineConfig,
    SkipCounter,
    StepInfo,
    engine_state,
    first_skip_flag,
    named_parameters,
    read_counters,
    whole_fp32_masters,
)
from scd_sf.train.optim import LearningRate, param_groups, set_learning_rate
from scd_sf.train.shards import MASTER, MOMENTS, EngineState, Shard, StateFiles, share


class LocalEngine:
    """See :class:`scd_sf.train.base.Engine`."""

    def __init__(
        self,
        module: nn.Module,
        cfg: EngineConfig,
        ranks: Ranks,
        *,
        micro_batches: int,
        schedule: LearningRate,
    ) -> None:
        self.module = module.to(ranks.device)
        self.cfg = cfg
        self.ranks = ranks
        self.micro_batches = micro_batches
        self.updates = 0
        self._schedule, self._skips = schedule, SkipCounter(cfg.max_skips)
        self._broadcast()
        originals = {
            name: p.detach().clone() for name, p in named_parameters(module) if p.requires_grad
        }
        if cfg.dtype == "bf16":
            module.to(torch.bfloat16)
        self._live = {name: p for name, p in named_parameters(module) if p.requires_grad}
        self._masters: dict[str, Tensor] = dict(self._live)
        if cfg.dtype == "bf16":
            self._masters = {name: nn.Parameter(value.float()) for name, value in originals.items()}
        self._gradients: dict[str, Tensor] = {}
        self._micro = 0
        self._bad = torch.zeros((), device=ranks.device)
        groups = param_groups(self._masters.items(), cfg.weight_decay, cfg.lr_scale)
        self._optimizer = torch.optim.AdamW(
            groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True
        )

    @property
    def skipped(self) -> int:
        return self._skips.total

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: Tensor) -> None:
        if self._micro == self.micro_batches:
            raise RuntimeError(
                f"backward called more than micro_batches={self.micro_batches} times without step"
            )
        self._bad = torch.maximum(self._bad, first_skip_flag(loss))
        (loss / self.micro_batches).backward()
        for name, parameter in self._live.items():
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                self._gradients[name] = (
                    self._gradients[name] + gradient if name in self._gradients else gradient
                )
                parameter.grad = None
        self._micro += 1

    def step(self) -> StepInfo:
        lr = self._schedule.at(self.updates)
        if self._micro < self.micro_batches:
            return StepInfo(stepped=False, grad_norm=0.0, finite=True, lr=lr)
        gradients = self._averaged_gradients()
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()])
        )
        finite = not self.ranks.any(bool(self._bad.item()) or not bool(torch.isfinite(norm)))
        if finite:
            self._apply(gradients, norm, lr)
        self._gradients, self._micro = {}, 0
        self._bad.zero_()
        self._skips.record(finite, self.updates)
        if finite:
            self.updates += 1
        return StepInfo(stepped=finite, grad_norm=float(norm), finite=finite, lr=lr)

    def fp32_masters(self) -> dict[str, Tensor]:
        return whole_fp32_masters(self, self.ranks)

    def owned(self) -> Iterator[Shard]:
        for name, parameter in named_parameters(self.module):
            yield share(name, self._masters.get(name, parameter), self.ranks)

    def state(self) -> EngineState:
        if self._micro:
            raise RuntimeError("state asked for between micro-batches; save after step")
        return engine_state(self, self.ranks, self._parts)

    def _parts(self, kind: str) -> Iterator[Shard]:
        for name, master in self._masters.items():
            yield share(
                name, master if kind == MASTER else self._optimizer.state[master][kind], self.ranks
            )

    @torch.no_grad()
    def load(self, path: Path) -> None:
        counters = read_counters(path)
        files = StateFiles(path, counters.files)
        self._optimizer.state.clear()
        for name, master in self._masters.items():
            full_shard = Shard(name, master.detach().reshape(-1), 0, tuple(master.shape))
            master.copy_(files.read(MASTER, full_shard).view_as(master))
            self._live[name].copy_(master)
            if counters.updates:
                # In the master's memory order (convolutions may be channels-last), which the fused
                # AdamW assumes for all its tensors.
                moments = {kind: files.read(kind, full_shard).view_as(master) for kind in MOMENTS}
                state = {
                    kind: torch.empty_like(master).copy_(value) for kind, value in moments.items()
                }
                step = torch.tensor(float(counters.updates), device=master.device)
                self._optimizer.state[master] = {"step": step, **state}
        for name, value in self.module.named_buffers():
            value.copy_(files.whole(name, value))
        self.updates, self._skips.total = counters.updates, counters.skipped

    def _broadcast(self) -> None:
        """Every rank starts from rank 0's weights, as DeepSpeed does."""
        if self.ranks.world > 1:
            for tensor in (*self.module.parameters(), *self.module.buffers()):
                dist.broadcast(tensor.detach(), src=0)

    def _averaged_gradients(self) -> dict[str, Tensor]:
        """Mean gradient over ranks by name, fp32, reduced in buckets; a parameter without gradient
        counts as zero."""
        gradients = {
            n: self._gradients.get(n, torch.zeros_like(m)) for n, m in self._masters.items()
        }
        if self.ranks.world == 1:
            return gradients
        bucket: list[Tensor] = []
        tensors = list(gradients.values())
        for index, tensor in enumerate(tensors):
            bucket.append(tensor)
            if sum(t.numel() for t in bucket) >= self.cfg.bucket or index == len(tensors) - 1:
                flat = torch.cat([t.reshape(-1) for t in bucket])
                dist.all_reduce(flat)
                flat /= self.ranks.world
                for target, part in zip(
                    bucket, flat.split([t.numel() for t in bucket]), strict=True
                ):
                    target.copy_(part.view_as(target))
                bucket = []
        return gradients

    @torch.no_grad()
    def _apply(self, gradients: dict[str, Tensor], norm: Tensor, lr: float) -> None:
        scale = 1.0
        if self.cfg.grad_clip > 0:
            scale = 1.0 / max(1.0, (float(norm) + 1e-6) / self.cfg.grad_clip)
        for name, master in self._masters.items():
            master.grad = gradients[name] * scale
        set_learning_rate(self._optimizer.param_groups, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self.cfg.dtype == "bf16":
            for name, live in self._live.items():
                live.copy_(self._masters[name])
