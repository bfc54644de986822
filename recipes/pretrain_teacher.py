"""Pretrain a bidirectional Wan from scratch by flow matching: the demo's small teacher.

    python recipes/pretrain_teacher.py --config recipes/configs/teacher_doom.yaml \\
        data=D/train val=D/val run.dir=runs/teacher

Writes ordinary checkpoints; ``export`` a finished one to diffusers layout with
recipes/make_teacher.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from scd_sf.checkpoint import provenance
from scd_sf.config import from_command_line, to_yaml
from scd_sf.data.latents import LatentClips, epoch_order
from scd_sf.diffusion.flow import add_noise, stratified_times, velocity_target
from scd_sf.diffusion.noise import generator
from scd_sf.distributed import init_distributed
from scd_sf.losses.flow_matching import denoiser_flow_loss, drop_text
from scd_sf.models.build import CheckpointConfig, ModelConfig, SamplerConfig
from scd_sf.models.wan.transformer import Wan, WanConfig
from scd_sf.train.base import Engine, EngineConfig, StepInfo, StepModule
from scd_sf.train.batches import RESUMABLE, TrainConfig, add_to, micro_batches
from scd_sf.train.checkpointing import Checkpointer
from scd_sf.train.checks import check_batches, check_same_size, check_shape, check_text
from scd_sf.train.ema import Ema
from scd_sf.train.engine import build_engine
from scd_sf.train.loop import Loop
from scd_sf.train.run import Run, RunConfig
from scd_sf.train.skipped import MicroBatch, keeping
from scd_sf.train.stop import Request
from scd_sf.train.summary import Summary, describe_clips
from scd_sf.types import Conditioning, Logs, check_within, exit_on_user_error, on_device


@dataclass
class PretrainConfig:
    """A small bidirectional Wan, trained from scratch on encoded clips."""

    data: str
    """Folder of encoded training clips."""
    val: str
    """Folder of encoded held-out clips."""
    run: RunConfig
    """Run directory, seed, log."""
    wan: WanConfig = field(default_factory=WanConfig)
    """Geometry of the model."""
    shift: float = 5.0
    """Timestep shift of the training times."""
    text_dropout: float = 0.1
    """Share of clips trained with the empty prompt, for guidance."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batches, checkpoints."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Optimiser and precision."""

    def __post_init__(self) -> None:
        check_within(self, {"shift": (1e-3, 1e3), "text_dropout": (0, 1)})


@torch.no_grad()
def validate(model: Wan, clips: LatentClips, limit: int = 48) -> Logs:
    """Flow losses at fixed noise, as means over t = .2, .5, .8, .95: with the right prompt, with the
    prompt of the same place and another motion, and with the null prompt. The difference of the
    first two shows how much the model uses the prompt's motion."""
    stride = max(1, len(clips) // limit)
    indices = list(range(0, len(clips), stride))[:limit]
    batch = clips.batch(indices)
    prompts = clips.batch(_other_motion(clips, indices)).text
    null = clips.null.expand(len(indices))
    losses: dict[str, list[Tensor]] = {"right": [], "wrong_motion": [], "null": []}
    for t in (0.2, 0.5, 0.8, 0.95):
        eps = torch.randn(batch.latents_BFCHW.shape, generator=generator(0, "val", int(1000 * t)))
        times = torch.full((len(indices),), t)
        x_t = add_noise(batch.latents_BFCHW, eps, times)
        for name, cond in (("right", batch.text), ("wrong_motion", prompts), ("null", null)):
            error = model(x_t, times, cond) - velocity_target(batch.latents_BFCHW, eps)
            losses[name].append(error.pow(2).mean())
    return {f"val/{name}": float(torch.stack(values).mean()) for name, values in losses.items()}


def _other_motion(clips: LatentClips, indices: list[int]) -> list[int]:
    """For each clip the index of a clip of the same place with another motion."""
    other_clips = []
    for turn, index in enumerate(indices):
        tags = clips.rows[index].tags
        choices = [
            candidate
            for candidate, row in enumerate(clips.rows)
            if row.tags["place"] == tags["place"] and row.tags["motion"] != tags["motion"]
        ]
        other_clips.append(choices[(turn * 7) % len(choices)])
    return other_clips


def update(
    cfg: PretrainConfig, run: Run, engine: Engine, clips: LatentClips, position: int
) -> tuple[StepInfo, Logs]:
    """One update over all micro-batches; returns the mean logs of all ranks."""
    sums: Logs = {}
    samples = epoch_order(cfg.run.seed, position - 1, cfg.train.global_batch, len(clips))
    with keeping(run, position, engine, samples) as records:
        for number, indices in micro_batches(
            cfg.train, cfg.run.seed, run.ranks, position - 1, len(clips)
        ):
            rng = generator(cfg.run.seed, "loss", position, number)
            host_batch = clips.batch(indices)
            batch = host_batch.to(run.ranks.device)
            cond = drop_text(batch.text, clips.null, cfg.text_dropout, rng)
            t = on_device(stratified_times(len(indices), cfg.shift, rng), run.ranks.device)
            loss = engine(batch.latents_BFCHW, cond, t, rng)
            records.append(
                MicroBatch(
                    number, indices, clips.texts(indices), loss.detach(), host_batch.tensors()
                )
            )
            engine.backward(loss)
            info = engine.step()
            add_to(sums, {"loss": float(loss.detach())}, engine.micro_batches)
    return info, run.ranks.mean(sums) | {"grad_norm": info.grad_norm, "lr": info.lr}


def main() -> None:
    cfg = from_command_line(PretrainConfig, __doc__ or "")
    ranks = init_distributed(cfg.run.timeout_minutes)
    clips, val = LatentClips(cfg.data), LatentClips(cfg.val)
    for data in (clips, val):
        check_shape(
            data.shape,
            data.root,
            cfg.wan.in_channels,
            (cfg.wan.patch_height, cfg.wan.patch_width),
            1,
        )
        check_text(data.prompts, cfg.wan.text_dim)
    check_same_size(clips.shape, val.shape, clips.root, val.root)
    check_batches(cfg.train, ranks, len(clips), clips.root)
    run = Run(cfg.run, ranks, config=cfg, may_change=RESUMABLE)
    run.tokens_per_step = cfg.train.global_batch * cfg.wan.clip_tokens(clips.shape)
    model = Wan(cfg.wan)

    def loss_fn(
        wan: Wan, x_0: Tensor, cond: Conditioning, t: Tensor, rng: torch.Generator
    ) -> Tensor:
        return denoiser_flow_loss(wan, x_0, cond, t, rng)

    engine = build_engine(
        StepModule(model, loss_fn),
        cfg.engine,
        ranks,
        global_batch=cfg.train.global_batch,
        micro_batch=cfg.train.micro_batch,
        total_updates=cfg.train.steps,
    )
    description = to_yaml(
        CheckpointConfig(ModelConfig("wan", wan=cfg.wan), SamplerConfig("euler", 50, cfg.shift))
    )
    origin = partial(provenance, stage="pretrain", seed=cfg.run.seed, data_hash=clips.hash)
    ema = Ema(cfg.train.ema, ranks)
    checkpointer = Checkpointer(run, cfg.train, {"model": engine}, ema, description, origin)
    start = checkpointer.resume()
    summary = Summary(
        checkpointer,
        start,
        title="Training of a bidirectional Wan, new weights",
        data=[
            describe_clips(len(clips), clips.shape, clips.root),
            f"held out: {describe_clips(len(val), val.shape, val.root)}",
        ],
    )
    summary.begin()
    with Loop(run, checkpointer, start) as loop:
        for step in loop:
            info, logs = update(cfg, run, engine, clips, loop.position(step))
            if info.stepped:
                ema.update(engine.owned())
            if step % cfg.train.validate_every == 0 or step == cfg.train.steps:
                ema_model = Wan(cfg.wan)
                ema.copy_to(ema_model)
                logs |= validate(ema_model, val)
            run.log(step, logs)
            last, request = step == cfg.train.steps, loop.request()
            if last or request or step % cfg.train.save_every == 0:
                checkpointer.save(step, required=last or request is Request.STOP)
            if request is Request.STOP and not last:
                loop.leave(step)
    export = ["scd", "export", cfg.run.dir, f"{cfg.run.dir}-diffusers", "--layout", "diffusers"]
    summary.end({"export": export})
    run.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
