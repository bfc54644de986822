"""P6: whether the last blocks need other frames (paper 4.2).

The last n blocks of the causal baseline are made frame-diagonal (models/blocks.py) without any
training, and the change of the flow loss and of the videos is measured. To see whether a short
fine-tune restores the quality, as in the paper, run stage 2 with ``blocks: {frame_diagonal: n}``
and recipes/evaluate.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial

from scd_sf.models.blocks import blocks_of, running_as
from scd_sf.models.causal import Causal
from scd_sf.probes.paired import (
    Change,
    FlowLosses,
    LossConfig,
    changes_figure,
    increase,
    increases,
    moved,
)
from scd_sf.probes.result import ProbeResult
from scd_sf.probes.subject import Subject
from scd_sf.types import UserError

PAPER_SHARE = 6  # its last 5 of 30 blocks


@dataclass(frozen=True)
class DiagonalProbe:
    """Probe P6: the last blocks see their own frame alone."""

    counts: tuple[int, ...] = ()
    """Numbers of last blocks, one row each; empty: a sixth of the model (the paper's share), and up
    to all."""
    loss: LossConfig = field(default_factory=LossConfig)
    """How the loss is measured."""

    def check(self, subject: Subject) -> None:
        """UserError: more blocks than there are, or not the causal baseline."""
        model = subject.model
        if not isinstance(model, Causal):
            raise UserError(
                f"{subject.name}: frame-diagonal blocks are for the causal baseline; give a checkpoint of it"
            )
        for count in self.chosen(subject):
            replace(blocks_of(model), frame_diagonal=count).check("causal", model.cfg.num_layers)

    def chosen(self, subject: Subject) -> tuple[int, ...]:
        """How many last blocks, one row each."""
        depth = subject.model.cfg.num_layers
        share = max(1, depth // PAPER_SHARE)
        return self.counts or tuple(dict.fromkeys((1, share, 2 * share, depth // 2, depth)))


@dataclass(frozen=True)
class DiagonalRow:
    """The last ``blocks`` blocks see their own chunk alone. ``loss``: relative increase over all
    levels, and at each (without clips none); ``moved``: how far the videos lie from those without
    such blocks, same noise; ``cache``: the remaining share of the K/V cache."""

    blocks: int
    loss: Change | None
    loss_by_level: tuple[Change, ...]
    moved: Change
    cache: float


def diagonal_rows(
    subject: Subject, counts: tuple[int, ...], losses: FlowLosses | None
) -> list[DiagonalRow]:
    """A row for each of ``counts``; afterwards the model runs as before. UserError: as
    :class:`DiagonalProbe`."""
    DiagonalProbe(counts).check(subject)
    model = subject.model
    depth = model.cfg.num_layers
    base_blocks = replace(blocks_of(model), frame_diagonal=0)
    variants = [replace(base_blocks, frame_diagonal=count) for count in counts]
    with running_as(model, base_blocks):
        base_TB = None if losses is None else losses.measure(model)
        video = subject.sample()
    rows = []
    for variant in variants:
        overall: Change | None = None
        by_level: tuple[Change, ...] = ()
        with running_as(model, variant):
            distance = moved(video, subject.sample())
            if losses is not None and base_TB is not None:
                changed_TB = losses.measure(model)
                overall, by_level = increase(base_TB, changed_TB), increases(base_TB, changed_TB)
        rows.append(
            DiagonalRow(
                variant.frame_diagonal,
                overall,
                by_level,
                distance,
                (depth - variant.frame_diagonal) / depth,
            )
        )
    return rows


def frame_diagonal(subject: Subject, cfg: DiagonalProbe) -> ProbeResult:
    """Measure the model with each number of last blocks without context. The flow loss is measured
    where the subject has clips. UserError: as :meth:`DiagonalProbe.check`."""
    cfg.check(subject)
    depth, counts = subject.model.cfg.num_layers, cfg.chosen(subject)
    losses = None if subject.clips is None else FlowLosses.of(subject, cfg.loss)
    rows = diagonal_rows(subject, counts, losses)
    text = (
        f"The last blocks of {depth} see their own chunk alone, without any training (P6; the paper does it to the "
        "last 5 of 30 and finds the baseline's quality again after a fine-tune). "
    )
    for row in rows:
        flow = "" if row.loss is None else f"flow loss {row.loss}, "
        distance = str(row.moved).lstrip("+")
        text += f"Last {row.blocks}: {flow}videos moved by {distance}, {100 * row.cache:.0f} % of the cache left. "
    lines = {"videos moved": [row.moved for row in rows]}
    flow_losses = [row.loss for row in rows if row.loss is not None]
    if flow_losses:
        lines["flow loss"] = flow_losses
    draw = partial(
        changes_figure, lines=lines, across=counts, x="last blocks that see their own chunk alone"
    )
    data: dict[str, object] = {
        "levels": list(losses.levels) if losses else [],
        "clips": len(losses.x_0) if losses else 0,
        "rows": [asdict(row) for row in rows],
    }
    return ProbeResult(
        "frame_diagonal", "Last blocks without context (P6)", text.strip(), data, {"changes": draw}
    )
