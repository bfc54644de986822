"""TECO's data sets: Minecraft (``X.mp4`` with ``X.npz`` beside it) and DMLab (``X.npz`` with the
video inside).

``{train,test}/<folder>/X.mp4`` (128x128, 300 frames) and ``X.npz`` with ``actions`` (F,) of whole
numbers; DMLab's ``X.npz`` has ``video`` uint8 (F, H, W, 3) too. Read from folders, or in place from
tars, also from the parts of one (``minecraft.tar.partaa`` .. as the Internet Archive has them).
``actions[f]`` goes with frame f, as FAR reads them: what led from frame f-1 to frame f.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from scd_sf.data.sources.pixels import PixelClip
from scd_sf.data.sources.raw_files import COPY, Refused, actions_of, arrays_of, open_raw
from scd_sf.data.sources.video_reader import AS_CODED, read_frames, resize_crop
from scd_sf.types import UserError

SUFFIXES = (".mp4", ".npz")


class Teco:
    """The clips of one split, in the order of their paths. See the module; errors as in
    ``PixelClips``."""

    labels: tuple[str, ...] = ()

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        num_actions: int = 3,
        fps: float = 20.0,
        size: int = 0,
        as_coded: bool = False,
    ) -> None:
        """``num_actions``: Minecraft's and DMLab's files hold 3 (TECO's own models count 6); every
        clip is checked. ``size``: resize to a square of so many pixels; 0: as it is. A frame
        belongs to each action, so a video of another rate than ``fps`` is malformed, unless
        ``as_coded``. UserError: no clip of this split."""
        self.num_actions, self.fps, self.size = num_actions, fps, size
        self._rate = AS_CODED if as_coded else fps
        self._files = open_raw(root, SUFFIXES)
        self.refused = list(self._files.refused)
        suffixes_of: dict[str, set[str]] = {}
        for name in self._files.names:
            path = PurePosixPath(name)
            if split in path.parts[:-1]:  # a tar may hold the split inside a folder of its own
                suffixes_of.setdefault(str(path.with_suffix("")), set()).add(path.suffix)
        self._videos = {
            stem: ".mp4" in suffixes
            for stem, suffixes in sorted(suffixes_of.items())
            if ".npz" in suffixes
        }
        self.ids = list(self._videos)
        stems = sorted(stem for stem, suffixes in suffixes_of.items() if ".npz" not in suffixes)
        self.refused += [
            Refused(self._files.where(f"{stem}.mp4"), "no .npz with actions beside it")
            for stem in stems
        ]
        if not self.ids:
            raise UserError(
                f"{root}: no clip of split '{split}' ({split}/<folder>/X.mp4 and X.npz); check the path"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> PixelClip:
        stem = self.ids[index]
        where = self._files.where(f"{stem}.npz")
        arrays = arrays_of(self._files.read(f"{stem}.npz"), ("actions", "video"), where)
        if self._videos[stem]:
            name = f"{stem}.mp4"
            frames = read_frames(
                self._files.read(name),
                self._files.where(name),
                fps=self._rate,
                exact=True,
                size=self.size,
            )
        else:
            frames = video_of(arrays.get("video"), where, self.size)
        return PixelClip(
            stem, frames, actions_of(arrays.get("actions"), len(frames), self.num_actions, where)
        )


def video_of(array: np.ndarray | None, where: str, size: int) -> Tensor:
    """uint8 (F, 3, H, W) of a stored (F, H, W, 3). UserError: none, or another shape or type."""
    if array is None:
        raise UserError(f"{where}: has neither an .mp4 beside it nor 'video' in it; {COPY}")
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8 or not array.size:
        raise UserError(
            f"{where}: 'video' is {array.dtype} {array.shape}, not uint8 (F, H, W, 3); {COPY}"
        )
    pictures = np.stack([resize_crop(picture, size) for picture in array]) if size else array
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
