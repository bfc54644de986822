"""The chain by the real scripts: what each stage leaves behind, under plain python and under both
launchers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
import torch
from tiny_run import SCRIPTS, STEPS2, STEPS3, Chain
from typer.testing import CliRunner

from scd_sf.checkpoint import find, read_provenance
from scd_sf.cli import app
from scd_sf.config import from_yaml
from scd_sf.models.build import CheckpointConfig, load_student
from scd_sf.tensor_files import read_tensors


def launch(command: list[str], cwd: Path = recipe_runner.ROOT) -> str:
    """Run a command with this interpreter's programs on PATH; its output."""
    programs = str(Path(sys.executable).parent)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_every_stage_leaves_a_checkpoint_that_explains_itself(chain: Chain) -> None:
    wanted = [
        ("stage1", 0, "euler", 50),
        ("stage2", STEPS2, "euler", 2),
        ("stage3", STEPS3, "renoise", 4),
    ]
    for name, step, sampler, steps in wanted:
        path = find(chain.root / name)
        config = from_yaml(CheckpointConfig, path / "config.yaml")
        record = read_provenance(path)
        assert record["step"] == step and str(record["stage"]).startswith(name)
        assert (config.sampler.name, config.sampler.steps) == (sampler, steps)
        assert config.model.family == "scd" and config.base == str(chain.wan)
    parents = read_provenance(find(chain.root / "stage3"))["parents"]
    assert isinstance(parents, list) and parents[0]["path"] == str(find(chain.root / "stage2"))
    assert read_provenance(find(chain.root / "stage2"))["video"] == {
        "frames": 9,
        "height": 32,
        "width": 32,
    }


def test_stage1_report_names_every_tensor(chain: Chain) -> None:
    model, _ = load_student(chain.stage1)
    report = (chain.stage1 / "report.txt").read_text()
    missing = [
        name
        for name, _ in model.named_parameters()
        if not re.search(rf"{re.escape(name)}(\s|$)", report)
    ]
    assert missing == []


@pytest.mark.parametrize(("stage", "parent"), [("stage2", "stage1"), ("stage3", "stage2")])
def test_keeping_attention_is_the_same_training(
    chain: Chain, tmp_path: Path, stage: str, parent: str
) -> None:
    arguments = chain.stage2(tmp_path) if stage == "stage2" else chain.stage3(tmp_path)
    here = (
        # and told by a relative path, recorded by the whole one
        f"init={os.path.relpath(find(chain.root / parent))}"
    )
    more = [f"teacher={os.path.relpath(chain.wan)}"] if stage == "stage3" else []
    recipe_runner.succeed(SCRIPTS[stage], *arguments, here, *more, "recompute_attention=false")
    assert tiny_run.metrics(tmp_path) == tiny_run.metrics(chain.root / stage)
    record = read_provenance(find(tmp_path))
    assert record["parents"] == read_provenance(find(chain.root / stage))["parents"]
    assert record.get("teacher", str(chain.wan)) == str(chain.wan)


@pytest.mark.parametrize(("stage", "parent"), [("stage2", "stage1"), ("stage3", "stage2")])
def test_every_tensor_is_trained_and_the_average_lags(
    chain: Chain, stage: str, parent: str
) -> None:
    """Encoder included (stage 3 would leave it at its parent's values if rollout detached it)."""
    weights = "ema.safetensors" if parent != "stage1" else "model.safetensors"
    before = read_tensors(find(chain.root / parent) / weights)
    after, ema = (
        read_tensors(find(chain.root / stage) / f"{name}.safetensors") for name in ("model", "ema")
    )
    assert before.keys() == after.keys() == ema.keys()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == []
    assert not any(torch.equal(after[name], ema[name]) for name in after if after[name].numel() > 1)


def test_metrics_of_every_step(chain: Chain) -> None:
    rows = tiny_run.metrics(chain.root / "stage2")
    assert [row["step"] for row in rows] == list(range(1, STEPS2 + 1))
    assert [row["step"] for row in rows if "val/loss" in row] == [3, 6]
    rows = tiny_run.metrics(chain.root / "stage3")
    wanted = {
        "critic/loss",
        "dmd/fake_real",
        "rollout/std",
        "monitor/std_ratio",
        "monitor/best_step",
        "grad_norm",
    }
    assert len(rows) == STEPS3 and all(wanted <= row.keys() for row in rows)
    assert (find(chain.root / "stage3") / "state" / "critic").is_dir()
    for stage, steps in (("stage2", (0, 3, 6)), ("stage3", (0, 2, 4))):
        assert sorted(f.stem for f in (chain.root / stage / "videos").iterdir()) == [
            f"{step:08d}" for step in steps
        ]


def test_pretrain_then_stage1_refuses_our_own_checkpoint_and_takes_diffusers(
    chain: Chain, tmp_path: Path
) -> None:
    """The from-scratch teacher trains, and a run directory is not taken for a Wan in diffusers
    layout."""
    model = "wan={num_attention_heads: 2, attention_head_dim: 12, in_channels: 4, out_channels: 4, text_dim: 8, "
    model += "freq_dim: 16, ffn_dim: 32, num_layers: 2}"
    train = "train={steps: 2, global_batch: 4, micro_batch: 4, save_every: 2, validate_every: 2}"
    inputs = [
        f"data={chain.train}",
        f"val={chain.root}/val",
        f"run.dir={tmp_path}/teacher",
        "engine.backend=torch",
    ]
    made = recipe_runner.succeed("recipes/pretrain_teacher.py", *inputs, model, train)
    tiny_run.check_words(made.out, tmp_path / "teacher", "export")
    exported = shlex.split(made.out.split("  export")[1].splitlines()[0])
    result = CliRunner().invoke(app, exported[1:])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "teacher-diffusers").is_dir()
    assert {"val/right", "val/wrong_motion", "val/null"} <= tiny_run.metrics(tmp_path / "teacher")[
        -1
    ].keys()
    refusal = recipe_runner.run(
        "recipes/stage1_transplant.py", f"base={tmp_path}/teacher", f"out={tmp_path}/s1"
    )
    assert refusal.code == 2 and "Wan 2.1 directory" in refusal.err


def test_plain_python_command(chain: Chain, tmp_path: Path) -> None:
    """The command of the README, as a new process."""
    command = [
        sys.executable,
        "recipes/stage1_transplant.py",
        f"base={chain.wan}",
        f"out={tmp_path}/s1",
    ]
    out = launch([*command, "family=causal"])
    assert "copied bit for bit" in out and find(tmp_path / "s1").name == "step_00000000"


def launcher(name: str) -> list[str]:
    ranks = {"deepspeed": "--num_accelerators", "torchrun": "--nproc_per_node"}[name]
    return [name, ranks, "2", "--master_port", recipe_runner.free_port()]


@pytest.mark.slow
def test_stage2_of_two_processes_under_torchrun(chain: Chain, tmp_path: Path) -> None:
    """DeepSpeed's ZeRO-2 on two processes has the losses of plain torch on one."""
    arguments = [*chain.stage2(tmp_path / "s2"), "engine.backend=deepspeed"]
    launch([*launcher("torchrun"), "recipes/stage2_flow_matching.py", *arguments])
    one, two = tiny_run.metrics(chain.root / "stage2"), tiny_run.metrics(tmp_path / "s2")
    for left, right in zip(one, two, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], abs=1e-5)
        assert right.get("val/loss") == pytest.approx(left.get("val/loss"), abs=1e-5)


@pytest.mark.slow
def test_stages_1_and_3_of_two_processes_under_deepspeed(chain: Chain, tmp_path: Path) -> None:
    """As :func:`test_stage2_of_two_processes_under_torchrun`."""
    start = launcher("deepspeed")
    arguments = [f"base={chain.wan}", f"out={tmp_path}/s1", "family=causal"]
    launch([*start, "recipes/stage1_transplant.py", *arguments])
    assert find(tmp_path / "s1").name == "step_00000000"
    kinds = [
        f"{engine}.backend=deepspeed"
        for engine in ("student_engine", "critic_engine", "teacher_engine")
    ]
    third = chain.stage3(tmp_path / "s3")
    launch([*start, "recipes/stage3_self_forcing.py", *third, *kinds])
    one, two = tiny_run.metrics(chain.root / "stage3"), tiny_run.metrics(tmp_path / "s3")
    for left, right in zip(one, two, strict=True):
        assert right["critic/loss"] == pytest.approx(left["critic/loss"], abs=1e-4)
        assert right["dmd/fake_real"] == pytest.approx(left["dmd/fake_real"], abs=1e-4)
    assert read_tensors(find(tmp_path / "s3") / "ema.safetensors").keys()
