"""Scores one dimension by VBench's own functions and writes the result as JSON. VBench's Python
runs this file.

    python -I worker.py DIMENSION DEVICE LIST.json RESULT.json

LIST: VBench's entries with their ``video_list``. Under torchrun the videos are shared by VBench's
own ranks, which need GPUs. Imports nothing of scd_sf.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Score the dimension and write the result; exceptions end in the caller's log."""
    name, device, videos_list, result = sys.argv[1:]
    import torch
    from vbench.distributed import dist_init, get_rank
    from vbench.utils import init_submodules

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist_init()
    compute = getattr(importlib.import_module(f"vbench.{name}"), f"compute_{name}")
    submodules = init_submodules([name], local=True)[name]
    score, videos = compute(videos_list, torch.device(device), submodules)
    if get_rank() == 0:
        text = json.dumps({"score": float(score), "videos": videos}, default=float)
        Path(result).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
