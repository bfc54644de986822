"""What to change of a job that does not fit, each change counted before it is advised.

First come changes that train the same: recomputing, smaller micro-batches, prompts that are encoded
beforehand, partitioning, the CPU's memory. Where they are not enough, a smaller job: the 1.3B
teacher, then smaller clips. A change that does not lower the memory that is too small, a GPU's or
the machine's, is left out.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from scd_sf.models.wan.transformer import WanConfig
from scd_sf.tools.plan.budget import Budget, budget
from scd_sf.tools.plan.job import PlanJob
from scd_sf.tools.stage_configs import Stage2Config, Stage3Config, VideoConfig
from scd_sf.train.base import EngineConfig

ENCODE_FIRST = "data_prep/encode_prompts.py makes ENCODED first: about 1 MB a prompt on the disk"
SMALL_TEACHER = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
NOISE = 0.01  # metered peaks vary so much from one count to the next
# frames, height, width, the largest first; sides are multiples of 16, as Wan's patches need
SMALLER_CLIPS = (
    (49, 480, 832),
    (81, 320, 576),
    (33, 480, 832),
    (49, 320, 576),
    (33, 320, 576),
    (33, 256, 448),
    (17, 256, 448),
    (17, 192, 320),
)


@dataclass(frozen=True)
class JobChange:
    """One piece of advice. ``overrides``: as the recipe takes them. ``job``: the changed job.
    ``note``: what else is to do, or what it changes of the result."""

    overrides: tuple[str, ...]
    job: PlanJob
    note: str = ""
    new_activations: bool = True

    @property
    def text(self) -> str:
        """Overrides and note, for people."""
        return shlex.join(self.overrides) + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Advice:
    """A change, and the budget with it and all changes before it."""

    change: JobChange
    plan: Budget


# a change of a job; None where the job has it already
Maker = Callable[[PlanJob], JobChange | None]


def advice(plan: Budget) -> list[Advice]:
    """Changes that make a plan fit, in their order. Empty when it fits already; the last one does
    not fit where nothing is enough. None raises the memory of a GPU, but for offload that is taken
    back where the machine has too little and the GPU enough."""
    steps: list[Advice] = []
    for maker in (*_same_training(plan.job), _small_teacher):
        current = steps[-1].plan if steps else plan
        if current.fits:
            return steps
        change = maker(current.job)
        if change is not None and _helps(change, changed := _counted(current, change), current):
            steps.append(Advice(change, changed))
    current = steps[-1].plan if steps else plan
    return steps if current.gpu_fits else [*steps, *_smaller_clips(current)]


def command_line(steps: Sequence[Advice]) -> str:
    """All overrides of the advice as one line to copy."""
    return shlex.join(word for step in steps for word in step.change.overrides)


def _helps(change: JobChange, new: Budget, old: Budget) -> bool:
    """Whether what is too small is needed less: a GPU's memory, and where that is enough the
    machine's. Or a GPU needs no more, and the machine less work and memory. Never where the
    machine's memory is then too small (offload)."""
    if not new.host_fits and new.host > old.host:
        return False
    if old.gpu_fits:
        return new.gpu_fits and new.host < old.host
    noise = NOISE if change.new_activations else 0.0
    return new.peak < (1 - noise) * old.peak or (
        new.peak < (1 + noise) * old.peak and new.host < old.host and new.flops < old.flops
    )


def _counted(current: Budget, change: JobChange) -> Budget:
    phases = None if change.new_activations else current.phases
    return budget(change.job, current.cluster, phases)


def _same_training(job: PlanJob) -> Iterator[Maker]:
    """Changes that train the same model on the same clips, the cheapest first."""
    yield partial(_setting, "checkpointing")
    yield partial(_setting, "recompute_attention")
    yield _one_clip
    yield _encoded_prompts
    names = ["engine"] if job.stage == 2 else ["teacher_engine", "critic_engine", "student_engine"]
    values: list[tuple[str, object]] = [
        ("backend", "deepspeed"),
        ("dtype", "bf16"),
        ("zero_stage", 2),
        ("zero_stage", 3),
        ("offload", True),
        ("offload", False),
    ]
    for key, value in values:
        for name in names:
            if (name, key) != ("teacher_engine", "zero_stage"):  # it is always at 3
                yield partial(_engine, name, key, value)


def _setting(name: str, job: PlanJob) -> JobChange | None:
    return None if vars(job.cfg)[name] else JobChange((f"{name}=true",), _with(job, **{name: True}))


def _one_clip(job: PlanJob) -> JobChange | None:
    if job.cfg.train.micro_batch == 1:
        return None
    return JobChange(
        ("train.micro_batch=1",), _with(job, train=replace(job.cfg.train, micro_batch=1))
    )


def _encoded_prompts(job: PlanJob) -> JobChange | None:
    if not job.text_parameters:
        return None
    encoded = replace(job, text_parameters=0)
    return JobChange(("prompts=ENCODED",), encoded, ENCODE_FIRST, new_activations=False)


def _engine(name: str, key: str, value: object, job: PlanJob) -> JobChange | None:
    """A change of one engine, with what it needs of the others: offload is DeepSpeed's, and bf16
    and offload need a partition."""
    engine: EngineConfig = vars(job.cfg)[name]
    if vars(engine)[key] == value:
        return None
    if key == "zero_stage" and (engine.backend == "torch" or engine.zero_stage == 3):
        return None
    values = {key: value}
    if key == "offload" and engine.backend == "torch":
        values["backend"] = "deepspeed"
    backend = values.get("backend", engine.backend)
    needs_parts = key == "offload" or "bf16" in (value, engine.dtype)
    if backend == "deepspeed" and needs_parts and engine.zero_stage == 0:
        values.setdefault("zero_stage", 2)
    changed: EngineConfig = replace(engine, **values)  # type: ignore[arg-type]
    words = tuple(f"{name}.{field}={str(v).lower()}" for field, v in values.items())
    # with a partition a gradient is freed as soon as it is computed
    metered = {"backend", "dtype"} & set(values) or engine.zero_stage == 0
    return JobChange(words, _with(job, **{name: changed}), new_activations=bool(metered))


def _small_teacher(job: PlanJob) -> JobChange | None:
    small = WanConfig()
    if job.stage == 2 or job.teacher.num_layers <= small.num_layers:
        return None
    smaller = _with(job, teacher=SMALL_TEACHER)
    return JobChange(
        (f"teacher={SMALL_TEACHER}",), replace(smaller, teacher=small), "a weaker teacher"
    )


def _smaller_clips(current: Budget) -> list[Advice]:
    """The largest smaller clips that fit, or the smallest of all."""
    steps: list[Advice] = []
    for size in SMALLER_CLIPS:
        change = _clips(VideoConfig(*size), current.job)
        if change is None:
            continue
        changed = _counted(current, change)
        if changed.peak < (steps[-1].plan if steps else current).peak:
            steps = [Advice(change, changed)]
        if changed.fits:
            break
    return steps


def _clips(video: VideoConfig, job: PlanJob) -> JobChange | None:
    shape, old = video.shape(job.model.wan.in_channels), job.shape
    smaller = shape != old and all(
        new <= before
        for new, before in (
            (shape.frames, old.frames),
            (shape.height, old.height),
            (shape.width, old.width),
        )
    )
    if not smaller or shape.frames % job.model.chunk:
        return None
    if isinstance(job.cfg, Stage3Config):
        words = tuple(f"video.{key}={value}" for key, value in vars(video).items())
        return JobChange(words, replace(_with(job, video=video), shape=shape), "smaller videos")
    if (job.cfg.loss.target_chunks or 0) > shape.frames // job.model.chunk:
        return None
    size = " ".join(f"{key}={value}" for key, value in vars(video).items())
    note = f"made by data_prep/generate_clips.py {size}; scd plan counts them with --clips"
    words = ("data=SMALLER/train", "val=SMALLER/val")
    return JobChange(words, replace(job, shape=shape), note)


def _with(job: PlanJob, **values: object) -> PlanJob:
    cfg: Stage2Config | Stage3Config = replace(job.cfg, **values)  # type: ignore[arg-type]
    return replace(job, cfg=cfg)
