"""What the recipes share: their command line, which samples and random numbers a step uses, saving and resuming.

Data order and random numbers are pure functions of (seed, step, micro-batch), so a resumed run repeats an
uninterrupted one bit for bit on CPU, and the same global batch on other numbers of processes sees the same samples.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeVar

from torch import Tensor

from scd_sf.checkpoint import STATE, SaveFailed, problem_of
from scd_sf.data.latents import epoch_order
from scd_sf.distributed import Ranks
from scd_sf.files import read_json, read_typed, safe_path
from scd_sf.train.base import Diverged, Engine
from scd_sf.train.checkpointing import Saving
from scd_sf.train.ema import Ema, EmaConfig
from scd_sf.train.run import Run, rank_zero_print
from scd_sf.train.shards import gathered, read_shards
from scd_sf.train.stop import EXIT_AGAIN, Control, Wish, leave
from scd_sf.types import Logs, UserError, VideoShape

T = TypeVar("T")
_log = logging.getLogger(__name__)
_BEGUN = "begun/"
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
    """How often a run that diverged goes back to its last checkpoint and leaves out the data since
    then, before it gives up."""
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


def pixel_shape(shape: VideoShape) -> dict[str, int]:
    """What a checkpoint's provenance says of the videos it was trained on; sampling takes it as its default."""
    return {"frames": shape.pixel_frames, "height": shape.pixel_height, "width": shape.pixel_width}


class _Interrupted(Exception):
    """Leave within a step, of which ``done`` has what later parts need."""

    def __init__(self, done: Logs) -> None:
        super().__init__("interrupted")
        self.done = done


@dataclass(frozen=True)
class _Saved:
    """``recipe.json`` of a checkpoint. In ``record`` null stands for a number that was not finite."""

    step: int
    ema_updates: int
    record: dict[str, float | None]
    extra: list[str]

    def numbers(self, path: Path) -> dict[str, float]:
        """``record``. UserError when a number that decides something is not there."""
        for key, value in self.record.items():
            if value is None and not key.startswith(_BEGUN):
                raise UserError(f"{path / STATE}/recipe.json: record.{key} is no number; resume from another step")
        return {key: math.nan if value is None else float(value) for key, value in self.record.items()}


class TrainState:
    """Everything a run needs to go on: engines, the EMA, and a small JSON record; saved and loaded as one.

        for step in state.steps(state.resume()):
            with state.attempt(step):
                ...  # one update; data and random numbers by state.position(step)

    ``model`` is the engine whose weights are the checkpoint; ``describe(step)`` gives config.yaml and provenance;
    ``record`` holds small numbers and ``extra`` further averages that must survive a restart (stage 3's best EMA).
    """

    def __init__(
        self,
        run: Run,
        engines: Mapping[str, Engine],
        ema: Ema,
        describe: Callable[[int], tuple[str, Mapping[str, object]]],
        train: TrainConfig,
    ) -> None:
        self.checkpoints, self.ranks, self.engines, self.ema = run.checkpoints, run.ranks, dict(engines), ema
        self.run, self.describe, self.train = run, describe, train
        self.control = Control(run.dir, run.ranks, run.cfg.heartbeat_seconds)
        self.record: dict[str, float] = {}
        self.extra: dict[str, Ema] = {}
        self._saving: Saving | None = None
        self._sizes = {name: sum(math.prod(shard.shape) for shard in e.owned()) for name, e in engines.items()}

    def resume(self) -> int:
        """Load the newest verified step and open the metric writers there; returns the number of finished updates."""
        path = self.run.resume_from()
        if path is not None:
            self._check_data(path)
        if path != self.checkpoints.path(self.train.steps):
            self._check_space()
        step = self._load(path) if path is not None else 0
        self.run.start(step)
        return step

    def _check_data(self, path: Path) -> None:
        """UserError where the checkpoint was trained on other data than are there now."""
        before = read_json(path / "provenance.json", "restore it").get("data_hash")
        now = self.describe(0)[1].get("data_hash")
        if None not in (before, now) and before != now:
            raise UserError(
                f"{path}: was trained on other data than are there now; put those back, or use a new run.dir"
            )

    def _check_space(self) -> None:
        """UserError on every rank, before any training, when not even one checkpoint fits on the disk."""
        problem = ""
        if self.ranks.is_main:
            problem = problem_of(lambda: self.checkpoints.require_space(self._bytes(), "one checkpoint"))
        if self.ranks.any(bool(problem)):
            raise UserError(problem or f"{self.run.dir}: rank 0 has no room for a checkpoint; see its message")

    def steps(self, start: int) -> Iterator[int]:
        """Steps start+1 .. ``train.steps``, with progress and heartbeat; after a rollback some come again."""
        self.control.start(start, self.train.steps)
        try:
            yield from self.run.progress(self.train.steps, start)
            self.control.say("finished")
        finally:
            self.control.close()

    @contextmanager
    def attempt(self, step: int) -> Iterator[None]:
        """The body of one step, and what follows it: a checkpoint when it is due or asked for, leaving when asked to.

        Too many non-finite updates end the body and roll the run back. An error because another rank is gone becomes
        one that names it.
        """
        self.control.beat(step)
        try:
            yield
            self._after(step)
        except _Interrupted as stop:
            self._leave_within(step, stop.done)
        except Diverged as error:
            self._roll_back(step, error)
        except RuntimeError as error:
            blamed = self.control.blame(error)
            self.control.say("failed", str(blamed or error))
            raise (blamed or error) from error
        except Exception as error:
            self.control.say("failed", str(error))
            raise

    def position(self, step: int) -> int:
        """Where step ``step`` stands in the order of data and random numbers: further on after a rollback."""
        return step + int(self.record.get("left_out", 0))

    def save(self, step: int, *, required: bool = True) -> None:
        """Write ``step`` (number of finished updates); all ranks call it. A step that is there already is kept.

        Unless ``required``, a failure is an alarm in the log, and the next checkpoint tries again.
        """
        self.settle()
        if self.ranks.on_main(lambda: self.checkpoints.has(step)):
            return
        problem = problem_of(lambda: self.checkpoints.prepare(step, self._bytes())) if self.ranks.is_main else ""
        if self.ranks.any(bool(problem)):
            self._failed(step, problem, required)
            return
        self._saving = Saving(self.checkpoints, self.ranks, step, self._state_writer(step), self._committer(step))
        if required or not self.train.async_save:
            self.settle(required=required)

    def settle(self, *, required: bool = False) -> None:
        """Wait for the checkpoint that is being written, if one is; all ranks call it."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        problem = saving.wait()
        if self.ranks.any(bool(problem)):
            if self.ranks.is_main:
                shutil.rmtree(self.checkpoints.path(saving.step).with_suffix(".tmp"), ignore_errors=True)
            self._failed(saving.step, problem, required)
        elif self.ranks.is_main:
            best = {int(self.record["best_saved"])} if "best_saved" in self.record else set[int]()
            self.checkpoints.prune(self.train.keep, self.train.keep_every, best)
        self.ranks.barrier()

    def _failed(self, step: int, problem: str, required: bool) -> None:
        error = SaveFailed(self.checkpoints.not_saved(step, problem or "Another process failed and says why."))
        if required:
            raise error
        _log.error("ALARM: %s The training goes on and tries again at the next checkpoint.", error)

    def _on_main(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Walked by all ranks, kept by the main one, on the CPU."""
        return {name: value.detach().to("cpu", copy=True) for name, value in tensors if self.ranks.is_main}

    def note_best(self, step: int, value: float) -> None:
        """``value`` (smaller is better) of ``step``, the same on all ranks: the smallest one's checkpoint is kept."""
        if step % self.train.save_every == 0 and value < self.record.get("best_value", math.inf):
            self.record |= {"best_value": value, "best_saved": float(step)}

    def update_ema(self) -> None:
        """After each applied update of the model's engine: each rank averages the parts it owns."""
        self.ema.update(self.engines["model"].owned())

    def _after(self, step: int) -> None:
        wish, last = self.control.wish(), step == self.train.steps
        stop = wish is Wish.STOP and not last
        if last or stop or wish is Wish.SAVE or step % self.train.save_every == 0:
            self.save(step, required=last or stop)
        if stop:
            self._interrupted(f"stopped after step {step}, saved")
        if wish is not Wish.NONE:
            self.control.granted()

    def may_stop(self, done: Logs | None = None) -> None:
        """Between two micro-batches, by all ranks: leave here when asked to stop.

        What the step did before is lost, except for finished parts: ``done`` are numbers that say which they are, and
        :meth:`begun` gives them back to the resumed run. Nothing of the averaged model may have changed in this step.
        """
        if self.control.wish() is Wish.STOP:
            raise _Interrupted(done or {})

    def begun(self) -> Logs:
        """What the run left within the coming step, as :meth:`may_stop` was told; once, and empty as a rule."""
        found = {name: value for name, value in self.record.items() if name.startswith(_BEGUN)}
        for name in found:
            del self.record[name]
        return {name.removeprefix(_BEGUN): value for name, value in found.items()}

    def _leave_within(self, step: int, done: Logs) -> None:
        """Save the state before ``step``, and its finished parts, unless that checkpoint is there: then they are
        repeated."""
        self.settle()
        for engine in self.engines.values():
            engine.abandon()
        there = self.ranks.any(step - 1 in self.checkpoints.steps())
        if step > 1 and not there:
            self.record |= {f"{_BEGUN}{name}": value for name, value in done.items()}
            self.save(step - 1, required=True)
        self._interrupted(f"stopped within step {step}, {'saved' if step > 1 else 'nothing to save yet'}")

    def _interrupted(self, what: str) -> NoReturn:
        self.control.granted()
        self.control.say("interrupted", self.control.reason)
        rank_zero_print(self.ranks, f"{what}; run the same command again to go on")
        self.run.finish()
        self.ranks.barrier()
        leave(EXIT_AGAIN)

    def _roll_back(self, step: int, error: Diverged) -> None:
        """Back to the last checkpoint, leaving out the data of the steps since then; all ranks together."""
        self.settle()
        count = self.record.get("rollbacks", 0.0) + 1
        path = self.ranks.on_main(self.checkpoints.newest)
        if path is None or count > self.train.max_rollbacks:
            why = (
                "no checkpoint to go back to" if path is None else f"{self.train.max_rollbacks} rollbacks did not help"
            )
            self.control.say("failed", f"{error}; {why}")
            raise UserError(f"{error}; {why}; the batches are listed in {self.run.dir / 'skipped.jsonl'}") from error
        skipped = self.position(step)
        back = self._load(path)
        self.record |= {"rollbacks": count, "left_out": float(skipped - back)}
        if self.ranks.is_main:
            line = {"at_step": step, "back_to": back, "left_out": skipped - back, "time": round(time.time(), 3)}
            with (self.run.dir / "rollbacks.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        _log.warning("%s: back to step %d, leaving out the data of the %d steps since", error, back, step - back)
        self.run.start(back)
        self.run.finished = back

    def _load(self, path: Path) -> int:
        saved = read_typed(path / STATE / "recipe.json", _Saved, "resume from another step")
        for name, engine in self.engines.items():
            engine.load(path / STATE / name)
        updates, masters = saved.ema_updates, list(self.engines["model"].owned())
        self.ema.restore(read_shards(path / "ema.safetensors", masters), updates)
        self.record = saved.numbers(path)
        self.extra = {name: Ema(self.ema.cfg, self.ranks) for name in saved.extra}
        for name, ema in self.extra.items():
            file = safe_path(path, f"{name}.safetensors", f"{path}: an average of recipe.json")
            ema.restore(read_shards(file, masters), updates)
        return saved.step

    def _bytes(self) -> int:
        """What a checkpoint takes at least: model, EMA and extras, and masters and two moments of every engine."""
        return 4 * (self._sizes["model"] * (2 + len(self.extra)) + 3 * sum(self._sizes.values()))

    def _state_writer(self, step: int) -> Callable[[Path], None]:
        """What this rank writes, copied now."""
        states = {name: engine.state() for name, engine in self.engines.items()}
        record = {
            "step": step,
            "ema_updates": self.ema.updates,
            "record": {key: value if math.isfinite(value) else None for key, value in self.record.items()},
            "extra": sorted(self.extra),
        }

        def write(folder: Path) -> None:
            for name, state in states.items():
                state.write(folder / name)
            if self.ranks.is_main:
                (folder / "recipe.json").write_text(json.dumps(record) + "\n", encoding="utf-8")

        return write

    def _committer(self, step: int) -> Callable[[], None]:
        """The main rank's part, gathered by all and copied now."""
        files = {"model": self._on_main(gathered(self.engines["model"].owned(), self.ranks))}
        files |= {name: self._on_main(ema.whole()) for name, ema in {"ema": self.ema, **self.extra}.items()}
        config_yaml, provenance = self.describe(step)
        return lambda: self.checkpoints.commit(step, files, config_yaml, provenance)
