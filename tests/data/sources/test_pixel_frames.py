"""Which frames a tokenizer's training sees, from memory and from the source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from scd_sf.data.clips import write_video
from scd_sf.data.sources.pixel_frames import PixelFrames, to_unit
from scd_sf.data.sources.pixel_sources import PixelsConfig, open_pixels
from scd_sf.data.sources.pixels import PixelClip
from scd_sf.types import UserError


@dataclass
class Numbered:
    """Every pixel of frame f of clip i is 20 i + f."""

    clips: int = 5
    frames: int = 12
    wide: int = 8
    shift: int = 0
    num_actions: int = 0
    labels: tuple[str, ...] = ()
    fps: float = 20.0

    @property
    def ids(self) -> list[str]:
        return [f"clip{i}" for i in range(self.clips)]

    def __len__(self) -> int:
        return self.clips

    def read(self, index: int) -> PixelClip:
        values = torch.arange(self.frames) + 20 * index + self.shift
        width = self.wide if index == 2 else 8
        return PixelClip(
            self.ids[index], values.to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 8, width)
        )


def numbers(frames: torch.Tensor) -> list[int]:
    return [int(value) for value in frames[:, 0, 0, 0]]


def test_from_memory_and_from_the_source() -> None:
    kept, live = PixelFrames(Numbered(), "d", 4, every=3), PixelFrames(Numbered(), "d", 4)
    assert numbers(kept.frames(1)) == [20, 23, 26, 29] and len(live.frames(1)) == 12
    for source, apart in ((kept, 3), (live, 1)):
        drawn = [
            numbers(source.batch([4, 0], 2, 1, torch.Generator().manual_seed(seed)))
            for seed in range(40)
        ]
        assert all(b - a == apart and d - c == apart and a >= 80 and d < 12 for a, b, c, d in drawn)
        assert {row[0] for row in drawn} == set(range(80, 92 - apart, apart))
        again = source.batch([4, 0], 2, 1, torch.Generator().manual_seed(3))
        assert numbers(again) == drawn[3] and again.shape == (4, 3, 8, 8)
    with pytest.raises(UserError, match="a clip has 4 frames, 5 are needed"):
        kept.batch([0], 3, 2, torch.Generator())


def test_spread_and_limit() -> None:
    frames = PixelFrames(Numbered(), "d", 4, limit=2)
    assert frames.indices == [0, 2] and len(frames) == 2
    assert numbers(frames.spread(6)) == [0, 4, 8, 40, 44, 48]
    assert numbers(PixelFrames(Numbered(), "d", 4).spread(2)) == [0, 40]


def test_hash_is_of_what_is_kept() -> None:
    hashes = {
        PixelFrames(clips, "d", 4, every=every, limit=limit).hash
        for clips, every, limit in (
            (Numbered(), 3, 0),
            (Numbered(), 4, 0),
            (Numbered(), 0, 0),
            (Numbered(), 3, 2),
            (Numbered(shift=1), 3, 0),
        )
    }
    assert len(hashes) == 5
    assert PixelFrames(Numbered(), "d", 4, every=3).hash in hashes


def test_sizes() -> None:
    with pytest.raises(
        UserError, match=re.escape("d: clip0: 8x8; both must be multiples of the tokenizer's 16")
    ):
        PixelFrames(Numbered(), "d", 16)
    with pytest.raises(UserError, match=re.escape("d: clip2: 12x8 where other clips are 8x8")):
        PixelFrames(Numbered(wide=12), "d", 4, every=1)


def test_to_unit() -> None:
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_teco_folders(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "maze"
    folder.mkdir(parents=True)
    for number in range(2):
        write_video(
            folder / f"{number}.mp4",
            torch.full((4, 3, 16, 16), 100 * number, dtype=torch.uint8),
            20,
        )
        np.savez(folder / f"{number}.npz", actions=np.array([0, 1, 2, 1]))
    clips = open_pixels(PixelsConfig(root=str(tmp_path)))
    assert len(clips) == 2 and clips.num_actions == 3
    clip = clips.read(1)
    assert clip.frames_F3HW.shape == (4, 3, 16, 16) and clip.actions_F is not None
    assert (
        clip.actions_F.tolist() == [0, 1, 2, 1] and abs(int(clip.frames_F3HW[0, 0, 0, 0]) - 100) < 3
    )
    np.savez(folder / "1.npz", actions=np.array([0, 1, 2, 3]))
    with pytest.raises(UserError, match=r"1\.npz"):
        clips.read(1)
    (folder / "0.npz").unlink()
    with pytest.raises(UserError, match=r"0\.npz"):
        clips.read(0)
    for config in (PixelsConfig(), PixelsConfig(root=str(tmp_path), split="test")):
        with pytest.raises(UserError):
            open_pixels(config)
