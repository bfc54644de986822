"""A checkpoint directory explains itself: the right family is built, and nothing is loaded half."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

from scd_sf.checkpoint import Checkpoints, provenance
from scd_sf.config import from_yaml, to_yaml
from scd_sf.models.build import (
    CheckpointConfig,
    ModelConfig,
    SamplerConfig,
    Scd,
    build_model,
    build_student,
    load_checkpoint_model,
    load_state,
    load_student,
)
from scd_sf.models.causal import Causal
from scd_sf.models.scd.wan import ScdWan
from scd_sf.models.wan.transformer import Wan
from scd_sf.types import UserError

SCD = ModelConfig(
    "scd", 1, tiny.CFG, tiny.scd_config(tiny.Variant("scd", 3, "paper", "temporal", "cached"))
)
CAUSAL = ModelConfig("causal", 3, tiny.CFG, SCD.scd)
WAN = ModelConfig("wan", 1, tiny.CFG, SCD.scd)


def save(root: Path, config: ModelConfig, files: dict[str, dict[str, Tensor]]) -> Path:
    saved = CheckpointConfig(config, SamplerConfig("renoise", 4, 5.0), "somewhere")
    return Checkpoints(root).write(
        1, files, to_yaml(saved), provenance(stage="test", step=1, seed=0)
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("config", "family"), [(SCD, ScdWan), (CAUSAL, Causal), (WAN, Wan)])
def test_the_family_and_every_weight_come_back(
    tmp_path: Path, config: ModelConfig, family: type
) -> None:
    model = build_model(config)
    tiny.redraw(model, 1, torch.float32)
    path = save(tmp_path, config, {"model": state(model.bfloat16()), "ema": state(model.float())})
    loaded, saved = load_checkpoint_model(path)
    assert type(loaded) is family
    assert saved == CheckpointConfig(config, SamplerConfig("renoise", 4, 5.0), "somewhere")
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(
            parameter, model.get_parameter(name)
        )
    if isinstance(loaded, Scd):
        assert (loaded.chunk, loaded.decoder.config) == (3, config.scd.decoder)
    if isinstance(loaded, Causal):
        assert loaded.chunk == 3


def test_a_student_is_not_bidirectional() -> None:
    assert isinstance(build_student(CAUSAL), Causal)
    with pytest.raises(UserError, match=r"model\.family is wan, a bidirectional model"):
        build_student(WAN)


def test_ema_is_preferred_and_the_plain_weights_can_be_asked_for(tmp_path: Path) -> None:
    model, ema = build_model(CAUSAL), build_model(CAUSAL)
    tiny.redraw(ema, 2, torch.float32)
    path = save(tmp_path / "both", CAUSAL, {"model": state(model), "ema": state(ema)})
    for weights, expected in (("ema", ema), ("model", model)):
        loaded, _ = load_student(path, weights)
        assert all(
            torch.equal(p, expected.get_parameter(name)) for name, p in loaded.named_parameters()
        )
    only, _ = load_student(save(tmp_path / "one", CAUSAL, {"model": state(model)}))
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in only.named_parameters())


def test_weights_are_ema_or_model(tmp_path: Path) -> None:
    path = save(tmp_path, CAUSAL, {"model": state(build_model(CAUSAL))})
    with pytest.raises(UserError, match="best"):
        load_student(path, "best")


def test_a_bidirectional_checkpoint_is_no_student(tmp_path: Path) -> None:
    path = save(tmp_path, WAN, {"model": state(build_model(WAN))})
    with pytest.raises(
        UserError, match=r"step_00000001: holds a bidirectional Wan.*run stage 1 first"
    ):
        load_student(path)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weights = state(build_model(CAUSAL))
    name = "trunk.blocks.2.attn1.to_k.weight"
    broken: dict[str, dict[str, Tensor]] = {
        name: {**weights, name: weights[name][:-1].clone()},
        "trunk.patch_embedding.bias": {
            k: v for k, v in weights.items() if k != "trunk.patch_embedding.bias"
        },
        "trunk.extra": {**weights, "trunk.extra": torch.zeros(1)},
    }
    for culprit, tensors in broken.items():
        path = save(tmp_path / culprit, CAUSAL, {"model": tensors})
        with pytest.raises(
            UserError,
            match=rf"model\.safetensors: tensor '{culprit}' does not fit its config\.yaml",
        ):
            load_student(path)


def test_a_changed_file_is_not_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, CAUSAL, {"model": state(build_model(CAUSAL))})
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"model\.safetensors: its sha256 differs"):
        load_student(path)


def test_load_state_is_all_or_nothing() -> None:
    model = build_model(CAUSAL)
    before = state(model)
    wrong = {name: torch.zeros_like(p) for name, p in before.items()}
    wrong.pop("trunk.head.proj_out.bias")
    with pytest.raises(UserError, match=r"there: tensor 'trunk\.head\.proj_out\.bias'"):
        load_state(model, wrong, Path("there"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_configs_round_trip_and_refuse_nonsense() -> None:
    config = CheckpointConfig(SCD, SamplerConfig("renoise", 4, 5.0))
    assert from_yaml(CheckpointConfig, to_yaml(config)) == config
    with pytest.raises(UserError, match=r"model.family is 'unet'; use scd, causal or wan"):
        replace(SCD, family="unet")
    with pytest.raises(UserError, match=r"the base model has layers 0\.\.1"):
        replace(SCD, wan=replace(tiny.CFG, num_layers=2))
    with pytest.raises(UserError, match=r"chunk is 0; it must be at least 1"):
        replace(CAUSAL, chunk=0)
    with pytest.raises(UserError, match=r"use scd, causal or wan"):
        from_yaml(CheckpointConfig, to_yaml(config).replace("family: scd", "family: unet"))


NAMES = {
    "causal-chunk1": "e6fdaed1778953b6",
    "scd-chunk1-channel": "d3ebb4dfa631b533",
    "scd-chunk1-paper-temporal-full": "d56a3cb97e3effbb",
    "scd-chunk3-delta": "829373e42d94db83",
    "dit-causal-chunk1": "0e47e383333ae677",
    "dit-scd-chunk1-paper-temporal-full": "89e41f2294a9c974",
    "dit-scd-chunk3-channel": "9c8c0813549ed07b",
    "causal-chunk1-diagonal": "e6fdaed1778953b6",
    "causal-chunk1-skip": "e6fdaed1778953b6",
}


def test_parameters_keep_the_names_and_shapes_that_checkpoints_have() -> None:
    """Digests of revision fef1105, when SCD was one class: checkpoints written then are read
    now."""
    for variant in tiny.SOME:
        if str(variant) in NAMES:
            state = tiny.student(variant).state_dict()
            lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
            digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
            assert digest == NAMES[str(variant)], f"{variant}: {lines}"
