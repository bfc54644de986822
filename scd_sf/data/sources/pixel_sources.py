"""Any source of pixel clips by name: what evaluation and encoding open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scd_sf.data.sources.far import Far
from scd_sf.data.sources.pixels import SourceClips, Subset
from scd_sf.data.sources.realestate10k import RealEstate10K
from scd_sf.data.sources.teco import Teco
from scd_sf.data.sources.ucf101 import Ucf101
from scd_sf.types import UserError

Kind = Literal["teco", "far", "ucf101", "realestate10k"]
SIZES = {"teco": 0, "far": 0, "ucf101": 64, "realestate10k": 256}
FPS = {"teco": 20.0, "far": 0.0, "ucf101": 25.0, "realestate10k": 30.0}


@dataclass(frozen=True)
class PixelsConfig:
    """Which clips. FAR's and MCVD's evaluation on UCF-101 is ``kind=ucf101 split=test fold=3
    every=10 first=256 as_coded=true``; TECO-Minecraft's is ``kind=teco split=test first=256``."""

    kind: Kind = "teco"
    """Which data set, and so which layout on disk."""
    root: str = ""
    """Folder (or tar) of the data set as it is distributed."""
    split: str = "train"
    """train, test, or what else the data set has."""
    list: str = ""
    """kind=far: the JSON list (inside ``root``, or a path of its own)."""
    list_prefix: str = ""
    """kind=far: beginning of the list's paths that is not part of ``root``."""
    num_actions: int = 3
    """kind=teco, far: actions are 0..num_actions-1; checked in every clip."""
    size: int = 0
    """Pixels along a side; 0: the data set's own (UCF-101: 64, RealEstate10K: 256, others as they
    are stored)."""
    fps: float = 0.0
    """Frames per second; 0: the data set's own (Minecraft, DMLab: 20, UCF-101: 25, RealEstate10K:
    30). Videos of another rate are resampled; with an action per frame they are malformed."""
    as_coded: bool = False
    """Take the frames of videos one by one, whatever their timestamps say (as FAR and MCVD do)."""
    frames: int = 0
    """kind=realestate10k: the first so many frames of a clip; 0: all."""
    cameras: bool = False
    """kind=realestate10k: check the cameras, too."""
    fold: int = 3
    """kind=ucf101: which of the three official splits."""
    every: int = 1
    """Only every n-th clip of the list."""
    first: int = 0
    """At most so many clips; 0: all."""

    def __post_init__(self) -> None:
        if self.kind not in SIZES:
            raise UserError(f"pixels: kind is '{self.kind}'; it must be one of {', '.join(SIZES)}")
        if self.num_actions < 1 or self.every < 1 or self.fold not in (1, 2, 3):
            raise UserError("pixels: num_actions and every must be at least 1, fold 1, 2 or 3")
        if min(self.size, self.frames, self.first) < 0 or self.fps < 0:
            raise UserError("pixels: size, frames, first and fps must not be negative")


def open_pixels(config: PixelsConfig) -> SourceClips:
    """The clips that a config names. UserError: they are not there (see the sources' own
    modules)."""
    if not config.root:
        raise UserError("pixels: 'root' is empty; give the folder of the data set")
    clips = _open(
        config, Path(config.root), config.size or SIZES[config.kind], config.fps or FPS[config.kind]
    )
    indices = range(0, len(clips), config.every)[: config.first or None]
    return clips if len(indices) == len(clips) else Subset(clips, indices)


def _open(config: PixelsConfig, root: Path, size: int, fps: float) -> SourceClips:
    as_coded = config.as_coded
    if config.kind == "teco":
        return Teco(
            root,
            config.split,
            num_actions=config.num_actions,
            fps=fps,
            size=size,
            as_coded=as_coded,
        )
    if config.kind == "ucf101":
        return Ucf101(root, config.split, fold=config.fold, size=size, fps=fps, as_coded=as_coded)
    if config.kind == "realestate10k":
        return RealEstate10K(
            root, config.split, size=size, frames=config.frames, cameras=config.cameras, fps=fps
        )
    if not config.list:
        raise UserError("pixels: kind 'far' needs 'list', FAR's JSON list of clips; give it")
    file = root / config.list  # an absolute path stays itself
    file = file if file.is_file() else Path(config.list)
    return Far(
        root,
        file,
        prefix=config.list_prefix,
        num_actions=config.num_actions,
        size=size,
        fps=fps,
        as_coded=as_coded,
    )
