"""Part 3: an update of stage 2 and a cycle of stage 3 at full size on one rank, beside the
figures of `scd plan`."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.distributed import init_distributed
from scd_sf.evaluation.roofline import synchronize
from scd_sf.models.build import ModelConfig
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.wan.transformer import WanConfig
from scd_sf.tools.gpu import trial
from scd_sf.tools.gpu.card import Card, host_gib, speed_row
from scd_sf.tools.gpu.parts import Figures, GpuRow, failed
from scd_sf.tools.plan.budget import GIB, Budget, Cluster, budget
from scd_sf.tools.plan.job import PlanJob, read_job
from scd_sf.tools.plan.phases import Phase
from scd_sf.tools.stage_configs import Stage3Config
from scd_sf.types import UserError, VideoShape

CONFIGS = Path("recipes/configs")
WITHIN = 0.15  # of the plan's memory
ONE_CLIP = ["train.global_batch=1", "train.micro_batch=1"]
# What goes to the CPU's memory, one after the other until it fits: the cheapest first.
OFFLOADED: dict[int, list[tuple[str, ...]]] = {
    2: [(), ("engine",)],
    3: [
        (),
        ("teacher_engine",),
        ("student_engine", "critic_engine"),
        ("teacher_engine", "student_engine", "critic_engine"),
    ],
}
TOY = WanConfig(2, 16, 4, 4, 8, 16, 32, 6)
TOY_STUDENT = ModelConfig(wan=TOY, scd=ScdConfig(tuple(range(5)), DecoderConfig((0, 5))))


def training_rows(card: Card) -> Sequence[GpuRow]:
    """A row for the card itself and one for each stage."""
    names = {2: "stage 2, one update of one clip", 3: "stage 3, one cycle of one clip"}
    updates = [
        GpuRow(name, partial(measure_training, card, stage)) for stage, name in names.items()
    ]
    return [speed_row(card), *updates]


def job_of(card: Card, stage: int) -> PlanJob:
    """The shipped configuration for one clip (81 frames at 832x480; stage 2 with K = 2 and 7
    targets)."""
    files = [CONFIGS / f"stage{stage}_wan_1.3b.yaml"]
    job = replace(read_job(files, ONE_CLIP, None, 512), text_parameters=0)
    if not card.toy:
        return job
    shape = VideoShape(frames=3, channels=TOY.in_channels, height=4, width=4)
    return replace(job, model=TOY_STUDENT, shape=shape, teacher=TOY, critic=TOY, text_tokens=5)


def fitting(
    job: PlanJob, card: Card, phases: list[Phase] | None = None
) -> tuple[Budget, list[str]]:
    """The plan on this card, and the overrides that move states to the CPU's memory until it fits.
    ``phases``: metered before.

    Raises UserError where even that is not enough, or the CPU's memory is too small."""
    cluster = Cluster(1, 1, card.gib, card.peak_tflops or 1.0, on_gpu=not card.toy)
    plan = budget(job, cluster, phases)
    for names in OFFLOADED[job.stage]:
        engines = {name: replace(vars(job.cfg)[name], offload=True) for name in names}
        plan = budget(replace(job, cfg=replace(job.cfg, **engines)), cluster, plan.phases)
        if plan.fits and plan.host / GIB > host_gib():
            raise UserError(
                f"stage {job.stage} needs {plan.host / GIB:.0f} GiB of host memory, here are {host_gib():.0f}"
            )
        if plan.fits:
            return plan, [f"{name}.offload=true" for name in names]
    least, has = f"{plan.needed_gib:.0f} GiB even with all states on the CPU", f"{card.gib:.0f}"
    raise UserError(f"stage {job.stage} needs {least}, the card has {has}; use a larger card")


def measure_training(card: Card, stage: int) -> Figures:
    """Seconds of the second update (the first compiles and allocates), MFU, and memory against the
    plan."""
    plan, changes = fitting(job_of(card, stage), card)
    ranks = init_distributed()
    update = start(plan.job, stage)
    update(True)
    if not card.toy:
        torch.cuda.reset_peak_memory_stats()
    synchronize(ranks.device)
    start_time = time.perf_counter()
    losses = update(False)
    synchronize(ranks.device)
    seconds = time.perf_counter() - start_time
    allocated_bytes = None if card.toy else torch.cuda.max_memory_allocated()
    reserved_bytes = None if card.toy else torch.cuda.max_memory_reserved()
    finite_losses(losses)
    del update, losses
    gc.collect()
    return figures(plan, changes, seconds, allocated_bytes, reserved_bytes)


def finite_losses(losses: Sequence[Tensor]) -> None:
    """UserError where a loss is not finite or there is none, because the engine may then have left
    out parts of the update."""
    values = [float(loss) for loss in losses]
    if not values or not all(map(math.isfinite, values)):
        raise UserError(f"losses are not finite: {values}")


def start(job: PlanJob, stage: int) -> Callable[[bool], list[Tensor]]:
    """Build the engines and return a function that runs one update and returns its losses. Called
    with True it runs a shorter one to warm up."""
    ranks = init_distributed()
    if stage == 2:
        update = trial.stage2_update(job, ranks)
        return lambda warm: update()
    cycle, cfg = trial.stage3_update(job, ranks), job.cfg
    assert isinstance(cfg, Stage3Config)
    return lambda warm: cycle(1 if warm else cfg.ratio)


def figures(
    plan: Budget,
    changes: list[str],
    seconds: float,
    allocated_bytes: int | None,
    reserved_bytes: int | None,
) -> Figures:
    """The measured figures beside the planned ones. ``allocated_bytes``,
    ``reserved_bytes``: None on a CPU."""
    job, flops = plan.job, plan.job.model_flops()
    peak = plan.cluster.peak_tflops * 1e12
    ratio = None if allocated_bytes is None else allocated_bytes / plan.peak
    line = {
        "update": f"stage {job.stage}",
        "seconds": round(seconds, 2),
        "PFLOP": round(flops / 1e15, 4),
        "TFLOP/s": round(flops / seconds / 1e12, 1),
        "MFU": round(flops / seconds / peak, 4) if plan.cluster.peak_tflops > 1 else None,
        "GiB": None if allocated_bytes is None else round(allocated_bytes / GIB, 2),
        "planned GiB": round(plan.peak / GIB, 2),
        "measured / planned": None if ratio is None else round(ratio, 3),
        "within 15 %": None if ratio is None else abs(ratio - 1) <= WITHIN,
        "changed to fit": ", ".join(changes) or "nothing",
    }
    beyond = ratio is not None and abs(ratio - 1) > WITHIN
    error = failed(f"{line['measured / planned']} of the planned memory") if beyond else {}
    return error | {
        "lines": [line],
        "engines": {role: vars(engine) for role, engine in job.engines().items()},
        "reserved_gib": None if reserved_bytes is None else round(reserved_bytes / GIB, 2),
        "planned_with_context_and_slack_gib": round(plan.needed_gib, 2),
        "planned_offloaded_gib": round(plan.offloaded / GIB, 1),
        "planned_seconds_at_45_percent": round(plan.seconds, 2)
        if plan.cluster.peak_tflops > 1
        else None,
    }
