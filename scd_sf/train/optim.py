"""What AdamW is given: parameter groups, and the learning rate as a pure function of the update number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

NO_DECAY_WORDS = ("norm", "table", "modulation", "embedding_bias", "start_token", "pos_embed")


@dataclass(frozen=True)
class Schedule:
    """Warm-up over ``warmup`` updates, constant, then linear to zero from ``anneal_from`` (a fraction of ``total``).

    ``anneal_from`` 1.0 means no decay. ``total`` counts optimizer updates.
    """

    lr: float
    warmup: int = 0
    anneal_from: float = 1.0
    total: int = 1

    def at(self, update: int) -> float:
        """Learning rate of update number ``update`` (0 is the first)."""
        rate = self.lr
        if update < self.warmup:
            rate *= (update + 1) / self.warmup
        start = self.anneal_from * self.total
        if self.anneal_from < 1.0 and update > start:
            rate *= max(0.0, (self.total - update) / (self.total - start))
        return rate


def decays(name: str, parameter: Tensor) -> bool:
    """Weight decay is for matrices and kernels: not for biases, gains, norms, modulation tables or learned tokens."""
    return parameter.ndim >= 2 and not any(word in name.lower() for word in NO_DECAY_WORDS)


def param_groups(named: Iterable[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of the parameters that require grad: with decay, then without; an empty group is left out."""
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in trained if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in trained if not decays(n, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
