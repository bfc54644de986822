"""Video prediction with a model trained from scratch, which gets the first frames of a clip and
returns the next ones.

Letters: B batch, F frames, C channels, H W latent height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.data.clips import write_video
from scd_sf.data.frames import FrameClips
from scd_sf.diffusion.guidance import GuidanceConfig
from scd_sf.diffusion.samplers import Sampler
from scd_sf.generation.generate import NotFinite, as_uint8, generate_latents
from scd_sf.generation.guided import SampleGuidance
from scd_sf.models.build import CheckpointConfig, Student, load_checkpoint_model
from scd_sf.models.tokenizers.tokenizer import load_tokenizer
from scd_sf.models.wan.transformer import Wan
from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.train.run import Run
from scd_sf.types import Conditioning, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictionGuidance:
    """Guidance of the decoder, one of two; the encoder is never doubled."""

    corruption: float = 1.0
    """Guidance away from a corrupted context: the s of Table 5 (its best is 1.5); 1: off."""
    context_noise: float = 0.05
    """Noise of that corruption, relative to the context's root mean square."""
    actions: float = 1.0
    """Classifier-free guidance with the null action; 1: off."""

    def __post_init__(self) -> None:
        self.of_decoder()  # checks the numbers

    def of_decoder(self) -> SampleGuidance:
        """The same as :func:`~scd_sf.generation.generate.generate_latents` takes it."""
        return SampleGuidance(
            GuidanceConfig(self.actions), "decoder", self.corruption, self.context_noise
        )


@dataclass(frozen=True)
class PredictionConfig:
    """How a model is rolled out."""

    window: int = 0
    """Latent frames of history that it sees; 0: all."""
    sink: int = 0
    """Latent frames at the beginning that stay, too, beside the window's."""
    guidance: PredictionGuidance = field(default_factory=PredictionGuidance)
    """Guidance while predicting."""

    def __post_init__(self) -> None:
        CacheConfig.sampling(self.window, self.sink, 1)  # checks window and sink


@dataclass(frozen=True)
class PredictionPreviewConfig:
    """Videos while training, predicted from the validation set."""

    tokenizer: str = ""
    """Directory of the tokenizer that decodes; empty: no videos."""
    clips: int = 2
    """Clips that are predicted."""
    context: int = 4
    """True frames that the model sees."""
    frames: int = 12
    """Frames predicted after them."""

    def __post_init__(self) -> None:
        if min(self.clips, self.frames) < 1 or self.context < 0:
            raise UserError("preview: clips and frames must be at least 1, context at least 0")


class PredictionPreview:
    """Writes ``RUN/videos/STEP.mp4``, the true clips (as the tokenizer decodes them) above their
    predictions; clips and noise are the same at every step."""

    def __init__(self, cfg: PredictionPreviewConfig, clips: FrameClips, sampler: Sampler) -> None:
        """UserError before any training: a tokenizer of another size, or clips that are too
        short."""
        self.cfg = cfg
        self.sampler = sampler
        self.fps = clips.info.fps
        self.tokenizer = load_tokenizer(Path(cfg.tokenizer)) if cfg.tokenizer else None
        if self.tokenizer is None:
            return
        if (self.tokenizer.channels, self.tokenizer.spatial) != (
            clips.info.channels,
            clips.info.spatial,
        ):
            raise UserError(
                f"preview.tokenizer {cfg.tokenizer}: not the one that {clips.root} was encoded with"
            )
        length = cfg.context + cfg.frames
        indices = clips.at_least(length)[: cfg.clips]
        self.batch = clips.batch(indices, [0] * len(indices), length)

    def show(self, run: Run, model: Student, step: int) -> None:
        """Predict the clips and write the video, on the main rank alone, with its whole copy of the
        model. A video that is not finite is logged and left out."""
        if self.tokenizer is None or not run.ranks.is_main:
            return
        device, cfg = run.ranks.device, self.cfg
        batch, model = self.batch.to(device), model.to(device)
        context = batch.latents_BFCHW[:, : cfg.context]
        seeds = list(range(len(context)))
        try:
            future = list(predict(model, context, batch.cond, cfg.frames, self.sampler, seeds))
        except NotFinite as error:
            log.warning("no validation video of step %d: %s", step, error)
            return
        finally:
            model.to("cpu")
        prediction = torch.cat([context, *future], 1)
        pixels = [
            self.tokenizer.decode(latents.float().cpu())
            for latents in (self.batch.latents_BFCHW, prediction)
        ]
        # truth above prediction
        rows = torch.cat([torch.cat(list(video), dim=-1) for video in pixels], dim=-2)
        frames = as_uint8((rows.clamp(-1, 1) + 1) / 2)
        path = run.dir / "videos" / f"{step:08d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, frames, self.fps)
        run.video(step, "samples", frames.permute(0, 2, 3, 1), path)


def load_predictor(path: Path, weights: str = "ema") -> tuple[Student, CheckpointConfig]:
    """The model of a checkpoint of recipes/pretrain.py, and its configuration. UserError: another
    kind of model."""
    model, config = load_checkpoint_model(path, weights)
    if isinstance(model, Wan) or config.model.backbone != "dit":
        raise UserError(f"{path}: not trained from scratch on frames; sample it with 'scd sample'")
    return model, config


@torch.no_grad()
def predict(
    student: Student,
    context_BFCHW: Tensor,
    cond: Conditioning,
    frames: int,
    sampler: Sampler,
    seeds: Sequence[int],
    cfg: PredictionConfig | None = None,
) -> Iterator[Tensor]:
    """Yield the ``frames`` latents after the context (which may have none), chunk by chunk, (B, n,
    C, H, W) each.

    ``cond`` covers all frames, those of the context too. A row's result depends on its seed alone.
    UserError: too few actions, or numbers that chunks do not divide.
    """
    cfg = cfg or PredictionConfig()
    _, context_frames, *shape = context_BFCHW.shape
    if cond.actions_BF is not None and cond.actions_BF.shape[1] < context_frames + frames:
        raise UserError(
            f"actions are given for {cond.actions_BF.shape[1]} frames of {context_frames + frames}; give one per frame"
        )
    null = cond.rows(slice(0, 1))
    null = replace(
        null,
        actions_BF=None if null.actions_BF is None else torch.full_like(null.actions_BF, -1),
        labels_B=None if null.labels_B is None else torch.full_like(null.labels_B, -1),
    )
    yield from generate_latents(
        student,
        cond.to(context_BFCHW.device),
        seeds,
        (context_frames + frames, shape[0], shape[1], shape[2]),
        sampler,
        window=cfg.window,
        sink=cfg.sink,
        history=context_BFCHW if context_frames else None,
        guidance=cfg.guidance.of_decoder(),
        null=null.to(context_BFCHW.device),
    )
