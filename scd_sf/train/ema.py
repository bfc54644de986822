"""Exponential moving average of the fp32 master weights, counted in optimizer updates.

At bf16 and small learning rates most bf16 weights do not change in one update although every master
does, so the average is taken over masters. Warm-up: decay_n = min(decay, (n + 1) / (n + 10)) at
update n, so that the first updates are not dominated by the initial weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scd_sf.distributed import Ranks
from scd_sf.train.shards import Shard, gathered
from scd_sf.types import UserError


@dataclass
class EmaConfig:
    """The average of the weights."""

    decay: float = 0.99
    """Decay per update."""
    start: int = 0
    """Before this update the average simply follows the weights."""
    warmup: bool = True
    """Smaller decay in the beginning: (n + 1) / (n + 10) at the n-th update."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay is {self.decay}; it must be in [0, 1)")
        if self.start < 0:
            raise ValueError(f"start is {self.start}; it must be 0 or more")


class Ema:
    """The average in fp32 by parameter name. Every rank keeps and updates the parts that it owns,
    without communication."""

    def __init__(self, cfg: EmaConfig, ranks: Ranks) -> None:
        self.cfg, self.ranks = cfg, ranks
        self.updates = 0
        self._average: dict[str, Shard] = {}

    def decay_at(self, update: int) -> float:
        if update < self.cfg.start:
            return 0.0
        n = update - self.cfg.start
        return min(self.cfg.decay, (n + 1) / (n + 10)) if self.cfg.warmup else self.cfg.decay

    @torch.no_grad()
    def update(self, owned: Iterable[Shard]) -> None:
        """Call once after each applied update, with this rank's parts of all masters
        (``Engine.owned``)."""
        decay, first = self.decay_at(self.updates), self.updates == 0
        for shard in owned:
            if first:
                self._average[shard.name] = shard.holding(shard.values.float().clone())
                continue
            average = self._average[shard.name]
            if (average.start, average.stop) != (shard.start, shard.stop):
                raise ValueError(
                    f"ema: {shard.name!r} is cut differently than before; restore() with the new parts"
                )
            average.values.lerp_(shard.values.float(), 1.0 - decay)
        self.updates += 1

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """(name, averaged weight) one at a time, not to be modified; all ranks walk it to the
        end."""
        return gathered(self._average.values(), self.ranks)

    def copy(self) -> Ema:
        """A copy of the average that later updates do not change."""
        copy = Ema(self.cfg, self.ranks)
        copy.restore(self._average.values(), self.updates)
        return copy

    def restore(self, owned: Iterable[Shard], updates: int) -> None:
        """Begin from this rank's parts of the average and the number of updates in it: those of a
        checkpoint, or the first weights and 0."""
        self._average = {shard.name: shard.holding(shard.values.float().clone()) for shard in owned}
        self.updates = updates

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into a module with the same parameter names, on every rank; all ranks
        call it.

        Raises UserError on a missing name, on all ranks alike.
        """
        parameters = dict(module.named_parameters())
        missing_name = next((name for name in parameters if name not in self._average), None)
        if missing_name is not None:
            raise UserError(
                f"ema: no average for parameter {missing_name!r}; the checkpoint is of another model"
            )
        for name, value in self.whole():
            if name in parameters:
                parameters[name].copy_(value)
