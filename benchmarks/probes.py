"""What a probe adds to the rollout it looks into: a Wan-shaped causal model of 30 blocks, 50 steps,
random weights.

    python benchmarks/probes.py --out docs/results/probe_cost.json

Plain and probed rollouts take turns (``--rounds``), medians, batch 1; a probe's whole time counts:
its rollout, its files, its matrices and components, but not the drawing. Ratios are of CPU time
(all threads), which other work on the machine hardly changes; seconds on the clock stand beside
them. Goal: less than 1.3 times the plain rollout.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from scd_sf.diffusion.samplers import Euler
from scd_sf.evaluation.bench import in_rounds
from scd_sf.files import write_json
from scd_sf.models.causal import Causal
from scd_sf.models.wan.transformer import WanConfig
from scd_sf.probes.attention_mass import AttentionProbe, attention_mass
from scd_sf.probes.pca import PcaProbe, pca
from scd_sf.probes.similarity import SimilarityProbe, similarity
from scd_sf.probes.subject import Subject
from scd_sf.types import Conditioning, VideoShape, exit_on_user_error


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    width: Annotated[int, typer.Option(help="Model width, a multiple of 64.")] = 256,
    side: Annotated[
        int, typer.Option(help="Latents along a side; a quarter of its square are tokens.")
    ] = 24,
    frames: Annotated[int, typer.Option(help="Latent frames.")] = 3,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    rounds: Annotated[int, typer.Option(help="Measured runs of each case.")] = 3,
    threads: Annotated[int, typer.Option(help="Torch's threads on the CPU.")] = 2,
) -> None:
    """Print (and write) seconds and ratios."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = WanConfig(
        num_attention_heads=width // 64, attention_head_dim=64, ffn_dim=4 * width, text_dim=64
    )
    model = Causal(config).eval().requires_grad_(False)
    shape = VideoShape(frames, config.in_channels, side, side)
    subject = Subject(
        "random", model, shape, Conditioning(torch.randn(1, 16, 64)), Euler(steps, 5.0), (0,)
    )
    cases: dict[str, Callable[[], object]] = {
        "plain": subject.sample,
        "similarity": lambda: similarity(subject, SimilarityProbe()),
        "pca": lambda: pca(subject, PcaProbe()),
        "attention": lambda: attention_mass(subject, AttentionProbe()),
    }
    rows = in_rounds(cases, rounds)
    cpu_ratios = {str(row["name"]): row["cpu_ratio_to_first"] for row in rows[1:]}
    print(f"CPU time over the plain rollout: {cpu_ratios}")
    if out is not None:
        model_facts = {
            "blocks": config.num_layers,
            "width": width,
            "tokens_per_frame": subject.tokens,
            "frames": frames,
        }
        machine = {
            "steps": steps,
            "rounds": rounds,
            "threads": threads,
            "machine": platform.machine(),
        }
        seconds = {
            kind: {str(row["name"]): row[kind] for row in rows}
            for kind in ("cpu_seconds", "seconds")
        }
        write_json(out, {**model_facts, **machine, **seconds, "ratio_to_plain": cpu_ratios})


if __name__ == "__main__":
    exit_on_user_error(lambda: typer.run(main))
