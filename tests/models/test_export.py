"""Weights for others: single files that explain themselves, Wan's own layouts, conversions; each
read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from scd_sf.checkpoint import Checkpoints, provenance
from scd_sf.config import to_yaml
from scd_sf.models import export
from scd_sf.models.build import (
    CheckpointConfig,
    ModelConfig,
    SamplerConfig,
    describe_checkpoint,
    is_single,
    load_student,
    probe_output,
    read_single,
)
from scd_sf.models.export import convert_wan, export_weights
from scd_sf.models.scd.transplant import TransplantConfig, run_transplant
from scd_sf.models.wan.weights import load_wan, open_wan, save_wan
from scd_sf.types import UserError

SAME = 1e-5  # equal weights at other addresses: BLAS may sum in another order
RENOISE = SamplerConfig("renoise", 4, 5.0)
SCD = tiny.scd_config(tiny.Variant("scd", 1, "delta"))


def checkpoint(root: Path, family: str) -> Path:
    """A distilled checkpoint with ema weights of its own."""
    config = CheckpointConfig(ModelConfig(family, 1, tiny.CFG, SCD), RENOISE, base="wan")
    variant = tiny.Variant(family, 1, "delta" if family == "scd" else "")
    states = {
        name: tiny.student(variant, seed, torch.float32).state_dict()
        for seed, name in enumerate(("model", "ema"))
    }
    record = provenance(
        stage="stage3_self_forcing", step=600, seed=0, extra={"video": {"frames": 9}}
    )
    return Checkpoints(root).write(600, states, to_yaml(config), record)


@pytest.mark.parametrize("family", ["scd", "causal"])
@pytest.mark.parametrize("weights", ["model", "ema"])
def test_a_single_file_says_what_it_is_and_loads(tmp_path: Path, family: str, weights: str) -> None:
    source, file = checkpoint(tmp_path / "run", family), tmp_path / "out" / "student.safetensors"
    assert export_weights(tmp_path / "run", file, "single", weights, "fp32") < SAME
    with safe_open(str(file), "pt") as handle:
        metadata = handle.metadata()
    assert metadata["format"] == "scd_sf.model.1" and metadata["licence"] == "Apache-2.0"
    assert (metadata["stage"], metadata["step"]) == ("stage3_self_forcing", "600")
    assert json.loads(metadata["sampler"]) == {
        "name": "renoise",
        "steps": 4,
        "shift": 5.0,
        "times": [],
    }
    config, origin = describe_checkpoint(file)
    assert config == describe_checkpoint(source)[0] and origin["weights"] == weights
    first, second = load_student(source, weights)[0], load_student(file)[0]
    assert all(torch.equal(p, second.get_parameter(name)) for name, p in first.named_parameters())
    assert (
        is_single(file)
        and export_weights(file, tmp_path / "again.safetensors", "single", dtype="fp32") < SAME
    )


def test_smaller_types_differ_by_what_is_reported(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", "scd")
    difference = export_weights(
        tmp_path / "run", tmp_path / "a.safetensors", "single", dtype="bf16"
    )
    assert 0 < difference < 0.2
    again = load_student(tmp_path / "a.safetensors")[0]
    assert difference == pytest.approx(
        float((probe_output(again) - probe_output(load_student(tmp_path / "run")[0])).abs().max())
    )


def test_nothing_is_there_before_it_was_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it compares, or another export came first: no unchecked file, and none of others
    is replaced."""
    checkpoint(tmp_path / "run", "scd")
    file, largest = tmp_path / "out" / "a.safetensors", export.largest

    def other_first(one: torch.Tensor, two: torch.Tensor) -> float:
        assert not file.exists()
        if one is not two:
            file.write_text("another's")
        return largest(one, two)

    monkeypatch.setattr(export, "largest", other_first)
    with pytest.raises(UserError, match="exists already, nothing is overwritten"):
        export_weights(tmp_path / "run", file, "single")
    assert file.read_text() == "another's" and [path.name for path in file.parent.iterdir()] == [
        file.name
    ]


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_the_causal_baseline_fits_wans_own_layouts(tmp_path: Path, layout: str) -> None:
    checkpoint(tmp_path / "run", "causal")
    assert export_weights(tmp_path / "run", tmp_path / "out", layout, dtype="fp32") < SAME
    assert open_wan(tmp_path / "out").layout == layout
    expected = load_student(tmp_path / "run")[0].state_dict()
    assert all(
        torch.equal(t, expected[name])
        for name, t in load_wan(tmp_path / "out").state_dict().items()
    )


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", "scd")
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"mine")
    for out, layout, dtype, words in (
        (tmp_path / "new", "diffusers", "bf16", "an SCD model does not fit Wan's diffusers layout"),
        (tmp_path / "new", "onnx", "bf16", "layout 'onnx' is unknown"),
        (tmp_path / "new", "single", "int4", "dtype 'int4' is unknown"),
        (taken, "single", "bf16", "exists already, nothing is overwritten"),
    ):
        with pytest.raises(UserError, match=words):
            export_weights(tmp_path / "run", out, layout, dtype=dtype)
    assert taken.read_bytes() == b"mine" and not (tmp_path / "new").exists()


def test_other_files_are_not_taken_for_exports(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    assert not is_single(file)
    with pytest.raises(UserError, match="not a file of 'scd export'"):
        load_student(file)
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(
        UserError, match=r"a\.pt: not a file of 'scd export'; for weights of others"
    ):
        load_student(tmp_path / "a.pt")
    for metadata, words in (
        ({"format": "scd_sf.model.1"}, "description is unreadable"),
        (
            {"format": "scd_sf.model.1", "provenance": "{}", "config": "modle: 3"},
            "unknown key 'modle'",
        ),
    ):
        save_file({"a": torch.zeros(1)}, file, metadata)
        with pytest.raises(UserError, match=rf"a\.safetensors.*{words}"):
            read_single(file)
    file.write_bytes(b"short")
    with pytest.raises(UserError, match=r"a\.safetensors: not a readable safetensors file"):
        load_student(file)


def test_conversion_there_and_back(tmp_path: Path) -> None:
    save_wan(tiny.wan(2, torch.bfloat16).state_dict(), tiny.CFG, tmp_path / "a", torch.bfloat16)
    files, difference = convert_wan(tmp_path / "a", tmp_path / "b", "original", max_shard=20_000)
    assert files.layout == "diffusers" and difference < SAME
    files, difference = convert_wan(tmp_path / "b", tmp_path / "c", "diffusers")
    assert files.layout == "original" and difference < SAME
    first, last = load_wan(tmp_path / "a"), load_wan(tmp_path / "c")
    assert all(torch.equal(p, last.get_parameter(name)) for name, p in first.named_parameters())
    with pytest.raises(UserError, match="exists already"):
        convert_wan(tmp_path / "a", tmp_path / "c", "original")


def test_stage_1_from_a_generator(tmp_path: Path) -> None:
    """A Self-Forcing file becomes the causal baseline with its own sampler; heads come from the
    base."""
    save_wan(
        tiny.wan(0, torch.float32).state_dict(),
        tiny.CFG,
        tmp_path / "base" / "transformer",
        torch.float32,
    )
    generator = tiny.wan(5, torch.float32)
    save_wan(
        generator.state_dict(), tiny.CFG, tmp_path / "original", torch.float32, layout="original"
    )
    tensors = {f"model.{name}": t for name, t in safe_tensors(tmp_path / "original").items()}
    torch.save({"generator_ema": tensors}, tmp_path / "self_forcing_dmd.pt")
    cfg = TransplantConfig(
        str(tmp_path / "base"),
        str(tmp_path / "out"),
        weights=str(tmp_path / "self_forcing_dmd.pt"),
        family="causal",
        chunk=3,
        sampler=RENOISE,
    )
    assert "copied bit for bit, 0 new" in run_transplant(cfg)
    student, config = load_student(tmp_path / "out")
    assert student.chunk == 3 and config.sampler == RENOISE
    assert all(
        torch.equal(p, generator.get_parameter(name)) for name, p in student.named_parameters()
    )
    assert describe_checkpoint(tmp_path / "out")[1]["weights"] == str(
        tmp_path / "self_forcing_dmd.pt"
    )


def safe_tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(folder / "diffusion_pytorch_model.safetensors"), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
