"""P5: denoising steps after the first few bypass the middle of the model (paper Figure 3,
supplement D.1).

The schedule itself is part of models/blocks.py. Here it is applied to a model without training, and
its cost, the change of the videos and the change of the flow loss at the bypassed levels are
measured. recipes/evaluate.py, whose rows take ``blocks``, measures the quality of the videos before
and after a fine-tune by the same schedule.
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
    """Seconds for which each schedule is timed at most; 0: once."""

    def __post_init__(self) -> None:
        if not self.whole or not all(0 <= share <= 1 for share in self.whole):
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
        family = "scd" if isinstance(subject.model, Scd) else "causal"
        depth = subject.model.cfg.num_layers
        for schedule in self.schedules(depth, subject.sampler.steps, subject.sampler_shift):
            BlocksConfig(skip=schedule).check(family, depth)

    def schedules(self, depth: int, steps: int, shift: float = 5.0) -> tuple[SkipConfig, ...]:
        """A schedule for each entry of ``whole``, for a model of ``depth`` blocks and a sampler of
        ``steps`` steps; shares are rounded up to whole steps, equal ones kept once."""
        shift = shift if self.shift is None else self.shift
        prefix = max(1, depth // PREFIX_SHARE) if self.prefix is None else self.prefix
        suffix = max(1, depth // SUFFIX_SHARE) if self.suffix is None else self.suffix
        counts = dict.fromkeys(math.ceil(share * steps - 1e-9) for share in self.whole)
        return tuple(SkipConfig(prefix, suffix, count, steps, shift) for count in counts)


@dataclass(frozen=True)
class SkipRow:
    """Measurements of one schedule (None: every block always runs). ``moved``: how far its videos
    lie from those of the whole model, same noise. ``loss``: increase at ``loss_levels``, those at
    which blocks are bypassed (without clips none). Costs are per latent frame at batch 1."""

    skip: SkipConfig | None
    moved: Change
    loss: Change | None
    loss_levels: tuple[float, ...]
    block_passes_per_frame: float = 0.0
    seconds_per_frame: float = 0.0


def skip_rows(
    subject: Subject, schedules: tuple[SkipConfig, ...], losses: FlowLosses | None
) -> list[SkipRow]:
    """A row for the whole model and one for each schedule, without costs; afterwards the model runs
    as before. UserError: a schedule that the model cannot run."""
    model = subject.model
    base_blocks = replace(blocks_of(model), skip=None)
    with running_as(model, base_blocks):
        base_TB = None if losses is None else losses.measure(model)
        video = subject.sample()
    rows = [SkipRow(None, NONE, None if base_TB is None else NONE, ())]
    for schedule in schedules:
        levels = losses.levels if losses else ()
        indices = [index for index, level in enumerate(levels) if level <= schedule.above]
        bypass_levels = tuple(levels[index] for index in indices)
        change: Change | None = None
        with running_as(model, replace(base_blocks, skip=schedule)):
            distance = moved(video, subject.sample())
            if losses is not None and base_TB is not None:
                bypass_losses = replace(losses, levels=bypass_levels)
                change = (
                    increase(base_TB[indices], bypass_losses.measure(model)) if indices else NONE
                )
        rows.append(SkipRow(schedule, distance, change, bypass_levels))
    return rows


def with_costs(subject: Subject, rows: list[SkipRow], seconds: float) -> list[SkipRow]:
    """The rows with block passes and seconds per latent frame at batch 1, timed in turn for up to
    ``seconds`` each."""
    model = subject.model
    own_blocks = blocks_of(model)
    assert not isinstance(model, Scd)
    block = type(model.trunk.blocks[0])
    costs = [
        Cost(_one_clip(subject, replace(own_blocks, skip=row.skip)), model, block, subject.chunk)
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
    """A function that yields the first prompt's video in chunks (1, n, C, H, W), by a model with
    these ``blocks``."""
    clip_subject = replace(subject, cond=subject.cond.rows(slice(0, 1)), seeds=subject.seeds[:1])

    def stream() -> Iterator[Tensor]:
        model = clip_subject.model
        with running_as(model, blocks), torch.no_grad():
            if isinstance(model, Wan):
                yield clip_subject.sample()
                return
            yield from generate_latents(
                model,
                clip_subject.cond.to(clip_subject.device),
                clip_subject.seeds,
                clip_subject.shape.latent(1)[1:],
                clip_subject.sampler,
            )

    return stream


def skip_layer(subject: Subject, cfg: SkipProbe) -> ProbeResult:
    """Measure the schedule with different numbers of whole steps. The flow loss is measured where
    the subject has clips. UserError: SCD, or a prefix and suffix that leave nothing to bypass."""
    depth, steps = subject.model.cfg.num_layers, subject.sampler.steps
    cfg.check(subject)
    schedules = cfg.schedules(depth, steps, subject.sampler_shift)
    losses = None if subject.clips is None else FlowLosses.of(subject, cfg.loss)
    whole_row, *rows = with_costs(
        subject, skip_rows(subject, schedules, losses), cfg.timing_seconds
    )
    text = (
        f"After the first steps of {steps} only the first {schedules[0].prefix} and the last "
        f"{schedules[0].suffix} of {depth} blocks run, without any training (P5; the paper does so "
        "after 5 of 50 steps, 5 + 10 of 30, and fine-tunes). "
        f"Whole: {whole_row.block_passes_per_frame:.0f} block passes, "
        f"{1000 * whole_row.seconds_per_frame:.1f} ms per frame. "
    )
    for schedule, row in zip(schedules, rows, strict=True):
        flow = "" if row.loss is None else f", flow loss at the levels of short steps {row.loss}"
        text += (
            f"{schedule.full_steps} whole steps: {row.block_passes_per_frame:.0f} passes, "
            f"{1000 * row.seconds_per_frame:.1f} ms, videos moved by {str(row.moved).lstrip('+')}{flow}. "
        )
    lines = {"videos moved": [row.moved for row in rows]}
    flow_losses = [row.loss for row in rows if row.loss is not None]
    if flow_losses:
        lines["flow loss of short steps"] = flow_losses
    draw = partial(
        changes_figure,
        lines=lines,
        across=[schedule.full_steps for schedule in schedules],
        x=f"whole steps of {steps}",
    )
    data: dict[str, object] = {"steps": steps, "rows": [asdict(row) for row in (whole_row, *rows)]}
    return ProbeResult(
        "skip_layer", "Steps that bypass the middle (P5)", text.strip(), data, {"changes": draw}
    )
