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
from scd_sf.train.alarms import CLIP_STATISTICS, TUNING, Alarms, video_alarms
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
from scd_sf.train.summary import Summary, describe_clips, launch, sample
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


def next_commands(
    cfg: Stage2Config, ranks: Ranks, base: str, clips: LatentClips
) -> dict[str, list[str]]:
    """What is done with the student: distil it, with ``base`` (the Wan directory that it comes
    from) as teacher and critic, or sample it."""
    config = "stage3_1gpu.yaml" if ranks.world == 1 else "stage3_wan_1.3b.yaml"
    distil = launch(
        "stage3_self_forcing.py",
        config if ranks.device.type == "cuda" else "demo_stage3.yaml",
        ranks,
    )
    distil += [f"init={cfg.run.dir}", f"teacher={base}", f"critic={base}", f"prompts={cfg.data}"]
    size = pixel_shape(clips.shape)
    distil += [f"video.{name}={value}" for name, value in size.items()]
    distil.append(f"run.dir={cfg.run.dir}-distilled")
    return {"distil": distil, "sample": sample(cfg.run.dir, clips.texts([0])[0])}


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
    preview_clips = [0, len(val) // 2]
    preview = Preview(
        parent.base,
        val.batch(preview_clips).text,
        val.shape,
        cfg.sampler.build(),
        run.dir / "videos",
        texts=val.texts(preview_clips),
        cfg=cfg.preview,
    )
    origin = partial(
        provenance,
        stage="stage2_flow_matching",
        seed=cfg.run.seed,
        parents=[init],
        data_hash=clips.hash,
        extra={
            "video": pixel_shape(clips.shape),
            CLIP_STATISTICS: statistics_range(preview, val, ranks),
        },
    )
    ema, ema_model = Ema(cfg.train.ema, ranks), build_student(parent.model)
    checkpointer = Checkpointer(run, cfg.train, {"model": engine}, ema, description, origin)
    reads = Prefetch(clips.stored, cfg.train.prefetch)
    start = checkpointer.resume()
    summary = Summary(
        checkpointer,
        start,
        title=f"Stage 2, flow matching: {parent.model.family} student from {init} (ema)",
        data=[
            describe_clips(len(clips), clips.shape, clips.root),
            f"held out: {describe_clips(len(val), val.shape, val.root)}",
        ],
    )
    summary.begin()
    reference: dict[str, tuple[float, float]] = {}
    if ranks.is_main:
        true_clips = val.batch(preview_clips).latents_BFCHW
        true_means = preview.true_statistics(true_clips, ranks.device)
        reference = {name: (value, value) for name, value in true_means.items()}
    alarms = Alarms(run, video_alarms(reference, TUNING), start, cfg.train.steps)
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
            run.log(step, logs | alarms.check(step, logs))
            last, request = step == cfg.train.steps, loop.request()
            if last or request or step % cfg.train.save_every == 0:
                checkpointer.save(step, required=last or request is Request.STOP)
            if request is Request.STOP and not last:
                loop.leave(step)
    reads.close()
    summary.end(next_commands(cfg, ranks, absolute(parent.base), clips))
    run.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
