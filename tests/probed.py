"""A subject with clips on disk, for the probes that need true frames."""

from __future__ import annotations

from pathlib import Path

import tiny
import tiny_run
import torch

from scd_sf.data.latents import LatentClips
from scd_sf.diffusion.samplers import build_sampler
from scd_sf.models.build import Student
from scd_sf.models.wan.transformer import Wan
from scd_sf.probes.subject import Subject
from scd_sf.types import VideoShape

SHAPE = VideoShape(3, tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)
EULER = build_sampler("euler", 4, 5.0)


def write_clips(root: Path, count: int = 6) -> LatentClips:
    """Random clips and prompts of the tiny models' sizes."""
    return LatentClips(tiny_run.write_latents(root, count, shape=SHAPE, width=tiny.TEXT))


def subject(model: Student | Wan, clips: LatentClips | None, prompts: int = 3) -> Subject:
    cond = tiny.prompts(prompts, dtype=torch.float32)
    return Subject("tiny model", model, SHAPE, cond, EULER, tuple(range(prompts)), clips)
