"""Part 2: frames per second of SCD and of its causal baseline at Wan 1.3B's size, by `scd bench`'s
own code."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from scd_sf.config import load_config
from scd_sf.evaluation.bench import BenchConfig, BenchModel, run_bench
from scd_sf.generation.compile import CompileConfig
from scd_sf.models.build import ModelConfig, SamplerConfig
from scd_sf.models.wan.transformer import WanConfig
from scd_sf.models.wan.vae import Vae
from scd_sf.tools.gpu.card import Card
from scd_sf.tools.gpu.parts import Figures, GpuRow
from scd_sf.types import say

CONFIG = Path("recipes/configs/bench_wan_1.3b.yaml")
MODES = {
    "eager": CompileConfig(),
    "graphs": CompileConfig(enabled=True, cuda_graphs=True),
    "compiled": CompileConfig(enabled=True),
}
GROUPS = {1: "frame-wise", 3: "3 frames a chunk"}
# Most telling first: (latent frames per chunk, steps, mode).
ORDER = [(chunk, 4, mode) for chunk in GROUPS for mode in ("eager", "graphs")]
ORDER += [(chunk, 2, "graphs") for chunk in GROUPS]
ORDER += [(chunk, 4, "compiled") for chunk in GROUPS]
ORDER += [(chunk, 2, mode) for mode in ("eager", "compiled") for chunk in GROUPS]
TOY = WanConfig(2, 12, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=4)
WHOLE_GIB, LEAST_GIB = 38.0, 20.0  # estimates: three models at 81 frames, and at 33


def speed_rows(card: Card) -> Sequence[GpuRow]:
    """One row for each chunk size, number of steps and mode; the baseline beside SCD. No CUDA
    graphs on a CPU."""
    return [
        GpuRow(
            f"{GROUPS[chunk]}, {steps} steps, {mode}",
            partial(measure_speed, card, chunk, steps, mode),
        )
        for chunk, steps, mode in ORDER
        if not (card.toy and mode == "graphs")
    ]


def config(card: Card, chunk: int, steps: int, mode: str) -> BenchConfig:
    """`scd bench` of the shipped configuration, of models with this chunk."""
    overrides = [] if card.gib >= WHOLE_GIB else ["frames=33"]
    if card.gib < LEAST_GIB:
        overrides += ["height=240", "width=416"]
    if card.toy:
        overrides = [
            "frames=9",
            "height=16",
            "width=16",
            "dtype=fp32",
            "vae_dtype=fp32",
            "text_tokens=5",
        ]
    device = [f"device={card.device.type}", "floor=true", f"rounds={1 if card.toy else 2}"]
    # the clip that is looked at first is eager
    device.append(f"warmup={0 if mode == 'eager' else 1}")
    cfg = load_config(BenchConfig, CONFIG, [*overrides, *device])
    models = [
        small(model) if card.toy else model for model in cfg.models if chunk_of(model) == chunk
    ]
    return replace(cfg, models=models, sampler=SamplerConfig("renoise", steps), compile=MODES[mode])


def chunk_of(model: BenchModel) -> int:
    """Latent frames per chunk of a model."""
    assert model.model is not None
    return model.model.scd.chunk if model.model.family == "scd" else model.model.chunk


def small(model: BenchModel) -> BenchModel:
    """The model at toy size."""
    cfg = model.model
    assert cfg is not None
    scd = replace(
        cfg.scd, encoder_layers=(0, 1, 2), decoder=replace(cfg.scd.decoder, layers=(0, 3))
    )
    return replace(model, model=ModelConfig(cfg.family, cfg.chunk, TOY, scd))


def toy_vae() -> Vae:
    """Wan 2.1's VAE, narrow."""
    return Vae(
        AutoencoderKLWan(
            base_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        )
    )


def measure_speed(card: Card, chunk: int, steps: int, mode: str) -> Figures:
    """The figures of a row: the bench's document and its lines of the table."""
    try:
        document = run_bench(config(card, chunk, steps, mode), say, toy_vae() if card.toy else None)
    finally:
        torch._dynamo.reset()
        gc.collect()
        if not card.toy:
            torch.cuda.empty_cache()
    video = "x".join(map(str, document["setup"]["video"]))  # type: ignore[index]
    return {"bench": document, "lines": [line(row, video) for row in document["rows"]]}  # type: ignore[attr-defined]


def line(row: Figures, video: str) -> Figures:
    """One model of ``video`` (frames x height x width): rates over the whole clip and in its steady
    state, without and with the VAE."""
    first_frame = row["first_frame_seconds"]
    mode = "compiled" if row["compile"]["enabled"] else "eager"
    if row["compile"]["cuda_graphs"]:
        mode = "graphs"
    return {
        "model": row["name"],
        "video": video,
        "steps": row["steps"],
        "run": mode,
        "FPS dit": row["fps_dit"],
        "FPS steady": row["steady_fps_dit"],
        "FPS dit+vae": row["fps_dit_vae"],
        "first frame s": first_frame["dit"],
        "with vae": first_frame["dit_vae"],
        "chunk ms p50": row["chunk_ms_p50"],
        "p95": row["chunk_ms_p95"],
        "peak GiB": row["peak_memory_alone_gib"],
        "x floor": row["dit_over_floor"],
    }
