"""Killed at any moment, the same command gives the run that was never killed: every loss and weight, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
import torch
from recipe_runner import KillAt
from tiny_run import Chain

from scd_sf.checkpoint import find, load_tensors

SCRIPTS = {"stage2": "recipes/stage2_flow_matching.py", "stage3": "recipes/stage3_self_forcing.py"}
BACKWARD = "scd_sf.train.local:LocalEngine.backward"

# Backward calls per step: stage 2 has 2, stage 3 has 2 turns x 2 critic + 2 student. Checkpoints follow steps 2, 4, 6.
MOMENTS = {
    "stage2-first-update": ("stage2", KillAt(BACKWARD, 2), []),
    "stage2-between-micro-batches": ("stage2", KillAt(BACKWARD, 10), [2, 4]),
    "stage2-before-a-checkpoint-is-committed": ("stage2", KillAt("os:rename", 2), [2]),
    "stage2-inside-a-checkpoint": ("stage2", KillAt("scd_sf.checkpoint:_write_contents", 2), [2]),
    "stage2-before-latest": ("stage2", KillAt("scd_sf.checkpoint:_fsync_dir", 9), None),
    "stage3-critic-update": ("stage3", KillAt(BACKWARD, 15), [2]),
    "stage3-student-update": ("stage3", KillAt(BACKWARD, 18), [2]),
    "stage3-inside-a-checkpoint": ("stage3", KillAt("scd_sf.train.local:write_counters", 4), [2]),
}


def same_as_uninterrupted(chain: Chain, stage: str, run: Path) -> None:
    """Per-step metrics, weights, averages and optimizer state, to the last bit."""
    assert tiny_run.metrics(run) == tiny_run.metrics(chain.root / stage)
    one, two = find(chain.root / stage), find(run)
    assert one.name == two.name
    files = sorted(file.relative_to(one) for file in one.rglob("*.safetensors"))
    assert files == sorted(file.relative_to(two) for file in two.rglob("*.safetensors"))
    for file in files:
        left, right = load_tensors(one / file), load_tensors(two / file)
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(chain: Chain, tmp_path: Path, moment: str) -> None:
    stage, kill, saved = MOMENTS[moment]
    run = tmp_path / "run"
    arguments = chain.stage2(run) if stage == "stage2" else chain.stage3(run)
    killed = recipe_runner.run(SCRIPTS[stage], *arguments, kill=kill)
    assert killed.code == -signal.SIGKILL, killed.err
    if saved is not None:
        steps = sorted(int(path.name[5:]) for path in run.glob("checkpoints/step_*") if path.suffix != ".tmp")
        assert steps == saved
    recipe_runner.succeed(SCRIPTS[stage], *arguments)
    same_as_uninterrupted(chain, stage, run)


def test_a_critic_that_learns_from_the_students_rollouts(chain: Chain, tmp_path: Path) -> None:
    """``critic_data=student``: another run than with rollouts of the critic's own, as exact after a kill."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ["critic_data=student", "critic_warmup=1"]
    recipe_runner.succeed(SCRIPTS["stage3"], *chain.stage3(whole), *more)
    rows, own = tiny_run.metrics(whole), tiny_run.metrics(chain.root / "stage3")
    assert all(row["critic/loss"] != other["critic/loss"] for row, other in zip(rows, own, strict=True))
    recipe_runner.run(SCRIPTS["stage3"], *chain.stage3(killed), *more, kill=KillAt(BACKWARD, 17))
    assert tiny_run.metrics(killed) != rows
    recipe_runner.succeed(SCRIPTS["stage3"], *chain.stage3(killed), *more)
    assert tiny_run.metrics(killed) == rows


def test_finished_run_is_left_alone(chain: Chain) -> None:
    run = chain.root / "stage2"
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    rows = tiny_run.metrics(run)
    recipe_runner.succeed(SCRIPTS["stage2"], *chain.stage2(run))
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before
    assert tiny_run.metrics(run) == rows


def test_damaged_newest_step_is_skipped_and_said(chain: Chain, tmp_path: Path) -> None:
    """The newest step is truncated after the kill: the one before it is used, and the losses are still the same."""
    run = tmp_path / "run"
    killed = recipe_runner.run(SCRIPTS["stage2"], *chain.stage2(run), kill=KillAt(BACKWARD, 10))
    assert killed.code == -signal.SIGKILL
    file = run / "checkpoints" / "step_00000004" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    resumed = recipe_runner.succeed(SCRIPTS["stage2"], *chain.stage2(run))
    assert "skipping checkpoint" in resumed.err and "step_00000004/model.safetensors" in resumed.err
    same_as_uninterrupted(chain, "stage2", run)
