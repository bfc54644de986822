"""A job to plan: a stage's configuration, and the shapes of its models and clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scd_sf.config import load_config, plain_yaml
from scd_sf.data.latents import LatentClips
from scd_sf.data.prompt_list import is_list
from scd_sf.models.build import ModelConfig, build_model, describe_checkpoint, require_wan
from scd_sf.models.scd.transplant import TransplantConfig
from scd_sf.models.wan.hub import UMT5_PARAMETERS
from scd_sf.models.wan.live_prompts import find_text_encoder
from scd_sf.models.wan.text import encoder_parameters
from scd_sf.models.wan.transformer import WAN_14B, Wan, WanConfig
from scd_sf.models.wan.weights import read_wan_config
from scd_sf.tools.plan.phases import Phase, Stage3, stage2_phases
from scd_sf.tools.stage_configs import Stage2Config, Stage3Config, VideoConfig
from scd_sf.train.base import EngineConfig
from scd_sf.types import UserError, VideoShape

SIZES = {"14B": WAN_14B, "1.3B": WanConfig()}


@dataclass(frozen=True)
class PlanJob:
    """``assumptions``: one sentence for each thing that the configuration leaves open.
    ``text_parameters``: parameters of the text encoder that every rank holds because its prompts
    are a list (0: none)."""

    cfg: Stage2Config | Stage3Config
    model: ModelConfig
    shape: VideoShape
    teacher: WanConfig = WAN_14B
    critic: WanConfig = field(default_factory=WanConfig)
    text_tokens: int = 512
    assumptions: tuple[str, ...] = ()
    text_parameters: int = 0

    @property
    def stage(self) -> int:
        return 2 if isinstance(self.cfg, Stage2Config) else 3

    @property
    def averages(self) -> int:
        """Number of EMA copies of the student. Stage 3 also keeps its best one."""
        return 1 if self.stage == 2 else 2

    def engines(self) -> dict[str, EngineConfig]:
        """Role -> engine, the student first."""
        if isinstance(self.cfg, Stage2Config):
            return {"student": self.cfg.engine}
        return {
            "student": self.cfg.student_engine,
            "critic": self.cfg.critic_engine,
            "teacher": self.cfg.teacher_engine,
        }

    def counts(self) -> dict[str, int]:
        """Role -> number of parameters."""
        with torch.device("meta"):
            modules: dict[str, torch.nn.Module] = {"student": build_model(self.model)}
            if self.stage == 3:
                modules |= {"critic": Wan(self.critic), "teacher": Wan(self.teacher)}
        return {
            role: sum(p.numel() for p in module.parameters()) for role, module in modules.items()
        }

    def model_flops(self) -> float:
        """FLOPs of one step on all processes together, without recomputation (as model FLOP
        utilisation counts them)."""
        plain: Any = dataclasses.replace(self.cfg, checkpointing=False)
        phases = dataclasses.replace(self, cfg=plain).phases()
        return self.cfg.train.global_batch * sum(phase.times * phase.flops for phase in phases)

    def phases(self) -> list[Phase]:
        """The metered parts of one step."""
        if isinstance(self.cfg, Stage2Config):
            return stage2_phases(self.cfg, self.model, self.shape, self.text_tokens)
        return Stage3(
            self.cfg, self.model, self.teacher, self.critic, self.shape, self.text_tokens
        ).phases()


def read_job(
    files: Sequence[Path],
    overrides: Sequence[str],
    student: Path | None,
    text_tokens: int,
    clips: VideoConfig | None = None,
) -> PlanJob:
    """A job from the recipe's own configuration. What that leaves open (``init=``, ``teacher=``,
    ``data=``) becomes an assumption of the job.

    Models are read where they exist; a name with 1.3B or 14B in it stands for Wan 2.1 of that size.
    ``student``: a configuration of stage 1, instead of ``init``. ``clips``: stage 2's, where ``data``
    is not here (None: the paper's). Raises UserError for what cannot
    be read.
    """
    trees = [plain_yaml(file) for file in files]
    keys = {key for tree in trees for key in tree} | {
        text.partition("=")[0].partition(".")[0] for text in overrides
    }
    schema: type[Any] = _stage(keys)
    has_run_dir = any(isinstance(run := tree.get("run"), dict) and "dir" in run for tree in trees)
    placeholders = [
        f"{f.name}=" for f in dataclasses.fields(schema) if _is_mandatory(f) and f.name not in keys
    ]
    if not has_run_dir and not any(text.startswith("run.dir=") for text in overrides):
        placeholders.append("run.dir=run")
    cfg = load_config(
        schema, list(files), [text for text in placeholders if text != "run="] + list(overrides)
    )
    assumptions: list[str] = []
    model = _student(cfg.init, student, assumptions)
    if isinstance(cfg, Stage2Config):
        model = model.with_blocks(cfg.blocks)
        shape = _clips(cfg.data, clips or VideoConfig(), model, assumptions)
        return PlanJob(cfg, model, shape, text_tokens=text_tokens, assumptions=tuple(assumptions))
    teacher = _wan(cfg.teacher, "teacher", "14B", assumptions)
    critic = _wan(cfg.critic, "critic", "1.3B", assumptions)
    shape = cfg.video.shape(model.wan.in_channels)
    text = _text_encoder(cfg, assumptions)
    return PlanJob(cfg, model, shape, teacher, critic, text_tokens, tuple(assumptions), text)


def _stage(keys: set[str]) -> type[Any]:
    names = {
        schema: {f.name for f in dataclasses.fields(schema)}
        for schema in (Stage2Config, Stage3Config)
    }
    only2 = names[Stage2Config] - names[Stage3Config]
    only3 = names[Stage3Config] - names[Stage2Config]
    if keys & only3 and not keys & only2:
        return Stage3Config
    mostly_stage2 = 2 * len(keys & names[Stage2Config]) >= len(keys)  # stage 1 has a sampler, too
    if keys & only2 and not keys & only3 and mostly_stage2:
        return Stage2Config
    raise UserError(
        "scd plan: this is neither a configuration of stage 2 nor of stage 3: give one with "
        f"{', '.join(sorted(only2)[:2])}, .. or {', '.join(sorted(only3)[:2])}, .. (recipes/configs/stage2_*, stage3_*)"
    )


def _is_mandatory(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _student(init: str, file: Path | None, assumptions: list[str]) -> ModelConfig:
    if file is not None:
        stage1 = load_config(TransplantConfig, file, ["base=", "out="])
        return ModelConfig(stage1.family, stage1.chunk, WanConfig(), stage1.scd)
    if init and Path(init).exists():
        model = describe_checkpoint(Path(init))[0].model
        require_wan(model, Path(init))
        return model
    assumptions.append(
        f"student: SCD of Wan 2.1 1.3B, 25 + 10 layers ({init + ' is not here' if init else 'no init='})"
    )
    return ModelConfig()


def _wan(path: str, role: str, default: str, assumptions: list[str]) -> WanConfig:
    if path and Path(path).exists():
        return read_wan_config(Path(path))
    size = next((size for size in SIZES if size.lower() in path.lower()), None) if path else default
    if size is None:
        raise UserError(
            f"{role}={path}: not here, and its name has neither 1.3B nor 14B in it; give a Wan directory"
        )
    assumptions.append(
        f"{role}: Wan 2.1 {size} ({path + ' is not here' if path else f'no {role}='})"
    )
    return SIZES[size]


def _text_encoder(cfg: Stage3Config, assumptions: list[str]) -> int:
    """Parameters of the text encoder that encodes the prompts during training; 0 where they are
    encoded already."""
    prompts = Path(cfg.prompts)
    if cfg.prompts and prompts.exists() and not is_list(prompts):
        return 0
    if not (cfg.prompts and prompts.exists()):
        absent = f"{cfg.prompts} is not here" if cfg.prompts else "no prompts="
        assumptions.append(f"prompts: a list, encoded while it trains ({absent})")
    sources = [
        source
        for source in (cfg.text.path, cfg.teacher, cfg.critic)
        if source and Path(source).is_dir()
    ]
    if sources:
        return encoder_parameters(find_text_encoder(cfg.text, sources))
    assumptions.append("text encoder: umT5-xxl, Wan's own (no model is here)")
    return UMT5_PARAMETERS


def _clips(data: str, size: VideoConfig, model: ModelConfig, assumptions: list[str]) -> VideoShape:
    if data and Path(data).exists():
        return LatentClips(data).shape
    shape = size.shape(model.wan.in_channels)
    text = f"{shape.pixel_frames} frames of {shape.pixel_height}x{shape.pixel_width}"
    assumptions.append(f"clips: {text} ({data + ' is not here' if data else 'no data='})")
    return shape
