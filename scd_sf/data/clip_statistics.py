"""A quick score without VBench's weights, for use during training: motion, flicker, saturation, and
CLIP similarity.

Videos are uint8 tensors (V, F, 3, H, W), RGB. No figure here is VBench's but
:func:`temporal_flickering`; they show where a training goes (a collapse: motion falls to 0;
over-saturation under guidance), not how good a video is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scd_sf.files import foreign, refuse_lfs_pointer
from scd_sf.tensor_files import check_finite
from scd_sf.types import Logs, UserError, on_device

CLIP_STATISTICS = "clip_statistics"  # in a checkpoint's provenance: ranges over true clips
_LUMA = (0.299, 0.587, 0.114)


def _check(videos: Tensor, frames: int) -> None:
    if (
        videos.ndim != 5
        or videos.shape[2] != 3
        or videos.dtype != torch.uint8
        or not videos.numel()
    ):
        raise UserError(
            f"quick score: videos are {videos.dtype} {tuple(videos.shape)}, not uint8 (V, F, 3, H, W)"
        )
    if videos.shape[1] < frames:
        raise UserError(
            f"quick score: videos of {videos.shape[1]} frames; at least {frames} are needed"
        )


def temporal_flickering(videos: Tensor) -> Tensor:
    """(V,) float64 in 0..1: VBench's dimension, ``(255 - mean |x[f+1] - x[f]|) / 255``; 1 for a
    still picture.

    Each pair's mean is taken in float32 and their mean in float32, as OpenCV and NumPy do it there.
    """
    _check(videos, 2)
    scores = []
    for video in videos:
        means = torch.stack([(b.float() - a.float()).abs().mean() for a, b in pairwise(video)])
        scores.append((255.0 - float(means.mean())) / 255.0)
    return torch.tensor(scores, dtype=torch.float64)


def motion(videos: Tensor) -> Tensor:
    """(V,): mean absolute difference of neighbouring frames, 0..1 (0 for a still picture). It
    is 1 - temporal flickering."""
    return 1.0 - temporal_flickering(videos)


def flicker(videos: Tensor) -> Tensor:
    """(V,) float64: how unsteady the brightness is, mean ``|m[f-1] - 2 m[f] + m[f+1]|`` of each
    frame's mean luma m in 0..1. A fade gives 0, brightness that jumps up and down gives much;
    motion alone gives little."""
    _check(videos, 3)
    luma = torch.tensor(_LUMA, dtype=torch.float64)
    means = (videos.to(torch.float64).mean(dim=(3, 4)) / 255.0) @ luma
    return (means[:, :-2] - 2 * means[:, 1:-1] + means[:, 2:]).abs().mean(1)


def saturation(videos: Tensor) -> Tensor:
    """(V,): mean HSV saturation ``(max - min) / max`` over pixels and frames, 0..1; black counts as
    0."""
    _check(videos, 1)
    high, low = videos.amax(2).float(), videos.amin(2).float()
    return ((high - low) / high.clamp(min=1.0)).mean(dim=(1, 2, 3)).double()


def statistics(videos: Tensor) -> Logs:
    """The means over videos; flicker only from 3 frames on."""
    means = {"quick/saturation": float(saturation(videos).mean())}
    if videos.shape[1] >= 2:
        means["quick/motion"] = float(motion(videos).mean())
    if videos.shape[1] >= 3:
        means["quick/flicker"] = float(flicker(videos).mean())
    return means


class ClipScorer:
    """A CLIP of open_clip with weights from a local file; nothing is downloaded. ``name``: e.g.
    ViT-B-32 (OpenAI's weights: ViT-B-32-quickgelu). UserError names the field and the remedy."""

    def __init__(self, name: str, weights: Path | str, device: torch.device | str = "cpu") -> None:
        try:
            import open_clip
        except ImportError as error:
            raise UserError(
                "clip: open_clip_torch is not installed; pip install 'scd-sf[eval]'"
            ) from error
        config = open_clip.get_model_config(name)
        if config is None or name.startswith(("hf-hub:", "local-dir:")):
            raise UserError(
                f"clip model '{name}' is unknown to open_clip; use one of open_clip.list_models()"
            )
        if "hf_tokenizer_name" in config["text_cfg"] or "hf_model_name" in config["text_cfg"]:
            raise UserError(
                f"clip model '{name}' needs files from a hub; use one with CLIP's tokenizer, as ViT-B-32"
            )
        if not Path(weights).is_file():
            raise UserError(
                f"clip weights {weights}: no such file; give an open_clip checkpoint of {name}"
            )
        refuse_lfs_pointer(Path(weights))
        with foreign(f"clip weights {weights}: not those of {name}", "give its checkpoint"):
            model, _, _ = open_clip.create_model_and_transforms(name, pretrained=str(weights))
        for part, tensor in model.state_dict().items():
            check_finite(tensor, part, f"clip weights {weights}")
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.tokenizer, self.device = open_clip.get_tokenizer(name), device
        visual = self.model.visual
        self.size, self.mean, self.std = visual.image_size[0], visual.image_mean, visual.image_std

    @torch.no_grad()
    def similarity(self, videos: Tensor, prompts: Sequence[str], frames: int = 8) -> Tensor:
        """(V,) float64: mean cosine of a prompt with up to ``frames`` evenly spaced frames of its
        video."""
        _check(videos, 1)
        if len(prompts) != len(videos):
            raise UserError(f"clip: {len(videos)} videos but {len(prompts)} prompts; give one each")
        count = min(frames, videos.shape[1])
        indices = torch.linspace(0, videos.shape[1] - 1, count).round().long()
        text = F.normalize(
            self.model.encode_text(on_device(self.tokenizer(list(prompts)), self.device)).double(),
            dim=-1,
        )
        similarities = []
        for video, prompt in zip(videos, text, strict=True):
            image = F.normalize(
                self.model.encode_image(self.pixels(video[indices])).double(), dim=-1
            )
            similarities.append((image @ prompt).mean())
        return torch.stack(similarities).cpu()

    def pixels(self, frames: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> what the network takes: the short side resized (bicubic), the
        centre, normalised."""
        height, width = frames.shape[-2:]
        scale = self.size / min(height, width)
        size = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
        x = F.interpolate(frames.float() / 255, size=size, mode="bicubic", antialias=True).clamp(
            0, 1
        )
        top, left = (size[0] - self.size) // 2, (size[1] - self.size) // 2
        x = x[:, :, top : top + self.size, left : left + self.size]
        mean, std = (
            torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (self.mean, self.std)
        )
        return on_device((x - mean) / std, self.device)
