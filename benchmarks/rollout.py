"""What generation costs per latent frame: SCD and Self-Forcing, the two caches, compiled or not,
diffusers.

    python benchmarks/rollout.py --out rollout.json

Wan's proportions at a quarter of its width (12 layers of 384; SCD 10 encoder + 4 decoder layers),
random weights, 4 steps, batch 1, without text encoder and VAE. All cases in one process, in
interleaved rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from scd_sf.config import HelpFormatter
from scd_sf.diffusion.noise import cpu_noise
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.evaluation.bench import in_rounds, random_weights
from scd_sf.files import write_json
from scd_sf.generation.compile import CompileConfig, compile_steps
from scd_sf.generation.generate import clips_of, generate_latents
from scd_sf.generation.rollout import rollout
from scd_sf.models.build import ModelConfig, Student, build_student
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.wan.transformer import WanConfig
from scd_sf.models.wan.wan_json import config_json
from scd_sf.types import Conditioning, exit_on_user_error

CFG = WanConfig(3, 128, text_dim=512, ffn_dim=2240, num_layers=12)
SCD = ScdConfig(tuple(range(10)), DecoderConfig((0, 1, 10, 11)))
LATENT, TEXT_TOKENS = (16, 12, 20), 20


def student(config: ModelConfig, compiled: bool = False) -> Student:
    """A model with random fp32 weights."""
    with torch.device("meta"):
        model = build_student(config)
    random_weights(model, torch.float32)
    compile_steps(model, CompileConfig(enabled=compiled), torch.device("cpu"))
    return model


def prompt() -> Conditioning:
    """Random text states (1, 20, text_dim)."""
    return Conditioning(
        torch.randn(1, TEXT_TOKENS, CFG.text_dim, generator=torch.Generator().manual_seed(0))
    )


def streaming(model: Student, frames: int) -> Callable[[], Tensor]:
    """Generates a clip as sampling does; the history is a ring that is written in place."""
    return lambda: clips_of(
        generate_latents(model, prompt(), [1], (frames, *LATENT), FewStepSampler())
    )


def training(model: Student, frames: int) -> Callable[[], Tensor]:
    """Generates a clip as stage 3 does, without gradients; the history is copied as it grows."""

    @torch.no_grad()
    def run() -> Tensor:
        rng = torch.Generator().manual_seed(1)
        noise = torch.randn(1, frames, *LATENT, generator=rng)
        return rollout(model, noise, prompt(), FewStepSampler(), cpu_noise(rng))

    return run


def bidirectional(frames: int) -> Callable[[], Tensor]:
    """diffusers' transformer on all frames at once, 4 steps without guidance."""
    config = {
        name: value
        for name, value in config_json(CFG, "diffusers").items()
        if not name.startswith("_")
    }
    model = WanTransformer3DModel(**config).eval().requires_grad_(False)
    x = torch.randn(1, LATENT[0], frames, *LATENT[1:])
    text = torch.randn(1, TEXT_TOKENS, CFG.text_dim)

    @torch.no_grad()
    def run() -> Tensor:
        for t in FewStepSampler().times:
            velocity = model(x, torch.tensor([1000 * t]), text, return_dict=False)[0]
        return velocity

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON with one entry per case")
    parser.add_argument("--frames", type=int, default=6, help="latent frames; a multiple of 3")
    parser.add_argument("--rounds", type=int, default=5, help="clips of every case")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="compiled cases too; compiling takes minutes on a CPU",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scd, causal = ModelConfig(wan=CFG, scd=SCD), ModelConfig("causal", wan=CFG)
    cases = {
        "SCD": streaming(student(scd), args.frames),
        "SCD, training's functional cache": training(student(scd), args.frames),
        "Self-Forcing frame-wise": streaming(student(causal), args.frames),
        "Self-Forcing chunk-wise": streaming(student(ModelConfig("causal", 3, CFG)), args.frames),
        "diffusers, bidirectional": bidirectional(args.frames),
    }
    if args.compiled:
        cases["SCD, compiled"] = streaming(student(scd, compiled=True), args.frames)
        cases["Self-Forcing frame-wise, compiled"] = streaming(
            student(causal, compiled=True), args.frames
        )
    rows = in_rounds(cases, args.rounds)
    for row in rows:
        row["seconds_per_latent_frame"] = round(float(str(row["seconds"])) / args.frames, 4)
    write_json(
        args.out,
        {
            "frames": args.frames,
            "threads": args.threads,
            "torch": str(torch.__version__),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    exit_on_user_error(main)
