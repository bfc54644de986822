"""P7: what the flow loss says of a block that is left out, and where to cut a model by it (paper Figure 7, supplement
E.1; spec/scd.md 3).

A block is left out by a forward hook that hands its input on, the identity on the residual; when the hook is removed
the model is what it was. Levels are taken from the training density.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from scd_sf.config import to_yaml
from scd_sf.metrics.curves import Line, curve_figure
from scd_sf.models.build import Student
from scd_sf.models.scd import Scd
from scd_sf.models.wan import Wan
from scd_sf.probes.paired import Change, increase, losses_of_seeds
from scd_sf.types import Conditioning, UserError

DECODER_SHARE = 3  # the paper's decoder has a third of the model's layers: 10 of 30


def _identity(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The block's input, of which the block may have returned the last frames alone."""
    x_BLE = inputs[0]
    return x_BLE[:, x_BLE.shape[1] - output.shape[1] :]


@contextmanager
def left_out(block: nn.Module) -> Iterator[None]:
    """Inside, the block is the identity on the residual path; afterwards the model is bit for bit what it was."""
    handle = block.register_forward_hook(_identity)
    try:
        yield
    finally:
        handle.remove()


def named_blocks(model: Student | Wan) -> dict[str, nn.Module]:
    """The blocks in the order they run: "0", "1", ..; of SCD "encoder 0", .., "decoder 0", .. (positions in each)."""
    if isinstance(model, Scd):
        stacks = {"encoder ": model.encoder, "decoder ": model.decoder.trunk}
    else:
        stacks = {"": model.trunk}
    return {f"{stack}{i}": block for stack, trunk in stacks.items() for i, block in enumerate(trunk.blocks)}


@dataclass(frozen=True)
class BlockCost:
    """What leaving one block out costs: relative increase of the flow loss over all levels, and at each."""

    block: str
    overall: Change
    by_level: tuple[Change, ...]


@dataclass(frozen=True)
class LeaveOneOut:
    """``base``: the whole model's loss at each of ``levels``; ``blocks`` in the order they run."""

    levels: tuple[float, ...]
    base: tuple[float, ...]
    clips: int
    seeds: tuple[int, ...]
    blocks: tuple[BlockCost, ...]


def leave_one_out(
    model: Student | Wan,
    x_0: Tensor,
    cond: Conditioning,
    levels: Sequence[float],
    seeds: Sequence[int] = (0,),
    batch: int = 8,
) -> LeaveOneOut:
    """The cost of every block, one at a time: (blocks + 1) x levels x seeds passes over the clips ``x_0``
    (B, F, C, H, W) under ``cond``. UserError: fewer than 2 clips."""
    base_TB = losses_of_seeds(model, x_0, cond, levels, seeds, batch)
    costs = []
    for name, block in named_blocks(model).items():
        with left_out(block):
            without_TB = losses_of_seeds(model, x_0, cond, levels, seeds, batch)
        each = tuple(increase(base_TB[i : i + 1], without_TB[i : i + 1]) for i in range(len(levels)))
        costs.append(BlockCost(name, increase(base_TB, without_TB), each))
    base = tuple(float(value) for value in base_TB.mean(1))
    return LeaveOneOut(tuple(levels), base, len(x_0), tuple(seeds), tuple(costs))


@dataclass(frozen=True)
class Split:
    """Layers for stage 1. ``held``: the share of all blocks' cost that those of the decoder carry."""

    encoder_layers: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    held: float

    @property
    def early(self) -> int:
        """How many of the decoder's layers are the encoder's first."""
        return sum(layer in self.encoder_layers for layer in self.decoder_layers)


def propose_split(costs: Sequence[Change], decoder_blocks: int = 0) -> Split:
    """Where to cut a stack whose block l costs ``costs[l]`` when it is left out.

    As in the paper the decoder is a run of the first and a run of the last blocks, the encoder all blocks before that
    last run (the first ones stand in both). Of all ways to part ``decoder_blocks`` (0: a third of the stack, the
    paper's share) between the two runs, the last at least 1, this takes the one whose blocks cost most together. Ways
    that come within one standard error of it count as equal, and the most even of those is taken: where both ends are
    well inside, the middle's noise would decide. UserError: no room for a decoder.
    """
    count = len(costs)
    size = decoder_blocks or max(1, round(count / DECODER_SHARE))
    if not 1 <= size < count:
        raise UserError(f"decoder_blocks is {size}; of {count} blocks the decoder needs 1..{count - 1}")

    def chosen(early: int) -> frozenset[int]:
        return frozenset((*range(early), *range(count - size + early, count)))

    def held(blocks: frozenset[int]) -> float:
        return sum(costs[block].mean for block in blocks)

    ways = {early: chosen(early) for early in range(size)}
    best = max(ways.values(), key=held)

    def as_good(blocks: frozenset[int]) -> bool:
        error = math.hypot(*(costs[block].error for block in blocks ^ best))
        return held(best) - held(blocks) <= error

    early = min((e for e in ways if as_good(ways[e])), key=lambda e: (abs(size - 2 * e), -held(ways[e])))
    total = sum(max(cost.mean, 0.0) for cost in costs)
    share = sum(max(costs[block].mean, 0.0) for block in ways[early]) / total if total > 0 else 0.0
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


def write_stage1(path: Path, split: Split, model: str) -> Path:
    """A configuration for ``recipes/stage1_transplant.py --config``; ``model``: what was probed, for the comment."""
    part = _Stage1Part("scd", _ScdPart(split.encoder_layers, _DecoderPart(split.decoder_layers)))
    head = (
        f"# Proposed by leaving single blocks out (probe P7) of {' '.join(model.split())}: the decoder's layers carry "
        f"{100 * split.held:.0f} %\n# of what all blocks together cost.\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + to_yaml(part), encoding="utf-8")
    return path


def draw(path: Path, found: LeaveOneOut) -> Path:
    """Cost against block, in percent of the whole model's loss: over all levels with error bars, and at each level."""
    places = list(range(len(found.blocks)))
    overall = [100 * cost.overall.mean for cost in found.blocks], [100 * cost.overall.error for cost in found.blocks]
    lines: dict[str, Line] = {"all levels": (places, *overall)}
    for i, level in enumerate(found.levels):
        lines[f"t = {level:.2f}"] = (places, [100 * cost.by_level[i].mean for cost in found.blocks])
    return curve_figure(path, lines, "block left out", "increase of the flow loss, %")


def as_json(found: LeaveOneOut, split: Split | None) -> dict[str, object]:
    """For a result file; ``split`` None: the model is split already."""
    proposal = None if split is None else asdict(split)
    return {**asdict(found), "proposed_split": proposal}
