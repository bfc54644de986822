"""Length of a training, and the samples of each step.

Data order and random numbers are pure functions of (seed, step, micro-batch), so a resumed run
repeats an uninterrupted one bit for bit on CPU, and the same global batch on other numbers of
processes sees the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scd_sf.data.latents import epoch_order
from scd_sf.distributed import Ranks
from scd_sf.train.ema import EmaConfig
from scd_sf.types import Logs, UserError

RESUMABLE = (
    "train.steps",
    "train.save_every",
    "train.validate_every",
    "train.keep",
    "train.keep_every",
    "train.max_rollbacks",
    "train.async_save",
    "train.prefetch",
    "checkpointing",  # what is kept and what is computed again
    "recompute_attention",
    *(
        f"{engine}.{name}"  # how the state is laid out, not what it is
        for engine in ("engine", "student_engine", "critic_engine", "teacher_engine")
        for name in ("backend", "zero_stage", "offload", "bucket")
    ),
)
"""Fields that may differ when a run is resumed."""


@dataclass
class TrainConfig:
    """Length, batches and checkpoints of a training."""

    steps: int = 1000
    """Optimiser updates."""
    global_batch: int = 64
    """Clips (or prompts) per update on all processes together."""
    micro_batch: int = 1
    """Of these, per process and forward; accumulation follows from both."""
    save_every: int = 100
    """Updates between checkpoints."""
    validate_every: int = 100
    """Updates between validations."""
    keep: int = 2
    """So many of the newest checkpoints stay on disk (and the best one, where a recipe knows
    it)."""
    keep_every: int = 0
    """The checkpoints of every n-th step stay, too; 0: none."""
    max_rollbacks: int = 2
    """How often a run that diverged (``engine.max_skips`` in a row, exit code 75) may be run again
    from its last checkpoint, without the data since then."""
    async_save: bool = False
    """Copy checkpoints to the CPU and write them while the training goes on."""
    prefetch: int = 2
    """Micro-batches that are read (or encoded) ahead; 0: none."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """The average of the weights."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "global_batch",
            "micro_batch",
            "save_every",
            "validate_every",
            "keep",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("keep_every", "max_rollbacks", "prefetch"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be at least 0")


def micro_batches(
    cfg: TrainConfig, seed: int, ranks: Ranks, step: int, size: int
) -> list[tuple[int, list[int]]]:
    """This rank's micro-batches of one update: (global micro-batch number, sample indices) each."""
    order = epoch_order(seed, step, cfg.global_batch, size)
    count = cfg.global_batch // (cfg.micro_batch * ranks.world)
    numbers = [index * ranks.world + ranks.rank for index in range(count)]
    return [(n, order[n * cfg.micro_batch : (n + 1) * cfg.micro_batch]) for n in numbers]


def add_to(sums: Logs, logs: Logs, micro_batches: int) -> None:
    """Add one of ``micro_batches`` micro-batches' share to the means in ``sums``."""
    for name, value in logs.items():
        sums[name] = sums.get(name, 0.0) + value / micro_batches
