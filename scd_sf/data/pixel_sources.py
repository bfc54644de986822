"""Any source of pixel clips by name. Here: TECO's (``split/<folder>/X.mp4``, beside it ``X.npz`` with ``actions``)."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from scd_sf.data.clips import read_video
from scd_sf.data.pixels import PixelClip, PixelClips
from scd_sf.types import UserError

Kind = Literal["teco"]


@dataclass(frozen=True)
class PixelsConfig:
    """Which clips: ``root`` holds the splits."""

    kind: Kind = "teco"
    root: str = ""
    split: str = "train"
    num_actions: int = 3


class Teco:
    """The clips of one split, in the order of their paths; see :class:`scd_sf.data.pixels.PixelClips`."""

    labels: tuple[str, ...] = ()
    fps = 20.0

    def __init__(self, root: Path, split: str, num_actions: int) -> None:
        self.root, self.num_actions = root / split, num_actions
        self._paths = sorted(self.root.glob("*/*.mp4"))
        self.ids = [path.relative_to(self.root).with_suffix("").as_posix() for path in self._paths]
        if not self._paths:
            raise UserError(f"{self.root}: no */*.mp4 in it; give the folder that holds the splits")

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> PixelClip:
        """See the protocol."""
        path = self._paths[index].with_suffix(".npz")
        frames = read_video(self._paths[index])
        try:
            with np.load(path) as found:
                actions = np.asarray(found["actions"])
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: no 'actions' can be read from it ({error}); make the clip again") from error
        if actions.shape != (len(frames),) or not set(actions.tolist()) <= set(range(self.num_actions)):
            wanted = f"{len(frames)} integers in 0..{self.num_actions - 1}"
            raise UserError(f"{path}: 'actions' must be {wanted}; make the clip again")
        return PixelClip(self.ids[index], frames, torch.from_numpy(actions.astype(np.int64)))


def open_pixels(config: PixelsConfig) -> PixelClips:
    """The clips that a config names. UserError: they are not there."""
    if not config.root:
        raise UserError("pixels: 'root' is empty; give the folder of the data set")
    return Teco(Path(config.root), config.split, config.num_actions)
