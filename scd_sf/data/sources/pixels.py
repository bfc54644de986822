"""The interface of all sources of pixel clips: TECO's and FAR's Minecraft, UCF-101, RealEstate10K.

Letters: F frames, H W pixel height and width; videos are uint8 (F, 3, H, W), RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from scd_sf.data.sources.raw_files import Refused


@dataclass(frozen=True)
class PixelClip:
    """One clip. ``actions_F`` (F,) int64 or None: ``actions_F[f]`` led from frame f-1 to frame f.
    ``label`` is an index into the source's ``labels``, or None."""

    id: str
    frames_F3HW: Tensor
    actions_F: Tensor | None = None
    label: int | None = None

    @property
    def frames(self) -> int:
        return len(self.frames_F3HW)


class PixelClips(Protocol):
    """An ordered list of clips on disk. Opening lists and checks names only; reading decodes."""

    @property
    def ids(self) -> list[str]: ...

    @property
    def num_actions(self) -> int:
        """0: no actions."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Names; empty: no labels."""
        ...

    @property
    def fps(self) -> float: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> PixelClip:
        """All frames of a clip. UserError (file, what is wrong) when it is malformed."""
        ...


class SourceClips(PixelClips, Protocol):
    """The clips of a data set that others made."""

    @property
    def refused(self) -> list[Refused]:
        """Files that were found when the source was opened but are not among its clips, with a
        reason each."""
        ...


class Subset:
    """Some clips of another list, in the order of ``indices``."""

    def __init__(self, clips: SourceClips, indices: Sequence[int]) -> None:
        self.clips, self.indices = clips, list(indices)
        self.num_actions, self.labels, self.fps = clips.num_actions, clips.labels, clips.fps
        self.refused = clips.refused
        self.ids = [clips.ids[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> PixelClip:
        return self.clips.read(self.indices[index])
