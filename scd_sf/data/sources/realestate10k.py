"""RealEstate10K: pixelSplat's chunks of JPEG frames, and the original camera files.

``{train,test}/000000.torch`` are lists of dictionaries (``key``, ``url``, ``timestamps`` (N,),
``cameras`` (N, 18), ``images``: N JPEG files as uint8 (bytes,)); ``index.json`` says which key lies
in which chunk. A camera row is ``fx fy cx cy 0 0`` (as shares of the picture) and the 3x4
world-to-camera matrix, row after row; a line of a camera file has the timestamp (microseconds)
before it: 19 numbers, after a first line with the video's address.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scd_sf.data.sources.picture_reader import picture_of
from scd_sf.data.sources.pixels import PixelClip
from scd_sf.data.sources.raw_files import COPY, LARGEST, Refused, tensor_file
from scd_sf.data.sources.video_reader import LARGEST_FRAME, resize_crop
from scd_sf.files import foreign, read_bytes, read_json, safe_path
from scd_sf.types import UserError

COLUMNS = 18
CHUNKS_IN_MEMORY = 2  # about 100 MB each


class RealEstate10K:
    """The clips of a split, chunk after chunk."""

    labels: tuple[str, ...] = ()
    num_actions = 0

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        size: int = 256,
        frames: int = 64,
        cameras: bool = False,
        fps: float = 30.0,
    ) -> None:
        """``frames``: the first so many of a clip (shorter clips are malformed); 0: all.
        ``cameras``: check them when a clip is read. UserError: no index, or one that does not fit
        the files."""
        self.root = root / split
        self.size = size
        self.frames = frames
        self.fps = fps
        self._check_cameras = cameras
        where = self.root / "index.json"
        index = read_json(
            where, "give the folder that holds train/ and test/ of pixelSplat's chunks"
        )
        if not index or any(not isinstance(file, str) for file in index.values()):
            raise UserError(f"{where}: must be {{key: file}} with at least one clip; {COPY}")
        chunks = {
            str(file): safe_path(self.root, str(file), f"{where}: a file")
            for file in index.values()
        }
        missing_names = {name for name, path in chunks.items() if not path.is_file()}
        self.refused = [
            Refused(str(chunks[name]), "listed in index.json but missing")
            for name in sorted(missing_names)
        ]
        chunk_of = {key: str(file) for key, file in index.items() if file not in missing_names}
        self._chunk_of = dict(sorted(chunk_of.items(), key=lambda item: (item[1], item[0])))
        self.ids = list(self._chunk_of)
        if not self.ids:
            raise UserError(f"{where}: none of its {len(chunks)} chunks is there; {COPY}")
        self._recent: OrderedDict[str, dict[str, dict[str, object]] | UserError] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> PixelClip:
        where, item = self._item(index)
        images = item.get("images")
        if not isinstance(images, list) or len(images) < max(1, self.frames):
            count = len(images) if isinstance(images, list) else "no"
            raise UserError(
                f"{where}: {count} images, {max(1, self.frames)} are needed; ask for fewer frames"
            )
        if self._check_cameras:
            _check_cameras(item, len(images), where)
        clip_images = enumerate(images[: self.frames or None])
        pictures = [_picture(image, self.size, where, number) for number, image in clip_images]
        return PixelClip(
            self.ids[index], torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        )

    def _item(self, index: int) -> tuple[str, dict[str, object]]:
        key = self.ids[index]
        name = self._chunk_of[key]
        with self._lock:  # threads that read neighbours wait for their common chunk
            if name not in self._recent:
                self._recent[name] = _chunk(self.root / name)
                while len(self._recent) > CHUNKS_IN_MEMORY:
                    self._recent.popitem(last=False)
            self._recent.move_to_end(name)
            chunk = self._recent[name]
        if isinstance(chunk, UserError):
            raise chunk
        where = f"{self.root / name}[{key}]"
        if key not in chunk:
            raise UserError(f"{where}: index.json names it, the chunk does not hold it; {COPY}")
        return where, chunk[key]


def _check_cameras(item: dict[str, object], images: int, where: str) -> None:
    """UserError unless a clip's cameras are (images, 18) and finite, with as many timestamps."""
    rows, times = item.get("cameras"), item.get("timestamps")
    good = (
        isinstance(rows, Tensor) and rows.shape == (images, COLUMNS) and bool(rows.isfinite().all())
    )
    if not good or not isinstance(times, Tensor) or times.shape != (images,):
        raise UserError(
            f"{where}: 'cameras' must be finite ({images}, {COLUMNS}) with 'timestamps'; {COPY}"
        )


def _chunk(path: Path) -> dict[str, dict[str, object]] | UserError:
    """A chunk's clips by key, or the error of an unreadable chunk, which every clip in it then
    raises."""
    try:
        return _read_chunk(path)
    except UserError as error:
        return error


def _read_chunk(path: Path) -> dict[str, dict[str, object]]:
    rows = tensor_file(read_bytes(path, COPY, 4 * LARGEST), str(path))
    if not isinstance(rows, list) or any(
        not isinstance(row, dict) or "key" not in row for row in rows
    ):
        raise UserError(f"{path}: not a list of clips with 'key'; {COPY}")
    return {str(row["key"]): row for row in rows}


def _picture(image: object, size: int, where: str, number: int) -> np.ndarray:
    """uint8 (size, size, 3) of a JPEG file's bytes."""
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 1:
        raise UserError(f"{where}: image {number} is not the bytes of a JPEG file; {COPY}")
    if image.numel() > image.untyped_storage().nbytes():  # an expanded view of few bytes
        raise UserError(f"{where}: image {number} claims {image.numel()} bytes; {COPY}")
    place = f"{where}: image {number}"
    with foreign(f"{place} cannot be decoded", COPY):
        file = io.BytesIO(image.numpy().tobytes())
        picture = picture_of(file, place, LARGEST_FRAME, ("JPEG",))
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return resize_crop(pixels, size)
