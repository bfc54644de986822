"""The exported pipeline: read without code of its own, equal to the rollout it wraps, streamed
frame by frame."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_run import Chain

from scd_sf import cli
from scd_sf.generation.generate import clips_of, decode, generate_latents
from scd_sf.generation.pipeline import CLASS, STUDENT, SCDWanPipeline, export_pipeline
from scd_sf.models.build import SamplerConfig, load_student
from scd_sf.models.wan.text import load_text_encoder
from scd_sf.models.wan.vae import load_vae
from scd_sf.types import UserError

PROMPTS = ["left in meadow", "still in hall"]


@pytest.fixture(scope="module")
def folder(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pipeline") / "exported"
    assert export_pipeline(chain.root / "stage3", out, dtype="fp32") < 1e-5
    return out


def test_it_is_the_rollout_and_the_decoder(chain: Chain, folder: Path) -> None:
    pipe = SCDWanPipeline.from_pretrained(folder)
    assert isinstance(pipe, DiffusionPipeline)
    assert set(pipe.components) == {"transformer", "vae", "text_encoder", "tokenizer"}
    student, config = load_student(chain.root / "stage3")
    cond = load_text_encoder(chain.wan).encode(PROMPTS)
    latents = clips_of(
        generate_latents(student, cond, [7, 8], (3, 4, 4, 4), config.sampler.build())
    )
    expected = decode(load_vae(chain.wan), latents)
    got = pipe(PROMPTS, seed=[7, 8], output_type="pt").frames
    assert got.shape == (2, 9, 3, 32, 32) and float((got - expected).abs().max()) < 1e-4
    alone = pipe(PROMPTS[1], seed=8, output_type="pt").frames
    assert float((alone - got[1:]).abs().max()) < 1e-4, "a clip depends on its own seed alone"


def test_frames_come_as_they_are_made(folder: Path) -> None:
    pipe = SCDWanPipeline.from_pretrained(folder)
    parts = list(pipe.stream(PROMPTS[0], seed=3, frames=13))
    assert [part.shape[1] for part in parts] == [1, 4, 4, 4]
    assert torch.equal(
        torch.cat(parts, 1), pipe(PROMPTS[0], seed=3, frames=13, output_type="pt").frames
    )
    assert not torch.equal(parts[0], next(pipe.stream(PROMPTS[0], seed=4)))


def test_saved_again_and_in_bf16(folder: Path, tmp_path: Path) -> None:
    pipe = SCDWanPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "again")
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert names == {
        str(file.relative_to(tmp_path / "again"))
        for file in (tmp_path / "again").rglob("*")
        if file.is_file()
    }
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == CLASS
    first, second = load_file(folder / STUDENT), load_file(tmp_path / "again" / STUDENT)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    half = SCDWanPipeline.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    frames = half(PROMPTS[0], seed=7, output_type="pt").frames
    assert frames.dtype == torch.float32 and frames.isfinite().all()
    half.save_pretrained(tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / STUDENT).values()} == {torch.bfloat16}


def test_a_distilled_student_keeps_its_sampler(folder: Path) -> None:
    pipe, euler = SCDWanPipeline.from_pretrained(folder), SamplerConfig("euler", 8, 5.0)
    with pytest.raises(
        UserError, match=r"distilled for sampler .*renoise.* not for .*euler.*force"
    ):
        pipe(PROMPTS[0], sampler=euler)
    forced = pipe(PROMPTS[0], sampler=euler, force=True, output_type="pt").frames
    assert forced.isfinite().all() and not torch.equal(
        forced, pipe(PROMPTS[0], output_type="pt").frames
    )


def test_bad_input(chain: Chain, folder: Path, tmp_path: Path) -> None:
    pipe = SCDWanPipeline.from_pretrained(folder)
    for arguments, words in (
        ({"frames": 10}, "frames is 10; the VAE needs"),
        ({"height": 30}, "height is 30"),
        ({"seed": [1, 2]}, "1 prompts but 2 seeds"),
    ):
        with pytest.raises(UserError, match=words):
            pipe(PROMPTS[0], **arguments)
    with pytest.raises(UserError, match="no pipeline directory"):
        SCDWanPipeline.from_pretrained(chain.wan)
    with pytest.raises(
        UserError, match=r"base is .*nowhere, and no such directory is there; set base="
    ):
        export_pipeline(chain.root / "stage3", tmp_path / "x", base=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"has no vae/"):
        export_pipeline(chain.root / "stage3", tmp_path / "x", base=str(tmp_path))
    assert not (tmp_path / "x").exists()


def scd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str]:
    """The exit code and what ``scd ARGUMENTS`` printed."""
    monkeypatch.setattr(sys, "argv", ["scd", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out + err


def test_the_commands(
    chain: Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """transplant, export, convert and inspect, one after the other."""
    layers = ["scd.encoder_layers=[0, 1, 2]", "scd.decoder.layers=[0, 5]"]
    code, said = scd(
        monkeypatch, capsys, "transplant", f"base={chain.wan}", f"out={tmp_path}/s1", *layers
    )
    assert code == 0 and "copied bit for bit" in said
    code, said = scd(
        monkeypatch,
        capsys,
        "export",
        tmp_path / "s1",
        tmp_path / "one.safetensors",
        "--dtype",
        "fp32",
    )
    assert code == 0 and "differs by at most" in said
    code, said = scd(monkeypatch, capsys, "inspect", tmp_path / "one.safetensors")
    assert code == 0 and "exported by scd" in said and "stage: stage1_transplant" in said
    code, said = scd(
        monkeypatch, capsys, "export", tmp_path / "s1", tmp_path / "pipe", "--layout", "pipeline"
    )
    assert code == 0 and (tmp_path / "pipe" / "model_index.json").is_file()
    code, said = scd(
        monkeypatch, capsys, "convert", chain.wan, tmp_path / "original", "--layout", "original"
    )
    assert (
        code == 0
        and "original layout, from diffusers" in said
        and "every tensor bit for bit" in said
    )
    code, said = scd(monkeypatch, capsys, "inspect", tmp_path / "original")
    assert code == 0 and "original layout, all tensors there" in said and "num_layers: 6" in said
    bare = tmp_path / "original" / "diffusion_pytorch_model.safetensors"
    code, said = scd(monkeypatch, capsys, "inspect", bare)
    assert code == 0 and "num_attention_heads: unknown" in said and "say it with --heads" in said
    code, said = scd(monkeypatch, capsys, "inspect", bare, "--heads", "2")
    assert code == 0 and "num_attention_heads: 2" in said
    code, said = scd(monkeypatch, capsys, "convert", bare, tmp_path / "x")
    assert code == 2 and "does not say how many attention heads it has" in said
    for size in ("0", "none"):
        code, said = scd(
            monkeypatch, capsys, "convert", chain.wan, tmp_path / "x", "--max-shard", size
        )
        assert code == 2 and f"max_shard is '{size}'" in said
    code, said = scd(monkeypatch, capsys, "convert", chain.wan, tmp_path / "x", "--layout", "onnx")
    assert code == 2 and "layout 'onnx' is unknown" in said
