"""Validation videos: a few prompts sampled with the current weights, decoded, written and measured
while training goes on. The measures need no network but CLIP's, where its weights are configured
(data/clip_statistics.py)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.data.clip_statistics import ClipScorer, statistics
from scd_sf.diffusion.samplers import Sampler
from scd_sf.generation.generate import NotFinite, as_uint8, clips_of, generate
from scd_sf.models.build import Student
from scd_sf.models.wan.hub import wan_folder
from scd_sf.models.wan.vae import ORIGINAL, load_vae
from scd_sf.types import Conditioning, Logs, UserError, VideoShape

log = logging.getLogger(__name__)


@dataclass
class PreviewConfig:
    """What is measured on the videos of a training."""

    clip_model: str = "ViT-B-32"
    """Name of the open_clip model."""
    clip_weights: str = ""
    """Its local checkpoint; empty: no CLIP similarity is logged."""

    def __post_init__(self) -> None:
        if self.clip_weights and not Path(self.clip_weights).is_file():
            raise UserError(
                f"preview.clip_weights {self.clip_weights}: no such file; give a checkpoint or leave it empty"
            )


class Preview:
    """The prompts of ``cond``, the i-th with seed i, side by side in ``folder/<step>.mp4``.

    ``base`` is the model directory whose VAE decodes. When it is not on this machine, that is said
    once and no videos are made: training does not depend on it. ``texts``: the same prompts in
    words, for CLIP as ``cfg`` says. Every rank builds one, so that all refuse what is wrong; rank 0
    uses it.
    """

    def __init__(
        self,
        base: str,
        cond: Conditioning,
        shape: VideoShape,
        sampler: Sampler,
        folder: Path,
        fps: int = 16,
        *,
        texts: Sequence[str] = (),
        cfg: PreviewConfig | None = None,
    ) -> None:
        self.cond = cond
        self.shape = shape
        self.sampler = sampler
        self.folder = folder
        self.fps = fps
        self.texts = list(texts)
        self.clip = (
            ClipScorer(cfg.clip_model, cfg.clip_weights)
            if cfg is not None and cfg.clip_weights
            else None
        )
        vae_folder = _folder_with_vae(base)
        self.vae = None if vae_folder is None else load_vae(vae_folder)
        if vae_folder is None:
            log.warning("no VAE at '%s': training goes on without validation videos", base)

    def sample(
        self, model: Student, rows: Sequence[int], device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """uint8 videos (B, F, 3, H, W) of all prompts, where only ``rows`` are sampled and decoded:
        the rest is 0; and which (B,) were made, as uint8.

        Samples that are not finite are said, stay black and are not measured: a diverging training
        ends by its own rules."""
        assert self.vae is not None, "no VAE: check preview.vae first"
        shape = self.shape
        videos = torch.zeros(
            self.cond.batch,
            shape.pixel_frames,
            3,
            shape.pixel_height,
            shape.pixel_width,
            dtype=torch.uint8,
        )
        finite = torch.zeros(self.cond.batch, dtype=torch.uint8)
        if len(rows) == 0:
            return videos, finite
        cond = Conditioning(self.cond.text_BLE[list(rows)]).to(device)
        self.vae.model.to(device=device)
        try:
            pixels = clips_of(generate(model, self.vae, cond, list(rows), shape, self.sampler))
            videos[list(rows)], finite[list(rows)] = as_uint8(pixels).cpu(), 1
        except NotFinite as error:
            log.warning("validation videos %s are black: %s", list(rows), error)
        self.vae.model.to(device="cpu")
        return videos, finite

    def write(self, videos: Tensor, step: int) -> tuple[Tensor, Path]:
        """Write the videos (B, F, 3, H, W) side by side to one file. Returns its uint8 frames (F,
        H, B*W, 3) and its path."""
        from scd_sf.data.clips import write_video  # PyAV: not needed where no video is made

        frames = torch.cat(list(videos), dim=-1)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{step:08d}.mp4"
        write_video(file, frames, self.fps)
        return frames.permute(0, 2, 3, 1), file

    @torch.no_grad()
    def true_statistics(self, latents_BFCHW: Tensor, device: torch.device | str = "cpu") -> Logs:
        """:func:`statistics` of true clips, decoded as the samples are: what a preview of their
        prompts should come near to. Empty without a VAE."""
        if self.vae is None:
            return {}
        self.vae.model.to(device=device)
        videos = [
            as_uint8((self.vae.decode(clip.to(device)) + 1) / 2).cpu()
            for clip in latents_BFCHW.split(1)
        ]
        self.vae.model.to(device="cpu")
        return statistics(torch.cat(videos))

    def measure(self, videos: Tensor, finite: Tensor) -> Logs:
        """Motion, flicker and saturation of the uint8 videos (B, F, 3, H, W) that are ``finite``
        (B,), and CLIP's similarity to the prompts; ``quick/not_finite``: how many were not, where
        one was not."""
        rows = finite.nonzero().flatten().tolist()
        logs: Logs = (
            {} if len(rows) == len(finite) else {"quick/not_finite": float(len(finite) - len(rows))}
        )
        if not rows:
            return logs
        logs |= statistics(videos[rows])
        if self.clip is not None:
            logs["quick/clip"] = float(
                self.clip.similarity(videos[rows], [self.texts[row] for row in rows]).mean()
            )
        return logs


def _folder_with_vae(base: str) -> Path | None:
    """The model directory, if it is on this machine or comes from the hub, and has a VAE."""
    if not base:
        return None
    try:
        folder = wan_folder(base, ("vae",))
    except UserError as error:
        log.warning("%s", error)
        return None
    found = any((folder / name).is_file() for name in ("vae/config.json", ORIGINAL))
    return folder if found else None
