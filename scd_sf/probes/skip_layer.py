"""P5: denoising steps after the first few bypass the middle of the model (paper Figure 3, supplement D.1).

The schedule itself is a way to run a model (models/blocks.py). Here it is tried on a model as it is: what it saves, how
far its videos move, what it does to the flow loss at the levels it touches. How good the videos are, before and after
a fine-tune by the same schedule, says recipes/evaluate.py, whose rows take ``blocks``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.diffusion.solvers import Sampler
from scd_sf.metrics.curves import Line, curve_figure
from scd_sf.metrics.protocols import Cost, time_in_rounds
from scd_sf.models.blocks import BlocksConfig, SkipConfig
from scd_sf.models.build import blocks_of, running_as
from scd_sf.models.causal import Causal
from scd_sf.models.wan import Wan
from scd_sf.probes.paired import Change, increase, losses_of_seeds, moved, samples
from scd_sf.rollout import row_noise, sample_bidirectional, stream_rollout
from scd_sf.types import Conditioning


@dataclass(frozen=True)
class SkipRow:
    """One schedule; None: every block always runs. ``moved``: how far its videos lie from those of the whole model,
    relative, same noise. ``loss``: increase at ``loss_levels``, those at which blocks are bypassed. Costs are per
    latent frame at batch 1."""

    skip: SkipConfig | None
    moved: Change
    loss: Change
    loss_levels: tuple[float, ...]
    block_passes_per_frame: float
    seconds_per_frame: float


def schedules(skip: SkipConfig, full_steps: Sequence[int]) -> tuple[SkipConfig, ...]:
    """The same prefix and suffix, with so many whole steps."""
    return tuple(replace(skip, full_steps=count) for count in full_steps)


def skip_layer(
    model: Causal | Wan,
    x_0: Tensor,
    cond: Conditioning,
    sampler: Sampler,
    ways: Sequence[SkipConfig],
    levels: Sequence[float],
    seeds: Sequence[int] = (0,),
    *,
    batch: int = 8,
    timing_seconds: float = 8.0,
) -> list[SkipRow]:
    """The model whole, then by each schedule. ``x_0`` (B, F, C, H, W) are real clips of the prompts ``cond``: their
    flow loss is taken, and videos of their number and shape are made. All are timed in turn, each for up to
    ``timing_seconds``. UserError: a schedule that does not fit the model's depth.
    """
    as_it_is = replace(blocks_of(model), skip=None)
    with running_as(model, as_it_is):
        base_TB = losses_of_seeds(model, x_0, cond, levels, seeds, batch)
        whole = samples(model, x_0, cond, sampler, seeds[0], batch)
    found: list[tuple[SkipConfig | None, Change, Change, tuple[float, ...]]] = []
    found.append((None, Change(0.0, 0.0), Change(0.0, 0.0), ()))
    for way in ways:
        touched = [place for place, level in enumerate(levels) if level <= way.above]
        chosen = tuple(levels[place] for place in touched)
        with running_as(model, replace(as_it_is, skip=way)):
            distance = moved(whole, samples(model, x_0, cond, sampler, seeds[0], batch))
            loss = Change(0.0, 0.0)
            if touched:
                loss = increase(base_TB[touched], losses_of_seeds(model, x_0, cond, chosen, seeds, batch))
        found.append((way, distance, loss, chosen))
    block, frames_per_pass = type(model.trunk.blocks[0]), x_0.shape[1] if isinstance(model, Wan) else model.chunk
    costs = [
        Cost(_one_clip(model, x_0, cond, sampler, replace(as_it_is, skip=way)), model, block, frames_per_pass)
        for way, *_ in found
    ]
    time_in_rounds(costs, 5, timing_seconds)
    seconds = [statistics.median(run.seconds_per_frame for run in cost.runs) for cost in costs]
    return [SkipRow(*row, cost.passes, second) for row, cost, second in zip(found, costs, seconds, strict=True)]


def draw(path: Path, rows: Sequence[SkipRow]) -> Path:
    """Block passes per frame against how far the videos moved and what the flow loss says, one point per schedule."""
    short = [row for row in rows if row.skip is not None]
    passes = [row.block_passes_per_frame for row in short]
    changes = {"videos moved": [row.moved for row in short], "flow loss of short steps": [row.loss for row in short]}
    lines: dict[str, Line] = {
        name: (passes, [100 * each.mean for each in found], [100 * each.error for each in found])
        for name, found in changes.items()
    }
    return curve_figure(path, lines, "block passes per latent frame", "relative change, %")


def _one_clip(
    model: Causal | Wan, x_0: Tensor, cond: Conditioning, sampler: Sampler, blocks: BlocksConfig
) -> Callable[[], Iterator[Tensor]]:
    """Generates the first prompt's clip, run so, in the parts it comes in."""
    device = next(model.parameters()).device
    told, (frames, channels, height, width) = cond.rows(slice(0, 1)).to(device), x_0.shape[1:]

    def stream() -> Iterator[Tensor]:
        with running_as(model, blocks), torch.no_grad():
            if isinstance(model, Wan):
                yield sample_bidirectional(model, told, (frames, channels, height, width), sampler, [0], device)
                return
            noise_like = row_noise([0])
            noise = noise_like(torch.empty(1, frames, channels, height, width, device=device))
            yield from stream_rollout(model, noise, told, sampler, noise_like)

    return stream
