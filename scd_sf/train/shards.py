"""Which part of each parameter a rank owns, how parts become whole, and engine state on disk for
any number of ranks.

State on disk is one file of parts per rank. Each part's name holds its position, so that any other
number of ranks can read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scd_sf.distributed import Ranks
from scd_sf.files import foreign, refuse_lfs_pointer, write_json, write_tensors
from scd_sf.tensor_files import check_finite
from scd_sf.types import UserError

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """``values`` (1-d, perhaps empty): elements ``start`` .. of the flattened parameter ``name`` of
    this ``shape``."""

    name: str
    values: Tensor
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()

    def of(self, tensor: Tensor) -> Tensor:
        """This shard's elements of another tensor of the same shape, 1-d."""
        return tensor.reshape(-1)[self.start : self.stop]

    def holding(self, values: Tensor) -> Shard:
        return Shard(self.name, values, self.start, self.shape)


def share(name: str, tensor: Tensor, ranks: Ranks) -> Shard:
    """This rank's even part of a tensor that every rank holds whole."""
    first, last = (tensor.numel() * rank // ranks.world for rank in (ranks.rank, ranks.rank + 1))
    return Shard(name, tensor.detach().reshape(-1)[first:last], first, tuple(tensor.shape))


def gathered(shards: Iterable[Shard], ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """(name, whole fp32 tensor) one at a time, on every rank; all ranks walk it to the end.

    Over the ranks the shards of one parameter must cover it once. With one rank the tensors are
    views.
    """
    for shard in shards:
        tensor = shard.values.float()
        if ranks.world > 1:
            tensor = torch.zeros(math.prod(shard.shape), device=ranks.device)
            shard.of(tensor).copy_(shard.values)
            dist.all_reduce(tensor)
        yield shard.name, tensor.view(shard.shape)


def read_shards(file: Path, like: Iterable[Shard]) -> Iterator[Shard]:
    """The parts ``like`` of the tensors of a safetensors file, read one at a time.

    Raises UserError when the file is missing or damaged, or holds other tensors.
    """
    try:
        refuse_lfs_pointer(file)
        with safe_open(file, framework="pt") as tensors:
            for shard in like:
                tensor = check_finite(tensors.get_tensor(shard.name), shard.name, str(file))
                if tuple(tensor.shape) != shard.shape:
                    raise UserError(
                        f"{file}: {shard.name} is {tuple(tensor.shape)} there, {shard.shape} in the model"
                    )
                yield shard.holding(shard.of(tensor).to(shard.values.device))
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: cannot be read as this model's weights ({error}); use another checkpoint"
        ) from error


@dataclass(frozen=True)
class EngineState:
    """One rank's part of an engine's state: tensors copied to the CPU, and the ``counters`` that
    the main rank writes."""

    rank: int
    tensors: Mapping[str, Tensor]
    counters: Mapping[str, int]

    @classmethod
    def copied(
        cls,
        rank: int,
        parts: Mapping[str, Iterable[Shard]],
        buffers: Mapping[str, Tensor],
        counters: Mapping[str, int],
    ) -> EngineState:
        """Copies of ``parts``, the masters and moments by kind, and on the main rank of
        ``buffers``."""
        tensors = {
            f"{kind}/{shard.name}@{shard.start}": shard.values
            for kind, shards in parts.items()
            for shard in shards
            if shard.values.numel()
        }
        if rank == 0:
            tensors |= {f"buffer/{name}": value for name, value in buffers.items()}
        copies = {
            key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()
        }
        return cls(rank, copies, counters)

    def write(self, path: Path) -> None:
        """This rank's file in ``path``, and ``engine.json`` beside it from the main rank."""
        path.mkdir(parents=True, exist_ok=True)
        write_tensors(path / f"rank{self.rank}.safetensors", self.tensors)
        if self.rank == 0:
            write_counters(path, self.counters)


def write_counters(path: Path, counters: Mapping[str, int]) -> None:
    """``engine.json``: the update counts, and how many ranks' files there are."""
    write_json(path / "engine.json", counters)


class StateFiles:
    """The files that ``count`` ranks wrote of an :class:`EngineState`. UserError when a file is
    missing or damaged."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self._files: dict[str, Any] = {}
        self._parts: dict[str, list[tuple[int, int, str]]] = {}
        for rank in range(count):
            file = path / f"rank{rank}.safetensors"
            with foreign(file, "use another checkpoint"):
                refuse_lfs_pointer(file)
                tensors = safe_open(file, framework="pt")
                for key in tensors.keys():  # noqa: SIM118  # not a mapping
                    self._files[key] = tensors
                    if "@" in key:
                        name, _, start = key.rpartition("@")
                        (length,) = tensors.get_slice(key).get_shape()
                        self._parts.setdefault(name, []).append(
                            (int(start), int(start) + length, key)
                        )

    def read(self, kind: str, like: Shard) -> Tensor:
        """The elements that ``like`` covers, 1-d on the CPU, put together from the parts.

        Raises UserError, the same on all ranks, when the checkpoint's tensor is missing or of
        another size, and on the ranks whose elements are not finite.
        """
        parts = sorted(self._parts.get(f"{kind}/{like.name}", []))
        boundaries = [0, *(stop for _, stop, _ in parts)]
        if [start for start, _, _ in parts] != boundaries[:-1] or boundaries[-1] != math.prod(
            like.shape
        ):
            raise UserError(
                f"{self.path}: no whole {kind} of parameter {like.name!r} of shape {like.shape}; resume with the "
                "checkpoint's own configuration"
            )
        pieces = [
            self._files[key].get_slice(key)[
                max(start, like.start) - start : min(stop, like.stop) - start
            ]
            for start, stop, key in parts
            if max(start, like.start) < min(stop, like.stop)
        ]
        elements = torch.cat(pieces) if pieces else torch.empty(0)
        return check_finite(elements, f"{kind}/{like.name}", str(self.path))

    def whole(self, name: str, like: Tensor) -> Tensor:
        """A buffer of the main rank with the shape of ``like``. UserError when there is none."""
        key = f"buffer/{name}"
        value = self._files[key].get_tensor(key) if key in self._files else None
        if value is None or value.shape != like.shape:
            raise UserError(
                f"{self.path}: no buffer {name!r} of shape {tuple(like.shape)}; resume with the configuration the "
                "checkpoint was made with"
            )
        return check_finite(value, key, str(self.path))
