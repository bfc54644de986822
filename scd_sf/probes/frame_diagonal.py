"""P6: do the last blocks need other frames? (paper 4.2; spec/scd.md 3)

The last n blocks of the causal baseline are made frame-diagonal (models/blocks.py), without any training: what the flow
loss says of it, and how far the videos move. Whether a short fine-tune brings the quality back, as in the paper, says
stage 2 with ``blocks: {frame_diagonal: n}`` and recipes/evaluate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from scd_sf.diffusion.solvers import Sampler
from scd_sf.metrics.curves import Line, curve_figure
from scd_sf.models.build import blocks_of, running_as
from scd_sf.models.causal import Causal
from scd_sf.probes.paired import Change, increase, losses_of_seeds, moved, samples
from scd_sf.types import Conditioning


@dataclass(frozen=True)
class DiagonalRow:
    """The last ``blocks`` blocks see their own chunk alone. ``loss``: relative increase over all levels, and at each;
    ``moved``: how far the videos lie from those without such blocks, relative, same noise; ``cache``: the part of the
    K/V cache that is left."""

    blocks: int
    loss: Change
    loss_by_level: tuple[Change, ...]
    moved: Change
    cache: float


def frame_diagonal(
    model: Causal,
    x_0: Tensor,
    cond: Conditioning,
    sampler: Sampler,
    counts: Sequence[int],
    levels: Sequence[float],
    seeds: Sequence[int] = (0,),
    *,
    batch: int = 8,
) -> list[DiagonalRow]:
    """A row for each number of blocks in ``counts``, on real clips ``x_0`` (B, F, C, H, W) of the prompts ``cond``.
    UserError: more blocks than there are."""
    depth, whole_way = model.cfg.num_layers, replace(blocks_of(model), frame_diagonal=0)
    ways = [replace(whole_way, frame_diagonal=count) for count in counts]
    for way in ways:
        way.check("causal", depth)
    with running_as(model, whole_way):
        base_TB = losses_of_seeds(model, x_0, cond, levels, seeds, batch)
        whole = samples(model, x_0, cond, sampler, seeds[0], batch)
    rows = []
    for way in ways:
        with running_as(model, way):
            changed_TB = losses_of_seeds(model, x_0, cond, levels, seeds, batch)
            distance = moved(whole, samples(model, x_0, cond, sampler, seeds[0], batch))
        each = tuple(increase(base_TB[i : i + 1], changed_TB[i : i + 1]) for i in range(len(levels)))
        left = (depth - way.frame_diagonal) / depth
        rows.append(DiagonalRow(way.frame_diagonal, increase(base_TB, changed_TB), each, distance, left))
    return rows


def draw(path: Path, rows: Sequence[DiagonalRow]) -> Path:
    """Against the number of frame-diagonal blocks: increase of the flow loss, and how far the videos moved."""
    counts = [row.blocks for row in rows]
    changes = {"flow loss": [row.loss for row in rows], "videos moved": [row.moved for row in rows]}
    lines: dict[str, Line] = {
        name: (counts, [100 * each.mean for each in found], [100 * each.error for each in found])
        for name, found in changes.items()
    }
    return curve_figure(path, lines, "last blocks that see their own chunk alone", "relative change, %")
