"""Distillation and a stage-2 update on two ranks equal plain torch, whatever the ZeRO stages (see
distillation.py).

Tolerances are absolute: masters after three cycles, losses and gradient norms of every update.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from train import distillation, workers
from train.distillation import CLIP, Case

from scd_sf.distributed import Ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# Every stage of the student and of the critic, the teacher offloaded and not.
MATRIX = [
    Case(student, critic, offload_teacher=(student + critic) % 2 == 0)
    for student, critic in ((0, 1), (1, 2), (2, 2), (3, 1))
]
STAGE2 = [Case(stage, 2, stage2=True) for stage in (1, 2, 3)]
WITHOUT_CHECKPOINTING = [
    Case(2, 2, checkpointing=False),
    Case(2, 2, checkpointing=False, stage2=True),
]
PLAIN = [Case("local", "local"), Case("local", "local", stage2=True)]
FP32 = [*MATRIX, *STAGE2, *WITHOUT_CHECKPOINTING, *PLAIN]
BF16 = [
    Case(student, critic, dtype="bf16") for student, critic in (("local", "local"), (1, 2), (3, 2))
]
Results = list[dict[str, dict[str, float]]]


def body(ranks: Ranks, out: Path) -> dict[str, Any]:
    """Every case; its distance to the plain reference."""
    kinds = {(case.lr, case.stage2) for case in FP32 + BF16}
    expected = {kind: distillation.reference(*kind) for kind in kinds}
    found = {}
    for case in FP32 + BF16:
        began = time.monotonic()
        found[str(case)] = distillation.compared(
            distillation.run(case, ranks), expected[case.lr, case.stage2]
        )
        print(
            f"[{ranks.rank}] {case} {time.monotonic() - began:.1f} s {found[str(case)]}",
            file=sys.stderr,
            flush=True,
        )
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return workers.spawn(2, tmp_path_factory.mktemp("distillation"), body)


@pytest.mark.parametrize("case", FP32, ids=str)
def test_equals_plain_torch(results: Results, case: Case) -> None:
    for rank in results:
        found = rank[str(case)]
        assert distillation.worst((found["loss"], found["norm"], found["masters"])) <= 1e-6, found
        assert found["least_norm"] > CLIP, "every update is clipped"
        assert found["student.masters"] > 0.9


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_moves_masters_that_weights_cannot_follow(results: Results, case: Case) -> None:
    for rank in results:
        found = rank[str(case)]
        assert found["student.masters"] > 0.9 > 0.1 > found["student.weights"], found
        assert found["cosine"] > 0.9 and found["loss"] < 0.1, found
