"""`scd bench`: the whole tuple is there, counts are exact, figures follow from the seconds
measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from scd_sf.cli import app
from scd_sf.config import load_config
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.evaluation.bench import (
    Bench,
    BenchConfig,
    BenchModel,
    ClipSeconds,
    MeasuredModel,
    alone,
    in_rounds,
    open_bench,
    run_bench,
    setup,
)
from scd_sf.models.build import ModelConfig
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.wan.tiny_vae import (
    TinyDecoder,
    TinyVae,
    TinyVaeConfig,
    latents_of,
    save_decoder,
)
from scd_sf.models.wan.transformer import WanConfig
from scd_sf.models.wan.vae import load_vae
from scd_sf.types import UserError

BASE = Path(__file__).parents[2] / "assets" / "wan_doom"
WAN = WanConfig(2, 12, text_dim=384, freq_dim=16, ffn_dim=32, num_layers=4)
SCD = ModelConfig("scd", wan=WAN, scd=ScdConfig((0, 1, 2), DecoderConfig((0, 3))))
CAUSAL = ModelConfig("causal", wan=WAN)


def config(**more: Any) -> BenchConfig:
    models = [BenchModel("ours", model=SCD), BenchModel("theirs", model=CAUSAL)]
    given = {"frames": 13, "height": 32, "width": 32, "rounds": 2, "warmup": 0} | more
    return BenchConfig(models=models, base=str(BASE), **given)


def test_the_document_holds_what_reviewers_ask_for() -> None:
    said: list[str] = []
    document: Any = run_bench(config(floor=True), said.append)
    assert said == ["ours: warm", "theirs: warm", "round 1/2", "round 2/2"]
    ours, theirs = document["rows"]
    assert (ours["family"], ours["fusion"], theirs["family"]) == ("Scd", "delta", "Causal")
    # encoder 3 and the decoder's early block once, decoder 2 times 4 steps; causal: 4 layers times
    # 4 steps, and a clean pass for all frames but the last
    assert ours["block_passes_per_latent_frame"] == 3 + 1 + 2 * 4
    assert theirs["block_passes_per_latent_frame"] == (4 * 4 * 4 + 3 * 4) / 4
    assert ours["compile"] == {"enabled": False, "cuda_graphs": False}
    assert (
        ours["attention"]
        and ours["time_over_first_row"] == 1.0
        and theirs["time_over_first_row"] > 0
    )
    for row in (ours, theirs):
        first = row["first_frame_seconds"]
        assert (
            0 < first["dit"] < first["dit_vae"] < first["text_dit_vae"]
            and first["dit"] < first["text_dit"]
        )
        assert (
            0 < row["fps_dit_vae"] < row["fps_dit"]
            and 0 < row["steady_fps_dit_vae"] < row["steady_fps_dit"]
        )
        assert row["floor_seconds"] > 0 and row["dit_over_floor"] > 0.5
        assert row["peak_memory_alone_gib"] <= row["peak_memory_gib"]
        assert 0 < row["chunk_ms_p50"] <= row["chunk_ms_p95"] and len(row["seconds_per_round"]) == 2
    setup = document["setup"]
    assert setup["video"] == [13, 32, 32] and setup["dtype"] == "fp32"
    assert setup["peak_memory_gib"] > 0.1 and setup["text_tokens"] == 24
    json.dumps(document)


def test_a_tiny_decoder_is_timed_in_place_of_the_vaes(tmp_path: Path) -> None:
    cfg = TinyVaeConfig(widths=(4, 4, 4, 4))
    save_decoder(TinyDecoder(cfg), tmp_path, latents_of(load_vae(BASE)))
    bench, entries = open_bench(config(decoder=str(tmp_path)))
    assert isinstance(bench.decoder, TinyVae) and setup(bench, 0)["decoder"] == str(tmp_path)
    assert bench.clip(entries[0]).pixels == (1, 4, 4, 4)
    bench, _ = open_bench(config())
    assert bench.decoder is bench.vae and setup(bench, 0)["decoder"] == "the VAE's own"


def test_a_models_peak_is_without_what_others_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs keep their histories: 4 GiB of the first model, 7 of the second, 1 GiB while a
    clip is made."""
    gib, memory = 2**30, {"held": 0, "most": 0}
    left = {"ours": 4 * gib, "theirs": 7 * gib}

    class Fake:
        def __init__(self, device: object) -> None:
            pass

        def now(self) -> int:
            return memory["held"]

        def reset(self) -> None:
            memory["most"] = memory["held"]

        def bytes(self) -> int:
            return memory["most"]

    def make(bench: Bench, entry: MeasuredModel, heavy: object) -> ClipSeconds:
        memory["held"] += left.pop(entry.config.name, 0)
        memory["most"] = memory["held"] + gib
        return ClipSeconds(0.0, (1.0,), (1.0,), (1,))

    monkeypatch.setattr("scd_sf.evaluation.bench.Peak", Fake)
    monkeypatch.setattr(Bench, "_clip", make)
    bench, entries = open_bench(config())
    for entry in (*entries, *entries):
        bench.clip(entry)
    assert [entry.peak_bytes / gib for entry in entries] == [12.0, 12.0]
    assert [alone(entry, entries) for entry in entries] == [5.0, 8.0]


def test_figures_follow_from_the_seconds() -> None:
    clip = ClipSeconds(0.5, (2.0, 1.0, 1.0), (1.0, 3.0, 3.0), (1, 4, 4))
    assert (
        clip.fps(vae=False) == 9 / 4
        and clip.fps(vae=True) == 9 / 11
        and clip.fps(vae=True, first=1) == 8 / 8
    )
    slow = ClipSeconds(0.5, (4.0, 2.0, 2.0), (2.0, 6.0, 6.0), (1, 4, 4))
    bench, entries = open_bench(config(frames=9))
    one, two = (
        MeasuredModel(e.config, e.student, FewStepSampler(), e.compile, clips=clips)
        for e, clips in zip(entries, ([clip], [slow]), strict=True)
    )
    row: Any = bench.row(two, one)
    assert row["time_over_first_row"] == 2.0 and row["first_frame_seconds"]["text_dit_vae"] == 6.5
    assert (row["chunk_ms_p50"], row["chunk_ms_p95"]) == (8000.0, 8000.0)


def test_steady_state_begins_when_the_window_is_full() -> None:
    bench, _ = open_bench(config(window=1, sink=1))
    assert isinstance(bench, Bench) and bench.full_from(1) == 3
    assert open_bench(config())[0].full_from(1) == 3


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"sink": 1}, "a sink needs a window"),
        ({"models": []}, "nothing to measure"),
    ],
)
def test_bad_settings(more: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        BenchConfig(**({"models": [BenchModel("a", model=SCD)]} | more))


def test_bad_models() -> None:
    with pytest.raises(UserError, match="'a' needs either checkpoint or model"):
        BenchModel("a")
    wide = BenchModel(
        "wide", model=ModelConfig("causal", wan=WanConfig(2, 12, ffn_dim=32, num_layers=1))
    )
    sizes: Any = {"frames": 5, "height": 32, "width": 32, "base": str(BASE)}
    with pytest.raises(UserError, match="'wide' takes text states 4096 wide"):
        open_bench(BenchConfig(models=[wide], **sizes))
    both = BenchModel("both", model=ModelConfig("wan", wan=WAN))
    with pytest.raises(UserError, match="'both' is bidirectional"):
        open_bench(BenchConfig(models=[both], **sizes))
    with pytest.raises(
        UserError, match="ours: does not say what it was trained on; set frames=, height=, width="
    ):
        open_bench(BenchConfig(models=[BenchModel("ours", model=SCD)], base=str(BASE)))


def test_the_shipped_config_compares_at_wans_size() -> None:
    cfg = load_config(
        BenchConfig, Path(__file__).parents[2] / "recipes" / "configs" / "bench_wan_1.3b.yaml", []
    )
    assert [row.name for row in cfg.models] == [
        "SCD, fusion delta",
        "SCD, fusion paper",
        "Self-Forcing, frame-wise",
        "SCD, fusion delta, chunks of 3",
        "SCD, fusion paper, chunks of 3",
        "Self-Forcing, chunk-wise",
    ]
    for row in cfg.models:
        assert row.model is not None
        assert row.model.family == "causal" or f"fusion {row.model.scd.decoder.fusion}" in row.name
    assert all(row.model is not None and row.model.wan == WanConfig() for row in cfg.models)
    assert (cfg.frames, cfg.height, cfg.width, cfg.dtype) == (81, 480, 832, "bf16")


def test_command_line_writes_the_document(tmp_path: Path) -> None:
    (tmp_path / "bench.yaml").write_text(
        "models: [{name: tiny, sampler: {name: euler, steps: 2}, model: {family: causal, wan: {num_attention_heads: 2, "
        "attention_head_dim: 12, text_dim: 384, freq_dim: 16, ffn_dim: 32, num_layers: 1}}}]\n"
    )
    arguments = [
        "bench",
        "--config",
        str(tmp_path / "bench.yaml"),
        f"base={BASE}",
        f"out={tmp_path / 'bench.json'}",
    ]
    result = CliRunner().invoke(
        app, [*arguments, "frames=5", "height=16", "width=16", "rounds=1", "warmup=0"]
    )
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["rows"][0]["sampler"] == "euler" and document["rows"][0]["steps"] == 2
    assert "tiny" in result.output


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    rows = in_rounds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert "".join(order) == "abababab"
    assert [row["name"] for row in rows] == ["a", "b"] and rows[0]["ratio_to_first"] == 1.0
    x = torch.ones(768, 768)
    row: Any = in_rounds({"product": lambda: x @ x}, 2, floor=True)[0]
    assert row["floor_seconds"] > 0 and row["floor_ratio"] > 0 and row["cpu_ratio_to_first"] == 1.0
