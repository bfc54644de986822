"""Stage 3: distil a student to a few steps by Self-Forcing: self-rollout + distribution matching
(Table 7).

    deepspeed recipes/stage3_self_forcing.py --config recipes/configs/stage3_wan_1.3b.yaml init=runs/stage2 \\
        teacher=/models/Wan2.1-T2V-14B-Diffusers critic=/models/Wan2.1-T2V-1.3B-Diffusers prompts=data/prompts \\
        run.dir=runs/stage3

Data-free: only prompts, a list of any length (they are encoded while it trains) or a directory of
encoded ones. Three engines in one process: student and critic ZeRO-2, the frozen teacher ZeRO-3.
One step is one student update after ``ratio`` critic updates. Works under ``deepspeed``,
``torchrun`` and plain ``python``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.checkpoint import absolute, provenance
from scd_sf.config import from_command_line, to_yaml
from scd_sf.data.clip_statistics import CLIP_STATISTICS
from scd_sf.data.latents import epoch_order
from scd_sf.data.prefetch import Prefetch
from scd_sf.data.prompts import Prompts
from scd_sf.diffusion.noise import cpu_noise, generator
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.distributed import Ranks, init_distributed
from scd_sf.generation.preview import Preview
from scd_sf.generation.rollout import rollout
from scd_sf.generation.validation import show_previews
from scd_sf.losses.dmd import critic_loss, dmd_loss
from scd_sf.models.build import ModelConfig, Student, build_student, load_student, set_checkpointing
from scd_sf.models.wan.hub import pinned
from scd_sf.models.wan.live_prompts import LivePrompts, open_prompts
from scd_sf.models.wan.transformer import Wan
from scd_sf.models.wan.weights import load_wan, open_wan, read_wan_config
from scd_sf.tools.plan.job import PlanJob
from scd_sf.tools.stage_configs import Stage3Config
from scd_sf.tools.stage_words import stage3_words
from scd_sf.train.alarms import clip_statistics_of
from scd_sf.train.base import Engine, StepInfo, StepModule
from scd_sf.train.batches import RESUMABLE, add_to, micro_batches
from scd_sf.train.checkpointing import Checkpointer, pixel_shape
from scd_sf.train.checks import check_batches, check_shape, check_text
from scd_sf.train.ema import Ema
from scd_sf.train.engine import build_engine, frozen_engine
from scd_sf.train.loop import Loop
from scd_sf.train.run import Run
from scd_sf.train.skipped import MicroBatch, keeping
from scd_sf.train.stop import Request
from scd_sf.types import Conditioning, Logs, VideoShape, exit_on_user_error, on_device


@dataclass(frozen=True)
class Rollout:
    """A micro-batch of the student's own clips (B, F, C, H, W), without gradient, and the prompts
    they were made of."""

    number: int
    indices: list[int]
    cond: Conditioning
    x_0: Tensor


@dataclass(frozen=True)
class Rollouts:
    """This rank's micro-batches of an update; ``samples``: the prompts of the global batch."""

    samples: list[int]
    parts: list[Rollout]


@dataclass
class Distillation:
    """The updates of student and critic on this rank. ``step`` decides their prompts and random
    numbers."""

    cfg: Stage3Config
    run: Run
    ranks: Ranks
    prompts: Prompts
    reads: Prefetch[Conditioning]
    sampler: FewStepSampler
    latent_shape: tuple[int, int, int, int]
    student: Engine
    critic: Engine
    teacher: torch.nn.Module

    def roll_out(self, step: int, turn: int) -> Rollouts:
        """New clips of the student for the critic."""
        seed, place = self.cfg.run.seed + 1, self._place(step, turn)
        size = len(self.prompts)
        parts: list[Rollout] = []
        for number, indices in micro_batches(self.cfg.train, seed, self.ranks, place, size):
            cond = self._cond(indices)
            with torch.no_grad():
                parts.append(
                    Rollout(
                        number, indices, cond, self._rollout(cond, "critic", step, turn, number)
                    )
                )
        return Rollouts(epoch_order(seed, place, self.cfg.train.global_batch, size), parts)

    def update_critic(self, step: int, turn: int, rollouts: Rollouts) -> Logs:
        """One update of the critic: it learns to denoise the rollouts with new noise. Returns this
        rank's mean logs."""
        cfg = self.cfg
        sums: Logs = {}
        with keeping(self.run, step, self.critic, rollouts.samples, f"critic{turn}") as records:
            for part in rollouts.parts:
                rng = generator(cfg.run.seed, "critic", step, turn, part.number)
                loss, logs = critic_loss(self.critic, part.x_0, part.cond, cfg.loss, rng)
                records.append(self._record(part, loss))
                self.critic.backward(loss)
                info = self.critic.step()
                add_to(sums, {"critic/loss": logs["critic/loss"]}, self.critic.micro_batches)
        return sums | {"critic/grad_norm": info.grad_norm}

    def update_student(self, step: int) -> tuple[StepInfo, Logs, Rollouts]:
        """One update of the student by distribution matching, through its whole rollout. Returns
        this rank's mean logs and the rollouts."""
        cfg = self.cfg
        sums: Logs = {}
        parts: list[Rollout] = []
        samples = epoch_order(cfg.run.seed, step - 1, cfg.train.global_batch, len(self.prompts))
        negative = self.prompts.negative.to(self.ranks.device)
        with keeping(self.run, step, self.student, samples) as records:
            for number, indices in micro_batches(
                cfg.train, cfg.run.seed, self.ranks, step - 1, len(self.prompts)
            ):
                cond = self._cond(indices)
                x_0 = self._rollout(cond, "student", step, 0, number)
                rng = generator(cfg.run.seed, "dmd", step, number)
                loss, logs = dmd_loss(x_0, self.teacher, self.critic, cond, negative, cfg.loss, rng)
                parts.append(Rollout(number, indices, cond, x_0.detach()))
                records.append(self._record(parts[-1], loss))
                self.student.backward(loss)
                info = self.student.step()
                add_to(sums, logs, self.student.micro_batches)
        return info, sums | {"grad_norm": info.grad_norm, "lr": info.lr}, Rollouts(samples, parts)

    def turns(self, step: int) -> tuple[range, range]:
        """The numbers of the critic's updates of a step, before and after the student's update."""
        cfg = self.cfg
        warmup = cfg.critic_warmup if step == 1 else 0
        if cfg.critic_data == "own":
            return range(warmup + cfg.ratio), range(0)
        return range(warmup), range(warmup, warmup + cfg.ratio)

    def read_ahead(self, step: int, turns: range) -> None:
        """Begin to encode the prompts of this step and the next, in their order. ``turns``: the
        critic's updates of this step."""
        self.reads.expect(
            self._prompts_of(step, turns) + self._prompts_of(step + 1, self.turns(step + 1)[0])
        )

    def _prompts_of(self, step: int, turns: range) -> list[list[int]]:
        """Prompt indices of every micro-batch: of the critic's updates ``turns``, then of the
        student's update."""
        seed = self.cfg.run.seed
        places = [
            (seed + 1, self._place(step, turn)) for turn in turns if turn % self.cfg.reuse == 0
        ]
        return [
            indices
            for stream, place in [*places, (seed, step - 1)]
            for _, indices in micro_batches(
                self.cfg.train, stream, self.ranks, place, len(self.prompts)
            )
        ]

    def _place(self, step: int, turn: int) -> int:
        """The position of a critic's update in the order of its prompts."""
        return (step - 1) * (self.cfg.ratio + 1) + turn

    def _cond(self, indices: Sequence[int]) -> Conditioning:
        return self.reads.batch(indices).to(self.ranks.device)

    def _rollout(self, cond: Conditioning, name: str, step: int, turn: int, number: int) -> Tensor:
        """Clips (B, F, C, H, W) of one self-rollout, which is one forward pass of the engine. The
        exit step is the same on all ranks and micro-batches."""
        seed = self.cfg.run.seed
        exit_step = int(
            torch.randint(
                self.sampler.steps, (), generator=generator(seed, name, "exit", step, turn)
            )
        )
        rng = generator(seed, name, "noise", step, turn, number)
        noise = on_device(
            torch.randn((cond.batch, *self.latent_shape), generator=rng), self.ranks.device
        )
        x_0: Tensor = self.student(noise, cond, exit_step, rng)
        return x_0

    def _record(self, part: Rollout, loss: Tensor) -> MicroBatch:
        tensors = {"rollout": part.x_0, "text": part.cond.text_BLE}
        return MicroBatch(
            part.number, part.indices, self.prompts.texts(part.indices), loss.detach(), tensors
        )


def update(
    distillation: Distillation, step: int, turns_before: range, turns_after: range
) -> tuple[StepInfo, Logs]:
    """One update of the student, with the critic's updates before and after it; returns the mean
    logs of all ranks."""
    distillation.read_ahead(step, turns_before)
    for turn in turns_before:
        if turn % distillation.cfg.reuse == 0:
            rollouts = distillation.roll_out(step, turn)
        critic_logs = distillation.update_critic(step, turn, rollouts)
    info, logs, rollouts = distillation.update_student(step)
    for turn in turns_after:  # critic_data=student
        critic_logs = distillation.update_critic(step, turn, rollouts)
    return info, distillation.ranks.mean(logs | critic_logs)


def watch(record: dict[str, float], logs: Logs, cfg: Stage3Config, step: int) -> Logs:
    """Collapse monitors; writes the smoothed |x0_fake - x0_real| and std ratio, and the newest healthy
    step into ``record``.

    In a collapse |fake - real| falls, then rises to a multiple of its lowest value, and the std
    leaves the data's range. Without a collapse the distance varies with the random noise levels, so
    that its lowest step is not the best one. A step is healthy if the distance is at most
    ``healthy_within`` times its lowest and the std ratio is in ``std_range``. Steps that are not
    finite are ignored.
    """
    if not math.isfinite(logs["dmd/fake_real"] + logs["rollout/std"]):
        return {}
    distance = 0.9 * record.get("fake_real", logs["dmd/fake_real"]) + 0.1 * logs["dmd/fake_real"]
    record["fake_real"] = distance
    record["lowest"] = min(distance, record.get("lowest", distance))
    ratio = logs["rollout/std"] / cfg.data_std
    record["std_mean"] = 0.9 * record.get("std_mean", ratio) + 0.1 * ratio
    healthy = (
        cfg.std_range[0] <= ratio <= cfg.std_range[1]
        and distance <= cfg.healthy_within * record["lowest"]
    )
    if healthy and step >= min(10, cfg.train.steps):
        record["best_step"] = float(step)
    return {
        "monitor/fake_real": distance,
        "monitor/std_ratio": ratio,
        "monitor/std_mean": record["std_mean"],
        "monitor/best_step": record.get("best_step", 0.0),
    }


def check(
    cfg: Stage3Config, ranks: Ranks, student: Student, shape: VideoShape, prompts: Prompts
) -> None:
    """UserError for shapes, text states or batch sizes that do not fit the student and both Wans,
    before anything is written."""
    for name, path in (("teacher", cfg.teacher), ("critic", cfg.critic)):
        wan = read_wan_config(Path(path))
        place = f"video, for {name} {path}"
        check_shape(
            shape, place, wan.in_channels, (wan.patch_height, wan.patch_width), student.chunk
        )
        check_text(prompts, wan.text_dim)
    check_batches(cfg.train, ranks, len(prompts), prompts.where)


def model_flops(
    cfg: Stage3Config, student: ModelConfig, shape: VideoShape, prompts: Prompts
) -> float:
    """FLOPs of one step, of all ranks together."""
    teacher, critic = (read_wan_config(Path(path)) for path in (cfg.teacher, cfg.critic))
    return PlanJob(cfg, student, shape, teacher, critic, prompts.length).model_flops()


def build(
    cfg: Stage3Config, run: Run, student: Student, prompts: Prompts, shape: VideoShape
) -> Distillation:
    """The three engines and the prompts, ready to train."""
    sampler, ranks = FewStepSampler(cfg.sampler.times), run.ranks
    if isinstance(prompts, LivePrompts):
        prompts.load()  # before the engines: no other model may be built while ZeRO-3 builds its own

    def self_rollout(
        model: Student, noise: Tensor, cond: Conditioning, exit_step: int, rng: torch.Generator
    ) -> Tensor:
        return rollout(model, noise, cond, sampler, cpu_noise(rng), exit_step=exit_step)

    critic = load_wan(Path(cfg.critic))
    trunks = [*student.trunks(), critic.trunk]
    set_checkpointing(trunks, cfg.checkpointing, cfg.recompute_attention)
    engine = partial(
        build_engine,
        ranks=ranks,
        global_batch=cfg.train.global_batch,
        micro_batch=cfg.train.micro_batch,
    )
    steps = cfg.train.steps
    student_engine = engine(
        StepModule(student, self_rollout), cfg.student_engine, total_updates=steps
    )
    critic_engine = engine(
        critic, cfg.critic_engine, total_updates=steps * cfg.ratio + cfg.critic_warmup
    )
    files = open_wan(Path(cfg.teacher))
    weights = {name: tensor.read for name, tensor in files.tensors.items()}
    teacher = frozen_engine(lambda: Wan(files.config), weights, cfg.teacher_engine, ranks)
    latent_shape = (shape.frames, shape.channels, shape.height, shape.width)
    reads = Prefetch(prompts.conditioning, cfg.train.prefetch, threads=1)
    return Distillation(
        cfg,
        run,
        ranks,
        prompts,
        reads,
        sampler,
        latent_shape,
        student_engine,
        critic_engine,
        teacher,
    )


def preview_of(distillation: Distillation, base: str, shape: VideoShape) -> Preview:
    """The preview that makes validation videos of the first and the middle prompt."""
    indices = [0, len(distillation.prompts) // 2]
    return Preview(
        base,
        distillation.reads.batch(indices),
        shape,
        distillation.sampler,
        distillation.run.dir / "videos",
        texts=distillation.prompts.texts(indices),
        cfg=distillation.cfg.preview,
    )


def main() -> None:
    given = from_command_line(Stage3Config, __doc__ or "")
    ranks = init_distributed(given.run.timeout_minutes)
    # one commit of a repository on the hub for all ranks, and for the checkpoints' provenance
    teacher, critic = ranks.on_main(lambda: (pinned(given.teacher), pinned(given.critic)))
    cfg = dataclasses.replace(given, teacher=teacher, critic=critic)
    init = ranks.checkpoint(cfg.init, "ema")
    student, parent = load_student(init, "ema")
    shape = cfg.video.shape(parent.model.wan.in_channels)
    prompts = open_prompts(
        Path(cfg.prompts), cfg.text, (cfg.teacher, cfg.critic), cfg.negative_prompt, ranks.device
    )
    check(cfg, ranks, student, shape, prompts)
    run = Run(cfg.run, ranks, config=given, may_change=(*RESUMABLE, "preview"))
    run.tokens_per_step = cfg.train.global_batch * parent.model.wan.clip_tokens(shape)
    if cfg.run.peak_tflops and ranks.is_main:
        run.flops_per_step = model_flops(cfg, parent.model, shape, prompts)
    distillation = build(cfg, run, student, prompts, shape)
    description = to_yaml(
        dataclasses.replace(parent, sampler=cfg.sampler, base=absolute(parent.base))
    )
    origin = partial(
        provenance,
        stage="stage3_self_forcing",
        seed=cfg.run.seed,
        parents=[init],
        data_hash=prompts.hash,
        extra={
            "teacher": cfg.teacher,
            "critic": cfg.critic,
            "negative_prompt": prompts.negative_prompt,
            "video": pixel_shape(shape),
            CLIP_STATISTICS: clip_statistics_of(init),
            **cfg.loss.guidance.logs(),
        },
    )
    engines = {"model": distillation.student, "critic": distillation.critic}
    ema, ema_model = Ema(cfg.train.ema, ranks), build_student(parent.model)
    checkpointer = Checkpointer(run, cfg.train, engines, ema, description, origin)
    preview = preview_of(distillation, parent.base, shape)
    start = checkpointer.resume()
    words = stage3_words(
        cfg, checkpointer, start, init, parent.model.family, prompts, shape, distillation.teacher
    )
    if start == 0:
        ema_model.load_state_dict(distillation.student.fp32_masters())
        show_previews(preview, ema_model, 0, ranks, run.video)
    with Loop(run, checkpointer, start) as loop:
        for step in loop:
            info, logs = update(distillation, loop.position(step), *distillation.turns(step))
            if info.stepped:
                ema.update(distillation.student.owned())
            logs |= watch(checkpointer.record, logs, cfg, step)
            if checkpointer.record.get("best_step") == step:
                checkpointer.extra["best"] = ema.copy()
            if step % cfg.train.validate_every == 0:
                ema.copy_to(ema_model)
                logs |= show_previews(preview, ema_model, step, ranks, run.video)
            run.log(step, logs | words.check(step, logs))
            last, request = step == cfg.train.steps, loop.request()
            if last or request or step % cfg.train.save_every == 0:
                checkpointer.save(step, required=last or request is Request.STOP)
            if request is Request.STOP and not last:
                loop.leave(step)
    distillation.reads.close()
    words.end()
    run.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
