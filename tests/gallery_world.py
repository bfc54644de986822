"""Folders of samples on disk, as ``scd sample`` writes them, with real H.264 videos."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scd_sf.data.clips import write_video
from scd_sf.files import sha256_file


def clip(seed: int, frames: int = 5, size: int = 32) -> Tensor:
    """Smooth colours, uint8 (F, 3, size, size); each frame of its own brightness, far from its
    neighbours'."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).expand(
        frames, -1, -1, -1
    )
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    levels = torch.arange(frames) * 11 % frames * (100 / max(1, frames - 1))
    return (smooth * 155 + levels.view(-1, 1, 1, 1)).to(torch.uint8)


def write_folder(
    root: Path,
    prompts: Sequence[str],
    *,
    fps: int = 10,
    frames: int = 5,
    size: int = 32,
    samples: int = 1,
    padding: int = 0,
) -> Path:
    """``samples`` videos per prompt. ``padding``: instead of different videos one, made so many
    bytes longer by a box that players pass over, different in each file."""
    root.mkdir(parents=True)
    videos: dict[str, dict[str, object]] = {}
    first = b""
    for number, prompt in enumerate(prompts):
        for sample in range(samples):
            name = f"{number:04d}-{sample:02d}.mp4"
            if padding and first:
                (root / name).write_bytes(
                    first + struct.pack(">I4s", padding + 8, b"free") + os.urandom(padding)
                )
            else:
                write_video(root / name, clip(number + 100 * sample, frames, size), fps)
                first = (root / name).read_bytes()
            videos[name] = {
                "prompt": prompt,
                "prompt_index": number,
                "sample": sample,
                "seed": 7000 + number + 100 * sample,
                "sha256": sha256_file(root / name),
            }
    settings = {
        "checkpoint": f"runs/{root.name}",
        "checkpoint_sha256": "ab" * 32,
        "weights": "ema",
        "dtype": "fp32",
        "sampler": {"name": "renoise", "steps": 4, "shift": 5.0},
        "size": [frames, size, size],
        "fps": fps,
        "seed": 0,
    }
    (root / "manifest.json").write_text(json.dumps({"settings": settings, "videos": videos}))
    return root


def change(root: Path, act: Callable[[dict[str, Any]], object]) -> Path:
    """The folder with ``act`` done to its manifest."""
    manifest = json.loads((root / "manifest.json").read_text())
    act(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root
