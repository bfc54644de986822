"""Saving and loading a training: engines, averages and a small record, by all ranks.

A checkpoint is written in a thread, which the training waits for or goes on beside. Every rank
writes its own part of the training state. When the main rank has seen the others' marks, it writes
the rest and commits. The thread uses no collective; marks are files in the checkpoint's own
directory, which all ranks must see. ``latest`` moves after the commit, never before.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from scd_sf.checkpoint import STATE, Checkpoints, SaveFailed, problem_of
from scd_sf.distributed import Ranks
from scd_sf.files import fsync_tree, read_json, read_typed, safe_path
from scd_sf.train.base import Engine
from scd_sf.train.batches import TrainConfig
from scd_sf.train.ema import Ema
from scd_sf.train.run import Run
from scd_sf.train.shards import gathered, read_shards
from scd_sf.types import UserError, VideoShape

_PATIENCE = 3600.0  # seconds that the main rank waits for another rank's part
# prefix of the values that older versions recorded when they saved within a step
_SUBSTEP = "begun/"
_log = logging.getLogger(__name__)


class Origin(Protocol):
    """:func:`scd_sf.checkpoint.provenance` with every argument but ``step`` set; returns the
    contents of the step's ``provenance.json``."""

    def __call__(self, *, step: int) -> Mapping[str, object]: ...


def pixel_shape(shape: VideoShape) -> dict[str, int]:
    """Frames, height and width in pixels of the training videos, for a checkpoint's provenance.
    They are the default size of sampling."""
    return {"frames": shape.pixel_frames, "height": shape.pixel_height, "width": shape.pixel_width}


class Checkpointer:
    """Saves and loads everything that a run needs to go on.

    ``engines["model"]`` is the engine whose weights are the checkpoint. ``record`` holds small
    numbers, and ``extra`` further averages, that must survive a restart (stage 3's best EMA).
    ``config_yaml`` becomes the checkpoint's config.yaml.
    """

    def __init__(
        self,
        run: Run,
        train: TrainConfig,
        engines: Mapping[str, Engine],
        ema: Ema,
        config_yaml: str,
        origin: Origin,
    ) -> None:
        self.run = run
        self.train = train
        self.engines = dict(engines)
        self.ema = ema
        self.checkpoints, self.ranks = run.checkpoints, run.ranks
        self.config_yaml, self.origin = config_yaml, origin
        self.record: dict[str, float] = {}
        self.extra: dict[str, Ema] = {}
        self._saving: BackgroundSave | None = None
        self._sizes = {
            name: sum(math.prod(shard.shape) for shard in engine.owned())
            for name, engine in engines.items()
        }

    # -------------------------------------------------------------------------------------- loading

    def resume(self) -> int:
        """Load the newest verified step and open the metric writers there; returns the number of
        finished updates. Without one the average is that of the first weights.

        UserError: the checkpoint was trained on other data, or the disk has no room for one
        checkpoint.
        """
        path = self.run.resume_from()
        if path is not None:
            self._check_data(path)
        if path != self.checkpoints.path(self.train.steps):
            self._check_space()
        if path is None:
            step = 0
            self.ema.restore(self.engines["model"].owned(), 0)
        else:
            step = self._load(path)
        self.run.start(step)
        return step

    def _check_data(self, path: Path) -> None:
        saved_hash = read_json(path / "provenance.json", "restore it").get("data_hash")
        present_hash = self.origin(step=0).get("data_hash")
        if None not in (saved_hash, present_hash) and saved_hash != present_hash:
            raise UserError(
                f"{path}: was trained on other data than are there now; put those back, or use a new run.dir"
            )

    def _check_space(self) -> None:
        problem = ""
        if self.ranks.is_main:
            problem = problem_of(
                lambda: self.checkpoints.require_space(self._bytes(), "one checkpoint")
            )
        if self.ranks.any(bool(problem)):
            raise UserError(
                problem or f"{self.run.dir}: rank 0 has no room for a checkpoint; see its message"
            )

    def _load(self, path: Path) -> int:
        recipe = read_typed(path / STATE / "recipe.json", _Saved, "resume from another step")
        for name, engine in self.engines.items():
            engine.load(path / STATE / name)
        masters = list(self.engines["model"].owned())
        # an average of no update may be empty: earlier versions wrote none before the first
        averages = read_shards(path / "ema.safetensors", masters) if recipe.ema_updates else masters
        self.ema.restore(averages, recipe.ema_updates)
        self.record = recipe.numbers(path)
        self.extra = {name: Ema(self.ema.cfg, self.ranks) for name in recipe.extra}
        for name, ema in self.extra.items():
            file = safe_path(path, f"{name}.safetensors", f"{path}: an average of recipe.json")
            ema.restore(read_shards(file, masters), recipe.ema_updates)
        return recipe.step

    # --------------------------------------------------------------------------------------- saving

    def save(self, step: int, *, required: bool) -> None:
        """Write ``step`` (number of finished updates); all ranks call it. An intact checkpoint of
        this step is not written again.

        Unless ``required``, a failure is an alarm in the log, and the next checkpoint tries again.
        With ``train.async_save`` it is then written while the training goes on.
        """
        self.wait()
        if self.ranks.on_main(lambda: self.checkpoints.has(step)):
            return
        problem = (
            problem_of(lambda: self.checkpoints.prepare(step, self._bytes()))
            if self.ranks.is_main
            else ""
        )
        if self.ranks.any(bool(problem)):
            self._report_failure(step, problem, required)
            return
        self._saving = BackgroundSave(
            self.checkpoints, self.ranks, step, self._state_writer(step), self._committer(step)
        )
        if required or not self.train.async_save:
            self.wait(required=required)

    def wait(self, *, required: bool = False) -> None:
        """Wait until no checkpoint is being written; all ranks call it."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        problem = saving.wait()
        if self.ranks.any(bool(problem)):
            if self.ranks.is_main:
                shutil.rmtree(
                    self.checkpoints.path(saving.step).with_suffix(".tmp"), ignore_errors=True
                )
            self._report_failure(saving.step, problem, required)
        elif self.ranks.is_main:
            best = [int(self.record["best_saved"])] if "best_saved" in self.record else []
            self.checkpoints.prune(self.train.keep, self.train.keep_every, best)
        self.ranks.barrier()

    def note_best(self, step: int, value: float) -> None:
        """Record the validation ``value`` of ``step``, the same on all ranks. The checkpoint with
        the smallest value is never pruned."""
        if step % self.train.save_every == 0 and value < self.record.get("best_value", math.inf):
            self.record |= {"best_value": value, "best_saved": float(step)}

    def _report_failure(self, step: int, problem: str, required: bool) -> None:
        error = SaveFailed(
            self.checkpoints.not_saved(step, problem or "Another process failed and says why.")
        )
        if required:
            raise error
        _log.error("ALARM: %s The training goes on and tries again at the next checkpoint.", error)

    def _bytes(self) -> int:
        """Least size of a checkpoint in bytes: the model, the EMA and extras, and the masters and
        two moments of every engine, in fp32."""
        return 4 * (self._sizes["model"] * (2 + len(self.extra)) + 3 * sum(self._sizes.values()))

    def _state_writer(self, step: int) -> Callable[[Path], None]:
        """A function that writes this rank's part of the state, which is copied to the CPU now."""
        states = {name: engine.state() for name, engine in self.engines.items()}
        record = {
            "step": step,
            "ema_updates": self.ema.updates,
            "record": {
                key: value if math.isfinite(value) else None for key, value in self.record.items()
            },
            "extra": sorted(self.extra),
        }

        def write(folder: Path) -> None:
            for name, state in states.items():
                state.write(folder / name)
            if self.ranks.is_main:
                (folder / "recipe.json").write_text(json.dumps(record) + "\n", encoding="utf-8")

        return write

    def _committer(self, step: int) -> Callable[[], None]:
        """A function for the main rank that writes the rest and commits. All ranks gather the
        tensors, which are copied to the CPU now."""
        files = {"model": self._on_main(gathered(self.engines["model"].owned(), self.ranks))}
        files |= {
            name: self._on_main(ema.whole())
            for name, ema in {"ema": self.ema, **self.extra}.items()
        }
        origin = self.origin(step=step)
        return lambda: self.checkpoints.commit(step, files, self.config_yaml, origin)

    def _on_main(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copies of (name, tensor) pairs on the CPU of the main rank; empty on the others. All
        ranks must iterate to the end."""
        return {
            name: value.detach().to("cpu", copy=True)
            for name, value in tensors
            if self.ranks.is_main
        }


@dataclass(frozen=True)
class _Saved:
    """``recipe.json`` of a checkpoint. In ``record`` null stands for a number that was not
    finite."""

    step: int
    ema_updates: int
    record: dict[str, float | None]
    extra: list[str]

    def numbers(self, path: Path) -> dict[str, float]:
        """``record`` without null values. UserError where a number is null."""
        values = {key: value for key, value in self.record.items() if not key.startswith(_SUBSTEP)}
        if len(values) < len(self.record):
            _log.warning(
                "%s: an earlier version saved it within step %d, which is made again",
                path,
                self.step + 1,
            )
        numbers: dict[str, float] = {}
        for key, value in values.items():
            if value is None:
                raise UserError(
                    f"{path / STATE}/recipe.json: record.{key} is no number; resume from another step"
                )
            numbers[key] = value
        return numbers


class BackgroundSave:
    """A checkpoint that a thread is writing. ``write_state(dir)`` writes this rank's part;
    ``commit`` runs on the main rank when all parts are written."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        ranks: Ranks,
        step: int,
        write_state: Callable[[Path], None],
        commit: Callable[[], None],
    ) -> None:
        self.step, self.problem = step, ""
        self._folder, self._ranks = checkpoints.path(step).with_suffix(".tmp"), ranks
        self._write_state, self._commit = write_state, commit
        self._part_done, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> str:
        """Wait until the checkpoint is on the disk. Returns this rank's problem, or an empty
        string.

        All ranks call it. They agree before the main rank is waited for: a rank that is gone is
        noticed, and one whose disk is too full to leave a mark is not waited for.
        """
        self._part_done.wait()
        if self._ranks.any(bool(self.problem)):
            self._given_up.set()
        self._thread.join()
        return self.problem

    def _run(self) -> None:
        self.problem = problem_of(self._write_part)
        self._part_done.set()
        if self._ranks.is_main and not self.problem:
            self.problem = problem_of(self._finish)

    def _write_part(self) -> None:
        problem = problem_of(lambda: self._write_state(self._folder / STATE))
        if not self._ranks.is_main:  # the main rank's commit syncs the whole tree
            problem = problem or problem_of(lambda: fsync_tree(self._folder / STATE))
            mark = self._mark(self._ranks.rank)
            # renamed when complete, so that the main rank never reads an empty mark
            unfinished_mark = mark.with_name(mark.name + ".begun")
            unfinished_mark.write_text(problem)
            unfinished_mark.rename(mark)
        if problem:
            raise UserError(problem)

    def _finish(self) -> None:
        for rank in range(1, self._ranks.world):
            self._await(rank)
        self._commit()

    def _await(self, rank: int) -> None:
        mark, deadline = self._mark(rank), time.monotonic() + _PATIENCE
        while not mark.exists():
            if self._given_up.is_set():
                raise UserError("another process could not write its part and says why")
            if time.monotonic() > deadline:
                raise UserError(
                    f"{mark}: rank {rank} has not written its part in {_PATIENCE:.0f} s; see its output"
                )
            time.sleep(0.01)
        if message := mark.read_text():
            raise UserError(f"rank {rank}: {message}")
        mark.unlink()

    def _mark(self, rank: int) -> Path:
        return self._folder / f".rank_{rank:05d}"
