"""Stage 2 of the paper (Wan 1.3B, 832x480, 81 frames) on the rehearsal's device: every fusion, and
the baseline."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import recipe_runner
import torch
from rehearsal import world
from rehearsal.budgets import BUDGETS, Budget
from rehearsal.fake_cuda import FakeCuda
from torch import Tensor

from scd_sf.config import load_config
from scd_sf.data.latents import LatentBatch
from scd_sf.data.prefetch import Prefetch
from scd_sf.diffusion.noise import generator
from scd_sf.losses.flow_matching import flow_matching_loss, validation_loss
from scd_sf.models.blocks import running_as
from scd_sf.models.build import Student, set_checkpointing
from scd_sf.tools.stage_configs import Stage2Config
from scd_sf.train.base import StepModule
from scd_sf.types import Conditioning, Logs

SCD, CHUNKS, PAPER, CAUSAL = (
    "stage1_wan_1.3b",
    "stage1_wan_1.3b_chunk3",
    "stage1_wan_1.3b_paper",
    "stage1_causal_chunk3",
)
PRESETS: dict[str, tuple[str, ...]] = {
    "delta": (SCD,),
    "delta, chunks of 3": (CHUNKS,),
    "paper": (PAPER,),
    "paper, the step's time": (PAPER, "scd.decoder.prefix_time=step"),
    "junction": (SCD, "scd.decoder.fusion=junction"),
    "junction, cached": (CHUNKS, "scd.decoder.fusion=junction", "scd.decoder.prefix=cached"),
    "channel": (SCD, "scd.decoder.fusion=channel"),
    "causal": (CAUSAL,),
}


def config(*names: str) -> Stage2Config:
    files = [world.CONFIGS / f"{name}.yaml" for name in ("stage2_wan_1.3b", *names)]
    return load_config(
        Stage2Config, files, ["init=x", "data=x", "val=x", "run.dir=x", "train.global_batch=1"]
    )


def update(cuda: FakeCuda, cfg: Stage2Config, student: Student, budget: Budget) -> Logs:
    """The recipe's own, of one micro-batch of a clip as it is stored: in 16 bits, its text without
    padding."""
    script: Any = recipe_runner.load_script("recipes/stage2_flow_matching.py")
    null, stored = world.prompts(), torch.zeros(world.CLIP.latent(1), dtype=torch.bfloat16)
    batch = LatentBatch(stored, world.prompts(length=77), world.TEXT)

    def loss_fn(
        model: Student, x_0: Tensor, cond: Conditioning, rng: torch.Generator
    ) -> tuple[Tensor, Logs]:
        return flow_matching_loss(model, x_0, cond, null, cfg.loss, rng)

    set_checkpointing(student.trunks(), cfg.checkpointing, cfg.recompute_attention)
    reads: Any = Prefetch(lambda indices: batch, 0)
    run, engine = SimpleNamespace(ranks=world.RANKS), world.Forward(StepModule(student, loss_fn))
    with cuda.budget(budget):
        _, logs = script.update(cfg, run, engine, world.Texts(), reads, 1)
    reads.close()
    set_checkpointing(student.trunks(), False)
    return logs


@pytest.mark.parametrize("name", PRESETS)
def test_a_micro_batch(cuda: FakeCuda, name: str) -> None:
    assert (
        update(cuda, config(), world.student(*PRESETS[name]), BUDGETS[f"stage 2, {name}"])["loss"]
        == 1.0
    )


@pytest.mark.parametrize("name", ["frame_diagonal", "skip_layer"])
def test_blocks_of_the_baseline(cuda: FakeCuda, name: str) -> None:
    cfg, student = config(f"stage2_{name}"), world.student(CAUSAL)
    assert cfg.blocks is not None
    with running_as(student, cfg.blocks):
        update(cuda, cfg, student, BUDGETS[f"stage 2, {name}"])


def test_validation(cuda: FakeCuda) -> None:
    """Of a clip, all chunks; the number itself is read by who adds it up."""
    student, x_0, cond = world.student(), world.clips(), world.prompts().to(cuda.device)
    with cuda.budget(BUDGETS["validation of a clip"]):
        loss = validation_loss(student, x_0, cond, world.prompts(), config().loss, generator(0))
    assert loss.shape == () and loss.device == cuda.device
