"""One real update of a planned job, with random weights and data, to measure what `scd plan`
counted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from scd_sf.diffusion.noise import cpu_noise
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.distributed import Ranks
from scd_sf.evaluation.bench import random_weights
from scd_sf.generation.rollout import rollout
from scd_sf.losses.dmd import critic_loss, dmd_loss
from scd_sf.losses.flow_matching import flow_matching_loss
from scd_sf.models.build import ModelConfig, Student, build_model, set_checkpointing
from scd_sf.models.wan.transformer import Wan
from scd_sf.tools.plan.job import PlanJob
from scd_sf.tools.stage_configs import Stage2Config, Stage3Config
from scd_sf.train.base import Engine, EngineConfig, StepModule
from scd_sf.train.ema import Ema
from scd_sf.train.engine import build_engine, frozen_engine
from scd_sf.types import Conditioning

Update = Callable[[], list[Tensor]]  # its losses, on their device


def stage2_update(job: PlanJob, ranks: Ranks) -> Update:
    """Build stage 2's engine. The returned function runs an update: all micro-batches and the
    average."""
    cfg = job.cfg
    assert isinstance(cfg, Stage2Config)
    student, batch = _model(job.model, ranks), cfg.train.micro_batch
    assert not isinstance(student, Wan)

    def loss_fn(model: Student, x_0: Tensor) -> Tensor:
        cond, null = _prompts(job, batch, ranks), _prompts(job, 1, ranks)
        return flow_matching_loss(model, x_0, cond, null, cfg.loss, _rng())[0]

    engine = _engine(StepModule(student, loss_fn), job, cfg.engine, ranks)
    ema = Ema(cfg.train.ema, ranks)
    del student

    def update() -> list[Tensor]:
        losses = []
        for _ in range(engine.micro_batches):
            loss = engine(torch.randn(job.shape.latent(batch), device=ranks.device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        ema.update(engine.owned())
        return losses

    return update


def stage3_update(job: PlanJob, ranks: Ranks) -> Callable[[int], list[Tensor]]:
    """Build stage 3's engines. The returned function runs a cycle and returns its losses: so many
    critic updates on rollouts of their own, then the student's update and its averages.

    The student exits at the last step, the critic's rollouts at each step in turn."""
    cfg = job.cfg
    assert isinstance(cfg, Stage3Config)
    batch, sampler = cfg.train.micro_batch, FewStepSampler(cfg.sampler.times)

    def play(model: Student, noise: Tensor, exit_step: int) -> Tensor:
        cond = _prompts(job, batch, ranks)
        return rollout(model, noise, cond, sampler, cpu_noise(_rng()), exit_step=exit_step)

    student = _engine(StepModule(_model(job.model, ranks), play), job, cfg.student_engine, ranks)
    critic = _engine(
        _model(ModelConfig("wan", wan=job.critic), ranks), job, cfg.critic_engine, ranks
    )
    teacher = _teacher(job, cfg.teacher_engine, ranks)
    ema, best_averages = Ema(cfg.train.ema, ranks), list[object]()

    def play_rollout(exit_step: int) -> Tensor:
        x: Tensor = student(torch.randn(job.shape.latent(batch), device=ranks.device), exit_step)
        return x

    def cycle(critic_updates: int) -> list[Tensor]:
        losses = []
        cond, negative = _prompts(job, batch, ranks), _prompts(job, 1, ranks)
        for turn in range(critic_updates):
            for _ in range(critic.micro_batches):
                with torch.no_grad():
                    x = play_rollout(turn % sampler.steps)
                loss = critic_loss(critic, x, cond, cfg.loss, _rng())[0]
                critic.backward(loss)
                critic.step()
                losses.append(loss.detach())
        for _ in range(student.micro_batches):
            x = play_rollout(sampler.steps - 1)
            loss = dmd_loss(x, teacher, critic, cond, negative, cfg.loss, _rng())[0]
            student.backward(loss)
            student.step()
            losses.append(loss.detach())
        ema.update(student.owned())
        best_averages[:] = [ema.copy()]
        return losses

    return cycle


def _model(config: ModelConfig, ranks: Ranks) -> Student | Wan:
    with torch.device("meta"):
        model = build_model(config)
    random_weights(model, torch.float32, ranks.device)
    return model


def _engine(module: nn.Module, job: PlanJob, cfg: EngineConfig, ranks: Ranks) -> Engine:
    model = module.model if isinstance(module, StepModule) else module
    assert isinstance(model, Student | Wan)
    trunks = [model.trunk] if isinstance(model, Wan) else model.trunks()
    set_checkpointing(trunks, job.cfg.checkpointing, job.cfg.recompute_attention)
    train = job.cfg.train
    return build_engine(
        module,
        cfg,
        ranks,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        total_updates=10,
    )


def _teacher(job: PlanJob, cfg: EngineConfig, ranks: Ranks) -> nn.Module:
    with torch.device("meta"):
        parameters = dict(Wan(job.teacher).named_parameters())
    rng = torch.Generator(ranks.device).manual_seed(0)

    def weight(name: str) -> Tensor:
        value = torch.empty(parameters[name].shape, device=ranks.device)
        is_norm_weight = value.ndim == 1 and name.endswith("weight")
        return value.fill_(1.0) if is_norm_weight else value.uniform_(-0.03, 0.03, generator=rng)

    return frozen_engine(
        lambda: Wan(job.teacher), {name: partial(weight, name) for name in parameters}, cfg, ranks
    )


def _prompts(job: PlanJob, batch: int, ranks: Ranks) -> Conditioning:
    return Conditioning(
        torch.zeros(batch, job.text_tokens, job.model.wan.text_dim, device=ranks.device)
    )


def _rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
