"""What the training loops of the recipes share: which samples a step uses, and how a loop is stopped and ends.

Data order and random numbers are pure functions of (seed, step, micro-batch), so a resumed run repeats an
uninterrupted one bit for bit on CPU, and the same global batch on other numbers of processes sees the same samples.

    start = checkpointer.resume()
    with Loop(run, checkpointer, cfg.train, start) as loop:
        for step in loop:
            ...  # one update, on the data of loop.position(step)
            last, request = step == cfg.train.steps, loop.request()
            if last or request or step % cfg.train.save_every == 0:
                checkpointer.save(step, required=last or request is Request.STOP)
            if request is Request.STOP and not last:
                loop.leave(step)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import NoReturn, Protocol, Self

from scd_sf.data.latents import epoch_order
from scd_sf.distributed import Ranks
from scd_sf.train.base import Diverged
from scd_sf.train.ema import EmaConfig
from scd_sf.train.run import Run, rank_zero_print
from scd_sf.train.skipped import Rollback, left_out_ranges, position, read_rollbacks, write_rollback
from scd_sf.train.stop import EXIT_AGAIN, Control, Request, leave
from scd_sf.types import Logs, UserError, VideoShape

_log = logging.getLogger(__name__)

RESUMABLE = (
    *(
        f"train.{name}"
        for name in (
            "steps",
            "save_every",
            "validate_every",
            "keep",
            "keep_every",
            "max_rollbacks",
            "async_save",
            "prefetch",
        )
    ),
    *(
        f"{engine}.{name}"  # how the state is laid out, not what it is
        for engine in ("engine", "student", "critic_engine", "teacher_engine")
        for name in ("kind", "zero_stage", "offload", "bucket")
    ),
)


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
        for name in ("steps", "global_batch", "micro_batch", "save_every", "validate_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("keep_every", "max_rollbacks", "prefetch"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be at least 0")


def micro_batches(cfg: TrainConfig, seed: int, ranks: Ranks, step: int, size: int) -> list[tuple[int, list[int]]]:
    """This rank's micro-batches of one update: (global micro-batch number, sample indices) each."""
    order = epoch_order(seed, step, cfg.global_batch, size)
    count = cfg.global_batch // (cfg.micro_batch * ranks.world)
    numbers = [index * ranks.world + ranks.rank for index in range(count)]
    return [(n, order[n * cfg.micro_batch : (n + 1) * cfg.micro_batch]) for n in numbers]


def add_to(sums: Logs, logs: Logs, micro_batches: int) -> None:
    """Add one of ``micro_batches`` micro-batches' share to the means in ``sums``."""
    for name, value in logs.items():
        sums[name] = sums.get(name, 0.0) + value / micro_batches


def pixel_shape(shape: VideoShape) -> dict[str, int]:
    """What a checkpoint's provenance says of the videos it was trained on; sampling takes it as its default."""
    return {"frames": shape.pixel_frames, "height": shape.pixel_height, "width": shape.pixel_width}


class Waits(Protocol):
    """What a loop needs of the one that saves (``train/checkpointing.py``)."""

    def settle(self) -> None:
        """Wait for the checkpoint that is being written; all ranks call it."""
        ...


class Loop:
    """The steps ``start`` + 1 .. ``total`` of a run, with progress and heartbeat, and how they end.

    It listens to signals and to ``RUN/save`` and ``RUN/stop`` (``train/stop.py``). ``status.json`` says how the loop
    ended. An error because another rank is gone becomes one that names it. A run that diverged notes what it leaves out
    and ends with exit code 75.
    """

    def __init__(self, run: Run, checkpointer: Waits, train: TrainConfig, start: int) -> None:
        self.run, self.ranks, self.start, self.train = run, run.ranks, start, train
        self._checkpointer, self._step = checkpointer, start
        self._control = Control(run.dir, run.ranks, run.cfg.heartbeat_seconds)
        rows = run.ranks.on_main(lambda: [(row.at_step, row.back_to, row.left_out) for row in read_rollbacks(run.dir)])
        self._rollbacks = [Rollback(*row) for row in rows]
        self._left_out = left_out_ranges(self._rollbacks)

    def __enter__(self) -> Self:
        self._control.start(self.start, self.train.steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._control.say("finished")
            elif isinstance(error, Diverged):
                self._leave_out(error)
            elif isinstance(error, Exception):
                blamed = self._control.blame(error) if isinstance(error, RuntimeError) else None
                self._control.say("failed", str(blamed or error))
                if blamed is not None:
                    raise blamed from error
        finally:
            self._control.close()

    def __iter__(self) -> Iterator[int]:
        for step in self.run.progress(self.train.steps, self.start):
            self._step = step
            self._control.beat(step)
            yield step
            self._control.fulfilled()

    def position(self, step: int) -> int:
        """Where ``step`` stands in the order of data and random numbers: further on after the run diverged."""
        return position(step, self._left_out)

    def request(self) -> Request:
        """What anybody asked any rank for since the step before; the same on all ranks, which all call it."""
        return self._control.request()

    def leave(self, step: int) -> NoReturn:
        """End all ranks with exit code 75, "run me again"; ``step`` is saved."""
        self._end(f"stopped after step {step}, saved", self._control.reason)

    def _leave_out(self, error: Diverged) -> None:
        """Note that the data since the last checkpoint is left out, and end. All ranks together.

        UserError: there is no checkpoint, or ``max_rollbacks`` are used up.
        """
        self._checkpointer.settle()
        path = self.ranks.on_main(self.run.checkpoints.newest)
        if path is None or len(self._rollbacks) >= self.train.max_rollbacks:
            no_more = f"{self.train.max_rollbacks} rollbacks did not help"
            why = "no checkpoint to go back to" if path is None else no_more
            self._control.say("failed", f"{error}; {why}")
            raise UserError(f"{error}; {why}; the batches are listed in {self.run.dir / 'skipped.jsonl'}") from error
        newest = int(path.name.removeprefix("step_"))
        rollback = Rollback(self._step, newest, self.position(self._step) - newest)
        self.ranks.on_main(lambda: write_rollback(self.run.dir, rollback))
        again = f"{error}: back to step {newest}, leaving out the data of the {self._step - newest} steps since"
        self._end(again, again)

    def _end(self, text: str, reason: str) -> NoReturn:
        self._control.fulfilled()
        self._control.say("interrupted", reason)
        rank_zero_print(self.ranks, f"{text}; run the same command again to go on")
        self.run.finish()
        self.ranks.barrier()
        leave(EXIT_AGAIN)
