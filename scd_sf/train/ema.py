"""Exponential moving average of the fp32 master weights, counted in optimizer updates.

At bf16 and small learning rates most bf16 weights do not change in one update although every master does, so the
average is taken over masters. Warm-up: decay_n = min(decay, (n + 1) / (n + 10)) at update n, so that the first updates
are not dominated by the initial weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scd_sf.types import UserError


@dataclass
class EmaConfig:
    """``decay`` per update; ``start``: the average simply follows the weights before this update."""

    decay: float = 0.99
    start: int = 0
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay is {self.decay}; it must be in [0, 1)")
        if self.start < 0:
            raise ValueError(f"start is {self.start}; it must be 0 or more")


class Ema:
    """The average by parameter name, fp32. Elementwise, so any consistent set of tensors can be averaged."""

    def __init__(self, cfg: EmaConfig) -> None:
        self.cfg = cfg
        self.updates = 0
        self._average: dict[str, Tensor] = {}

    def decay_at(self, update: int) -> float:
        if update < self.cfg.start:
            return 0.0
        n = update - self.cfg.start
        return min(self.cfg.decay, (n + 1) / (n + 10)) if self.cfg.warmup else self.cfg.decay

    @torch.no_grad()
    def update(self, masters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Call once after each applied update, with all masters (an iterator keeps the peak at one tensor)."""
        items = masters.items() if isinstance(masters, Mapping) else masters
        decay, first = self.decay_at(self.updates), not self._average
        for name, value in items:
            if first:
                self._average[name] = value.detach().float().clone()
            else:
                self._average[name].lerp_(value.detach().to(self._average[name]), 1.0 - decay)
        self.updates += 1

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights (not copies), for the checkpoint's ``ema.safetensors``."""
        return self._average

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Continue from a checkpoint: its ema tensors and the number of updates they average."""
        self._average = {name: value.detach().float().clone() for name, value in tensors.items()}
        self.updates = updates

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into a module with the same parameter names. Raises UserError on a missing name."""
        for name, parameter in module.named_parameters():
            if name not in self._average:
                raise UserError(f"ema: no average for parameter {name!r}; the checkpoint is of another model")
            parameter.copy_(self._average[name])
