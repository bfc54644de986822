"""P5: denoising steps after the first few bypass the middle of the model (paper Figure 3,
supplement D.1).

The schedule itself is a way to run a model (models/blocks.py). Here it is tried on a model as it
is: what it saves, how far its videos move, what it does to the flow loss at the levels it touches.
How good the videos are, before and after a fine-tune by the same schedule, says
recipes/evaluate.py, whose rows take ``blocks``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from scd_sf.evaluation.timing import Cost, time_in_rounds
from scd_sf.generation.generate import generate_latents
from scd_sf.models.blocks import BlocksConfig, SkipConfig, blocks_of, running_as
from scd_sf.models.build import Scd
from scd_sf.models.wan.transformer import Wan
from scd_sf.probes.paired import (
    NONE,
    Change,
    FlowLosses,
    LossConfig,
    changes_figure,
    increase,
    moved,
)
from scd_sf.probes.result import ProbeResult
from scd_sf.probes.subject import Subject
from scd_sf.types import UserError, check_within

PREFIX_SHARE, SUFFIX_SHARE = 6, 3  # the supplement's 5 early and 10 late of 30 blocks


@dataclass(frozen=True)
class SkipProbe:
    """Probe P5: the middle blocks run in the first denoising steps alone."""

    prefix: int | None = None
    """First blocks that always run; null: a sixth of the model, the paper's share."""
    suffix: int | None = None
    """Last blocks that always run; null: a third of the model, the paper's share."""
    whole: tuple[float, ...] = (0.02, 0.1, 0.2, 0.5)
    """Shares of the sampler's steps, from the first on, that run all blocks (the paper: 0.1)."""
    shift: float | None = None
    """Timestep shift of the steps; null: the sampler's own."""
    loss: LossConfig = field(default_factory=LossConfig)
    """How the loss is measured."""
    timing_seconds: float = 8.0
    """Each schedule is timed for up to so many seconds; 0: once."""

    def __post_init__(self) -> None:
        if not self.whole or not all(0 <= part <= 1 for part in self.whole):
            raise UserError(
                f"skip.whole is {list(self.whole)}; it must hold parts of the steps, each in [0, 1]"
            )
        check_within(
            self,
            {
                "prefix": (0, 2**12),
                "suffix": (0, 2**12),
                "shift": (1e-3, 1e3),
                "timing_seconds": (0, 1e5),
            },
            "skip.",
        )

    def check(self, subject: Subject) -> None:
        """UserError: SCD, or a prefix and suffix that leave nothing to bypass."""
        family, depth = (
            "scd" if isinstance(subject.model, Scd) else "causal",
            subject.model.cfg.num_layers,
        )
        for way in self.schedules(depth, subject.sampler.steps, subject.sampler_shift):
            BlocksConfig(skip=way).check(family, depth)

    def schedules(self, depth: int, steps: int, shift: float = 5.0) -> tuple[SkipConfig, ...]:
        """For a model of ``depth`` blocks and a sampler of ``steps`` steps; parts are rounded up to
        whole steps."""
        shift = shift if self.shift is None else self.shift
        prefix = max(1, depth // PREFIX_SHARE) if self.prefix is None else self.prefix
        suffix = max(1, depth // SUFFIX_SHARE) if self.suffix is None else self.suffix
        counts = dict.fromkeys(math.ceil(part * steps - 1e-9) for part in self.whole)
        return tuple(SkipConfig(prefix, suffix, count, steps, shift) for count in counts)


@dataclass(frozen=True)
class SkipRow:
    """One schedule; None: every block always runs. ``moved``: how far its videos lie from those of
    the whole model, same noise. ``loss``: increase at ``loss_levels``, those at which blocks are
    bypassed (without clips none). Costs are per latent frame at batch 1."""

    skip: SkipConfig | None
    moved: Change
    loss: Change | None
    loss_levels: tuple[float, ...]
    block_passes_per_frame: float = 0.0
    seconds_per_frame: float = 0.0


def skip_rows(
    subject: Subject, ways: tuple[SkipConfig, ...], losses: FlowLosses | None
) -> list[SkipRow]:
    """The model whole, then by each schedule, without costs; it is run as before afterwards.
    UserError: a schedule that the model cannot run."""
    model, as_it_is = subject.model, replace(blocks_of(subject.model), skip=None)
    with running_as(model, as_it_is):
        base_TB = None if losses is None else losses.measure(model)
        video = subject.sample()
    rows = [SkipRow(None, NONE, None if base_TB is None else NONE, ())]
    for way in ways:
        levels = losses.levels if losses else ()
        touched = [place for place, level in enumerate(levels) if level <= way.above]
        chosen, change = tuple(levels[place] for place in touched), None
        with running_as(model, replace(as_it_is, skip=way)):
            distance = moved(video, subject.sample())
            if losses is not None and base_TB is not None:
                short = replace(losses, levels=chosen)
                change = increase(base_TB[touched], short.measure(model)) if touched else NONE
        rows.append(SkipRow(way, distance, change, chosen))
    return rows


def with_costs(subject: Subject, rows: list[SkipRow], seconds: float) -> list[SkipRow]:
    """Block passes and seconds per latent frame of each, at batch 1, all timed in turn."""
    model, as_it_is = subject.model, blocks_of(subject.model)
    assert not isinstance(model, Scd)
    block, per_pass = type(model.trunk.blocks[0]), subject.chunk
    costs = [
        Cost(_one_clip(subject, replace(as_it_is, skip=row.skip)), model, block, per_pass)
        for row in rows
    ]
    time_in_rounds(costs, 5, seconds)
    return [
        replace(
            row,
            block_passes_per_frame=cost.passes,
            seconds_per_frame=cost.seconds_per_frame,
        )
        for row, cost in zip(rows, costs, strict=True)
    ]


def _one_clip(subject: Subject, blocks: BlocksConfig) -> Callable[[], Iterator[Tensor]]:
    """Makes the first prompt's video, run so, in the parts it comes in."""
    one = replace(subject, cond=subject.cond.rows(slice(0, 1)), seeds=subject.seeds[:1])

    def stream() -> Iterator[Tensor]:
        model = one.model
        with running_as(model, blocks), torch.no_grad():
            if isinstance(model, Wan):
                yield one.sample()
                return
            yield from generate_latents(
                model, one.cond.to(one.device), one.seeds, one.shape.latent(1)[1:], one.sampler
            )

    return stream


def skip_layer(subject: Subject, cfg: SkipProbe) -> ProbeResult:
    """The schedule with different numbers of whole steps. The flow loss is taken where the subject
    has clips. UserError: SCD, or a prefix and suffix that leave nothing to bypass."""
    depth, steps = subject.model.cfg.num_layers, subject.sampler.steps
    cfg.check(subject)
    ways = cfg.schedules(depth, steps, subject.sampler_shift)
    losses = None if subject.clips is None else FlowLosses.of(subject, cfg.loss)
    whole, *rows = with_costs(subject, skip_rows(subject, ways, losses), cfg.timing_seconds)
    text = (
        f"After the first steps of {steps} only the first {ways[0].prefix} and the last {ways[0].suffix} of {depth} "
        "blocks run, without any training (P5; the paper does so after 5 of 50 steps, 5 + 10 of 30, and fine-tunes). "
        f"Whole: {whole.block_passes_per_frame:.0f} block passes, {1000 * whole.seconds_per_frame:.1f} ms per frame. "
    )
    for way, row in zip(ways, rows, strict=True):
        flow = "" if row.loss is None else f", flow loss at the levels of short steps {row.loss}"
        text += (
            f"{way.full_steps} whole steps: {row.block_passes_per_frame:.0f} passes, "
            f"{1000 * row.seconds_per_frame:.1f} ms, videos moved by {str(row.moved).lstrip('+')}{flow}. "
        )
    lines = {"videos moved": [row.moved for row in rows]}
    flow_losses = [row.loss for row in rows if row.loss is not None]
    if flow_losses:
        lines["flow loss of short steps"] = flow_losses
    draw = partial(
        changes_figure,
        lines=lines,
        across=[way.full_steps for way in ways],
        x=f"whole steps of {steps}",
    )
    data: dict[str, object] = {"steps": steps, "rows": [asdict(row) for row in (whole, *rows)]}
    return ProbeResult(
        "skip_layer", "Steps that bypass the middle (P5)", text.strip(), data, {"changes": draw}
    )
