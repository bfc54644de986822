"""One process of many builds Wan 2.1 14B as a ZeRO-3 teacher, without the other processes:
parameters, memory and seconds.

    python benchmarks/teacher_14b.py --world 64 --out teacher_14b.json

``train/engine.py:frozen_engine`` at full size, as rank 1 of ``--world``: the model is partitioned
while it is built, then every parameter is gathered, filled and partitioned again, in the order of a
cluster. The process group is PyTorch's fake one, which answers every collective at once; gathered
values are meaningless, and nothing is computed with them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from scd_sf.config import HelpFormatter
from scd_sf.distributed import Ranks
from scd_sf.files import write_json
from scd_sf.models.wan.transformer import WAN_14B, Wan, WanConfig
from scd_sf.train.base import EngineConfig
from scd_sf.train.engine import frozen_engine
from scd_sf.types import exit_on_user_error


def never_read() -> Tensor:
    """Stands for the weights' reader, which only rank 0 calls."""
    raise AssertionError("only rank 0 reads")


def build(cfg: WanConfig, world: int) -> dict[str, object]:
    """Build the teacher as rank 1 of ``world``; returns counts, GiB and seconds of this
    process."""
    # this process as the only one of its host
    os.environ.update(RANK="1", WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_SIZE="1")
    dist.init_process_group("fake", rank=1, world_size=world, store=FakeStore())
    ranks = Ranks(1, world, 1, torch.device("cpu"))
    with torch.device("meta"):
        names = {name: never_read for name, _ in Wan(cfg).named_parameters()}
    rss_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.monotonic()
    engine = frozen_engine(lambda: Wan(cfg), names, EngineConfig(dtype="bf16"), ranks)
    assert isinstance(engine.module, Wan)
    # ZeRO-3 adds ds_tensor and ds_numel to its parameters
    parameters: dict[str, Any] = dict(engine.module.named_parameters())
    shard_bytes = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in parameters.values())
    return {
        "world": world,
        "parameters": sum(p.ds_numel for p in parameters.values()),
        "tensors": len(parameters),
        "whole_gib": round(sum(2 * p.ds_numel for p in parameters.values()) / 2**30, 2),
        "held_gib": round(shard_bytes / 2**30, 3),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "rss_before_gib": round(rss_before, 2),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--world", type=int, default=64, help="processes that share the teacher")
    parser.add_argument(
        "--layers",
        type=int,
        default=WAN_14B.num_layers,
        help="layers of the model; fewer for a quick look",
    )
    parser.add_argument("--out", type=Path, help="JSON of the measurements")
    args = parser.parse_args()
    result = build(dataclasses.replace(WAN_14B, num_layers=args.layers), args.world)
    print(json.dumps(result))
    if args.out is not None:
        write_json(args.out, result)


if __name__ == "__main__":
    exit_on_user_error(main)
