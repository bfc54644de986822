"""Features of latent frames at every step in files, so that memory holds one step of one block.

Letters: S steps, T tokens, E width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import torch
from torch import Tensor

FLOAT = 4  # bytes


class FeatureStore:
    """fp32 (S, clips, T, E) per block and frame in a file of ``folder``; steps come in any order,
    and are read by slices of tokens, none larger than one step's features. A context manager: the
    files are closed at its end.

    ``means``: of the tokens, fp64 (clips, S, E) per block and frame.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder = folder
        self.steps = steps
        self.means: dict[tuple[int, int], Tensor] = {}
        self._files: dict[tuple[int, int], BinaryIO] = {}
        self._shapes: dict[tuple[int, int], tuple[int, ...]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()

    def write(self, block: int, frame: int, step: int, x_BTE: Tensor) -> None:
        """Write a step's tokens (clips, T, E) of a block and frame."""
        key = (block, frame)
        x = x_BTE.detach().float().cpu().contiguous()
        if key not in self._files:
            self._files[key] = self._path(*key).open("w+b")
            self._shapes[key] = (self.steps, *x.shape)
            self.means[key] = torch.zeros(x.shape[0], self.steps, x.shape[2], dtype=torch.float64)
        file = self._files[key]
        file.seek(step * x.numel() * FLOAT)
        file.write(x.numpy().data)
        self.means[key][:, step] = x.double().mean(1)

    def frames(self) -> list[tuple[int, int]]:
        """Every (block, frame) that has features, sorted."""
        return sorted(self._shapes)

    def tokens(self, block: int, frame: int) -> Iterator[Tensor]:
        """Yield the features of all steps as fp64 (clips, S, t, E), a few tokens t at a time."""
        file = self._read(block, frame)
        width = max(1, file.shape[2] // self.steps)
        for start in range(0, file.shape[2], width):
            yield (
                torch.from_numpy(np.array(file[:, :, start : start + width]))
                .double()
                .transpose(0, 1)
            )

    def step(self, block: int, frame: int, step: int) -> Tensor:
        """The features of one step as fp64 (clips, T, E)."""
        return torch.from_numpy(np.array(self._read(block, frame)[step])).double()

    def _read(self, block: int, frame: int) -> np.ndarray:
        self._files[block, frame].flush()
        return np.memmap(
            self._path(block, frame), np.float32, "r", shape=self._shapes[block, frame]
        )

    def _path(self, block: int, frame: int) -> Path:
        return self.folder / f"block_{block:03d}_frame_{frame:03d}.f32"
