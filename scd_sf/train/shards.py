"""Which part of each parameter a rank owns, and how the parts become whole again: any engine, any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scd_sf.train.ranks import Ranks
from scd_sf.types import UserError


@dataclass(frozen=True)
class Shard:
    """``values`` (1-d, perhaps empty): elements ``start`` .. of the flattened parameter ``name`` of this ``shape``."""

    name: str
    values: Tensor
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()

    def of(self, whole: Tensor) -> Tensor:
        """The same elements of another tensor of that shape."""
        return whole.reshape(-1)[self.start : self.stop]

    def holding(self, values: Tensor) -> Shard:
        return Shard(self.name, values, self.start, self.shape)


def share(name: str, whole: Tensor, ranks: Ranks) -> Shard:
    """This rank's even part of a tensor that every rank holds whole."""
    first, last = (whole.numel() * rank // ranks.world for rank in (ranks.rank, ranks.rank + 1))
    return Shard(name, whole.detach().reshape(-1)[first:last], first, tuple(whole.shape))


def gathered(shards: Iterable[Shard], ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """(name, whole fp32 tensor) one at a time, on every rank; all ranks walk it to the end.

    Over the ranks the shards of one parameter must cover it once. With one rank the tensors are views.
    """
    for shard in shards:
        whole = shard.values.float()
        if ranks.world > 1:
            whole = torch.zeros(math.prod(shard.shape), device=ranks.device)
            shard.of(whole).copy_(shard.values)
            dist.all_reduce(whole)
        yield shard.name, whole.view(shard.shape)


def read_shards(file: Path, like: Iterable[Shard]) -> Iterator[Shard]:
    """The parts ``like`` of the tensors of a safetensors file, read one at a time.

    Raises UserError when the file is missing or damaged, or holds other tensors.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            for shard in like:
                whole = tensors.get_tensor(shard.name)
                if tuple(whole.shape) != shard.shape:
                    raise UserError(f"{file}: {shard.name} is {tuple(whole.shape)} there, {shard.shape} in the model")
                yield shard.holding(shard.of(whole).to(shard.values.device))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read as this model's weights ({error}); use another checkpoint") from error
