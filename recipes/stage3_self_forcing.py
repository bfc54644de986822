"""Stage 3: distil a student to a few steps by Self-Forcing: self-rollout + distribution matching (Table 7).

    deepspeed recipes/stage3_self_forcing.py --config recipes/configs/stage3_wan_1.3b.yaml init=runs/stage2 \\
        teacher=/models/Wan2.1-T2V-14B-Diffusers critic=/models/Wan2.1-T2V-1.3B-Diffusers prompts=data/prompts \\
        run.dir=runs/stage3

Data-free: only prompts, a list of any length (they are encoded while it trains) or a directory of encoded ones. Three
engines in one process: student and critic ZeRO-2, the frozen teacher ZeRO-3. One step is one student update after
``ratio`` critic updates. Works under ``deepspeed``, ``torchrun`` and plain ``python``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.checkpoint import absolute, provenance
from scd_sf.config import from_command_line, to_yaml
from scd_sf.data.latents import epoch_order
from scd_sf.data.prefetch import Prefetch
from scd_sf.data.prompts import Prompts
from scd_sf.diffusion.noise import cpu_noise, generator
from scd_sf.diffusion.solvers import Renoise
from scd_sf.distributed import Ranks, init_distributed
from scd_sf.generation.preview import Preview
from scd_sf.generation.rollout import rollout
from scd_sf.generation.validation import show_previews
from scd_sf.losses.dmd import critic_loss, dmd_loss
from scd_sf.models.build import Student, build_student, load_student
from scd_sf.models.wan.live_prompts import LivePrompts, open_prompts
from scd_sf.models.wan.transformer import Wan
from scd_sf.models.wan.weights import load_wan, open_wan, read_wan_config
from scd_sf.tools.plan.job import PlanJob
from scd_sf.tools.stages import Stage3Config
from scd_sf.train.base import Engine, StepInfo, StepModule
from scd_sf.train.checks import check_batches, check_shape, check_text
from scd_sf.train.ema import Ema
from scd_sf.train.engine import build_engine, frozen_engine
from scd_sf.train.loop import (
    RESUMABLE,
    TrainState,
    micro_batches,
    pixel_shape,
)
from scd_sf.train.run import Run
from scd_sf.train.skipped import MicroBatch, keeping
from scd_sf.types import Conditioning, Logs, VideoShape, exit_on_user_error, on_device, say

MayStop = Callable[[], None]
Rollouts = dict[int, tuple[Tensor, Conditioning, list[int]]]  # by micro-batch: detached rollouts and their prompts


def _go_on() -> None:
    """Not here."""


@dataclass
class Distillation:
    """The pieces one update needs, on this rank."""

    cfg: Stage3Config
    run: Run
    ranks: Ranks
    prompts: Prompts
    reads: Prefetch[Conditioning]
    sampler: Renoise
    latent: tuple[int, int, int, int]
    student: Engine
    critic: Engine
    teacher: torch.nn.Module

    def cond(self, indices: Sequence[int]) -> Conditioning:
        return self.reads.batch(indices).to(self.ranks.device)

    def prompts_of(self, step: int, turns: Sequence[int]) -> list[list[int]]:
        """This rank's prompts in the order in which a step asks for them: critic updates ``turns``, then its own."""
        seed, size = self.cfg.run.seed, len(self.prompts)
        places = [(seed + 1, (step - 1) * (self.cfg.ratio + 1) + turn) for turn in turns if turn % self.cfg.reuse == 0]
        places.append((seed, step - 1))
        return [
            indices
            for stream, place in places
            for _, indices in micro_batches(self.cfg.train, stream, self.ranks, place, size)
        ]

    def kept(self, number: int, indices: list[int], loss: Tensor, x: Tensor, cond: Conditioning) -> MicroBatch:
        prompts = self.prompts.texts(indices)
        return MicroBatch(number, indices, prompts, loss.detach(), {"rollout": x.detach(), "text": cond.text_BLE})

    def rollout(self, cond: Conditioning, name: str, step: int, turn: int, number: int) -> Tensor:
        """One engine forward = one whole self-rollout. The exit step is the same on all ranks and micro-batches."""
        seed = self.cfg.run.seed
        exit_step = int(torch.randint(self.sampler.steps, (), generator=generator(seed, name, "exit", step, turn)))
        rng = generator(seed, name, "noise", step, turn, number)
        noise = on_device(torch.randn((cond.batch, *self.latent), generator=rng), self.ranks.device)
        x: Tensor = self.student(noise, cond, exit_step, rng)
        return x

    def critic_update(self, step: int, turn: int, stored: Rollouts, fresh: bool, may_stop: MayStop) -> Logs:
        """One critic update, on a new rollout or on the stored one noised anew."""
        cfg, total = self.cfg, 0.0
        position, size = (step - 1) * (cfg.ratio + 1) + turn, len(self.prompts)
        samples = epoch_order(cfg.run.seed + 1, position, cfg.train.global_batch, size) if fresh else []
        with keeping(self.run, step, self.critic, samples, f"critic{turn}") as kept:
            for number, indices in micro_batches(cfg.train, cfg.run.seed + 1, self.ranks, position, size):
                may_stop()
                if fresh or number not in stored:
                    cond = self.cond(indices)
                    with torch.no_grad():
                        stored[number] = (self.rollout(cond, "critic", step, turn, number), cond, indices)
                x, cond, indices = stored[number]
                rng = generator(cfg.run.seed, "critic", step, turn, number)
                loss, logs = critic_loss(self.critic, x, cond, cfg.loss, rng)
                kept.append(self.kept(number, indices, loss, x, cond))
                self.critic.backward(loss)
                info = self.critic.step()
                total += logs["critic/loss"] / self.critic.micro_batches
        return {"critic/loss": total, "critic/grad_norm": info.grad_norm}

    def student_update(self, step: int, stored: Rollouts, may_stop: MayStop) -> tuple[Logs, StepInfo]:
        """One student update; leaves its rollouts in ``stored``."""
        cfg, size = self.cfg, len(self.prompts)
        mean: Logs = {}
        samples = epoch_order(cfg.run.seed, step - 1, cfg.train.global_batch, size)
        with keeping(self.run, step, self.student, samples) as kept:
            for number, indices in micro_batches(cfg.train, cfg.run.seed, self.ranks, step - 1, size):
                may_stop()
                cond = self.cond(indices)
                x = self.rollout(cond, "student", step, 0, number)
                rng = generator(cfg.run.seed, "dmd", step, number)
                negative = self.prompts.negative.to(self.ranks.device)
                loss, logs = dmd_loss(x, self.teacher, self.critic, cond, negative, cfg.loss, rng)
                kept.append(self.kept(number, indices, loss, x, cond))
                self.student.backward(loss)
                stored[number] = (x.detach(), cond, indices)
                info = self.student.step()
                for name, value in logs.items():
                    mean[name] = mean.get(name, 0.0) + value / self.student.micro_batches
        return mean | {"grad_norm": info.grad_norm, "lr": info.lr}, info

    def update(self, step: int, first: bool, state: TrainState) -> tuple[Logs, StepInfo]:
        """One student update and its critic updates, ``first`` after the critic's warm-up. ``step`` places data and
        random numbers. The run may end between micro-batches, wherever what follows needs no rollout from before."""
        cfg = self.cfg
        stored: Rollouts = {}
        own = cfg.critic_data == "own"
        before = (cfg.critic_warmup if first else 0) + (cfg.ratio if own else 0)
        critic_logs = state.begun()
        turns = int(critic_logs.pop("turns", 0))
        again = range(cfg.ratio if own else 0)
        self.reads.expect(self.prompts_of(step, range(turns, before)) + self.prompts_of(step + 1, again))

        def may_stop(turn: int) -> MayStop:
            return lambda: state.may_stop({"turns": float(turn), **critic_logs})

        for turn in range(turns, before):
            fresh = turn % cfg.reuse == 0
            critic_logs = self.critic_update(step, turn, stored, fresh, may_stop(turn) if fresh else _go_on)
        logs, info = self.student_update(step, stored, may_stop(before))
        for turn in range(before, before + (0 if own else cfg.ratio)):
            critic_logs = self.critic_update(step, turn, stored, False, _go_on)
        return logs | critic_logs, info


def watch(record: dict[str, float], logs: Logs, cfg: Stage3Config, step: int) -> Logs:
    """Collapse monitors; keeps the smoothed |x0_fake - x0_real| and the newest healthy step in ``record``.

    A distillation that collapses shows |fake - real| falling, then climbing several times over, and the std leaving the
    data's. Short of that the distance only wanders with the noise levels drawn, and its lowest step says nothing: a
    step is healthy while the distance stays within ``healthy_within`` of its lowest and the std in ``std_range``.
    A step that was not finite says nothing.
    """
    if not math.isfinite(logs["dmd/fake_real"] + logs["rollout/std"]):
        return {}
    smoothed = 0.9 * record.get("fake_real", logs["dmd/fake_real"]) + 0.1 * logs["dmd/fake_real"]
    record["fake_real"] = smoothed
    record["lowest"] = min(smoothed, record.get("lowest", smoothed))
    ratio = logs["rollout/std"] / cfg.data_std
    sane = cfg.std_range[0] <= ratio <= cfg.std_range[1] and smoothed <= cfg.healthy_within * record["lowest"]
    if sane and step >= min(10, cfg.train.steps):
        record["best_step"] = float(step)
    return {
        "monitor/fake_real": smoothed,
        "monitor/std_ratio": ratio,
        "monitor/best_step": record.get("best_step", 0.0),
    }


def check(cfg: Stage3Config, ranks: Ranks, student: Student, latent: VideoShape, prompts: Prompts) -> None:
    """Everything that can be wrong with the inputs, before anything is written: shapes, text, batches, both Wans."""
    for name, path in (("teacher", cfg.teacher), ("critic", cfg.critic)):
        wan = read_wan_config(Path(path))
        where = f"video, for {name} {path}"
        check_shape(latent, where, wan.in_channels, (wan.patch_height, wan.patch_width), student.chunk)
        check_text(prompts, wan.text_dim)
    check_batches(cfg.train, ranks, len(prompts), prompts.where)


def build(cfg: Stage3Config, run: Run, student: Student, prompts: Prompts, latent: VideoShape) -> Distillation:
    sampler, ranks = Renoise(cfg.sampler.times), run.ranks

    def self_rollout(model: Student, noise: Tensor, cond: Conditioning, exit_step: int, rng: torch.Generator) -> Tensor:
        return rollout(model, noise, cond, sampler, cpu_noise(rng), exit_step=exit_step)

    critic = load_wan(Path(cfg.critic))
    for trunk in (*student.trunks(), critic.trunk):
        trunk.checkpointing, trunk.recompute_attention = cfg.checkpointing, cfg.recompute_attention
    train = cfg.train
    engines = [
        build_engine(
            module,
            engine,
            ranks,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            total_updates=updates,
        )
        for module, engine, updates in (
            (StepModule(student, self_rollout), cfg.student, train.steps),
            (critic, cfg.critic_engine, train.steps * cfg.ratio + cfg.critic_warmup),
        )
    ]
    files = open_wan(Path(cfg.teacher))
    weights = {name: tensor.read for name, tensor in files.tensors.items()}
    teacher = frozen_engine(lambda: Wan(files.config), weights, cfg.teacher_engine, ranks)
    shape = (latent.frames, latent.channels, latent.height, latent.width)
    reads = Prefetch(prompts.conditioning, train.prefetch, threads=1)
    return Distillation(cfg, run, ranks, prompts, reads, sampler, shape, engines[0], engines[1], teacher)


def preview_of(parts: Distillation, base: str, latent: VideoShape) -> Preview:
    """Validation videos of the first and the middle prompt."""
    seen = [0, len(parts.prompts) // 2]
    return Preview(
        base,
        parts.reads.batch(seen),
        latent,
        parts.sampler,
        parts.run.dir / "videos",
        texts=parts.prompts.texts(seen),
        cfg=parts.cfg.preview,
    )


def main() -> None:
    cfg = from_command_line(Stage3Config, __doc__ or "")
    ranks = init_distributed(cfg.run.timeout_minutes)
    init = ranks.checkpoint(cfg.init, "ema")
    student, parent = load_student(init, "ema")
    latent = cfg.video.shape(parent.model.wan.in_channels)
    prompts = open_prompts(Path(cfg.prompts), cfg.text, (cfg.teacher, cfg.critic), cfg.negative_prompt, ranks.device)
    check(cfg, ranks, student, latent, prompts)
    run = Run(cfg.run, ranks, config=cfg, may_change=(*RESUMABLE, "preview"))
    run.tokens_per_step = cfg.train.global_batch * parent.model.wan.clip_tokens(latent)
    if cfg.run.peak_tflops and ranks.is_main:
        teacher, critic = (read_wan_config(Path(path)) for path in (cfg.teacher, cfg.critic))
        run.flops_per_step = PlanJob(cfg, parent.model, latent, teacher, critic, prompts.length).model_flops()
    if isinstance(prompts, LivePrompts):
        prompts.load()  # before the engines: no other model may be built while ZeRO-3's is
    if ranks.is_main:
        say(f"prompts: {prompts}")
    parts = build(cfg, run, student, prompts, latent)
    description = to_yaml(dataclasses.replace(parent, sampler=cfg.sampler, base=absolute(parent.base)))

    def describe(step: int) -> tuple[str, dict[str, object]]:
        wans = {"teacher": absolute(cfg.teacher), "critic": absolute(cfg.critic)}
        extra = {
            **wans,
            "negative_prompt": prompts.negative_prompt,
            "video": pixel_shape(latent),
            **cfg.loss.guidance.logs(),
        }
        return description, provenance(
            stage="stage3_self_forcing",
            step=step,
            seed=cfg.run.seed,
            parents=[init],
            data_hash=prompts.hash,
            extra=extra,
        )

    preview = preview_of(parts, parent.base, latent)
    averaged = build_student(parent.model)
    engines = {"model": parts.student, "critic": parts.critic}
    state = TrainState(run, engines, Ema(cfg.train.ema, ranks), describe, cfg.train)
    start = state.resume()
    if start == 0:
        averaged.load_state_dict(parts.student.masters())
        show_previews(preview, averaged, 0, ranks, run.video)
    for step in state.steps(start):
        with state.attempt(step):
            logs, info = parts.update(state.position(step), step == 1, state)
            if info.stepped:
                state.update_ema()
            logs = ranks.mean(logs)
            logs |= watch(state.record, logs, cfg, step)
            if state.record.get("best_step") == step:
                state.extra["best"] = state.ema.copy()
            if step % cfg.train.validate_every == 0:
                state.ema.copy_to(averaged)
                logs |= show_previews(preview, averaged, step, ranks, run.video)
            run.log(step, logs)
    parts.reads.close()
    run.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
