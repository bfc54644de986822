"""What stages 2 and 3 say: their summaries (``train/summary.py``) with the commands that follow, and
their alarms (``train/alarms.py``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from scd_sf.checkpoint import absolute
from scd_sf.data.latents import LatentClips
from scd_sf.data.prompts import Prompts
from scd_sf.generation.preview import Preview
from scd_sf.models.build import CheckpointConfig
from scd_sf.tools.stage_configs import Stage2Config, Stage3Config
from scd_sf.train.alarms import (
    DISTILLATION,
    TUNING,
    Alarms,
    clip_statistics_of,
    rollout_alarms,
    video_alarms,
)
from scd_sf.train.checkpointing import Checkpointer, pixel_shape
from scd_sf.train.summary import Summary, describe_clips, launch, sample_words
from scd_sf.types import Logs, VideoShape


@dataclass(frozen=True)
class StageWords:
    """The words of one training. ``conclusion``: the next commands by what they do, and what is said
    of the best checkpoint, asked for at the end."""

    summary: Summary
    alarms: Alarms
    conclusion: Callable[[], tuple[dict[str, list[str]], str]]

    def check(self, step: int, logs: Logs) -> Logs:
        """:meth:`Alarms.check`."""
        return self.alarms.check(step, logs)

    def end(self) -> None:
        """:meth:`Summary.end`."""
        self.summary.end(*self.conclusion())


def stage2_words(
    cfg: Stage2Config,
    checkpointer: Checkpointer,
    start: int,
    init: Path,
    parent: CheckpointConfig,
    clips: LatentClips,
    val: LatentClips,
    preview: Preview,
) -> StageWords:
    """Says what stage 2 trains after ``start`` updates. ``parent``: the config of the checkpoint
    ``init``. ``preview``: of the held-out clips :func:`preview_clips`."""
    run, ranks = checkpointer.run, checkpointer.ranks
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
        latents = val.batch(preview_clips(val)).latents_BFCHW
        means = preview.true_statistics(latents, ranks.device)
        reference = {name: (value, value) for name, value in means.items()}
    alarms = Alarms(run, video_alarms(reference, TUNING), start, cfg.train.steps)

    def conclusion() -> tuple[dict[str, list[str]], str]:
        config = "stage3_1gpu.yaml" if ranks.world == 1 else "stage3_wan_1.3b.yaml"
        config = config if ranks.device.type == "cuda" else "demo_stage3.yaml"
        base, size = absolute(parent.base), pixel_shape(clips.shape)
        distil = launch("stage3_self_forcing.py", config, ranks)
        distil += [f"init={run.dir}", f"teacher={base}", f"critic={base}", f"prompts={cfg.data}"]
        distil += [f"video.{name}={value}" for name, value in size.items()]
        distil.append(f"run.dir={run.dir}-distilled")
        return {"distil": distil, "sample": sample_words(run.dir, clips.texts([0])[0])}, ""

    return StageWords(summary, alarms, conclusion)


def preview_clips(val: LatentClips) -> list[int]:
    """The held-out clips whose prompts stage 2's previews show."""
    return [0, len(val) // 2]


def stage3_words(
    cfg: Stage3Config,
    checkpointer: Checkpointer,
    start: int,
    init: Path,
    family: str,
    prompts: Prompts,
    shape: VideoShape,
    teacher: nn.Module,
) -> StageWords:
    """Says what stage 3 trains after ``start`` updates. ``family``: of the student in ``init``."""
    run, size = checkpointer.run, pixel_shape(shape)
    summary = Summary(
        checkpointer,
        start,
        title=f"Stage 3, Self-Forcing: {family} student from {init} (ema), teacher {cfg.teacher}, "
        f"critic {cfg.critic}",
        data=[
            f"prompts {prompts}",
            f"rollouts of {size['frames']} frames of {size['height']}x{size['width']}",
        ],
        frozen={"teacher": (teacher, cfg.teacher_engine)},
    )
    summary.begin()
    ranges = rollout_alarms(cfg.std_range) + video_alarms(clip_statistics_of(init), DISTILLATION)
    alarms = Alarms(run, ranges, start, cfg.train.steps)

    def conclusion() -> tuple[dict[str, list[str]], str]:
        has_best = "best" in checkpointer.extra
        weights = "best" if has_best else "ema"
        best = "none: no step was healthy (std_range, healthy_within)"
        if has_best:
            step = int(checkpointer.record["best_step"])
            best = f"weights=best of the last checkpoint, the average of step {step:,}"
        export = ["scd", "export", str(run.dir), f"{run.dir}.safetensors", "--weights", weights]
        sample = sample_words(run.dir, prompts.texts([0])[0], weights)
        return {"sample": sample, "export": export}, best

    return StageWords(summary, alarms, conclusion)
