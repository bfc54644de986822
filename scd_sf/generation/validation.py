"""Validation of the averaged weights during training: loss and videos, shared over the ranks.

All ranks call these together, each with its own whole copy of the model, which is on the device
only meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.data.clip_statistics import CLIP_STATISTICS
from scd_sf.data.latents import LatentClips
from scd_sf.diffusion.noise import generator
from scd_sf.distributed import Ranks
from scd_sf.generation.preview import Preview
from scd_sf.losses.flow_matching import FlowMatchingConfig, validation_loss
from scd_sf.models.build import Student
from scd_sf.types import Logs, on_device

CLIPS = 8  # of which the range of true statistics is taken
VideoRecord = Callable[[int, str, Tensor, Path], None]


@torch.no_grad()
def validate(
    model: Student, clips: LatentClips, loss: FlowMatchingConfig, limit: int, ranks: Ranks
) -> Logs:
    """:func:`validation_loss` of ``limit`` clips at fixed noise, one at a time. The same on every
    rank."""
    indices = list(range(0, len(clips), max(1, len(clips) // limit)))[:limit]
    total = 0.0
    with _on_device(model, ranks.device):
        for index in indices[ranks.rank :: ranks.world]:
            batch, null = clips.batch([index]).to(ranks.device), clips.null.to(ranks.device)
            rng = generator(0, "validation", index)
            total += float(validation_loss(model, batch.latents_BFCHW, batch.text, null, loss, rng))
    return {"val/loss": ranks.mean({"sum": total})["sum"] * ranks.world / len(indices)}


def show_previews(
    preview: Preview, model: Student, step: int, ranks: Ranks, record: VideoRecord
) -> Logs:
    """The validation videos, each sampled and decoded by another rank; rank 0 writes and measures
    them and hands (step, "samples", uint8 frames, file) to ``record``. None where one rank has no
    VAE."""
    if ranks.any(preview.vae is None):
        return {}
    with _on_device(model, ranks.device):
        own_videos, finite = preview.sample(
            model, range(ranks.rank, preview.cond.batch, ranks.world), ranks.device
        )
    videos, finite = (
        ranks.sum(on_device(part, ranks.device)).cpu() for part in (own_videos, finite)
    )
    if not ranks.is_main:
        return {}
    record(step, "samples", *preview.write(videos, step))
    return preview.measure(videos, finite)


def statistics_range(preview: Preview, clips: LatentClips, ranks: Ranks) -> dict[str, object]:
    """For a checkpoint's provenance: ``clip_statistics``, least and largest of each statistic of the
    previews, over single true clips spread over ``clips``. Empty on other ranks than the main one,
    and without a VAE."""
    if not ranks.is_main or preview.vae is None:
        return {}
    indices = range(0, len(clips), max(1, len(clips) // CLIPS))[:CLIPS]
    logs = [
        preview.true_statistics(clips.batch([index]).latents_BFCHW, ranks.device)
        for index in indices
    ]
    ranges = {
        name: (min(row[name] for row in logs), max(row[name] for row in logs)) for name in logs[0]
    }
    return {CLIP_STATISTICS: ranges}


@contextmanager
def _on_device(model: Student, device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")
        torch.cuda.empty_cache()
