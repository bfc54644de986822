"""Features of one latent frame at every step, kept in files: memory holds one step of one block.

Letters: S steps, T tokens, E width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor


class FeatureStore:
    """fp32 (clips, S, T, E) per block and frame in ``folder``; rows are written as they come, read by slices of tokens.

    ``room``: a slice has about as many numbers as this many tokens of one step.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self._shapes: dict[tuple[int, int], tuple[int, ...]] = {}

    def write(self, block: int, frame: int, step: int, x_BTE: Tensor) -> None:
        """A step's tokens of every clip."""
        key, clips = (block, frame), len(x_BTE)
        shape = (clips, self.steps, *x_BTE.shape[1:])
        mode: Literal["r+", "w+"] = "r+" if key in self._shapes else "w+"
        self._shapes[key] = shape
        file = np.memmap(self._path(*key), np.float32, mode, shape=shape)
        file[:, step] = x_BTE.float().cpu().numpy()
        file.flush()

    def frames(self) -> list[tuple[int, int]]:
        """(block, frame) of all that was written."""
        return sorted(self._shapes)

    def tokens(self, block: int, frame: int) -> Iterator[Tensor]:
        """fp64 (clips, S, t, E), a few tokens at a time: no slice is larger than one step's features."""
        shape = self._shapes[block, frame]
        file = np.memmap(self._path(block, frame), dtype=np.float32, mode="r", shape=shape)
        width = max(1, shape[2] // self.steps)
        for start in range(0, shape[2], width):
            yield torch.from_numpy(np.array(file[:, :, start : start + width])).double()

    def step(self, block: int, frame: int, step: int) -> Tensor:
        """fp64 (clips, T, E)."""
        shape = self._shapes[block, frame]
        file = np.memmap(self._path(block, frame), dtype=np.float32, mode="r", shape=shape)
        return torch.from_numpy(np.array(file[:, step])).double()

    def _path(self, block: int, frame: int) -> Path:
        return self.folder / f"block_{block:03d}_frame_{frame:03d}.f32"
