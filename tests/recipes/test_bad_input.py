"""Bad input by the real scripts: exit code 2, one ``error:`` line with problem and remedy, nothing
written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
from recipe_runner import Result
from tiny_run import Chain

from scd_sf.checkpoint import Checkpoints, find
from scd_sf.config import to_yaml
from scd_sf.models.build import CheckpointConfig, ModelConfig, build_model

STAGE1, STAGE2, STAGE3 = (
    f"recipes/{name}.py"
    for name in ("stage1_transplant", "stage2_flow_matching", "stage3_self_forcing")
)
DECODER = "scd.decoder.layers=[0, 30]"


@dataclass(frozen=True)
class Case:
    """``make(chain, folder)`` gives arguments (the run directory is ``folder/run``); ``words``
    stand in the error."""

    script: str
    make: Callable[[Chain, Path], list[str]]
    words: tuple[str, ...]


def stage2(*overrides: str) -> Callable[[Chain, Path], list[str]]:
    return lambda chain, folder: [*chain.stage2(folder / "run"), *inside(folder, overrides)]


def stage3(*overrides: str) -> Callable[[Chain, Path], list[str]]:
    return lambda chain, folder: [*chain.stage3(folder / "run"), *inside(folder, overrides)]


def inside(folder: Path, overrides: tuple[str, ...]) -> list[str]:
    return [text.replace("FOLDER", str(folder)) for text in overrides]


def truncated_checkpoint(chain: Chain, folder: Path) -> list[str]:
    shutil.copytree(chain.stage1, folder / "copy")
    file = folder / "copy" / "step_00000000" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    return [*chain.stage2(folder / "run"), f"init={file.parent}"]


def other_size(chain: Chain, folder: Path) -> list[str]:
    tiny_run.write_latents(
        folder / "val", shape=replace(tiny_run.SHAPE, height=2 * tiny_run.SHAPE.height)
    )
    return [*chain.stage2(folder / "run"), f"val={folder}/val"]


def truncated_latents(chain: Chain, folder: Path) -> list[str]:
    shutil.copytree(chain.train, folder / "data")
    file = folder / "data" / "latents-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    return [*chain.stage2(folder / "run"), f"data={folder}/data"]


def truncated_teacher(chain: Chain, folder: Path) -> list[str]:
    shutil.copytree(chain.wan, folder / "teacher")
    file = folder / "teacher" / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    return [f"base={folder}/teacher", f"out={folder}/run", "family=causal"]


def bidirectional(chain: Chain, folder: Path) -> list[str]:
    config = ModelConfig("wan", wan=tiny_run.WAN)
    state = build_model(config).state_dict()
    Checkpoints(folder / "wan").write(
        0, {"model": state}, to_yaml(CheckpointConfig(config)), {"stage": "pretrain"}
    )
    return [*chain.stage3(folder / "run"), f"init={folder}/wan"]


def other_channels(chain: Chain, folder: Path) -> list[str]:
    tiny_run.write_latents(folder / "data", shape=replace(tiny_run.SHAPE, channels=3))
    return [*chain.stage2(folder / "run"), f"data={folder}/data"]


def other_text(chain: Chain, folder: Path) -> list[str]:
    tiny_run.write_latents(folder / "data", width=6)
    return [*chain.stage3(folder / "run"), f"prompts={folder}/data"]


def chunks_of_two(chain: Chain, folder: Path) -> list[str]:
    out = recipe_runner.succeed(
        STAGE1, f"base={chain.wan}", f"out={folder}/chunks", "family=causal", "chunk=2"
    )
    assert "causal" in out.out
    return [*chain.stage3(folder / "run"), f"init={folder}/chunks"]


def config_file(chain: Chain, folder: Path) -> list[str]:
    (folder / "mine.yaml").write_text("engine: {lrr: 1.0e-3}\n")
    return ["--config", f"{folder}/mine.yaml", *chain.stage2(folder / "run")]


def below_a_file(chain: Chain, folder: Path) -> list[str]:
    (folder / "run").write_text("a file")
    return chain.stage2(folder / "run" / "below")


CASES = {
    "unknown-key": Case(
        STAGE2, stage2("train.step=3"), ("'train.step'", "did you mean 'train.steps'?")
    ),
    "unknown-key-in-file": Case(
        STAGE2, config_file, ("mine.yaml", "'engine.lrr'", "did you mean 'engine.lr'?")
    ),
    "wrong-type": Case(STAGE2, stage2("train.steps=many"), ("train.steps", "int")),
    "missing-checkpoint": Case(
        STAGE2, stage2("init=FOLDER/nowhere"), ("nowhere", "no such folder", "give")
    ),
    "validation-of-another-size": Case(
        STAGE2, other_size, ("validation clips are 64x32", "are 32x32", "at one size")
    ),
    "truncated-checkpoint": Case(
        STAGE2, truncated_checkpoint, ("model.safetensors", "truncated", "copy this one")
    ),
    "truncated-latents": Case(STAGE2, truncated_latents, ("latents-00001.safetensors",)),
    "truncated-base": Case(
        STAGE1, truncated_teacher, ("diffusion_pytorch_model.safetensors", "copy")
    ),
    "layer-the-base-lacks": Case(
        STAGE1,
        lambda chain, folder: [
            f"base={chain.wan}",
            f"out={folder}/run",
            "scd.encoder_layers=[0]",
            DECODER,
        ],
        ("decoder.layers", "30", "0..5"),
    ),
    "stage1-output-is-taken": Case(
        STAGE1,
        lambda chain, _: [f"base={chain.wan}", f"out={chain.stage1}", "family=causal"],
        ("stage1", "nothing is overwritten", "out="),
    ),
    "frames": Case(STAGE3, stage3("video.frames=10"), ("frames is 10", "use 9")),
    "odd-latent-size": Case(
        STAGE3, stage3("video.height=24"), ("patches of 2x2", "multiples of 16")
    ),
    "chunk-does-not-divide": Case(STAGE3, chunks_of_two, ("3 latent frames", "chunk=2")),
    "batch-stage2": Case(
        STAGE2, stage2("train.global_batch=3"), ("global_batch is 3", "micro_batch", "use")
    ),
    "batch-stage3": Case(
        STAGE3, stage3("train={global_batch: 3, micro_batch: 2}"), ("global_batch is 3", "use")
    ),
    "batch-larger-than-data": Case(
        STAGE2,
        stage2("train.global_batch=32"),
        ("16 samples", "global_batch=32", "use train.global_batch=16"),
    ),
    "unwritable-run": Case(
        STAGE2, below_a_file, ("run/below", "cannot write the run directory", "run.dir")
    ),
    "bidirectional-init": Case(STAGE3, bidirectional, ("bidirectional Wan", "stage 1")),
    "missing-teacher": Case(
        STAGE3, stage3("teacher=FOLDER/nowhere"), ("nowhere", "no such file or folder")
    ),
    "other-channels": Case(STAGE2, other_channels, ("data", "3 channels", "takes 4", "VAE")),
    "other-text-encoder": Case(STAGE3, other_text, ("6 wide", "takes 8", "text encoder")),
    "missing-latents": Case(
        STAGE2, stage2("data=FOLDER/nowhere"), ("nowhere/manifest.json", "encode")
    ),
    "missing-prompts": Case(
        STAGE3, stage3("prompts=FOLDER/nowhere"), ("nowhere/manifest.json", "encode")
    ),
    "nothing-to-resume": Case(
        STAGE2, stage2("run.resume=must"), ("resume was asked for", "latest")
    ),
}


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and modification time of every file but a run's lock."""
    found = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in found}


def error_line(result: Result) -> str:
    """The one error line; warnings of what was skipped may stand before it."""
    assert result.code == 2, f"exit code {result.code}\n{result.out}\n{result.err}"
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and result.err.splitlines()[-1] == lines[0], result.err
    assert "Traceback" not in result.err
    return lines[0]


@pytest.mark.parametrize("name", CASES)
def test_refused_before_training(chain: Chain, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    arguments = case.make(chain, tmp_path)
    before = {**files(chain.root), **files(tmp_path)}
    line = error_line(recipe_runner.run(case.script, *arguments))
    assert [word for word in case.words if word not in line] == [], line
    allowed = {tmp_path / "run" / "config.yaml"} if name == "nothing-to-resume" else set()
    after = {**files(chain.root), **files(tmp_path)}
    assert {path for path in after if path not in before} <= allowed
    assert all(after[path] == value for path, value in before.items())


def test_changed_configuration_of_a_finished_run_is_refused(chain: Chain) -> None:
    before = files(chain.root)
    result = recipe_runner.run(STAGE2, *chain.stage2(chain.root / "stage2"), "engine.lr=5e-3")
    line = error_line(result)
    assert "engine.lr is 0.01 there but 0.005 now" in line and "run.dir" in line
    assert files(chain.root) == before


def test_non_finite_loss_stops_the_run_and_names_the_samples(chain: Chain, tmp_path: Path) -> None:
    """Updates are skipped, counted and noted; after max_skips in a row the run stops; its
    checkpoints stay finite."""
    run = tmp_path / "run"
    poison = ["engine={lr: 1e30, max_skips: 3, backend: torch}", "train.save_every=100"]
    line = error_line(recipe_runner.run(STAGE2, *chain.stage2(run), *poison))
    assert (
        "3 updates in a row had a non-finite loss" in line
        and "start a new run.dir with a lower lr" in line
    )
    skipped = (run / "skipped.jsonl").read_text().splitlines()
    assert len(skipped) == 3 and '"step": 2' in skipped[0] and '"samples": [' in skipped[0]
    assert [row["step"] for row in tiny_run.metrics(run)] == [1, 2, 3]
    assert tiny_run.metrics(run)[1]["loss"] is None
    with pytest.raises(ValueError, match="no checkpoint here"):
        find(run)
