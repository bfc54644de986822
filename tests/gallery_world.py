"""Folders of samples on disk, as ``scd sample`` writes them, with real H.264 videos."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.data.clips import write_video


def clip(seed: int, frames: int = 5, size: int = 32) -> Tensor:
    """Smooth moving colours, uint8 (F, 3, size, size); frame f is brighter than frame f - 1."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).expand(frames, -1, -1, -1)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (smooth * 155 + torch.linspace(0, 100, frames).view(-1, 1, 1, 1)).to(torch.uint8)


def write_folder(
    root: Path, prompts: Sequence[str], *, fps: int = 10, frames: int = 5, size: int = 32, copy: bool = False
) -> Path:
    """One video per prompt; ``copy``: all of them the same file."""
    root.mkdir(parents=True)
    videos = {}
    for number, prompt in enumerate(prompts):
        name = f"{number:04d}-00.mp4"
        if copy and number:
            shutil.copyfile(root / "0000-00.mp4", root / name)
        else:
            write_video(root / name, clip(number, frames, size), fps)
        videos[name] = {"prompt": prompt, "prompt_index": number, "sample": 0, "seed": 7000 + number, "sha256": "0"}
    settings = {
        "checkpoint": f"runs/{root.name}", "checkpoint_sha256": "ab" * 32, "weights": "ema", "dtype": "fp32",
        "sampler": {"name": "renoise", "steps": 4, "shift": 5.0}, "size": [frames, size, size], "fps": fps, "seed": 0,
    }  # fmt: skip
    (root / "manifest.json").write_text(json.dumps({"settings": settings, "videos": videos}))
    return root
