"""P7: the increase of the flow loss when a block is left out, and a split of the model chosen by it
(paper Figure 7, supplement E.1).

A forward hook leaves a block out by returning the block's input, the identity on the residual path;
the model is unchanged when the hook is removed. Levels come from the training density.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

from torch import Tensor, nn

from scd_sf.config import to_yaml
from scd_sf.models.build import Scd, Student
from scd_sf.models.wan.transformer import Wan
from scd_sf.probes.paired import Change, FlowLosses, LossConfig, changes_figure, increase, increases
from scd_sf.probes.result import ProbeResult
from scd_sf.probes.subject import Subject
from scd_sf.types import UserError, check_within

DECODER_SHARE = 3  # the paper's decoder has a third of the model's layers: 10 of 30


def _identity(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The block's input, cut to its last frames where the block returns these alone."""
    x_BLE = inputs[0]
    return x_BLE[:, x_BLE.shape[1] - output.shape[1] :]


@contextmanager
def left_out(block: nn.Module) -> Iterator[None]:
    """Inside, the block is the identity on the residual path; afterwards the model is unchanged,
    bit for bit."""
    handle = block.register_forward_hook(_identity)
    try:
        yield
    finally:
        handle.remove()


def named_blocks(model: Student | Wan) -> dict[str, nn.Module]:
    """The blocks in the order they run: "0", "1", ..; of SCD "encoder 0", .., "decoder 0", ..
    (positions in each)."""
    if isinstance(model, Scd):
        stacks = {"encoder ": model.encoder, "decoder ": model.decoder.trunk}
    else:
        stacks = {"": model.trunk}
    return {
        f"{stack}{i}": block
        for stack, trunk in stacks.items()
        for i, block in enumerate(trunk.blocks)
    }


@dataclass(frozen=True)
class LeaveOneOut:
    """Probe P7: the loss without each block."""

    loss: LossConfig = field(default_factory=LossConfig)
    """How the loss is measured."""
    decoder_blocks: int = 0
    """Blocks of the decoder that is proposed; 0: a third of the model, the paper's share."""

    def __post_init__(self) -> None:
        check_within(self, {"decoder_blocks": (0, 2**12)}, "leave_one_out.")

    def check(self, subject: Subject) -> None:
        """UserError: fewer than 2 clips, or too few blocks for such a decoder (not checked for SCD,
        which is split already)."""
        if not isinstance(subject.model, Scd):
            decoder_size(len(subject.step_blocks), self.decoder_blocks)
        FlowLosses.chosen(subject, self.loss)


@dataclass(frozen=True)
class BlockCost:
    """The cost of leaving one block out: relative increase of the flow loss over all levels, and at
    each."""

    block: str
    overall: Change
    by_level: tuple[Change, ...]


def block_costs(model: Student | Wan, losses: FlowLosses) -> tuple[Tensor, list[BlockCost]]:
    """The whole model's losses (T, B), and the cost of every block in the order they run, left out
    one at a time: (blocks + 1) x levels x seeds passes over the clips."""
    base_TB = losses.measure(model)
    costs: list[BlockCost] = []
    for name, block in named_blocks(model).items():
        with left_out(block):
            without_TB = losses.measure(model)
        costs.append(BlockCost(name, increase(base_TB, without_TB), increases(base_TB, without_TB)))
    return base_TB, costs


@dataclass(frozen=True)
class Split:
    """Layers for stage 1. ``held``: the share of all blocks' cost that those of the decoder
    carry."""

    encoder_layers: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    held: float

    @property
    def early(self) -> int:
        """How many of the decoder's layers are the encoder's first."""
        return sum(layer in self.encoder_layers for layer in self.decoder_layers)


def decoder_size(count: int, decoder_blocks: int = 0) -> int:
    """How many of ``count`` blocks the decoder gets (0: a third). UserError: none would remain
    for the decoder or the encoder."""
    size = decoder_blocks or max(1, round(count / DECODER_SHARE))
    if not 1 <= size < count:
        raise UserError(
            f"decoder_blocks is {size}; of {count} blocks the decoder needs 1..{count - 1}"
        )
    return size


def propose_split(costs: Sequence[Change], decoder_blocks: int = 0) -> Split:
    """Where to cut a stack whose block l costs ``costs[l]`` when it is left out.

    As in the paper the decoder is a run of the first and a run of the last blocks, the encoder all
    blocks before that last run (the first ones stand in both). Of all ways to divide
    ``decoder_blocks`` (0: a third of the stack, the paper's share) between the two runs, the last
    at least 1, this takes the one whose blocks cost most together. Candidates within one standard
    error of it count as equal, and the most even of those is taken, because otherwise noise would
    decide. UserError: no room for a decoder.
    """
    count, size = len(costs), decoder_size(len(costs), decoder_blocks)

    def decoder_blocks_of(early: int) -> frozenset[int]:
        return frozenset((*range(early), *range(count - size + early, count)))

    def cost_of(blocks: frozenset[int]) -> float:
        return sum(costs[block].mean for block in blocks)

    candidates = {early: decoder_blocks_of(early) for early in range(size)}
    best = max(candidates.values(), key=cost_of)

    def is_equal(blocks: frozenset[int]) -> bool:
        error = math.hypot(*(costs[block].error for block in blocks ^ best))
        return cost_of(best) - cost_of(blocks) <= error

    early = min(
        (first_count for first_count in candidates if is_equal(candidates[first_count])),
        key=lambda first_count: (abs(size - 2 * first_count), -cost_of(candidates[first_count])),
    )
    total = sum(max(cost.mean, 0.0) for cost in costs)
    decoder_cost = sum(max(costs[block].mean, 0.0) for block in candidates[early])
    share = decoder_cost / total if total > 0 else 0.0
    encoder = tuple(range(count - size + early))
    return Split(encoder, (*range(early), *range(count - size + early, count)), share)


@dataclass(frozen=True)
class _DecoderPart:
    layers: tuple[int, ...]


@dataclass(frozen=True)
class _ScdPart:
    encoder_layers: tuple[int, ...]
    decoder: _DecoderPart


@dataclass(frozen=True)
class _Stage1Part:
    family: str
    scd: _ScdPart


def stage1_yaml(split: Split, model: str) -> str:
    """A configuration for ``recipes/stage1_transplant.py --config``; ``model``: name of the
    probed model, for the comment."""
    config = _Stage1Part("scd", _ScdPart(split.encoder_layers, _DecoderPart(split.decoder_layers)))
    head = (
        f"# Proposed by leaving single blocks out (probe P7) of {' '.join(model.split())}: the decoder's layers carry "
        f"{100 * split.held:.0f} %\n# of what all blocks together cost.\n"
    )
    return head + to_yaml(config)


def leave_one_out(subject: Subject, cfg: LeaveOneOut) -> ProbeResult:
    """Every block's cost, and (but for SCD, which is split already) a split, as a configuration of
    stage 1 in ``leave_one_out-stage1.yaml``. UserError: no clips, or no room for such a decoder."""
    cfg.check(subject)
    whole_stack = not isinstance(subject.model, Scd)
    losses = FlowLosses.of(subject, cfg.loss)
    base_TB, costs = block_costs(subject.model, losses)
    by_cost = sorted(costs, key=lambda cost: -cost.overall.mean)
    dearest = ", ".join(f"block {cost.block} {cost.overall}" for cost in by_cost[:4])
    cheapest = ", ".join(f"block {cost.block} {cost.overall}" for cost in by_cost[-2:])
    levels = ", ".join(f"{level:.2f}" for level in losses.levels)
    text = (
        f"One block at a time is left out, the identity on the residual path (P7, paper Figure 7): flow loss of "
        f"{len(losses.x_0)} clips at t = {levels}, equal parts of the training density; errors are standard errors "
        f"over clips, same noise. Dearest: {dearest}; cheapest: {cheapest}. "
    )
    data: dict[str, object] = {
        "levels": list(losses.levels),
        "base": base_TB.mean(1).tolist(),
        "clips": len(losses.x_0),
        "seeds": list(losses.seeds),
        "blocks": [asdict(cost) for cost in costs],
        "proposed_split": None,
    }
    files = {}
    if whole_stack:
        split = propose_split([cost.overall for cost in costs], cfg.decoder_blocks)
        text += (
            f"Proposed: encoder 0-{split.encoder_layers[-1]}, decoder {list(split.decoder_layers)}, whose layers carry "
            f"{100 * split.held:.0f} % of the cost of all."
        )
        data["proposed_split"] = asdict(split)
        files["stage1.yaml"] = stage1_yaml(split, subject.name)
    lines = {"all levels": [cost.overall for cost in costs]}
    lines |= {
        f"t = {level:.2f}": [cost.by_level[index] for cost in costs]
        for index, level in enumerate(losses.levels)
    }
    title = "block left out" if whole_stack else "block left out (encoder's, then decoder's)"
    draw = partial(
        changes_figure,
        lines=lines,
        across=range(len(costs)),
        x=title,
        y="increase of the flow loss, %",
    )
    return ProbeResult(
        "leave_one_out", "Single blocks left out (P7)", text.strip(), data, {"costs": draw}, files
    )
