"""What is to be planned: a stage's configuration, and the shapes of its models and clips."""

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
from scd_sf.models.wan.live_prompts import find_text_encoder
from scd_sf.models.wan.text import encoder_parameters
from scd_sf.models.wan.transformer import WAN_14B, Wan, WanConfig
from scd_sf.models.wan.umt5 import UMT5_PARAMETERS
from scd_sf.models.wan.weights import read_wan_config
from scd_sf.tools.plan.phases import Phase, Stage3, stage2_phases
from scd_sf.tools.stages import Stage2Config, Stage3Config, VideoConfig
from scd_sf.train.base import EngineConfig
from scd_sf.types import UserError, VideoShape

SIZES = {"14B": WAN_14B, "1.3B": WanConfig()}


@dataclass(frozen=True)
class PlanJob:
    """``assumed``: what was not given and is taken for granted, in words. ``text_parameters``: of
    the text encoder that every rank holds because its prompts are a list (0: none)."""

    cfg: Stage2Config | Stage3Config
    model: ModelConfig
    shape: VideoShape
    teacher: WanConfig = WAN_14B
    critic: WanConfig = field(default_factory=WanConfig)
    text_tokens: int = 512
    assumed: tuple[str, ...] = ()
    text_parameters: int = 0

    @property
    def stage(self) -> int:
        return 2 if isinstance(self.cfg, Stage2Config) else 3

    @property
    def averages(self) -> int:
        """EMA copies of the student: stage 3 also keeps its best one."""
        return 1 if self.stage == 2 else 2

    def engines(self) -> dict[str, EngineConfig]:
        """By role; the student first."""
        if isinstance(self.cfg, Stage2Config):
            return {"student": self.cfg.engine}
        return {
            "student": self.cfg.student_engine,
            "critic": self.cfg.critic_engine,
            "teacher": self.cfg.teacher_engine,
        }

    def counts(self) -> dict[str, int]:
        """Parameters by role."""
        with torch.device("meta"):
            modules: dict[str, torch.nn.Module] = {"student": build_model(self.model)}
            if self.stage == 3:
                modules |= {"critic": Wan(self.critic), "teacher": Wan(self.teacher)}
        return {
            role: sum(p.numel() for p in module.parameters()) for role, module in modules.items()
        }

    def model_flops(self) -> float:
        """FLOPs of one step on all processes together, as model FLOP utilisation counts them:
        recomputation is no work."""
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
    files: Sequence[Path], overrides: Sequence[str], student: Path | None, text_tokens: int
) -> PlanJob:
    """The recipe's own configuration; what it leaves open (``init=``, ``teacher=``, ``data=``) is
    assumed and said.

    Models are read where they exist; a name with 1.3B or 14B in it stands for Wan 2.1 of that size.
    ``student``: a configuration of stage 1, instead of ``init``. Raises UserError for what cannot
    be read.
    """
    trees = [plain_yaml(file) for file in files]
    given = {key for tree in trees for key in tree} | {
        text.partition("=")[0].partition(".")[0] for text in overrides
    }
    schema: type[Any] = _stage(given)
    run_dir = any(isinstance(run := tree.get("run"), dict) and "dir" in run for tree in trees)
    blank = [f"{f.name}=" for f in dataclasses.fields(schema) if _open(f) and f.name not in given]
    blank += (
        [] if run_dir or any(text.startswith("run.dir=") for text in overrides) else ["run.dir=run"]
    )
    cfg = load_config(
        schema, list(files), [text for text in blank if text != "run="] + list(overrides)
    )
    assumed: list[str] = []
    model = _student(cfg.init, student, assumed)
    if isinstance(cfg, Stage2Config):
        model = model.with_blocks(cfg.blocks)
        shape = _clips(cfg.data, model, assumed)
        return PlanJob(cfg, model, shape, text_tokens=text_tokens, assumed=tuple(assumed))
    teacher, critic = (
        _wan(cfg.teacher, "teacher", "14B", assumed),
        _wan(cfg.critic, "critic", "1.3B", assumed),
    )
    shape = cfg.video.shape(model.wan.in_channels)
    text = _text_encoder(cfg, assumed)
    return PlanJob(cfg, model, shape, teacher, critic, text_tokens, tuple(assumed), text)


def _stage(given: set[str]) -> type[Any]:
    names = {
        schema: {f.name for f in dataclasses.fields(schema)}
        for schema in (Stage2Config, Stage3Config)
    }
    only2, only3 = (
        names[Stage2Config] - names[Stage3Config],
        names[Stage3Config] - names[Stage2Config],
    )
    if given & only3 and not given & only2:
        return Stage3Config
    most = 2 * len(given & names[Stage2Config]) >= len(given)  # stage 1 has a sampler, too
    if given & only2 and not given & only3 and most:
        return Stage2Config
    raise UserError(
        "scd plan: this is neither a configuration of stage 2 nor of stage 3: give one with "
        f"{', '.join(sorted(only2)[:2])}, .. or {', '.join(sorted(only3)[:2])}, .. (recipes/configs/stage2_*, stage3_*)"
    )


def _open(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _student(init: str, file: Path | None, assumed: list[str]) -> ModelConfig:
    if file is not None:
        stage1 = load_config(TransplantConfig, file, ["base=", "out="])
        return ModelConfig(stage1.family, stage1.chunk, WanConfig(), stage1.scd)
    if init and Path(init).exists():
        found = describe_checkpoint(Path(init))[0].model
        require_wan(found, Path(init))
        return found
    assumed.append(
        f"student: SCD of Wan 2.1 1.3B, 25 + 10 layers ({init + ' is not here' if init else 'no init='})"
    )
    return ModelConfig()


def _wan(path: str, role: str, default: str, assumed: list[str]) -> WanConfig:
    if path and Path(path).exists():
        return read_wan_config(Path(path))
    size = next((size for size in SIZES if size.lower() in path.lower()), None) if path else default
    if size is None:
        raise UserError(
            f"{role}={path}: not here, and its name has neither 1.3B nor 14B in it; give a Wan directory"
        )
    assumed.append(f"{role}: Wan 2.1 {size} ({path + ' is not here' if path else f'no {role}='})")
    return SIZES[size]


def _text_encoder(cfg: Stage3Config, assumed: list[str]) -> int:
    """Parameters of the text encoder that encodes the prompts during training; 0 where they are
    encoded already."""
    prompts = Path(cfg.prompts)
    if cfg.prompts and prompts.exists() and not is_list(prompts):
        return 0
    if not (cfg.prompts and prompts.exists()):
        absent = f"{cfg.prompts} is not here" if cfg.prompts else "no prompts="
        assumed.append(f"prompts: a list, encoded while it trains ({absent})")
    sources = [
        source
        for source in (cfg.text.path, cfg.teacher, cfg.critic)
        if source and Path(source).is_dir()
    ]
    if sources:
        return encoder_parameters(find_text_encoder(cfg.text, sources))
    assumed.append("text encoder: umT5-xxl, Wan's own (no model is here)")
    return UMT5_PARAMETERS


def _clips(data: str, model: ModelConfig, assumed: list[str]) -> VideoShape:
    if data and Path(data).exists():
        return LatentClips(data).shape
    shape = VideoConfig().shape(model.wan.in_channels)
    text = f"{shape.pixel_frames} frames of {shape.pixel_height}x{shape.pixel_width}"
    assumed.append(f"clips: {text} ({data + ' is not here' if data else 'no data='})")
    return shape
