"""What a run writes beside its checkpoints: wandb offline as one run across restarts, MFU, and
never a secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
from tiny_run import Chain

from scd_sf.data.clips import read_video

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_aSecretThatNobodyMayFind",
    "OPENAI_API_KEY": "sk-aSecretThatNobodyMayFindEither",
}


@pytest.mark.slow
def test_wandb_is_one_offline_run_across_restarts_and_no_secret_is_written(
    chain: Chain, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    given = [*chain.stage2(run), "run.wandb=offline", "run.peak_tflops=0.01"]
    environ = {**os.environ, **SECRETS, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for steps in (2, 4):
        command = [
            sys.executable,
            "recipes/stage2_flow_matching.py",
            *given,
            f"train.steps={steps}",
        ]
        done = subprocess.run(
            command,
            cwd=recipe_runner.ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert not any(secret in done.stdout + done.stderr for secret in SECRETS.values())
    found = sorted((run / "wandb").glob("offline-run-*"))
    assert len({folder.name.rpartition("-")[2] for folder in found}) == 1 <= len(found), (
        "one id for one directory"
    )
    rows = tiny_run.metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    recorded = (run / "metrics.jsonl").read_text()
    assert '"perf/mfu"' in recorded and '"perf/tokens_per_second"' in recorded
    for file in run.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not any(secret.encode() in content for secret in SECRETS.values()), file


def test_mfu_is_work_over_time_and_peak(chain: Chain, tmp_path: Path) -> None:
    """tokens and FLOPs of a step are constants, so their rates are proportional; without a peak
    there is no MFU."""
    run = tmp_path / "run"
    recipe_runner.succeed(tiny_run.SCRIPTS["stage3"], *chain.stage3(run), "run.peak_tflops=0.01")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "perf/mfu" not in rows[0]  # the first step's time is not known
    rates = {round(row["perf/mfu"] * row["perf/seconds"], 4) for row in rows[1:]}
    assert max(rates) == pytest.approx(min(rates), rel=0.02) and min(rates) > 0
    plain = [
        json.loads(line)
        for line in (chain.root / "stage3" / "metrics.jsonl").read_text().splitlines()
    ]
    assert not any("perf/mfu" in row for row in plain)


@pytest.mark.slow
def test_validation_is_shared_by_the_ranks(chain: Chain, tmp_path: Path) -> None:
    """Two ranks see the loss that one sees; each samples one of the two videos, rank 0 writes both
    side by side."""
    alone, both = tmp_path / "one", tmp_path / "two"
    for world, run in ((1, alone), (2, both)):
        given = [*chain.stage2(run), "train.micro_batch=1", "train.validate_every=3"]
        results = recipe_runner.run_ranks(tiny_run.SCRIPTS["stage2"], *given, world=world)
        assert all(result.code == 0 for result in results), results[0].err
    losses = [
        [row["val/loss"] for row in tiny_run.metrics(run) if "val/loss" in row]
        for run in (alone, both)
    ]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    names = [file.name for file in sorted((alone / "videos").iterdir())]
    assert names == [f"{step:08d}.mp4" for step in (0, 3, 6)]
    first, second = (read_video(run / "videos" / names[0]).float() for run in (alone, both))
    assert first.shape == second.shape and (first - second).abs().mean() < 2.0  # compressed
    left, right = second.chunk(2, dim=-1)
    assert left.std() > 0 and right.std() > 0, "each rank's video is there"
