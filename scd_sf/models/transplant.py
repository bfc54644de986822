"""Stage 1: Wan's weights -> SCD (or the causal baseline), with a report of every source -> destination tensor.

The encoder takes Wan's layers ``encoder_layers``; the decoder copies ``decoder.layers`` and gets its own copies of the
patch embedding, time embedding and head (spec/scd.md W11). Copies share no storage with each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scd_sf.models.causal import CausalWan
from scd_sf.models.scd import Scd, ScdConfig
from scd_sf.models.wan import Wan
from scd_sf.types import UserError


@dataclass(frozen=True)
class Transfer:
    """One line of the report: destination tensor and the Wan tensor it was copied from (None: newly initialised)."""

    destination: str
    source: str | None
    shape: tuple[int, ...]


def _source_name(name: str, layers: tuple[int, ...]) -> str:
    """Trunk-relative name with the block index replaced by the Wan layer it comes from."""
    parts = name.split(".")
    if parts[0] == "blocks":
        parts[1] = str(layers[int(parts[1])])
    return "trunk." + ".".join(parts)


def _pairs(scd: Scd) -> Iterator[tuple[str, str | None]]:
    for name, _ in scd.encoder.named_parameters():
        yield f"encoder.{name}", _source_name(name, scd.encoder.layers)
    for name, _ in scd.decoder.trunk.named_parameters():
        yield f"decoder.trunk.{name}", _source_name(name, scd.decoder.trunk.layers)
    for name, _ in scd.decoder.named_parameters():
        if not name.startswith("trunk."):
            yield f"decoder.{name}", None


def _copy(destination: nn.Module, source: Wan, pairs: Iterator[tuple[str, str | None]]) -> list[Transfer]:
    source_state = dict(source.named_parameters())
    target_state = dict(destination.named_parameters())
    report: list[Transfer] = []
    with torch.no_grad():
        for target_name, source_name in pairs:
            target = target_state.pop(target_name)
            if source_name is not None:
                target.copy_(source_state[source_name])
            report.append(Transfer(target_name, source_name, tuple(target.shape)))
    assert not target_state, f"untouched parameters: {sorted(target_state)}"
    return report


def transplant_scd(wan: Wan, config: ScdConfig) -> tuple[Scd, list[Transfer]]:
    """Wan -> SCD. UserError if a layer list names a layer Wan does not have."""
    config.check(wan.cfg.num_layers)
    scd = Scd(wan.cfg, config)
    return scd, _copy(scd, wan, _pairs(scd))


def transplant_causal(wan: Wan, chunk: int) -> tuple[CausalWan, list[Transfer]]:
    """Wan -> the causal baseline: the same tensors under a causal mask."""
    if chunk < 1:
        raise UserError(f"model.chunk is {chunk}; it must be at least 1")
    causal = CausalWan(wan.cfg, chunk)
    return causal, _copy(causal, wan, ((name, name) for name, _ in causal.named_parameters()))


def verify_transplant(model: nn.Module, wan: Wan, report: list[Transfer]) -> None:
    """Every copied tensor is bit-equal to its source, and no two tensors share storage. AssertionError otherwise."""
    source: dict[str, Tensor] = dict(wan.named_parameters(remove_duplicate=False))
    state = dict(model.named_parameters(remove_duplicate=False))
    for line in report:
        if line.source is not None:
            assert torch.equal(state[line.destination], source[line.source]), f"{line.destination} != {line.source}"
    storages = [p.untyped_storage().data_ptr() for p in [*state.values(), *source.values()] if p.numel()]
    assert len(set(storages)) == len(storages), "two tensors share storage"


def report_lines(report: list[Transfer]) -> list[str]:
    """``destination <- source [shape]`` for people."""
    return [f"{r.destination} <- {r.source or '(new)'} {list(r.shape)}" for r in report]
