"""The parts of a training step on the meta device: what each computes and keeps, for one process's
micro-batch.

The losses and the rollout are the recipes' own, and the models have their real shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from scd_sf.diffusion.noise import cpu_noise
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.generation.rollout import rollout
from scd_sf.losses.dmd import critic_loss, dmd_loss
from scd_sf.losses.flow_matching import flow_matching_loss
from scd_sf.models.build import ModelConfig, Student, build_model, set_checkpointing
from scd_sf.models.wan.transformer import Wan, WanConfig
from scd_sf.tensor_files import dtype_of
from scd_sf.tools.plan.meter import Meter
from scd_sf.tools.stage_configs import Stage2Config, Stage3Config
from scd_sf.train.base import EngineConfig
from scd_sf.types import Conditioning, Denoiser, UserError, VideoShape

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Phase:
    """One part of a step.

    ``trains``: role of the model that is updated. ``flops``: per clip. ``times``: how often it
    happens in a step. ``peak``: most bytes alive at once beside the models (activations, the
    rollout's cache, gradients). ``parts``: name -> FLOPs per clip. ``host_normals``: normal numbers
    that the host draws for a micro-batch."""

    name: str
    trains: str
    flops: float
    times: int
    peak: int
    parts: dict[str, float]
    host_normals: int = 0


def student_of(
    model: ModelConfig, cfg: EngineConfig, *, checkpointing: bool, recompute_attention: bool
) -> Student:
    """The student on the meta device, as its engine runs it."""
    with torch.device("meta"):
        student = build_model(model)
    if isinstance(student, Wan):
        raise UserError(
            "the student is a bidirectional Wan; give an SCD or causal one (--student, or init=)"
        )
    set_checkpointing(student.trunks(), checkpointing, recompute_attention)
    return _trainable(student, cfg)


def stage2_phases(
    cfg: Stage2Config, model: ModelConfig, shape: VideoShape, text_tokens: int
) -> list[Phase]:
    """The one phase of stage 2: forward and backward of the flow-matching loss."""
    student = student_of(
        model,
        cfg.engine,
        checkpointing=cfg.checkpointing,
        recompute_attention=cfg.recompute_attention,
    )
    batch = cfg.train.micro_batch
    with Meter() as meter:
        x, cond = _clips(batch, shape), _prompts(batch, text_tokens, model.wan)
        loss, _ = flow_matching_loss(
            student, x, cond, _prompts(1, text_tokens, model.wan), cfg.loss, _rng()
        )
        forward = meter.flops
        loss.backward()
    parts = {"forward": forward / batch, "backward": (meter.flops - forward) / batch}
    return [Phase("step", "student", meter.flops / batch, 1, meter.peak, parts, meter.host_normals)]


class Stage3:
    """The phases of one cycle of stage 3."""

    def __init__(
        self,
        cfg: Stage3Config,
        model: ModelConfig,
        teacher: WanConfig,
        critic: WanConfig,
        shape: VideoShape,
        text_tokens: int,
    ) -> None:
        self.cfg = cfg
        self.shape = shape
        self.text_tokens = text_tokens
        self.sampler = FewStepSampler(cfg.sampler.times)
        self.student = student_of(
            model,
            cfg.student_engine,
            checkpointing=cfg.checkpointing,
            recompute_attention=cfg.recompute_attention,
        )
        with torch.device("meta"):
            self.teacher, self.critic = Wan(teacher).requires_grad_(False), Wan(critic)
        self.teacher = self.teacher.to(_dtype(cfg.teacher_engine))
        set_checkpointing([self.critic.trunk], cfg.checkpointing, cfg.recompute_attention)
        _trainable(self.critic, cfg.critic_engine)

    def phases(self) -> list[Phase]:
        """The critic's updates and the student's. Exit steps are drawn evenly, so FLOPs are those
        of the mean exit step and memory that of the last."""
        batch = self.cfg.train.micro_batch
        with Meter() as meter, torch.no_grad():
            self._rollout(0)
        shortest = meter.flops / batch
        return [self._critic_update(shortest), self._student_update(shortest)]

    def _critic_update(self, shortest: float) -> Phase:
        cfg, batch = self.cfg, self.cfg.train.micro_batch
        with Meter() as meter:
            with torch.no_grad():
                x = self._rollout(self.sampler.steps - 1)
            flops_before = meter.flops
            rollout_flops = (shortest + flops_before / batch) / 2
            loss, _ = critic_loss(self.critic, x, self._prompts(), cfg.loss, _rng())
            loss.backward()
        own_rollouts = cfg.critic_data == "own"
        rollouts = math.ceil(cfg.ratio / cfg.reuse) if own_rollouts else 0
        rollouts_per_update = rollouts / cfg.ratio
        parts = {
            "rollout": rollouts_per_update * rollout_flops,
            "critic": (meter.flops - flops_before) / batch,
        }
        return Phase(
            "critic update",
            "critic",
            sum(parts.values()),
            cfg.ratio,
            meter.peak,
            parts,
            meter.host_normals,
        )

    def _student_update(self, shortest: float) -> Phase:
        batch, marks = self.cfg.train.micro_batch, dict[str, float]()
        with Meter() as meter:

            def count_flops(name: str, model: Wan) -> Denoiser:
                def call(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
                    flops_before = meter.flops
                    velocity: Tensor = model(x_t, t, cond)
                    marks[name] = marks.get(name, 0.0) + (meter.flops - flops_before) / batch
                    return velocity

                return call

            x = self._rollout(self.sampler.steps - 1)
            rollout_flops = (shortest + meter.flops / batch) / 2
            judges = count_flops("teacher", self.teacher), count_flops("critic", self.critic)
            negative = _prompts(1, self.text_tokens, self.teacher.cfg)
            loss, _ = dmd_loss(x, *judges, self._prompts(), negative, self.cfg.loss, _rng())
            flops_before = meter.flops
            loss.backward()
        parts = {
            "rollout": rollout_flops,
            **marks,
            "student's backward": (meter.flops - flops_before) / batch,
        }
        return Phase(
            "student update",
            "student",
            sum(parts.values()),
            1,
            meter.peak,
            parts,
            meter.host_normals,
        )

    def _rollout(self, exit_step: int) -> Tensor:
        batch = self.cfg.train.micro_batch
        rng = cpu_noise(_rng())
        noise = rng(_clips(batch, self.shape))
        return rollout(self.student, noise, self._prompts(), self.sampler, rng, exit_step=exit_step)

    def _prompts(self) -> Conditioning:
        return _prompts(self.cfg.train.micro_batch, self.text_tokens, self.critic.cfg)


def _trainable(module: M, cfg: EngineConfig) -> M:
    """The module in the engine's type. With ZeRO a weight's gradient is freed as soon as it is
    computed, because the engine has reduced it by then."""
    module = module.to(_dtype(cfg))
    if cfg.backend == "deepspeed" and cfg.zero_stage > 0:
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(_forget)
    return module


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _dtype(cfg: EngineConfig) -> torch.dtype:
    return dtype_of(cfg.dtype)


def _clips(batch: int, shape: VideoShape) -> Tensor:
    return torch.empty(shape.latent(batch), device="meta")


def _prompts(batch: int, tokens: int, wan: WanConfig) -> Conditioning:
    return Conditioning(torch.empty(batch, tokens, wan.text_dim, device="meta"))


def _rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
