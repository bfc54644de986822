"""``scd plan`` against what PyTorch's allocator had alive in real training steps of a small model:
within 15 %."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recipe_runner

TWO = ("train.global_batch=2", "train.micro_batch=1")
BF16 = "{dtype: bf16, bucket: 1000000}"
CASES = {
    "stage 2, local": (1, "stage2", *TWO, "engine.backend=torch", "checkpointing=false"),
    "stage 2, ZeRO-2": (2, "stage2", *TWO, f"engine={BF16}"),
    "stage 2, ZeRO-3, accumulated": (
        2,
        "stage2",
        "train.global_batch=4",
        "train.micro_batch=1",
        "engine={dtype: bf16, bucket: 1000000, zero_stage: 3}",
    ),
    "stage 3": (
        2,
        "stage3",
        *TWO,
        f"student_engine={BF16}",
        f"critic_engine={BF16}",
        f"teacher_engine={BF16}",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_planned_memory_is_what_a_run_takes(case: str, tmp_path: Path) -> None:
    world, *given = CASES[case]
    results = recipe_runner.run_ranks(
        "tests/tools/plan/measured.py", tmp_path / "out.json", *given, world=int(world)
    )
    assert all(result.code == 0 for result in results), results[0].err[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    print(f"{case}: planned {found['planned']}, measured {found['measured']}")
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15), found
