"""What the two training stages are configured by: the recipes run it, ``scd plan`` counts what it would cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from scd_sf.diffusion.solvers import few_step_times
from scd_sf.generation.preview import PreviewConfig
from scd_sf.losses.dmd import DmdConfig
from scd_sf.losses.flow_matching import FlowMatchingConfig
from scd_sf.models.blocks import BlocksConfig
from scd_sf.models.build import SamplerConfig
from scd_sf.models.wan.live_prompts import LiveTextConfig
from scd_sf.train.base import TRAINING, EngineConfig
from scd_sf.train.loop import TrainConfig
from scd_sf.train.run import RunConfig
from scd_sf.types import UserError, VideoShape, check_within


@dataclass
class Stage2Config:
    """Defaults are Table 6: AdamW (.9, .99), lr 2e-5, wd .01, global batch 64, EMA .99, shift 5.

    ``blocks``: trains the student to be run so, and its checkpoints say it (null: as ``init`` says).
    ``checkpointing``: the backward pass computes every block again, with ``recompute_attention=false`` all but its
    attention.
    """

    init: str
    data: str
    val: str
    run: RunConfig
    blocks: BlocksConfig | None = None
    loss: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(lr=2e-5, betas=(0.9, 0.99)))
    checkpointing: bool = True
    recompute_attention: bool = True
    validation_clips: int = 32
    preview: PreviewConfig = field(default_factory=PreviewConfig)

    def __post_init__(self) -> None:
        check_within(self, {"validation_clips": (1, 2**20)})
        plain = FlowMatchingConfig()
        for name in ("action_dropout", "label_dropout"):
            if getattr(self.loss, name) != getattr(plain, name):
                raise UserError(f"loss.{name} is set, but clips with prompts have none: remove it")


@dataclass
class VideoConfig:
    """What is rolled out: 81 frames of 480x832 in the paper."""

    frames: int = 81
    height: int = 480
    width: int = 832

    def __post_init__(self) -> None:
        check_within(self, {"frames": (1, 10**6), "height": (1, 2**15), "width": (1, 2**15)}, "video.")

    def shape(self, channels: int) -> VideoShape:
        """In latents. UserError for sizes that the VAE does not make."""
        return VideoShape.from_pixels(self.frames, self.height, self.width, channels=channels)


@dataclass
class Stage3Config:
    """Defaults are Table 7. ``prompts``: a list (txt, csv, jsonl, a filter's or an extender's folder), which is encoded
    while it trains, as ``text`` says; or a directory of encoded ones. ``negative_prompt``: what the teacher is guided
    away from; null is "wan", Wan's own, for a list, and for a directory what it was encoded with.
    ``critic_data``: "own" rollouts for the critic, before the student's update, a new one every ``reuse`` critic
    updates; or the "student"'s rollouts, detached, after its update.
    ``linear_times`` warped by ``step_shift`` are the times of the student's steps; its checkpoints carry them.
    ``loss.shift`` is the law of DMD's noise levels.
    ``data_std``: standard deviation of real latents, the yardstick of the collapse monitor (1 for Wan's latents).
    ``healthy_within``, ``std_range``: what :func:`watch` accepts; a checkpoint's ``best`` is the newest healthy EMA.
    ``checkpointing``, ``recompute_attention``: of student and critic, as in stage 2."""

    init: str
    teacher: str
    critic: str
    prompts: str
    run: RunConfig
    text: LiveTextConfig = field(default_factory=LiveTextConfig)
    negative_prompt: str | None = None
    video: VideoConfig = field(default_factory=VideoConfig)
    loss: DmdConfig = field(default_factory=DmdConfig)
    linear_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    step_shift: float = 5.0
    ratio: int = 5
    critic_warmup: int = 0
    critic_data: Literal["own", "student"] = "own"
    reuse: int = 1
    data_std: float = 1.0
    std_range: tuple[float, float] = (0.75, 1.33)
    healthy_within: float = 1.3
    train: TrainConfig = field(default_factory=TrainConfig)
    student: EngineConfig = field(default_factory=lambda: EngineConfig(lr=2e-6, betas=(0.0, 0.99)))
    critic_engine: EngineConfig = field(default_factory=lambda: EngineConfig(lr=4e-7, betas=(0.0, 0.99)))
    teacher_engine: EngineConfig = field(default_factory=EngineConfig)
    checkpointing: bool = True
    recompute_attention: bool = True
    preview: PreviewConfig = field(default_factory=PreviewConfig)

    def __post_init__(self) -> None:
        if min(self.ratio, self.reuse) < 1 or self.critic_warmup < 0:
            raise UserError(f"ratio {self.ratio} and reuse {self.reuse} must be >= 1, critic_warmup >= 0")
        check_within(self, {"data_std": (1e-6, 1e6), "healthy_within": (1, 1e6), "step_shift": (1e-3, 1e3)})
        if self.reuse > 1 and self.critic_data == "student" and not self.critic_warmup:
            raise UserError(f"reuse is {self.reuse}, but critic_data=student has its own rollouts: leave it out")
        plain = EngineConfig()
        for name in TRAINING:
            if getattr(self.teacher_engine, name) != getattr(plain, name):
                raise UserError(f"teacher_engine.{name} is set, but the teacher is not trained: remove it")
        self.sampler.build()

    @property
    def sampler(self) -> SamplerConfig:
        """What the student is distilled for."""
        times = few_step_times(self.step_shift, self.linear_times)
        return SamplerConfig("renoise", len(times), self.step_shift, times)
