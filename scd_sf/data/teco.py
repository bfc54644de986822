"""Clips in TECO's layout: ``{train,test}/<anything>/NAME.mp4`` with ``NAME.npz`` beside it (int64 ``actions``).

Letters: F frames, H W pixel height and width.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scd_sf.data.clips import read_video
from scd_sf.data.pixels import PixelClip, PixelClips
from scd_sf.types import UserError


class TecoClips:
    """One split, in the order of the paths; see :class:`scd_sf.data.pixels.PixelClips`."""

    def __init__(self, root: Path, split: str, num_actions: int = 3, fps: float = 20.0) -> None:
        self.root, self._num_actions, self._fps = root / split, num_actions, fps
        self._paths = sorted(self.root.glob("*/*.mp4"))
        if not self._paths:
            raise UserError(f"{self.root}: no */*.mp4 in it; give the folder that holds train/ and test/")

    @property
    def ids(self) -> list[str]:
        return [path.relative_to(self.root).with_suffix("").as_posix() for path in self._paths]

    @property
    def num_actions(self) -> int:
        return self._num_actions

    @property
    def labels(self) -> tuple[str, ...]:
        return ()

    @property
    def fps(self) -> float:
        return self._fps

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> PixelClip:
        """See the protocol."""
        path = self._paths[index]
        frames = read_video(path)
        return PixelClip(self.ids[index], frames, _actions(path.with_suffix(".npz"), len(frames), self._num_actions))


def _actions(path: Path, frames: int, count: int) -> Tensor:
    try:
        with np.load(path) as found:
            actions = np.asarray(found["actions"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no 'actions' can be read from it ({error}); make the clip again") from error
    if actions.shape != (frames,) or actions.dtype.kind not in "iu" or not np.all((0 <= actions) & (actions < count)):
        raise UserError(f"{path}: 'actions' must be {frames} integers in 0..{count - 1}; make the clip again")
    return torch.from_numpy(actions.astype(np.int64))


def open_pixels(kind: str, root: Path, split: str) -> PixelClips:
    """The clips of one split. ``kind``: teco."""
    if kind != "teco":
        raise UserError(f"data kind is {kind!r}; it must be 'teco'")
    return TecoClips(root, split)
