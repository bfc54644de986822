"""The last frames of a clip, kept for a download: an mp4 and its manifest."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from scd_sf.data.clips import video_writer
from scd_sf.types import UserError

MOST_BYTES = 2**30  # of kept frames
MOST_CHANGES = 1000  # changes of the prompt that are remembered


@dataclass(frozen=True)
class KeptClip:
    """A moment of a :class:`Recording`, which goes on: chunks (F, 3, H, W) uint8 whose first frame
    is ``first``, and changes of the prompt as (frame, prompt, history); ``strengths`` of a camera's
    frames as (frame, strength), each of which holds until the next, the last ones of them."""

    chunks: tuple[Tensor, ...]
    first: int
    changes: tuple[tuple[int, str, str], ...]
    lost_changes: int
    strengths: tuple[tuple[int, float], ...] = ()


class Recording:
    """The chunks of a clip that are kept: the last ``frames`` frames, and no more than ``limit``
    bytes. Not for two threads at once."""

    def __init__(self, frames: int, limit: int = MOST_BYTES) -> None:
        self._frames, self._limit = frames, limit
        self._chunks: deque[Tensor] = deque()
        self._bytes = self._held = self._first = 0
        self._changes: deque[tuple[int, str, str]] = deque(maxlen=MOST_CHANGES)
        self._num_changes = 0
        self._strengths: deque[tuple[int, float]] = deque(maxlen=MOST_CHANGES)

    def add(self, frames_F3HW: Tensor) -> None:
        """The next chunk. Old ones go; the last one always stays."""
        self._chunks.append(frames_F3HW)
        self._held += len(frames_F3HW)
        self._bytes += frames_F3HW.nbytes
        while len(self._chunks) > 1 and (
            self._held - len(self._chunks[0]) >= self._frames or self._bytes > self._limit
        ):
            oldest = self._chunks.popleft()
            self._held -= len(oldest)
            self._bytes -= oldest.nbytes
            self._first += len(oldest)

    def changed(self, frame: int, prompt: str, history: str) -> None:
        """Another prompt holds from ``frame`` on."""
        self._changes.append((frame, prompt, history))
        self._num_changes += 1

    def with_strength(self, frame: int, strength: float) -> None:
        """The strength from ``frame`` on, if it is another one."""
        if not self._strengths or self._strengths[-1][1] != strength:
            self._strengths.append((frame, strength))

    def kept(self) -> KeptClip:
        """What there is now."""
        lost = self._num_changes - len(self._changes)
        changes, strengths = tuple(self._changes), tuple(self._strengths)
        return KeptClip(tuple(self._chunks), self._first, changes, lost, strengths)


def as_zip(
    kept: KeptClip,
    fps: int,
    crf: int,
    record: Mapping[str, object],
    is_wanted: Callable[[], bool] = lambda: True,
) -> bytes:
    """``video.mp4`` and ``manifest.json`` in one archive. ``record``: of the clip and the settings,
    as JSON values. ``is_wanted`` is asked before each chunk. UserError: no frame is kept yet, or the
    file is not wanted any more."""
    if not kept.chunks:
        raise UserError("nothing has been made yet; press start first")
    with tempfile.TemporaryDirectory(prefix="scd-serve-") as folder:
        path = Path(folder) / "video.mp4"
        with video_writer(path, fps, crf=crf) as append:
            for chunk in kept.chunks:
                if not is_wanted():
                    raise UserError("nobody waits for the download any more")
                append(chunk)
        video = path.read_bytes()
    manifest = {
        **record,
        "then": [list(change) for change in kept.changes],
        "then_forgotten": kept.lost_changes,
        "camera_strengths": [list(change) for change in kept.strengths],
        "first_frame": kept.first,
        "frames": sum(len(chunk) for chunk in kept.chunks),
        "sha256": hashlib.sha256(video).hexdigest(),
    }
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("video.mp4", video)
        file.writestr("manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return archive.getvalue()
