"""Configurations of stages 2 and 3. The recipes run them, ``scd plan`` counts their
cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from scd_sf.diffusion.samplers import few_step_times
from scd_sf.generation.preview import PreviewConfig
from scd_sf.losses.dmd import DmdConfig
from scd_sf.losses.flow_matching import FlowMatchingConfig
from scd_sf.models.blocks import BlocksConfig
from scd_sf.models.build import SamplerConfig
from scd_sf.models.wan.live_prompts import LiveTextConfig
from scd_sf.train.base import TRAINING, EngineConfig
from scd_sf.train.batches import TrainConfig
from scd_sf.train.run import RunConfig
from scd_sf.types import UserError, VideoShape, check_within


@dataclass
class Stage2Config:
    """Stage 2; the defaults are Table 6."""

    init: str
    """Checkpoint of stage 1 (or an earlier stage 2)."""
    data: str
    """Folder of encoded training clips."""
    val: str
    """Folder of encoded held-out clips."""
    run: RunConfig
    """Run directory, seed, log."""
    blocks: BlocksConfig | None = None
    """Train the student to run only these blocks, or see only these frames; its checkpoints say it.
    Null: as ``init`` says."""
    loss: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    """Flow matching."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Sampler of previews; it goes into the checkpoints."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batches, checkpoints."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(lr=2e-5, betas=(0.9, 0.99)))
    """Optimiser and precision of the student."""
    checkpointing: bool = True
    """Compute the blocks again in the backward pass: less memory, more time."""
    recompute_attention: bool = True
    """With ``checkpointing``: attention, too; false keeps its outputs."""
    validation_clips: int = 32
    """Held-out clips of the validation loss, at fixed noise."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """What is measured on the videos while training."""

    def __post_init__(self) -> None:
        check_within(self, {"validation_clips": (1, 2**20)})
        plain = FlowMatchingConfig()
        for name in ("action_dropout", "label_dropout"):
            if getattr(self.loss, name) != getattr(plain, name):
                raise UserError(f"loss.{name} is set, but clips with prompts have none: remove it")


@dataclass
class VideoConfig:
    """Size of the rollouts."""

    frames: int = 81
    """Video frames: 1 + 4 k (81 in the paper)."""
    height: int = 480
    """Pixels (480 in the paper)."""
    width: int = 832
    """Pixels (832 in the paper)."""

    def __post_init__(self) -> None:
        check_within(
            self, {"frames": (1, 10**6), "height": (1, 2**15), "width": (1, 2**15)}, "video."
        )

    def shape(self, channels: int) -> VideoShape:
        """Shape of the latents. UserError for sizes that the VAE does not make."""
        return VideoShape.from_pixels(self.frames, self.height, self.width, channels=channels)


@dataclass
class Stage3Config:
    """Stage 3, Self-Forcing; the defaults are Table 7."""

    init: str
    """Checkpoint of stage 2."""
    teacher: str
    """Wan directory of the teacher (14B in the paper), or its name on the Hugging Face hub, with or
    without @REVISION."""
    critic: str
    """Wan directory that the critic starts from (1.3B in the paper), or its name on the hub."""
    prompts: str
    """A list (txt, csv, jsonl, the folder of a filter or extender), encoded while training, or a
    folder of encoded prompts."""
    run: RunConfig
    """Run directory, seed, log."""
    text: LiveTextConfig = field(default_factory=LiveTextConfig)
    """How a list of prompts is encoded."""
    negative_prompt: str | None = None
    """What the teacher is guided away from; null: wan (Wan 2.1's own) for a list, and for a folder
    what it was encoded with."""
    video: VideoConfig = field(default_factory=VideoConfig)
    """Size of the rollouts."""
    loss: DmdConfig = field(default_factory=DmdConfig)
    """DMD: noise levels and the teacher's guidance."""
    linear_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    """Times of the student's steps before the warp (1 is noise); its checkpoints carry them."""
    step_shift: float = 5.0
    """Timestep shift that warps them."""
    ratio: int = 5
    """Critic updates per student update."""
    critic_warmup: int = 0
    """Critic updates before the first of the student."""
    critic_data: Literal["own", "student"] = "own"
    """What the critic learns from: own rollouts before the student's update, or the student's
    rollouts, detached, after it."""
    reuse: int = 1
    """Critic updates on one rollout (critic_data=own)."""
    data_std: float = 1.0
    """Standard deviation of real latents, the yardstick of the collapse monitor (1 for Wan's)."""
    std_range: tuple[float, float] = (0.75, 1.33)
    """Healthy: the rollouts' standard deviation over ``data_std`` lies in here."""
    healthy_within: float = 1.3
    """Healthy: the distance between critic and teacher stays within this factor of its lowest. The
    newest healthy EMA is the checkpoint's ``best``."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batches, checkpoints; steps are updates of the student."""
    student_engine: EngineConfig = field(
        default_factory=lambda: EngineConfig(lr=2e-6, betas=(0.0, 0.99))
    )
    """Optimiser and precision of the student."""
    critic_engine: EngineConfig = field(
        default_factory=lambda: EngineConfig(lr=4e-7, betas=(0.0, 0.99))
    )
    """Optimiser and precision of the critic."""
    teacher_engine: EngineConfig = field(default_factory=EngineConfig)
    """Where the frozen teacher lies, and its precision."""
    checkpointing: bool = True
    """Compute the blocks of student and critic again in the backward pass: less memory, more
    time."""
    recompute_attention: bool = True
    """With ``checkpointing``: attention, too; false keeps its outputs."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """What is measured on the videos while training."""

    def __post_init__(self) -> None:
        if min(self.ratio, self.reuse) < 1 or self.critic_warmup < 0:
            raise UserError(
                f"ratio {self.ratio} and reuse {self.reuse} must be >= 1, critic_warmup >= 0"
            )
        check_within(
            self, {"data_std": (1e-6, 1e6), "healthy_within": (1, 1e6), "step_shift": (1e-3, 1e3)}
        )
        if self.reuse > 1 and self.critic_data == "student" and not self.critic_warmup:
            raise UserError(
                f"reuse is {self.reuse}, but critic_data=student has its own rollouts: leave it out"
            )
        plain = EngineConfig()
        for name in TRAINING:
            if getattr(self.teacher_engine, name) != getattr(plain, name):
                raise UserError(
                    f"teacher_engine.{name} is set, but the teacher is not trained: remove it"
                )
        self.sampler.build()

    @property
    def sampler(self) -> SamplerConfig:
        """Sampler that the student is distilled for."""
        times = few_step_times(self.step_shift, self.linear_times)
        return SamplerConfig("renoise", len(times), self.step_shift, times)
