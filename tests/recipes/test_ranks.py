"""Two ranks under the real scripts: the same run as one rank, also when their number changes; none
goes its own way."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
import torch
from recipe_runner import Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_run import Chain

from scd_sf.checkpoint import find
from scd_sf.data.latents import LatentClips, epoch_order
from scd_sf.tensor_files import read_tensors

STAGE2, STAGE3 = "recipes/stage2_flow_matching.py", "recipes/stage3_self_forcing.py"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def ranks(script: str, *arguments: object, world: int) -> list[Result]:
    results = recipe_runner.run_ranks(script, *arguments, world=world)
    for result in results:
        assert result.code == 0, result.err[-4000:]
    return results


def assert_same_run(one: Path, two: Path, tolerance: float) -> None:
    """Losses, norms, validation and weights. ``train.steps`` decides where a run validates and from
    when it has a best step: of that only what both say is compared."""
    rows = list(zip(tiny_run.metrics(one), tiny_run.metrics(two), strict=True))
    for left, right in rows:
        both = (left.keys() & right.keys()) - {"monitor/best_step"}
        assert {"step", "grad_norm", "lr"} < both
        assert {key: left[key] for key in both} == pytest.approx(
            {key: right[key] for key in both}, rel=tolerance, abs=tolerance
        )
    for name in ("model", "ema"):
        ours, other = (read_tensors(find(run) / f"{name}.safetensors") for run in (one, two))
        assert ours.keys() == other.keys()
        assert all(float((ours[key] - other[key]).abs().max()) <= tolerance for key in ours)


@pytest.mark.parametrize("engine", ["backend: torch", "backend: deepspeed, zero_stage: 2"])
def test_one_rank_two_ranks_one_rank(chain: Chain, tmp_path: Path, engine: str) -> None:
    """Growing and shrinking: the same samples, noise and global batch as the run of one rank that
    never stopped."""
    run = tmp_path / "run"
    for steps, world in ((2, 1), (4, 2), (6, 1)):
        ranks(
            STAGE2,
            *chain.stage2(run),
            f"engine={{{engine}, lr: 1e-2}}",
            f"train.steps={steps}",
            world=world,
        )
    assert_same_run(run, chain.root / "stage2", 1e-5)


def test_stage3_on_two_ranks_resumed_on_one(chain: Chain, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for steps, world in ((2, 2), (4, 1)):
        ranks(STAGE3, *chain.stage3(run), f"train.steps={steps}", world=world)
    assert_same_run(run, chain.root / "stage3", 1e-4)


def test_a_batch_that_spans_two_epochs(chain: Chain, tmp_path: Path) -> None:
    """16 clips, 6 a step: no sample is dropped or repeated, and two ranks see what one sees."""
    order = [index for step in range(8) for index in epoch_order(0, step, 6, 16)]
    assert all(sorted(order[start : start + 16]) == list(range(16)) for start in (0, 16, 32))
    for world in (1, 2):
        run = tmp_path / str(world)
        ranks(
            STAGE2, *chain.stage2(run), "train.global_batch=6", "train.micro_batch=1", world=world
        )
    assert_same_run(tmp_path / "1", tmp_path / "2", 1e-5)


def test_a_sample_that_is_not_finite_on_one_rank(chain: Chain, tmp_path: Path) -> None:
    """All ranks skip that update, count it and write their share of the batch; the run goes on."""
    order = epoch_order(0, 2, 4, 24)
    data, run = (
        tiny_run.write_latents(tmp_path / "data", 24, seed=1, huge=order[3]),
        tmp_path / "run",
    )
    ranks(STAGE2, *chain.stage2(run), f"data={data}", "train.steps=4", world=2)
    assert [row["step"] for row in tiny_run.metrics(run) if row["loss"] is None] == [3]
    (line,) = (run / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "engine": "model", "samples": order}
    assert json.loads((find(run) / "state" / "model" / "engine.json").read_text())["skipped"] == 1
    assert all(
        tensor.isfinite().all() for tensor in read_tensors(find(run) / "model.safetensors").values()
    )
    clips = LatentClips(data)
    for rank, finite in ((0, True), (1, False)):
        with safe_open(
            run / "nan_dump" / f"step_00000003_model_rank_{rank}.safetensors", framework="pt"
        ) as dump:
            (row,) = json.loads(dump.metadata()["micro_batches"])
            mine = order[2 * rank : 2 * rank + 2]
            assert (row["number"], row["indices"], row["prompts"]) == (
                rank,
                mine,
                clips.texts(mine),
            )
            assert math.isfinite(float(row["loss"])) == finite
            read = clips.batch(mine)
            assert torch.equal(dump.get_tensor(f"{rank}/latents"), read.latents_BFCHW)
            assert torch.equal(dump.get_tensor(f"{rank}/text"), read.text.text_BLE)


def test_a_critic_that_is_not_finite_on_one_rank(chain: Chain, tmp_path: Path) -> None:
    """Stage 3 with a text state that overflows: whichever engine meets the prompt skips, on all
    ranks, and is named."""
    prompts, run = tmp_path / "prompts", tmp_path / "run"
    shutil.copytree(chain.train, prompts)
    file = prompts / "text-00000.safetensors"
    tensors = load_file(file)
    tensors["tokens"][0] = float("inf")
    save_file(tensors, file)
    ranks(STAGE3, *chain.stage3(run), f"prompts={prompts}", world=2)
    dumps = {path.name.rsplit("_rank_", 1)[0] for path in (run / "nan_dump").iterdir()}
    lines = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert dumps == {f"step_{line['step']:08d}_{line['engine']}" for line in lines}
    assert len(list((run / "nan_dump").iterdir())) == 2 * len(dumps) and "critic" in str(dumps)
    for name, key in (("model", "model"), ("critic", "critic")):
        skipped = json.loads((find(run) / "state" / name / "engine.json").read_text())["skipped"]
        assert skipped == sum(line["engine"].startswith(key) for line in lines)
    assert all(
        tensor.isfinite().all() for tensor in read_tensors(find(run) / "ema.safetensors").values()
    )
    assert all(
        row["monitor/fake_real"] is not None
        for row in tiny_run.metrics(run)
        if "monitor/fake_real" in row
    )


def test_fewer_prompts_than_the_batch_of_all_ranks(chain: Chain, tmp_path: Path) -> None:
    """Refused by every rank before anything is written: a batch has no prompt twice."""
    run = tmp_path / "run"
    results = recipe_runner.run_ranks(STAGE3, *chain.stage3(run), "train.global_batch=8", world=2)
    for result in results:
        assert result.code == 2 and "6 samples, fewer than train.global_batch=8" in result.err
    assert not run.exists()
