"""What every source of pixel clips looks like: TECO's and FAR's Minecraft, UCF-101, RealEstate10K.

Letters: F frames, H W pixel height and width; videos are uint8 (F, 3, H, W), RGB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class PixelClip:
    """One clip. ``actions_F`` (F,) int64: ``actions_F[f]`` is what led from frame f-1 to frame f; None: no actions.
    ``label``: index into the source's ``labels``; None: none."""

    id: str
    frames_F3HW: Tensor
    actions_F: Tensor | None = None
    label: int | None = None


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
