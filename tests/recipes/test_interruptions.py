"""Stopped, out of disk, diverged, or left by a rank: what a training does then, by its real
scripts."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
import torch
from recipe_runner import At
from tiny_run import BACKWARD, SCRIPTS, Chain, same_as_uninterrupted

from scd_sf.data.latents import epoch_order
from scd_sf.tensor_files import read_tensors
from scd_sf.train.stop import EXIT_AGAIN


def steps(run: Path) -> list[int]:
    return sorted(
        int(path.name[5:]) for path in run.glob("checkpoints/step_*") if path.suffix != ".tmp"
    )


def status(run: Path) -> dict[str, object]:
    return dict(json.loads((run / "status.json").read_text()))


@pytest.mark.parametrize(("stage", "call"), [("stage2", 5), ("stage3", 14)])
def test_a_signal_saves_and_asks_to_be_run_again(
    chain: Chain, tmp_path: Path, stage: str, call: int
) -> None:
    """In the middle of step 3: it is finished and saved, and the same command gives the run that
    never stopped."""
    run = tmp_path / "run"
    arguments = chain.stage2(run) if stage == "stage2" else chain.stage3(run)
    stopped = recipe_runner.run(SCRIPTS[stage], *arguments, at=At(BACKWARD, call, signal.SIGTERM))
    assert stopped.code == EXIT_AGAIN, stopped.err
    assert steps(run) == [2, 3] and "stopped after step 3, saved" in stopped.out
    assert (status(run)["state"], status(run)["reason"]) == ("interrupted", "SIGTERM")
    recipe_runner.succeed(SCRIPTS[stage], *arguments)
    same_as_uninterrupted(chain, stage, run)
    assert status(run)["state"] == "finished"


def test_a_signal_in_the_last_step_comes_too_late(chain: Chain, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe_runner.succeed(
        SCRIPTS["stage2"], *chain.stage2(run), at=At(BACKWARD, 12, signal.SIGUSR1)
    )
    assert status(run)["state"] == "finished"
    same_as_uninterrupted(chain, "stage2", run)


def test_a_full_disk_is_an_alarm_and_the_training_goes_on(chain: Chain, tmp_path: Path) -> None:
    run = tmp_path / "run"
    full = At("scd_sf.checkpoint:_write_contents", 2, 0)
    result = recipe_runner.run(SCRIPTS["stage2"], *chain.stage2(run), at=full)
    assert result.code == 0, result.err
    assert (
        "ALARM" in result.err
        and "step 4 is not saved" in result.err
        and "No space left" in result.err
    )
    assert steps(run) == [2, 6] and not list(run.glob("checkpoints/*.tmp"))
    same_as_uninterrupted(chain, "stage2", run)


def test_saving_beside_the_training_changes_nothing(chain: Chain, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe_runner.succeed(
        SCRIPTS["stage3"], *chain.stage3(run), "train.async_save=true", "train.save_every=1"
    )
    assert steps(run) == [3, 4]
    same_as_uninterrupted(chain, "stage3", run)


def test_the_last_checkpoint_must_be_written(chain: Chain, tmp_path: Path) -> None:
    run = tmp_path / "run"
    full = At("scd_sf.checkpoint:_write_contents", 3, 0)
    result = recipe_runner.run(SCRIPTS["stage2"], *chain.stage2(run), at=full)
    assert result.code == 2 and "step 6 is not saved" in result.err and steps(run) == [2, 4]
    assert status(run)["state"] == "failed"
    recipe_runner.succeed(SCRIPTS["stage2"], *chain.stage2(run))
    same_as_uninterrupted(chain, "stage2", run)


def test_a_diverged_run_ends_and_goes_on_without_the_data(chain: Chain, tmp_path: Path) -> None:
    """One clip's huge latents overflow the loss on one rank. It comes at step 4: both ranks end
    together, and the same command makes steps 3 and 4 again, from later data; also when it is
    killed before its next checkpoint."""
    run = tmp_path / "run"
    arguments = [
        *chain.stage2(run),
        f"data={poisoned(tmp_path / 'data', step=4)}",
        "engine.max_skips=1",
    ]
    both = recipe_runner.run_ranks(SCRIPTS["stage2"], *arguments, world=2)
    assert [result.code for result in both] == [EXIT_AGAIN] * 2, both[0].err + both[1].err
    said = "back to step 2, leaving out the data of the 2 steps since"
    assert f"{said}; run the same command again to go on" in both[0].out
    assert status(run)["state"] == "interrupted" and said in str(status(run)["reason"])
    line = json.loads((run / "rollbacks.jsonl").read_text())
    assert (line["at_step"], line["back_to"], line["left_out"]) == (4, 2, 2)
    killed = recipe_runner.run(SCRIPTS["stage2"], *arguments, at=At(BACKWARD, 3))
    assert killed.code == -signal.SIGKILL and steps(run) == [2]
    recipe_runner.succeed(SCRIPTS["stage2"], *arguments)
    rows = tiny_run.metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and all(
        row["loss"] is not None for row in rows
    )
    for name in ("skipped", "rollbacks"):
        assert len((run / f"{name}.jsonl").read_text().splitlines()) == 1
    (run / "rollbacks.jsonl").unlink()  # as when checkpoints are copied without it
    refused = recipe_runner.run(SCRIPTS["stage2"], *arguments, "train.steps=7")
    assert refused.code == 2 and "is not the one of the checkpoint of step 6" in refused.err
    assert steps(run)[-1] == 6


def test_a_run_whose_first_update_is_skipped(chain: Chain, tmp_path: Path) -> None:
    """It validates, saves and resumes with the average of no update: the first weights."""
    run = tmp_path / "run"
    arguments = [
        *chain.stage2(run),
        f"data={poisoned(tmp_path / 'data', step=1)}",
        "train.validate_every=1",
    ]
    stop = At(BACKWARD, 2, signal.SIGTERM)
    stopped = recipe_runner.run(SCRIPTS["stage2"], *arguments, at=stop)
    assert stopped.code == EXIT_AGAIN, stopped.err
    saved = run / "checkpoints" / "step_00000001"
    average, weights = (read_tensors(saved / f"{name}.safetensors") for name in ("ema", "model"))
    assert average.keys() == weights.keys()
    assert all(torch.equal(average[name], weights[name].float()) for name in weights)
    recipe_runner.succeed(SCRIPTS["stage2"], *arguments)
    rows = tiny_run.metrics(run)
    assert rows[0]["loss"] is None and all(row["val/loss"] for row in rows)


def test_a_diverged_run_gives_up_with_a_report(chain: Chain, tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = poisoned(tmp_path / "data", step=4)
    arguments = [*chain.stage2(run), f"data={data}", "engine.max_skips=1", "train.max_rollbacks=0"]
    result = recipe_runner.run(SCRIPTS["stage2"], *arguments)
    assert (
        result.code == 2
        and "0 rollbacks did not help" in result.err
        and "skipped.jsonl: look at them, and start a new run.dir with a lower lr" in result.err
        and "resume" not in result.err
    )
    assert steps(run) == [2] and status(run)["state"] == "failed"


def poisoned(root: Path, step: int) -> Path:
    """The training set of 24 clips, one of step ``step``'s with latents that overflow the loss."""
    return tiny_run.write_latents(root, 24, seed=1, huge=epoch_order(0, step - 1, 4, 24)[0])


def test_retention(chain: Chain, tmp_path: Path) -> None:
    """The newest, every third, and the one of the smallest validation loss."""
    run = tmp_path / "run"
    more = ["train.save_every=1", "train.validate_every=1", "train.keep=1", "train.keep_every=3"]
    recipe_runner.succeed(SCRIPTS["stage2"], *chain.stage2(run), *more)
    losses = {row["step"]: row["val/loss"] for row in tiny_run.metrics(run)}
    assert steps(run) == sorted({3, 6, min(losses, key=losses.__getitem__)})


def test_one_directory_one_job(chain: Chain, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = recipe_runner.run(SCRIPTS["stage2"], *chain.stage2(run))
    assert result.code == 2 and "is at work in it" in result.err and "training" in result.err


@pytest.mark.slow
def test_a_dead_rank_is_named(chain: Chain, tmp_path: Path) -> None:
    """Rank 1 is killed in its third step; rank 0 ends soon, names it, and two ranks resume to the
    end."""
    run = tmp_path / "run"
    both = recipe_runner.run_ranks(
        SCRIPTS["stage2"], *chain.stage2(run), world=2, at={1: At(BACKWARD, 3)}, timeout=300
    )
    assert both[1].code == -signal.SIGKILL and both[0].code == 2, both[0].err
    assert (
        "rank 1 (process" in both[0].err and "run the same command again to resume" in both[0].err
    )
    assert steps(run) == [2]
    both = recipe_runner.run_ranks(SCRIPTS["stage2"], *chain.stage2(run), world=2)
    assert [result.code for result in both] == [0, 0] and steps(run)[-1] == 6


@pytest.mark.slow
def test_two_ranks_stop_together(chain: Chain, tmp_path: Path) -> None:
    """The signal reaches one rank only."""
    run = tmp_path / "run"
    at = {1: At(BACKWARD, 3, signal.SIGUSR1)}
    both = recipe_runner.run_ranks(SCRIPTS["stage2"], *chain.stage2(run), world=2, at=at)
    assert [result.code for result in both] == [EXIT_AGAIN] * 2, both[0].err + both[1].err
    # of one micro-batch a rank
    assert steps(run)[-1] == 3 and "stopped after step 3" in both[0].out
    assert all((run / "heartbeat" / f"rank_0000{rank}.json").is_file() for rank in range(2))
    assert os.listdir(run / "checkpoints").count("latest") == 1
