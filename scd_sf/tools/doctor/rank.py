"""One rank of the all-reduce that ``scd doctor`` tries: ``python -m scd_sf.tools.doctor.rank BACKEND``."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def main() -> None:
    """Sum ranks' numbers on all ranks; an AssertionError or the backend's own error on stderr when that fails."""
    backend, rank = sys.argv[1], int(os.environ["RANK"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, timeout=timedelta(seconds=60), device_id=device if backend == "nccl" else None)
    value = torch.full((1 << 16,), float(rank + 1), device=device)
    dist.all_reduce(value)
    if not bool((value == 3.0).all()):
        raise AssertionError(f"1 + 2 summed to {value[0].item()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
