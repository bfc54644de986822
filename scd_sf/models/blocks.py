"""Which blocks of a stack run at which noise level, and which see other frames: the paper's probes of what a model can
do without (section 4.2, supplement D.1; P5 and P6 of docs/results/probes.md). Parameters stay what they are.

Letters: B batch, F frames, L tokens, E width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scd_sf.diffusion.flow import shift_time
from scd_sf.types import UserError, check_within


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
            raise UserError(f"skip.full_steps is {self.full_steps}; it must lie in 0..{self.steps} (skip.steps)")

    @property
    def above(self) -> float:
        """All blocks run at noise levels above this one: halfway between the last whole step and the first short one,
        before the shift, so that no rounding of a step's time matters."""
        return shift_time(1 - (self.full_steps - 0.5) / self.steps, self.shift)

    def middle(self, num_layers: int) -> range:
        """The blocks that are bypassed."""
        return range(self.prefix, num_layers - self.suffix)

    def full(self, t_BF: Tensor, clean_time: float) -> Tensor:
        """True for the frames at ``t`` that every block runs on, (B, F): noisy ones above the level, and finished ones,
        whose keys and values the first steps of later frames read in every block."""
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
            raise UserError(f"blocks.frame_diagonal is {diagonal}; the model has {num_layers} blocks, choose 0..that")
        if diagonal and family != "causal":
            raise UserError(f"blocks.frame_diagonal is {diagonal}: only the causal baseline has it, this is '{family}'")
        if skip is None:
            return
        if family == "scd":
            raise UserError("blocks.skip: SCD's decoder is short already; skip layers of family causal or wan")
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


def run_skipping(
    run: Callable[[Tensor, range], Tensor], x_BLE: Tensor, full_BF: Tensor, chosen: range, middle: range
) -> Tensor:
    """The blocks ``chosen``, of which ``middle`` changes only the tokens of the frames in ``full``.

    A frame sees none that is noised otherwise than itself, so to let the middle run on all and to keep the outputs of
    some is to run it on those. Under autograd it always runs: every rank has to reach the same parameters.
    """
    x_BLE = run(x_BLE, range(chosen.start, min(chosen.stop, middle.start)))
    inside = range(max(chosen.start, middle.start), min(chosen.stop, middle.stop))
    if torch.is_grad_enabled() or bool(full_BF.any()):
        frames = (full_BF.shape[1], -1)
        deep, short = run(x_BLE, inside).unflatten(1, frames), x_BLE.unflatten(1, frames)
        x_BLE = torch.where(full_BF[:, :, None, None], deep, short).flatten(1, 2)
    return run(x_BLE, range(max(chosen.start, middle.stop), chosen.stop))
