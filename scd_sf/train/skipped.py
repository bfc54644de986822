"""What is kept of an update that was skipped because a loss or gradient was not finite.

``RUN/skipped.jsonl`` names the samples of the global batch; ``RUN/nan_dump/step_N_ENGINE_rank_R.safetensors`` holds
what rank R computed on: tensors as ``MICROBATCH/NAME``, the rest as JSON in the metadata.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from scd_sf.files import write_tensors
from scd_sf.train.base import Engine
from scd_sf.train.run import Run

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """What this rank computed one loss on; ``number`` counts the micro-batches of all ranks."""

    number: int
    indices: Sequence[int]
    prompts: Sequence[str]
    loss: Tensor
    tensors: dict[str, Tensor]


@contextmanager
def keeping(
    run: Run, step: int, engine: Engine, samples: Sequence[int], who: str = "model"
) -> Iterator[list[MicroBatch]]:
    """One update of ``engine``: give it every micro-batch before the step. They are written only if it was skipped.

    ``samples``: of the global batch. All ranks skip together, and so each writes its share.
    """
    batch: list[MicroBatch] = []
    before = engine.skipped
    try:
        yield batch
    finally:  # the last skip in a row ends in an error
        if engine.skipped > before:
            try:
                _write(run, step, who, samples, batch)
            except OSError as error:  # a full disk must not stop one rank alone
                _log.warning("the batch of the skipped update %d could not be kept: %s", step, error)


def _write(run: Run, step: int, who: str, samples: Sequence[int], batch: Sequence[MicroBatch]) -> None:
    if run.ranks.is_main:
        with (run.dir / "skipped.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, "engine": who, "samples": list(samples)}) + "\n")
    folder = run.dir / "nan_dump"
    folder.mkdir(exist_ok=True)
    tensors = {f"{part.number}/{name}": tensor for part in batch for name, tensor in part.tensors.items()}
    rows = [
        {"number": part.number, "indices": part.indices, "prompts": part.prompts, "loss": str(float(part.loss))}
        for part in batch
    ]
    write_tensors(
        folder / f"step_{step:08d}_{who}_rank_{run.ranks.rank}.safetensors",
        {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()},
        {"micro_batches": json.dumps(rows)},
    )
