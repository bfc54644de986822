"""Prediction with models from scratch: rows depend on their seeds, guidance is what the models' own
tests say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from scd_sf.checkpoint import Checkpoints
from scd_sf.config import to_yaml
from scd_sf.diffusion.samplers import Euler
from scd_sf.evaluation.prediction import (
    PredictionConfig,
    PredictionGuidance,
    load_predictor,
    predict,
)
from scd_sf.models.build import CheckpointConfig, ModelConfig, Student
from scd_sf.types import Conditioning, UserError

FAMILIES = [
    tiny.Variant("scd", 1, "paper", "temporal", "full", "dit"),
    tiny.Variant("causal", 1, backbone="dit"),
]
families = pytest.mark.parametrize("variant", FAMILIES, ids=str)


def told(frames: int) -> Conditioning:
    cond = tiny.prompts(2, dtype=torch.float32)
    assert cond.actions_BF is not None
    return dataclasses.replace(
        cond, text_BLE=torch.zeros(2, 0, 0), actions_BF=cond.actions_BF[:, :frames]
    )


def run(
    model: Student,
    cond: Conditioning,
    seeds: list[int],
    cfg: PredictionConfig | None = None,
    known: int = 2,
) -> Tensor:
    context = tiny.latents(2, known, dtype=torch.float32)[: cond.batch]
    return torch.cat(list(predict(model, context, cond, 3, Euler(2, 1.0), seeds, cfg)), 1)


@families
def test_a_row_is_its_own(variant: tiny.Variant) -> None:
    """Alone or in a batch, the same; another seed, another future; the context leads to it."""
    model, cond = tiny.student(variant, dtype=torch.float32), told(5)
    both = run(model, cond, [7, 8])
    assert both.shape == (2, 3, tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)
    torch.testing.assert_close(
        run(model, cond.rows(slice(0, 1)), [7])[0], both[0], rtol=1e-4, atol=1e-4
    )
    assert float((run(model, cond, [9, 8])[0] - both[0]).abs().max()) > 1e-2
    assert run(model, told(3), [7, 8], known=0).shape == both.shape  # from nothing
    window = run(model, cond, [7, 8], PredictionConfig(window=1))
    # two frames of history, one is seen
    assert float((window[:, 0] - both[:, 0]).abs().max()) > 1e-6


def test_guidance_moves_and_one_is_off() -> None:
    model, cond = tiny.student(FAMILIES[0], dtype=torch.float32), told(5)
    plain = run(model, cond, [7, 8])
    off = PredictionConfig(guidance=PredictionGuidance(corruption=1.0, actions=1.0))
    assert torch.equal(run(model, cond, [7, 8], off), plain)
    for guidance in (
        PredictionGuidance(corruption=1.5, context_noise=0.3),
        PredictionGuidance(actions=2.0),
    ):
        moved = run(model, cond, [7, 8], PredictionConfig(guidance=guidance))
        assert float((moved - plain).abs().max()) > 1e-3
    with pytest.raises(UserError, match="needs an SCD student"):
        run(
            tiny.student(FAMILIES[1], dtype=torch.float32),
            cond,
            [7, 8],
            PredictionConfig(guidance=guidance),
        )


def test_actions_for_every_frame_are_needed() -> None:
    with pytest.raises(UserError, match="given for 4 frames of 5"):
        run(tiny.student(FAMILIES[0], dtype=torch.float32), told(4), [7, 8])


def test_only_models_from_scratch_are_predictors(tmp_path: Path) -> None:
    for backbone in ("wan", "dit"):
        variant = dataclasses.replace(FAMILIES[0], backbone=backbone)
        config = ModelConfig("scd", 1, tiny.CFG, tiny.scd_config(variant), backbone, tiny.DIT)
        state = tiny.student(variant, dtype=torch.float32).state_dict()
        folder = tmp_path / backbone
        Checkpoints(folder / "checkpoints").write(
            0, {"model": state}, to_yaml(CheckpointConfig(config)), {"stage": "x"}
        )
        if backbone == "wan":
            with pytest.raises(UserError, match="not trained from scratch"):
                load_predictor(folder, "model")
        else:
            assert load_predictor(folder, "model")[1].model.dit == tiny.DIT
