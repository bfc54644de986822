"""Stage 2: joint flow-matching fine-tune of a transplanted student, teacher-forced on clean clips
(Table 6).

    deepspeed recipes/stage2_flow_matching.py --config recipes/configs/stage2_wan_1.3b.yaml \\
        init=runs/stage1 data=data/wan14b_70k/train val=data/wan14b_70k/val run.dir=runs/stage2

Works under ``deepspeed``, ``torchrun`` and plain ``python``; the same command resumes.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from scd_sf.checkpoint import absolute, provenance
from scd_sf.config import from_command_line, to_yaml
from scd_sf.data.latents import LatentBatch, LatentClips, epoch_order
from scd_sf.data.prefetch import Prefetch
from scd_sf.diffusion.noise import generator
from scd_sf.distributed import Ranks, init_distributed
from scd_sf.generation.preview import Preview
from scd_sf.generation.validation import show_previews, statistics_range, validate
from scd_sf.losses.flow_matching import flow_matching_loss, loss_by_time
from scd_sf.models.build import Student, build_student, load_student, set_checkpointing
from scd_sf.models.wan.transformer import WanConfig
from scd_sf.tools.plan.job import PlanJob
from scd_sf.tools.stage_configs import Stage2Config
from scd_sf.tools.stage_words import preview_clips, stage2_words
from scd_sf.train.base import Engine, StepInfo, StepModule
from scd_sf.train.batches import RESUMABLE, add_to, micro_batches
from scd_sf.train.checkpointing import Checkpointer, pixel_shape
from scd_sf.train.checks import check_batches, check_same_size, check_shape, check_text
from scd_sf.train.ema import Ema
from scd_sf.train.engine import build_engine
from scd_sf.train.loop import Loop
from scd_sf.train.run import Run
from scd_sf.train.skipped import MicroBatch, keeping
from scd_sf.train.stop import Request
from scd_sf.types import Conditioning, Logs, exit_on_user_error


def student_engine(cfg: Stage2Config, ranks: Ranks, student: Student, null: Conditioning) -> Engine:
    """The student's engine; its forward pass is the whole loss."""
    set_checkpointing(student.trunks(), cfg.checkpointing, cfg.recompute_attention)

    def loss_fn(
        model: Student, x_0: Tensor, cond: Conditioning, rng: torch.Generator
    ) -> tuple[Tensor, Logs]:
        return flow_matching_loss(model, x_0, cond, null, cfg.loss, rng)

    return build_engine(
        StepModule(student, loss_fn),
        cfg.engine,
        ranks,
        global_batch=cfg.train.global_batch,
        micro_batch=cfg.train.micro_batch,
        total_updates=cfg.train.steps,
    )


def update(
    cfg: Stage2Config,
    run: Run,
    engine: Engine,
    clips: LatentClips,
    reads: Prefetch[LatentBatch],
    position: int,
) -> tuple[StepInfo, Logs]:
    """One update over all micro-batches; returns the mean logs of all ranks."""
    sums: Logs = {}
    samples = epoch_order(cfg.run.seed, position - 1, cfg.train.global_batch, len(clips))
    batches, next_batches = (
        micro_batches(cfg.train, cfg.run.seed, run.ranks, step, len(clips))
        for step in (position - 1, position)
    )
    reads.expect(indices for _, indices in (*batches, *next_batches))
    with keeping(run, position, engine, samples) as records:
        for number, indices in batches:
            host_batch = reads.batch(indices)
            batch = host_batch.to(run.ranks.device)
            loss, logs = engine(
                batch.latents_BFCHW, batch.text, generator(cfg.run.seed, "loss", position, number)
            )
            records.append(
                MicroBatch(
                    number, indices, clips.texts(indices), loss.detach(), host_batch.tensors()
                )
            )
            engine.backward(loss)
            info = engine.step()
            add_to(sums, logs, engine.micro_batches)
    return info, loss_by_time(run.ranks.mean(sums)) | {"grad_norm": info.grad_norm, "lr": info.lr}


def check_clips(student: Student, wan: WanConfig, clips: LatentClips, val: LatentClips) -> None:
    """UserError for training or held-out clips that do not fit the student or each other."""
    patch = wan.patch_height, wan.patch_width
    for data in (clips, val):
        check_shape(data.shape, data.root, wan.in_channels, patch, student.chunk)
        check_text(data.prompts, wan.text_dim)
    check_same_size(clips.shape, val.shape, clips.root, val.root)


def main() -> None:
    cfg = from_command_line(Stage2Config, __doc__ or "")
    ranks = init_distributed(cfg.run.timeout_minutes)
    init = ranks.checkpoint(cfg.init, "ema")
    student, parent = load_student(init, "ema", cfg.blocks)
    clips, val = LatentClips(cfg.data), LatentClips(cfg.val)
    wan = parent.model.wan
    check_clips(student, wan, clips, val)
    check_batches(cfg.train, ranks, len(clips), clips.root)
    run = Run(cfg.run, ranks, config=cfg, may_change=(*RESUMABLE, "preview"))
    run.tokens_per_step = cfg.train.global_batch * wan.clip_tokens(clips.shape)
    if cfg.run.peak_tflops and ranks.is_main:
        run.flops_per_step = PlanJob(
            cfg, parent.model, clips.shape, text_tokens=clips.prompts.length
        ).model_flops()
    engine = student_engine(cfg, ranks, student, clips.null)
    description = to_yaml(
        dataclasses.replace(parent, sampler=cfg.sampler, base=absolute(parent.base))
    )
    shown = preview_clips(val)
    preview = Preview(
        parent.base,
        val.batch(shown).text,
        val.shape,
        cfg.sampler.build(),
        run.dir / "videos",
        texts=val.texts(shown),
        cfg=cfg.preview,
    )
    origin = partial(
        provenance,
        stage="stage2_flow_matching",
        seed=cfg.run.seed,
        parents=[init],
        data_hash=clips.hash,
        extra={"video": pixel_shape(clips.shape), **statistics_range(preview, val, ranks)},
    )
    ema, ema_model = Ema(cfg.train.ema, ranks), build_student(parent.model)
    checkpointer = Checkpointer(run, cfg.train, {"model": engine}, ema, description, origin)
    reads = Prefetch(clips.stored, cfg.train.prefetch)
    start = checkpointer.resume()
    words = stage2_words(cfg, checkpointer, start, init, parent, clips, val, preview)
    if start == 0:
        ema_model.load_state_dict(engine.fp32_masters())
        show_previews(preview, ema_model, 0, ranks, run.video)
    with Loop(run, checkpointer, start) as loop:
        for step in loop:
            info, logs = update(cfg, run, engine, clips, reads, loop.position(step))
            if info.stepped:
                ema.update(engine.owned())
            if step % cfg.train.validate_every == 0 or step == cfg.train.steps:
                ema.copy_to(ema_model)
                logs |= validate(ema_model, val, cfg.loss, cfg.validation_clips, ranks)
                checkpointer.note_best(step, logs["val/loss"])
                logs |= show_previews(preview, ema_model, step, ranks, run.video)
            run.log(step, logs | words.check(step, logs))
            last, request = step == cfg.train.steps, loop.request()
            if last or request or step % cfg.train.save_every == 0:
                checkpointer.save(step, required=last or request is Request.STOP)
            if request is Request.STOP and not last:
                loop.leave(step)
    reads.close()
    words.end()
    run.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
