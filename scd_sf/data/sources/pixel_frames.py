"""Single frames of pixel clips for training an image tokenizer: which ones a step sees, and where
they are kept.

Letters: N frames, H W pixel height and width; frames are uint8 (N, 3, H, W), RGB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from scd_sf.data.sources.pixels import PixelClips
from scd_sf.files import hash_json
from scd_sf.types import UserError


class PixelFrames:
    """The frames of a source, by clip. With ``every`` > 0 each ``every``-th frame of every
    clip is decoded once and kept in memory. With 0 all frames of a clip are decoded at each access.

    ``hash`` says which frames these are: their contents where they are kept, the clips' ids where
    they are not.
    """

    def __init__(
        self, clips: PixelClips, name: str, spatial: int, *, every: int = 0, limit: int = 0
    ) -> None:
        """``limit``: so many clips at most, spread evenly (0: all). UserError: sizes that differ or
        are no multiple of ``spatial``."""
        count = min(limit or len(clips), len(clips))
        self.clips, self.name, self.every = clips, name, every
        self.indices = [index * len(clips) // count for index in range(count)]
        self._size: tuple[int, ...] = ()
        self._frames: list[Tensor] = []
        digest = hashlib.sha256()
        for index in self.indices if every else self.indices[:1]:
            frames = self._read(index, spatial)[:: every or 1]
            if every:
                self._frames.append(frames.clone())
                digest.update(frames.contiguous().numpy().tobytes())
        ids = [clips.ids[index] for index in self.indices]
        self.hash = hash_json([ids, every, digest.hexdigest() if every else ""])

    def __len__(self) -> int:
        return len(self.indices)

    def _read(self, index: int, spatial: int = 1) -> Tensor:
        frames, where = self.clips.read(index).frames_F3HW, f"{self.name}: {self.clips.ids[index]}"
        height, width = frames.shape[2:]
        self._size = self._size or (height, width)
        if (height, width) != self._size:
            raise UserError(
                f"{where}: {width}x{height} where other clips are {self._size[1]}x{self._size[0]}; resize"
            )
        if height % spatial or width % spatial:
            raise UserError(
                f"{where}: {width}x{height}; both must be multiples of the tokenizer's {spatial}: resize"
            )
        return frames

    def frames(self, clip: int) -> Tensor:
        """The selected frames of a clip, uint8 (F, 3, H, W)."""
        return self._frames[clip] if self.every else self._read(self.indices[clip])

    def batch(self, clips: Sequence[int], per_clip: int, step: int, rng: torch.Generator) -> Tensor:
        """(N, 3, H, W): ``per_clip`` frames of each clip, ``step`` apart (among kept ones), from a
        random place."""
        parts = []
        for clip in clips:
            frames = self.frames(clip)
            last = len(frames) - 1 - (per_clip - 1) * step
            if last < 0:
                num_frames, num_needed = len(frames), 1 + (per_clip - 1) * step
                raise UserError(
                    f"{self.name}: a clip has {num_frames} frames, {num_needed} are needed; lower per_clip or step"
                )
            first = int(torch.randint(last + 1, (), generator=rng))
            parts.append(frames[first : first + 1 + (per_clip - 1) * step : step])
        return torch.cat(parts)

    def spread(self, count: int) -> Tensor:
        """About ``count`` frames, at most ``count``, evenly over clips and time: (N, 3, H, W)."""
        clips = [
            index * len(self) // min(count, len(self)) for index in range(min(count, len(self)))
        ]
        per_clip = max(1, count // len(clips))
        parts = []
        for clip in clips:
            frames = self.frames(clip)
            parts.append(frames[[index * len(frames) // per_clip for index in range(per_clip)]])
        return torch.cat(parts)


def to_unit(frames: Tensor) -> Tensor:
    """uint8 -> fp32 in [-1, 1]."""
    return frames.float() / 127.5 - 1.0
