"""Run by VBench's own Python, as a file: one dimension by VBench's own functions, the result as JSON.

    python -I worker.py job.json

``job``: dimension, device, full_info (VBench's JSON with ``video_list`` filled in), result (the file to write). Under
torchrun the videos are shared by VBench's own ranks, which need GPUs. Imports nothing of scd_sf.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Compute and write; any exception is the caller's to show from the log."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch
    from vbench.distributed import dist_init, get_rank
    from vbench.utils import init_submodules

    name = job["dimension"]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist_init()
    compute = getattr(importlib.import_module(f"vbench.{name}"), f"compute_{name}")
    submodules = init_submodules([name], local=True)[name]
    score, videos = compute(job["full_info"], torch.device(job["device"]), submodules)
    if get_rank() == 0:
        result, part = Path(job["result"]), Path(job["result"] + ".part")
        with part.open("w", encoding="utf-8") as file:
            json.dump({"score": float(score), "videos": videos}, file, default=float)
            file.flush()
            os.fsync(file.fileno())
        part.replace(result)


if __name__ == "__main__":
    main()
