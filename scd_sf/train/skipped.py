"""Records of updates that were skipped because a loss or gradient was not finite, and of the data
that a run leaves out afterwards.

``RUN/skipped.jsonl`` names the samples of the global batch;
``RUN/nan_dump/step_N_ENGINE_rank_R.safetensors`` holds what rank R computed on: tensors as
``MICROBATCH/NAME``, the rest as JSON in the metadata.

After too many in a row the run has diverged. It goes on from its last checkpoint with the data that
comes next: ``RUN/rollbacks.jsonl`` says what is left out, one :class:`Rollback` per line.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from scd_sf.files import read_jsonl, typed, write_jsonl, write_tensors
from scd_sf.train.base import Engine
from scd_sf.train.run import Run
from scd_sf.types import UserError

ROLLBACKS = "rollbacks.jsonl"
_KEEP = "it says which data this run leaves out: restore it"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """The inputs of one loss on this rank. ``number`` counts the micro-batches of all ranks."""

    number: int
    indices: Sequence[int]
    prompts: Sequence[str]
    loss: Tensor
    tensors: dict[str, Tensor]


@contextmanager
def keeping(
    run: Run, step: int, engine: Engine, samples: Sequence[int], engine_name: str = "model"
) -> Iterator[list[MicroBatch]]:
    """A list for the micro-batches of one update of ``engine``: append each before the step. They
    are written to disk only if the update was skipped.

    ``samples``: indices of the global batch. All ranks skip together, so each writes its share.
    """
    batch: list[MicroBatch] = []
    skips_before = engine.skipped
    try:
        yield batch
    finally:  # the last skip in a row ends in an error
        if engine.skipped > skips_before:
            try:
                _write(run, step, engine_name, samples, batch)
            except OSError as error:  # a full disk must not stop one rank alone
                _log.warning(
                    "the batch of the skipped update %d could not be kept: %s", step, error
                )


def _write(
    run: Run, step: int, engine_name: str, samples: Sequence[int], batch: Sequence[MicroBatch]
) -> None:
    if run.ranks.is_main:
        with (run.dir / "skipped.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(
                json.dumps({"step": step, "engine": engine_name, "samples": list(samples)}) + "\n"
            )
    folder = run.dir / "nan_dump"
    folder.mkdir(exist_ok=True)
    tensors = {
        f"{part.number}/{name}": tensor for part in batch for name, tensor in part.tensors.items()
    }
    rows = [
        {
            "number": part.number,
            "indices": part.indices,
            "prompts": part.prompts,
            "loss": str(float(part.loss)),
        }
        for part in batch
    ]
    write_tensors(
        folder / f"step_{step:08d}_{engine_name}_rank_{run.ranks.rank}.safetensors",
        {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()},
        {"micro_batches": json.dumps(rows)},
    )


# -------------------------------------------------------------- what a run that diverged leaves out


@dataclass(frozen=True)
class Rollback:
    """At step ``at_step`` the run diverged, and goes on from step ``back_to`` with other data.

    From there on, ``left_out`` positions of the data in all lie between a step and its place in the
    order. ``time``: unix seconds.
    """

    at_step: int
    back_to: int
    left_out: int
    time: float = 0.0


Ranges = Sequence[tuple[int, int]]  # (first, last) positions, ascending and apart


def position(step: int, left_out: Ranges) -> int:
    """The ``step``-th position (the first is 1) that is not left out."""
    for first, last in left_out:
        if step >= first:
            step += last - first + 1
    return step


def left_out_ranges(rollbacks: Sequence[Rollback]) -> list[tuple[int, int]]:
    """The positions that the steps after ``back_to``, up to ``at_step``, had taken before each
    rollback."""
    ranges: list[tuple[int, int]] = []
    for rollback in rollbacks:
        first, last = position(rollback.back_to, ranges) + 1, rollback.back_to + rollback.left_out
        last = max([last, *(end for start, end in ranges if first <= start <= last)])
        ranges = [
            *((start, end) for start, end in ranges if not first <= start <= last),
            (first, last),
        ]
        ranges.sort()
    return ranges


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """All rollbacks of a run in chronological order; empty without a file. UserError if the file is
    damaged."""
    file = run_dir / ROLLBACKS
    if not file.exists():
        return []
    rollbacks = [typed(row, Rollback, file, _KEEP) for row in read_jsonl(file, _KEEP)]
    for rollback in rollbacks:
        steps = rollback.at_step - rollback.back_to
        if rollback.back_to < 0 or steps < 1 or rollback.left_out < steps:
            raise UserError(f"{file}: {rollback} contradicts itself; {_KEEP}")
    return rollbacks


def write_rollback(run_dir: Path, rollback: Rollback) -> None:
    """Append one rollback to the run's file, atomically."""
    rows = [*read_rollbacks(run_dir), replace(rollback, time=round(time.time(), 3))]
    write_jsonl(run_dir / ROLLBACKS, [asdict(row) for row in rows])
