"""UCF-101: ``UCF-101/<Class>/v_<Class>_gXX_cYY.avi`` and the official lists in
``ucfTrainTestlist/``.

``classInd.txt`` names the 101 classes (``1 ApplyEyeMakeup``); ``trainlist0N.txt`` has
``Class/v_...avi 1`` a line, ``testlist0N.txt`` the same without the number. Frames are resized
(short side) and cropped to a square.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from scd_sf.data.sources.pixels import PixelClip
from scd_sf.data.sources.raw_files import Refused
from scd_sf.data.sources.video_reader import AS_CODED, read_frames
from scd_sf.files import lines_of, read_text, safe_path
from scd_sf.types import UserError

LARGEST_LIST = 2**24  # bytes
LISTS = "get UCF101TrainTestSplits-RecognitionTask.zip and unpack it beside UCF-101/"


class Ucf101:
    """The clips of a list, in its order; the label is the class's place in ``classInd.txt``, from 0
    on."""

    num_actions = 0

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        fold: int = 3,
        size: int = 64,
        fps: float = 25.0,
        as_coded: bool = False,
    ) -> None:
        """``root`` holds ``UCF-101/`` and ``ucfTrainTestlist/``. ``split``: train or test;
        ``fold``: 1, 2 or 3. Videos are resampled to ``fps``, unless ``as_coded``.

        UserError: a list is missing or malformed, or names no class or a path that leaves the
        folder.
        """
        if split not in ("train", "test"):
            raise UserError(f"UCF-101: split '{split}' is unknown; use train or test")
        self.size, self.fps, self._rate = size, fps, AS_CODED if as_coded else fps
        self.videos, lists = root / "UCF-101", root / "ucfTrainTestlist"
        if not self.videos.is_dir():
            raise UserError(f"{self.videos}: no such folder; get UCF101.rar and unpack it there")
        self.labels = _classes(lists / "classInd.txt")
        numbers = {name: number for number, name in enumerate(self.labels)}
        file = lists / f"{split}list{fold:02d}.txt"
        self.ids: list[str] = []
        self._labels: list[int] = []
        self.refused: list[Refused] = []
        for line, row in enumerate(_lines(file), 1):
            name = row[0]
            path = PurePosixPath(name)
            if (
                len(path.parts) != 2
                or path.suffix != ".avi"
                or path.parts[0] not in numbers
                or len(row) > 2
            ):
                raise UserError(
                    f"{file}:{line}: {' '.join(row)!r} is no '<Class>/<video>.avi'; {LISTS}"
                )
            label = numbers[path.parts[0]]
            if len(row) == 2 and row[1] != str(label + 1):
                raise UserError(
                    f"{file}:{line}: label {row[1]} is not that of {path.parts[0]}; {LISTS}"
                )
            safe_path(self.videos, name, f"{file}:{line}")
            self.ids.append(name)
            self._labels.append(label)
        if not self.ids:
            raise UserError(f"{file}: lists no clip; {LISTS}")

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> PixelClip:
        path = self.videos / self.ids[index]
        frames = read_frames(path, str(path), fps=self._rate, size=self.size)
        return PixelClip(self.ids[index], frames, label=self._labels[index])


def _lines(file: Path) -> list[list[str]]:
    return [line.split() for line in lines_of(read_text(file, LISTS, LARGEST_LIST)) if line.strip()]


def _classes(file: Path) -> tuple[str, ...]:
    rows = _lines(file)
    if not rows or any(
        len(row) != 2 or row[0] != str(number) for number, row in enumerate(rows, 1)
    ):
        raise UserError(f"{file}: its lines must be '1 <Class>', '2 <Class>' ..; {LISTS}")
    return tuple(row[1] for row in rows)
