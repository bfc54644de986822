"""Two ways to run a whole model with fewer blocks, or with blocks that see less: the paper's probes
of what a model can do without (section 4.2, supplement D.1; P5 and P6 of docs/results/probes.md).
Its parameters stay what they are.

A checkpoint says how it is run (``model.blocks`` of its config.yaml). So what runs it so is here,
where every reader of checkpoints finds it; what measures it is in probes/skip_layer.py and
probes/frame_diagonal.py. Letters: B batch, F frames, L tokens, E width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from scd_sf.diffusion.flow import shift_time
from scd_sf.models.causal import Causal
from scd_sf.models.scd.scratch import ScdScratch
from scd_sf.models.scd.wan import ScdWan
from scd_sf.models.trunk import Text, Times, Trunk, run_all
from scd_sf.models.wan.transformer import Wan
from scd_sf.nn.attention import AttentionContext
from scd_sf.nn.rope import Rotary
from scd_sf.types import UserError, check_within

Model = ScdWan | ScdScratch | Causal | Wan


@dataclass(frozen=True)
class SkipConfig:
    """Probe P5 (supplement D.1): all blocks in the first denoising steps, afterwards the first and
    the last ones alone; past the middle goes the residual path.

    What decides is the noise level, so that training and samplers of any number of steps follow the
    same schedule. The defaults are the supplement's.
    """

    prefix: int = 5
    """First blocks that always run."""
    suffix: int = 10
    """Last blocks that always run."""
    full_steps: int = 5
    """So many first steps run all blocks."""
    steps: int = 50
    """Denoising steps that ``full_steps`` is counted of."""
    shift: float = 5.0
    """Timestep shift of these steps."""

    def __post_init__(self) -> None:
        if min(self.prefix, self.suffix) < 0 or self.steps < 1 or self.shift <= 0:
            raise UserError(
                f"skip.prefix {self.prefix} and suffix {self.suffix} must be >= 0, steps {self.steps} and shift "
                f"{self.shift} > 0"
            )
        if not 0 <= self.full_steps <= self.steps:
            raise UserError(
                f"skip.full_steps is {self.full_steps}; it must lie in 0..{self.steps} (skip.steps)"
            )

    @property
    def above(self) -> float:
        """All blocks run at noise levels above this one.

        It lies halfway between the last whole step and the first short one, before the shift, so
        that no rounding of a step's time matters.
        """
        return shift_time(1 - (self.full_steps - 0.5) / self.steps, self.shift)

    def middle(self, num_layers: int) -> range:
        """The blocks that are bypassed."""
        return range(self.prefix, num_layers - self.suffix)

    def full(self, t_BF: Tensor, clean_time: float) -> Tensor:
        """True for the frames at ``t`` that every block runs on, (B, F).

        They are the noisy ones above the level, and the finished ones: the first steps of later
        frames read their keys and values in every block.
        """
        return (t_BF > self.above) | (t_BF <= clean_time)


@dataclass(frozen=True)
class BlocksConfig:
    """Which blocks run, and which see other frames."""

    frame_diagonal: int = 0
    """The last so many blocks see their own chunk alone (probe P6; the causal baseline); 0:
    none."""
    skip: SkipConfig | None = None
    """Skip-layer schedule (probe P5; the causal baseline and the bidirectional model); null: every
    block always runs."""

    def __post_init__(self) -> None:
        check_within(self, {"frame_diagonal": (0, 2**12)}, "blocks.")

    def check(self, family: str, num_layers: int) -> None:
        """UserError where a model of this family and depth cannot run so."""
        diagonal, skip = self.frame_diagonal, self.skip
        if not 0 <= diagonal <= num_layers:
            raise UserError(
                f"blocks.frame_diagonal is {diagonal}; the model has {num_layers} blocks, choose 0..that"
            )
        if diagonal and family != "causal":
            raise UserError(
                f"blocks.frame_diagonal is {diagonal}: only the causal baseline has it, this is '{family}'"
            )
        if skip is None:
            return
        if family == "scd":
            raise UserError(
                "blocks.skip: SCD's decoder is short already; skip layers of family causal or wan"
            )
        if not skip.middle(num_layers):
            raise UserError(
                f"blocks.skip: prefix {skip.prefix} and suffix {skip.suffix} leave nothing of {num_layers} blocks to "
                "bypass; make them smaller"
            )
        if diagonal > skip.suffix:
            raise UserError(
                f"blocks.frame_diagonal is {diagonal}, blocks.skip.suffix {skip.suffix}: a frame-diagonal block must "
                "not be one that is bypassed; make the suffix at least as long"
            )


@dataclass(frozen=True)
class Skipping:
    """A replacement of :func:`~scd_sf.models.trunk.run_all` that follows the schedule ``skip``.

    A frame sees none that is noised otherwise than itself. So to let the middle run on all frames
    and to keep the outputs of some is to run it on those. Under autograd it always runs: every rank
    has to reach the same parameters.
    """

    skip: SkipConfig

    def __call__(
        self,
        trunk: Trunk,
        x_BLE: Tensor,
        times: Times,
        text: Text,
        rotary: Rotary,
        attend: AttentionContext,
        span: slice,
    ) -> Tensor:
        indices = range(len(trunk.blocks))[span]
        middle = self.skip.middle(len(trunk.blocks))

        def run(x_BLE: Tensor, first: int, stop: int) -> Tensor:
            first, stop = max(first, indices.start), min(stop, indices.stop)
            return trunk.run(x_BLE, times.mod, text, rotary, attend, slice(first, max(first, stop)))

        if x_BLE.is_meta:  # scd plan only counts: every block
            return run(x_BLE, 0, indices.stop)
        full_BF = self.skip.full(times.t, trunk.cfg.clean_time)
        any_full, all_full = True, False
        if not torch.is_grad_enabled():
            # one synchronisation with the device
            any_full, all_full = torch.stack([full_BF.any(), full_BF.all()]).tolist()
        if all_full:
            return run(x_BLE, 0, indices.stop)
        x_BLE = run(x_BLE, 0, middle.start)
        if any_full:
            frames = (full_BF.shape[1], -1)
            deep = run(x_BLE, middle.start, middle.stop).unflatten(1, frames)
            short = x_BLE.unflatten(1, frames)
            x_BLE = torch.where(full_BF[:, :, None, None], deep, short).flatten(1, 2)
        return run(x_BLE, middle.stop, indices.stop)


def set_blocks(model: Model, blocks: BlocksConfig) -> None:
    """Set how the model runs its blocks. UserError where it cannot run so."""
    family = "wan" if isinstance(model, Wan) else "causal" if isinstance(model, Causal) else "scd"
    blocks.check(family, model.cfg.num_layers)
    if isinstance(model, Causal | Wan):
        model.run_blocks = run_all if blocks.skip is None else Skipping(blocks.skip)
    if isinstance(model, Causal):
        model.frame_diagonal = blocks.frame_diagonal


def blocks_of(model: Model) -> BlocksConfig:
    """How the model runs its blocks at present."""
    diagonal = model.frame_diagonal if isinstance(model, Causal) else 0
    run_blocks = model.run_blocks if isinstance(model, Causal | Wan) else run_all
    return BlocksConfig(diagonal, run_blocks.skip if isinstance(run_blocks, Skipping) else None)


@contextmanager
def running_as(model: Model, blocks: BlocksConfig) -> Iterator[None]:
    """A context in which the model runs its blocks so; at its end the old setting is restored."""
    old_blocks = blocks_of(model)
    set_blocks(model, blocks)
    try:
        yield
    finally:
        set_blocks(model, old_blocks)
