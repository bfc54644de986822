"""Bytes that one model and its engine hold on one process, by backend and ZeRO stage.

What is allocated where was read in DeepSpeed 0.19.8 (``runtime/zero/stage_1_and_2.py``,
``stage3.py``) and compared with the memory of real runs (``tests/tools/plan/test_measured.py``). P
parameters, N processes. With bf16 weights: masters 4 P, two moments 8 P and the average 4 P are
divided by N from ZeRO-1 on, gradients (bf16 while they are reduced, fp32 sums) from ZeRO-2 on,
weights 2 P at ZeRO-3.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from scd_sf.train.base import EngineConfig

# DeepSpeed keeps two reduction buckets while it communicates beside the backward pass (on a GPU)
_OVERLAP = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on the device. ``weights`` .. ``average`` are there all the time; ``accumulated`` while
    a step's micro-batches add up; ``buffers`` for communication while the model runs; ``update``
    while the optimizer steps, instead of activations."""

    weights: int
    masters: int
    moments: int
    average: int
    accumulated: int
    buffers: int
    update: int

    @property
    def always(self) -> int:
        """Bytes that are there all the time."""
        return self.weights + self.masters + self.moments + self.average

    def as_json(self) -> dict[str, int]:
        return asdict(self)


def trained_memory(
    count: int,
    cfg: EngineConfig,
    world: int,
    *,
    micro_batches: int,
    averages: int,
    on_gpu: bool = True,
) -> Memory:
    """Memory of a trained model of ``count`` parameters. ``averages``: number of its EMA copies."""
    size = 2 if cfg.dtype == "bf16" else 4
    share = math.ceil(count / world)
    if cfg.backend == "torch":
        masters = 4 * count if cfg.dtype == "bf16" else 0
        gradients = 4 * count  # fp32 sums; clipping makes another copy
        return Memory(
            size * count, masters, 8 * count, 4 * share * averages, gradients, 0, 2 * gradients
        )
    if cfg.zero_stage == 0:
        return Memory(
            4 * count, 0, 8 * count, 4 * share * averages, 4 * count, 4 * cfg.bucket, 4 * count
        )
    device = 0 if cfg.offload else 1
    full = min(cfg.bucket, count)
    # buckets; a flat copy, its fp32 sum
    buffers = size * cfg.bucket * (_OVERLAP if on_gpu else 1) + full * (size + 4)
    parts = Memory(size * count, 4 * share, 8 * share, 4 * share * averages, 0, buffers, 0)
    gradients = 4 * (count if cfg.zero_stage == 1 else share)
    if cfg.zero_stage == 3:
        # gathered and prefetched layers; reduce-scatter's copy
        buffers += size * min(3 * cfg.bucket, count) + 4 * full
        parts = Memory(size * share, 4 * share, 8 * share, 4 * share * averages, 0, buffers, 0)
    accumulated = gradients if micro_batches > 1 or cfg.zero_stage == 3 else 0
    return Memory(
        parts.weights,
        device * parts.masters,
        device * parts.moments,
        device * parts.average,
        device * accumulated,
        buffers,
        device * (gradients + 4 * share + size * share),
    )


def frozen_memory(count: int, cfg: EngineConfig, world: int) -> Memory:
    """Memory of a teacher, which has weights alone. They are whole (backend torch), divided among
    all processes (ZeRO-3), or on the CPU (offload)."""
    size = 2 if cfg.dtype == "bf16" else 4
    if cfg.backend == "torch":
        return Memory(size * count, 0, 0, 0, 0, 0, 0)
    gather_buffer = size * min(3 * cfg.bucket, count)
    return Memory(
        0 if cfg.offload else size * math.ceil(count / world), 0, 0, 0, 0, gather_buffer, 0
    )


def host_state(count: int, cfg: EngineConfig, world: int, *, averages: int) -> int:
    """Bytes of host memory on one process beside the device: what ``offload`` keeps there."""
    if not cfg.offload or cfg.backend == "torch":
        return 0
    return (12 + 4 + 4 * averages) * math.ceil(count / world)


def frozen_on_host(count: int, cfg: EngineConfig, world: int) -> int:
    """Bytes of host memory on one process: a teacher's weights that ``offload`` keeps there."""
    if not cfg.offload or cfg.backend != "deepspeed":
        return 0
    return (2 if cfg.dtype == "bf16" else 4) * math.ceil(count / world)


def saved(count: int, *, averages: int) -> int:
    """Bytes of one checkpoint: weights and averages whole in fp32, and each process's masters,
    moments and averages."""
    return 4 * count * ((1 + averages) + 3 + averages)
