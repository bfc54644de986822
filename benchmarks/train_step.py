"""What a training step costs: stage 2 by number of noisy samples and with activation checkpointing, stage 3 by part.

    python benchmarks/train_step.py --out train_step.json

Wan's proportions at a quarter of its width (12 layers of 384; SCD 10 encoder + 4 decoder layers), random weights; a
step is forward and backward of the loss at batch 1, without the optimizer. The teacher and the critic of stage 3 have
the student's width. All cases in one process, in interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from scd_sf.bench import in_rounds, random_weights
from scd_sf.data.manifest import write_json
from scd_sf.diffusion.solvers import Renoise
from scd_sf.losses.dmd import DmdConfig, critic_loss, dmd_loss
from scd_sf.losses.flow_matching import FlowMatchingConfig, flow_matching_loss
from scd_sf.models.build import ModelConfig, Student, build_model
from scd_sf.models.scd import ScdConfig
from scd_sf.models.scd_decoder import DecoderConfig
from scd_sf.models.trunk import WanConfig
from scd_sf.models.wan import Wan
from scd_sf.rollout import cpu_noise, rollout
from scd_sf.types import Conditioning

CFG = WanConfig(3, 128, text_dim=512, ffn_dim=2240, num_layers=12)
SCD = ScdConfig(tuple(range(10)), DecoderConfig((0, 1, 10, 11)))
LATENT, TEXT_TOKENS = (16, 12, 20), 20
COND = Conditioning(torch.randn(1, TEXT_TOKENS, CFG.text_dim, generator=torch.Generator().manual_seed(0)))


def filled(config: ModelConfig) -> Student | Wan:
    with torch.device("meta"):
        model = build_model(config)
    random_weights(model, torch.float32)
    return model


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def backward(model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    model.zero_grad(set_to_none=True)


def stage2(model: Student | Wan, x: Tensor, samples: int, checkpointing: bool) -> Callable[[], None]:
    assert not isinstance(model, Wan)

    def run() -> None:
        for trunk in model.trunks():
            trunk.checkpointing = checkpointing
        loss, _ = flow_matching_loss(model, x, COND, COND, FlowMatchingConfig(samples=samples), rng())
        backward(model, loss)

    return run


def stage3(
    student: Student | Wan, teacher: Student | Wan, critic: Student | Wan, x: Tensor
) -> dict[str, Callable[[], None]]:
    assert not isinstance(student, Wan) and isinstance(teacher, Wan) and isinstance(critic, Wan)
    teacher.requires_grad_(False)
    cfg, exit_step = DmdConfig(), 2

    def self_rollout() -> Tensor:
        for trunk in student.trunks():
            trunk.checkpointing = False
        return rollout(
            student, torch.randn(x.shape, generator=rng()), COND, Renoise(), cpu_noise(rng()), exit_step=exit_step
        )

    def generator_step() -> None:
        loss, _ = dmd_loss(self_rollout(), teacher, critic, COND, COND, cfg, rng())
        backward(student, loss)

    def critic_step() -> None:
        with torch.no_grad():
            fake = self_rollout()
        loss, _ = critic_loss(critic, fake, COND, cfg, rng())
        backward(critic, loss)

    def stored_critic_step() -> None:
        loss, _ = critic_loss(critic, x, COND, cfg, rng())
        backward(critic, loss)

    return {
        "stage 3, student step": generator_step,
        "stage 3, critic step": critic_step,
        "stage 3, critic step on a stored rollout": stored_critic_step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON with one entry per case")
    parser.add_argument("--frames", type=int, default=6, help="latent frames of the clip")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = torch.randn(1, args.frames, *LATENT, generator=rng())
    scd, causal = filled(ModelConfig(wan=CFG, scd=SCD)), filled(ModelConfig("causal", wan=CFG))
    wan = ModelConfig("wan", wan=CFG)
    cases = {f"stage 2, SCD, K = {k}": stage2(scd, x, k, False) for k in (1, 2, 4)}
    cases["stage 2, SCD, K = 2, checkpointing"] = stage2(scd, x, 2, True)
    cases["stage 2, causal, K = 1"] = stage2(causal, x, 1, False)
    cases |= stage3(scd, filled(wan), filled(wan), x)
    rows = in_rounds(cases, args.rounds)
    for row in rows:
        print(json.dumps(row), flush=True)
    write_json(
        args.out, {"frames": args.frames, "threads": args.threads, "torch": str(torch.__version__), "rows": rows}
    )


if __name__ == "__main__":
    main()
