"""Training from scratch: learns, resumes bit for bit, on two ranks as on one, and refuses what does
not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import recipe_runner
import tiny_run
import torch
from recipe_runner import At

from scd_sf.checkpoint import find
from scd_sf.config import load_config
from scd_sf.data.frames import FrameSetInfo, FrameWriter
from scd_sf.evaluation.prediction import load_predictor
from scd_sf.models.build import Scd
from scd_sf.tensor_files import read_tensors
from scd_sf.types import UserError

SCRIPT = "recipes/pretrain.py"
INFO = FrameSetInfo(channels=4, height=4, width=4, spatial=16, num_actions=3)
DIT = (
    "dit={num_attention_heads: 2, attention_head_dim: 16, in_channels: 4, out_channels: 4, freq_dim: 16, ffn_dim: 32, "
    "num_layers: 3, patch_height: 2, patch_width: 2, num_actions: 3}"
)
SCD = "scd={encoder_layers: [0, 1], decoder: {layers: [2], fusion: paper, prefix_rope: temporal, prefix_time: step}}"


def write_frames(root: Path, seed: int = 0, info: FrameSetInfo = INFO) -> Path:
    """Eight clips of a square that an action moves: what comes next follows from the action."""
    writer, rng = FrameWriter(root, {"seed": seed}, info), torch.Generator().manual_seed(seed)
    for number in range(8):
        frames = 6 + number % 3
        actions = torch.randint(0, 3, (frames,), generator=rng)
        place = (actions - 1).cumsum(0) % 4
        latents = torch.zeros(frames, 4, 4, 4)
        latents[torch.arange(frames), :, :, place] = 2.0
        writer.append(f"c{number}", latents - 0.5, actions if info.num_actions else None)
    writer.finish()
    return root


def arguments(root: Path, run: Path, *more: str) -> list[str]:
    model = f"model={{{DIT.replace('=', ': ')}, {SCD.replace('=', ': ')}}}"
    train = "train={steps: 6, global_batch: 4, micro_batch: 2, save_every: 2, validate_every: 3, ema: {decay: 0.5}}"
    engine = "engine={backend: torch, lr: 1.0e-2, lr_scale: {decoder: 2.0}}"
    given = [
        f"data={root / 'train'}",
        f"val={root / 'val'}",
        f"run.dir={run}",
        "frames=5",
        "validation_clips=4",
    ]
    return [*given, model, train, engine, *more]


def outcome(run: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: v for k, v in row.items() if k.startswith(("loss", "val/", "grad_norm", "lr", "step"))}
        for row in rows
    ]
    return kept, read_tensors(find(run) / "ema.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("frames")
    write_frames(root / "train")
    write_frames(root / "val", 1)
    return root


def test_killed_and_resumed_it_is_the_unbroken_run(data: Path, tmp_path: Path) -> None:
    done = recipe_runner.succeed(SCRIPT, *arguments(data, tmp_path / "whole"))
    tiny_run.check_words(done.out, tmp_path / "whole", "score")
    killed = recipe_runner.run(
        SCRIPT,
        *arguments(data, tmp_path / "parts"),
        at=At("scd_sf.train.local:LocalEngine.backward", 8),
    )
    assert killed.code == -9
    recipe_runner.succeed(SCRIPT, *arguments(data, tmp_path / "parts"))
    whole, parts = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    assert [row["step"] for row in whole[0]] == [1, 2, 3, 4, 5, 6]
    assert whole[0][-4:] == parts[0][-4:] and "val/loss" in whole[0][-1]
    assert all(torch.equal(tensor, parts[1][name]) for name, tensor in whole[1].items())
    model, config = load_predictor(tmp_path / "whole")
    assert isinstance(model, Scd) and config.model.backbone == "dit" and config.sampler.shift == 1.0


@pytest.mark.slow
def test_two_ranks_under_zero_are_one_process(data: Path, tmp_path: Path) -> None:
    """The encoder's rate and the decoder's under DeepSpeed too; K samples in turn."""
    recipe_runner.succeed(SCRIPT, *arguments(data, tmp_path / "one"))
    zero = [
        "engine={backend: deepspeed, zero_stage: 2, lr: 1.0e-2, lr_scale: {decoder: 2.0}}",
        "samples_in_turn=true",
    ]
    results = recipe_runner.run_ranks(SCRIPT, *arguments(data, tmp_path / "two", *zero), world=2)
    assert [result.code for result in results] == [0, 0], results[0].err[-3000:]
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert [row["loss"] for row in one[0]] == pytest.approx(
        [row["loss"] for row in two[0]], rel=1e-4
    )
    for name, tensor in one[1].items():
        torch.testing.assert_close(tensor, two[1][name], rtol=1e-3, atol=2e-4)


def test_what_does_not_fit_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path
) -> None:
    write_frames(tmp_path / "silent", info=FrameSetInfo(4, 4, 4, 16))
    for more, message in (
        ("frames=9", "no clip has 9 frames"),
        ("model.dit.num_actions=5", "has 3 actions, model.dit.num_actions is 5"),
        ("model.backbone=wan", "model.backbone must be dit"),
        (f"val={tmp_path / 'silent'}", "has 0 actions"),
        ("engine.lr_scale.head=2", "lr_scale.head: no parameter's name starts so"),
        (f"data={tmp_path}", "its folders silent have one"),
        (f"preview.tokenizer={tmp_path}", str(tmp_path)),
    ):
        result = recipe_runner.run(SCRIPT, *arguments(data, tmp_path / "run", more))
        assert result.code == 2 and message in result.err, (more, result.err[-500:])
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_fields_that_contradict_or_are_not_read_are_refused() -> None:
    """Each would be written into the checkpoint without having been trained."""
    schema = vars(recipe_runner.load_script(SCRIPT))["PretrainConfig"]
    doom, doom_scd = (
        recipe_runner.ROOT / "recipes/configs" / f"pretrain_{name}.yaml"
        for name in ("doom", "doom_scd")
    )

    def configured(*more: str, scd: bool = True) -> Any:
        return load_config(
            schema, [doom, doom_scd] if scd else [doom], ["data=x", "val=x", "run.dir=x", *more]
        )

    layers = "set them together"
    for scd, more, message in (
        (
            True,
            ["model.dit.num_layers=8"],
            f"num_layers is 8, but model.scd has 4 encoder_layers and 2 .*{layers}",
        ),
        (
            True,
            ["model.scd.encoder_layers=[0, 1, 2]"],
            f"num_layers is 6, .*3 encoder_layers.*{layers}",
        ),
        (True, ["model.scd.decoder.layers=[4]"], layers),
        (True, ["model.chunk=2"], r"model.chunk is set, .*\(SCD's is model.scd.chunk\): remove it"),
        (
            True,
            ["model.wan.num_layers=2"],
            "model.wan is set, but family scd from scratch does not read it",
        ),
        (False, ["model.scd.chunk=2"], "model.scd is set, but family causal"),
        (False, ["model.scd.decoder.fusion=channel"], "model.scd is set, but family causal"),
        (False, ["model.wan.ffn_dim=2"], "model.wan is set"),
    ):
        with pytest.raises(UserError, match=message):
            configured(*more, scd=scd)
    wider = configured("model.dit.num_layers=8", "model.scd.decoder.layers=[4, 5, 6, 7]").model
    assert (wider.dit.num_layers, len(wider.scd.decoder.layers)) == (8, 4)
    assert configured("model.scd.chunk=2", "model.chunk=2").model.scd.chunk == 2
    assert configured("model.dit.num_layers=8", "model.chunk=2", scd=False).model.chunk == 2


def test_defaults_are_scd_b(tmp_path: Path) -> None:
    schema = vars(recipe_runner.load_script(SCRIPT))["PretrainConfig"]
    cfg = load_config(schema, None, ["data=x", "val=x", "run.dir=x"])
    assert len(cfg.model.scd.encoder_layers) == 8 and len(cfg.model.scd.decoder.layers) == 4
