"""Stage 3 of the paper (Wan 1.3B student and critic, 14B teacher, 832x480, 81 frames) on the
rehearsal's device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import recipe_runner
import torch
from rehearsal import world
from rehearsal.budgets import BUDGETS
from rehearsal.fake_cuda import FakeCuda
from torch import Tensor

from scd_sf.config import load_config
from scd_sf.data.prefetch import Prefetch
from scd_sf.diffusion.noise import cpu_noise
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.generation.rollout import rollout
from scd_sf.models.build import Student, set_checkpointing
from scd_sf.models.wan.transformer import WanConfig
from scd_sf.tools.stage_configs import Stage3Config
from scd_sf.train.base import StepModule
from scd_sf.types import Conditioning


@contextmanager
def distillation(student: Student, *changes: str) -> Iterator[Any]:
    """The recipe's own updates of that student, of one micro-batch each."""
    script: Any = recipe_runner.load_script("recipes/stage3_self_forcing.py")
    blanks = ["init=x", "teacher=x", "critic=x", "prompts=x", "run.dir=x", "train.global_batch=1"]
    cfg = load_config(Stage3Config, world.CONFIGS / "stage3_wan_1.3b.yaml", [*blanks, *changes])
    sampler, critic = FewStepSampler(cfg.sampler.times), world.wan(WanConfig())

    def self_rollout(
        model: Student, noise: Tensor, cond: Conditioning, exit_step: int, rng: torch.Generator
    ) -> Tensor:
        return rollout(model, noise, cond, sampler, cpu_noise(rng), exit_step=exit_step)

    trunks = [*student.trunks(), critic.trunk]
    set_checkpointing(trunks, cfg.checkpointing, cfg.recompute_attention)
    prompts: Any = world.Texts()
    reads: Any = Prefetch(prompts.conditioning, 2, threads=1)
    engines: list[Any] = [world.Forward(StepModule(student, self_rollout)), world.Forward(critic)]
    teacher, run = world.wan().requires_grad_(False), Any
    shape = cfg.video.shape(16).latent(1)[1:]
    yield script.Distillation(
        cfg, run, world.RANKS, prompts, reads, sampler, shape, *engines, teacher
    )
    reads.close()
    set_checkpointing(student.trunks(), False)


def test_a_cycle_at_the_papers_size(cuda: FakeCuda) -> None:
    """A critic update on a rollout of its own, one on the same rollout again, and the student's.
    Checkpointing is for the short clips: it makes the rehearsal slow."""
    with distillation(world.student(), "checkpointing=false") as parts:
        with cuda.budget(BUDGETS["stage 3, critic on a rollout of its own"]):
            rollouts = parts.roll_out(1, 0)
            logs = parts.update_critic(1, 0, rollouts)
        with cuda.budget(BUDGETS["stage 3, critic on the same rollout"]):
            logs = parts.update_critic(1, 0, rollouts)
        assert logs["critic/loss"] == 1.0
        with cuda.budget(BUDGETS["stage 3, student"]):
            _, logs, _ = parts.update_student(1)
    assert logs["dmd/fake_real"] == 1.0


@pytest.mark.parametrize(
    "preset",
    [
        ("stage1_causal_chunk3",),
        ("stage1_wan_1.3b_paper",),
        ("stage1_wan_1.3b", "scd.decoder.fusion=junction", "scd.decoder.prefix=cached"),
        ("stage1_wan_1.3b", "scd.decoder.fusion=channel"),
    ],
    ids=lambda preset: preset[-1],
)
def test_other_students(cuda: FakeCuda, preset: tuple[str, ...]) -> None:
    """Of a short clip: reads and blocking copies are those of any other."""
    with distillation(world.student(*preset), "video.frames=9") as parts, cuda.counted() as counts:
        parts.update_student(1)
    assert counts.totals[::2] == BUDGETS["stage 3, student"][::2], str(counts)
