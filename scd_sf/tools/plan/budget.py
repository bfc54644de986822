"""Memory by role and phase, disk, FLOPs and hours on a cluster. What to change when it does not
fit: advice.py.

Activations are metered on the meta device (phases.py), states are counted (engines.py).
Hours are an estimate: FLOPs over the stated share (MFU) of the stated peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scd_sf.nn.tables import LIMIT
from scd_sf.tools.plan.engines import (
    Memory,
    frozen_memory,
    frozen_on_host,
    host_state,
    saved,
    trained_memory,
)
from scd_sf.tools.plan.job import PlanJob
from scd_sf.tools.plan.phases import Phase
from scd_sf.tools.stage_configs import Stage3Config
from scd_sf.train.base import accumulation
from scd_sf.types import UserError

GIB = 2**30
TEXT = "text encoder"  # of prompts that are a list: whole on every rank, on its device
CONTEXT_GIB, SLACK = 0.8, 0.1  # estimates: CUDA's own memory, and what the allocator cannot use
TABLES_GIB = 2 * LIMIT / GIB  # rotary positions and masks that are kept


@dataclass(frozen=True)
class Cluster:
    """``gpu_mem`` GiB each; ``mfu``: the share of ``peak_tflops`` (dense bf16) that is expected to
    be used. ``host_mem``: GiB of main memory in each node (0: unknown, so nothing is checked)."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_mem: float = 80.0
    peak_tflops: float = 989.0
    mfu: float = 0.45
    on_gpu: bool = True
    host_mem: float = 0.0

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus_per_node < 1:
            raise UserError(
                f"--nodes is {self.nodes}, --gpus-per-node {self.gpus_per_node}; at least 1 each"
            )
        sizes = (self.gpu_mem, self.peak_tflops)
        if not all(0 < size < math.inf for size in sizes) or not 0 < self.mfu <= 1:
            raise UserError(
                "--gpu-mem and --peak-tflops must be above 0 and finite, --mfu in (0, 1]"
            )
        if not 0 <= self.host_mem < math.inf:
            raise UserError(f"--host-mem is {self.host_mem}; give the GiB of a machine, 0: unknown")

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Budget:
    """Bytes per process, FLOPs of one step over all processes."""

    job: PlanJob
    cluster: Cluster
    counts: dict[str, int]
    memory: dict[str, Memory]
    phases: list[Phase]

    def at(self, phase: Phase) -> int:
        """Device memory while a phase runs. All states are held; beside them either its gradients,
        buffers and activations, or its optimizer's step, whichever is larger."""
        always = sum(memory.always for memory in self.memory.values())
        model_memory = self.memory[phase.trains]
        step_bytes = (
            model_memory.accumulated
            + sum(memory.buffers for memory in self.memory.values())
            + phase.peak
        )
        return always + max(step_bytes, model_memory.update)

    @property
    def peak(self) -> int:
        return max(self.at(phase) for phase in self.phases)

    @property
    def validation(self) -> int:
        """Device memory while validating: all states and the averaged student in fp32, without what
        sampling and the VAE's decoder need."""
        return sum(memory.always for memory in self.memory.values()) + 4 * self.counts["student"]

    @property
    def needed_gib(self) -> float:
        """Estimated GiB per GPU: the peak, tables that are kept, CUDA's context, the allocator's
        slack."""
        return self.peak / GIB * (1 + SLACK) + TABLES_GIB + CONTEXT_GIB

    @property
    def gpu_fits(self) -> bool:
        return self.needed_gib <= self.cluster.gpu_mem

    @property
    def host_fits(self) -> bool:
        """Whether a node's processes have the main memory that they take; true where that is
        unknown."""
        return not self.cluster.host_mem or self.node_host / GIB <= self.cluster.host_mem

    @property
    def fits(self) -> bool:
        return self.gpu_fits and self.host_fits

    @property
    def flops(self) -> float:
        clips = self.job.cfg.train.global_batch
        return clips * sum(phase.times * phase.flops for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Estimated seconds of one step."""
        return self.flops / (
            self.cluster.world * self.cluster.peak_tflops * 1e12 * self.cluster.mfu
        )

    @property
    def trained_roles(self) -> list[str]:
        """Models that have an optimizer."""
        return [role for role in self.counts if role not in ("teacher", TEXT)]

    @property
    def offloaded(self) -> int:
        """Host memory of one process that offload keeps: optimizers' states, the teacher's
        weights."""
        engines, world = self.job.engines(), self.cluster.world
        states = sum(
            host_state(self.counts[role], engines[role], world, averages=self.job.averages)
            for role in self.trained_roles
        )
        if "teacher" in self.counts:
            states += frozen_on_host(self.counts["teacher"], engines["teacher"], world)
        return states

    @property
    def host(self) -> int:
        """Host memory of one process at its peak: the student's average for validation in fp32,
        what offload keeps, and the larger of starting (students and critics come in fp32) and
        saving (states are copied)."""
        trained_roles, student = self.trained_roles, 4 * self.counts["student"]
        start = sum(4 * self.counts[role] for role in trained_roles) + 4 * max(
            self.counts[r] for r in trained_roles
        )
        start = max(start, student + self.memory[TEXT].weights if TEXT in self.memory else 0)
        shares = sum(
            12 * math.ceil(self.counts[role] / self.cluster.world) for role in trained_roles
        )
        return student + self.offloaded + max(start, shares + (1 + self.job.averages) * student)

    @property
    def node_host(self) -> int:
        """Host memory of all processes of a node at their peak."""
        return self.cluster.gpus_per_node * self.host

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint on the disk."""
        critic_bytes = sum(12 * count for role, count in self.counts.items() if role == "critic")
        return saved(self.counts["student"], averages=self.job.averages) + critic_bytes

    @property
    def disk(self) -> int:
        """Bytes of the checkpoints that are kept and of the one being written."""
        return (self.job.cfg.train.keep + 1) * self.checkpoint

    def clip_bytes(self) -> tuple[int, int]:
        """Bytes of one training clip: its 16-bit latents, and its text states of all tokens."""
        shape = self.job.shape
        latents = 2 * shape.frames * shape.channels * shape.height * shape.width
        return latents, 2 * self.job.text_tokens * self.job.model.wan.text_dim

    def cache_bytes(self) -> int:
        """Bytes of a whole rollout's K/V, which are part of a phase's peak: keys and values of
        every layer with a history."""
        model, shape = self.job.model, self.job.shape
        layers = len(model.scd.encoder_layers) if model.family == "scd" else model.wan.num_layers
        size = 2 if self.job.engines()["student"].dtype == "bf16" else 4
        return (
            2
            * layers
            * model.wan.clip_tokens(shape)
            * model.wan.width
            * size
            * self.job.cfg.train.micro_batch
        )


def budget(job: PlanJob, cluster: Cluster, phases: list[Phase] | None = None) -> Budget:
    """The budget of a job on a cluster. ``phases``: those of a job with the same activations, which
    are not metered again. Raises UserError where processes do not divide the global batch."""
    train = job.cfg.train
    micro_batches = accumulation(train.global_batch, train.micro_batch, cluster.world)
    counts, memory = job.counts(), dict[str, Memory]()
    for role, engine in job.engines().items():
        if role == "teacher":
            memory[role] = frozen_memory(counts[role], engine, cluster.world)
            continue
        memory[role] = trained_memory(
            counts[role],
            engine,
            cluster.world,
            micro_batches=micro_batches,
            averages=job.averages if role == "student" else 0,
            on_gpu=cluster.on_gpu,
        )
    if job.text_parameters and isinstance(job.cfg, Stage3Config):
        counts[TEXT] = job.text_parameters
        size = 4 if job.cfg.text.dtype == "fp32" else 2
        memory[TEXT] = Memory(size * job.text_parameters, 0, 0, 0, 0, 0, 0)
    return Budget(job, cluster, counts, memory, phases or job.phases())
