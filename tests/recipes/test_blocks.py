"""The skip-layer schedule and frame-diagonal blocks by the real scripts: fine-tuned, scored,
sampled, planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
from tiny_run import Chain

from scd_sf.checkpoint import find
from scd_sf.config import from_yaml
from scd_sf.evaluation.table import read_rows
from scd_sf.models.blocks import BlocksConfig, SkipConfig, blocks_of
from scd_sf.models.build import CheckpointConfig, load_student
from scd_sf.models.causal import Causal
from scd_sf.tools.plan.job import read_job

SKIP = "{prefix: 1, suffix: 2, full_steps: 1, steps: 3}"


@pytest.fixture(scope="module")
def causal(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The causal baseline after stage 1, and ``skip``: a fine-tune of it."""
    root = tmp_path_factory.mktemp("blocks")
    recipe_runner.succeed(
        "recipes/stage1_transplant.py", f"base={chain.wan}", f"out={root}/stage1", "family=causal"
    )
    given = [*chain.stage2(root / "skip"), f"init={root}/stage1", "train.steps=2"]
    recipe_runner.succeed(
        "recipes/stage2_flow_matching.py", *given, f"blocks={{skip: {SKIP}, frame_diagonal: 1}}"
    )
    return root


def test_fine_tune_scores_and_samples_run_the_schedule(
    chain: Chain, causal: Path, tmp_path: Path
) -> None:
    model, config = load_student(causal / "skip")
    wanted = BlocksConfig(1, SkipConfig(1, 2, 1, 3))
    assert (
        config.model.blocks == wanted and isinstance(model, Causal) and blocks_of(model) == wanted
    )
    assert (
        from_yaml(CheckpointConfig, find(causal / "stage1") / "config.yaml").model.blocks
        == BlocksConfig()
    )

    for split, count in (("train", 24), ("val", 12)):
        tiny_run.write_latents(tmp_path / split, count, held_out=True)
    skip = {"blocks": {"skip": {"prefix": 1, "suffix": 2, "full_steps": 1, "steps": 3}}}
    rows = [
        {"name": "tuned", "checkpoint": "skip", "steps": 3},
        {"name": "as it was", "checkpoint": "skip", "steps": 3, "blocks": {}},
        {"name": "untuned", "checkpoint": "stage1", "steps": 3, **skip},
        {"name": "teacher", "steps": 3, **skip},
    ]
    given = [
        f"base={chain.wan}",
        f"train={tmp_path}/train",
        f"val={tmp_path}/val",
        f"root={causal}",
    ]
    given.append(f"out={tmp_path}/scores")
    recipe_runner.succeed(
        "recipes/evaluate.py", *given, "clips=6", "timing_repeats=1", f"rows={json.dumps(rows)}"
    )
    found = {row.name: row for row in read_rows(tmp_path / "scores" / "results.json")[0]}
    passes = {
        name: found[name].block_passes_per_frame
        for name in ("tuned", "as it was", "untuned", "teacher")
    }
    steps, frames = 6 + 3 + 3, 3
    # a finished frame goes through all that see the past
    clean = {"tuned": 5, "as it was": 6, "untuned": 6}
    expected = {name: steps + count * (frames - 1) / frames for name, count in clean.items()}
    assert passes == pytest.approx(expected | {"as it was": 18 + 4, "teacher": float(steps)})

    out = tmp_path / "videos"
    sample = [
        f"checkpoint={causal}/stage1",
        f"out={out}",
        'prompts=["left in meadow"]',
        "frames=9",
        "height=32",
    ]
    sample += ["width=32", "sampler={name: euler, steps: 3}"]
    recipe_runner.succeed("recipes/sample.py", *sample, f"blocks={{skip: {SKIP}}}")
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    assert settings["blocks"] == {
        "frame_diagonal": 0,
        "skip": {**skip["blocks"]["skip"], "shift": 5.0},
    }
    refused = recipe_runner.run("recipes/sample.py", *sample)
    assert refused.code == 2 and "blocks" in refused.err, "a folder holds videos of one setting"
    refused = recipe_runner.run(
        "recipes/sample.py", *sample, f"checkpoint={chain.root}/stage2", f"blocks.skip={SKIP}"
    )
    assert refused.code == 2 and "SCD's decoder is short already" in refused.err


def test_the_plan_of_such_a_fine_tune(causal: Path) -> None:
    """Every block is counted, and the clean frames not in the frame-diagonal ones."""
    flops = []
    for blocks in ("{}", f"{{skip: {SKIP}}}", "{frame_diagonal: 3}"):
        given = [f"init={causal}/stage1", f"blocks={blocks}", "checkpointing=false"]
        job = read_job([], [*given, "validation_clips=1"], None, 8)
        flops.append(sum(phase.flops for phase in job.phases()))
    assert flops[0] == flops[1] > flops[2] > 0.5 * flops[0]
