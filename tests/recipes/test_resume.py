"""Killed at any moment, the same command gives the run that was never killed: every loss and
weight, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
from recipe_runner import At
from tiny_run import BACKWARD, SCRIPTS, Chain, same_as_uninterrupted

# Backward calls per step: stage 2 has 2, stage 3 has 2 turns x 2 critic + 2 student. Checkpoints
# follow steps 2, 4, 6.
MOMENTS = {
    "stage2-first-update": ("stage2", At(BACKWARD, 2), []),
    "stage2-between-micro-batches": ("stage2", At(BACKWARD, 10), [2, 4]),
    "stage2-before-a-checkpoint-is-committed": (
        "stage2",
        At("scd_sf.checkpoint:write_manifest", 2),
        [2],
    ),
    "stage2-inside-a-checkpoint": ("stage2", At("scd_sf.checkpoint:_write_contents", 2), [2]),
    "stage2-before-latest": ("stage2", At("scd_sf.checkpoint:fsync", 2), [2, 4]),
    "stage3-critic-update": ("stage3", At(BACKWARD, 15), [2]),
    "stage3-student-update": ("stage3", At(BACKWARD, 18), [2]),
    "stage3-inside-a-checkpoint": ("stage3", At("scd_sf.train.shards:write_counters", 4), [2]),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(chain: Chain, tmp_path: Path, moment: str) -> None:
    stage, kill, saved = MOMENTS[moment]
    run = tmp_path / "run"
    arguments = chain.stage2(run) if stage == "stage2" else chain.stage3(run)
    killed = recipe_runner.run(SCRIPTS[stage], *arguments, at=kill)
    assert killed.code == -signal.SIGKILL, killed.err
    if saved is not None:
        steps = sorted(
            int(path.name[5:]) for path in run.glob("checkpoints/step_*") if path.suffix != ".tmp"
        )
        assert steps == saved
    # what is computed again in the backward pass may change on the way
    more = ["recompute_attention=false"] if moment == "stage2-between-micro-batches" else []
    recipe_runner.succeed(SCRIPTS[stage], *arguments, *more)
    same_as_uninterrupted(chain, stage, run)


def test_a_critic_that_learns_from_the_students_rollouts(chain: Chain, tmp_path: Path) -> None:
    """``critic_data=student``: another run than with rollouts of the critic's own, as exact after a
    kill."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ["critic_data=student", "critic_warmup=2", "reuse=2"]
    recipe_runner.succeed(SCRIPTS["stage3"], *chain.stage3(whole), *more)
    rows, own = tiny_run.metrics(whole), tiny_run.metrics(chain.root / "stage3")
    assert all(
        row["critic/loss"] != other["critic/loss"] for row, other in zip(rows, own, strict=True)
    )
    recipe_runner.run(SCRIPTS["stage3"], *chain.stage3(killed), *more, at=At(BACKWARD, 17))
    assert tiny_run.metrics(killed) != rows
    recipe_runner.succeed(SCRIPTS["stage3"], *chain.stage3(killed), *more)
    assert tiny_run.metrics(killed) == rows


def test_finished_run_is_left_alone(chain: Chain) -> None:
    run = chain.root / "stage2"
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    rows = tiny_run.metrics(run)
    again = recipe_runner.succeed(SCRIPTS["stage2"], *chain.stage2(run))
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before
    assert tiny_run.metrics(run) == rows
    first = again.out.splitlines()[0]
    assert first.startswith(f"{run}: finished before, at step 6 of 6; nothing was done")
    assert "train.steps=12" in first and "step 1/6" not in again.out


def test_damaged_newest_step_is_skipped_and_said(chain: Chain, tmp_path: Path) -> None:
    """The newest step is truncated after the kill: the one before it is used, and the losses are
    still the same."""
    run = tmp_path / "run"
    killed = recipe_runner.run(SCRIPTS["stage2"], *chain.stage2(run), at=At(BACKWARD, 10))
    assert killed.code == -signal.SIGKILL
    file = run / "checkpoints" / "step_00000004" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    resumed = recipe_runner.succeed(SCRIPTS["stage2"], *chain.stage2(run))
    assert "skipping checkpoint" in resumed.err and "step_00000004/model.safetensors" in resumed.err
    same_as_uninterrupted(chain, "stage2", run)
