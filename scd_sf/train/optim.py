"""AdamW's parameter groups, and the learning rate as a pure function of the update number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from scd_sf.types import UserError

NO_DECAY_WORDS = ("norm", "table", "modulation", "embedding_bias", "start_token", "pos_embed")


class LearningRate(Protocol):
    """A learning rate as a function of the update."""

    def at(self, update: int) -> float:
        """The learning rate of update number ``update`` (0 is the first)."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Warm-up over ``warmup`` updates, constant, then linear to zero from ``anneal_from`` (a
    fraction of ``total``).

    ``anneal_from`` 1.0 means no decay. ``total`` counts optimizer updates.
    """

    lr: float
    warmup: int = 0
    anneal_from: float = 1.0
    total: int = 1

    def at(self, update: int) -> float:
        """See :class:`LearningRate`."""
        rate = self.lr
        if update < self.warmup:
            rate *= (update + 1) / self.warmup
        start = self.anneal_from * self.total
        if self.anneal_from < 1.0 and update > start:
            rate *= max(0.0, (self.total - update) / (self.total - start))
        return rate


def decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter has weight decay: matrices and kernels have it, but biases, gains, norms,
    modulation tables and learned tokens do not."""
    return parameter.ndim >= 2 and not any(word in name.lower() for word in NO_DECAY_WORDS)


def param_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    weight_decay: float,
    scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """AdamW groups of the parameters that require grad: with decay, then without; an empty group is
    left out.

    ``scales``: the learning rate of parameters whose name starts so is a multiple of the others';
    each group's is in its ``lr_scale``. UserError: a prefix that no parameter has.
    """
    trainable = [
        (name, parameter) for name, parameter in named_parameters if parameter.requires_grad
    ]
    for prefix in scales or {}:
        if not any(name.startswith(prefix) for name, _ in trainable):
            raise UserError(
                f"lr_scale.{prefix}: no parameter's name starts so; they start with {_heads(trainable)}"
            )

    def scale(name: str) -> float:
        return next(
            (value for prefix, value in (scales or {}).items() if name.startswith(prefix)), 1.0
        )

    groups: list[dict[str, Any]] = []
    for factor in sorted({scale(name) for name, _ in trainable}):
        for with_decay in (True, False):
            decay = weight_decay if with_decay else 0.0
            parameters = [
                p for n, p in trainable if scale(n) == factor and decays(n, p) == with_decay
            ]
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "lr_scale": factor})
    return groups


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set each group's learning rate to ``lr`` times its ``lr_scale``."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]


def _heads(named_parameters: Iterable[tuple[str, Tensor]]) -> str:
    return ", ".join(sorted({name.split(".")[0] for name, _ in named_parameters}))
