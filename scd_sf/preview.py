"""Validation videos: a few prompts sampled with the current weights, decoded and written while training goes on."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.data.clips import write_video
from scd_sf.diffusion.solvers import Sampler
from scd_sf.models.generator import FrameGenerator
from scd_sf.models.vae import ORIGINAL, load_vae
from scd_sf.rollout import sample
from scd_sf.types import Conditioning, VideoShape

log = logging.getLogger(__name__)


class Preview:
    """The prompts of ``cond``, always with the same seeds, side by side in ``folder/<step>.mp4``.

    ``base`` is the model directory whose VAE decodes. When it is not on this machine, that is said once and no videos
    are made: training does not depend on it.
    """

    def __init__(
        self, base: str, cond: Conditioning, shape: VideoShape, sampler: Sampler, folder: Path, fps: int = 16
    ) -> None:
        self.cond, self.shape, self.sampler, self.folder, self.fps = cond, shape, sampler, folder, fps
        found = bool(base) and any((Path(base) / name).is_file() for name in ("vae/config.json", ORIGINAL))
        self.vae = load_vae(base) if found else None
        if not found:
            log.warning("no VAE at '%s': training goes on without validation videos", base)

    def write(self, model: FrameGenerator, step: int) -> Tensor | None:
        """Sample, decode and write one video; returns its uint8 frames (F, H, B*W, 3), None without a VAE."""
        if self.vae is None:
            return None
        seeds = list(range(self.cond.batch))
        latents = sample(model, self.cond, self.shape.latent(1)[1:], self.sampler, seeds)
        pixels = ((self.vae.decode(latents).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        frames = torch.cat(list(pixels), dim=-1)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_video(self.folder / f"{step:08d}.mp4", frames, self.fps)
        return frames.permute(0, 2, 3, 1)
