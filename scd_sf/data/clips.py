"""Captioned pixel clips on disk, and the project's only writer of mp4 files (the reader is
video_reader.py).

A clip directory holds ``manifest.json`` (format, shape, counts, the sha256 of ``clips.jsonl``),
``clips.jsonl`` (one :class:`Clip` per line, with the size and sha256 of its file) and
``clips/<split>/<id>.mp4``. So one hash covers all. Letters: F pixel frames, H W pixel height and
width; videos are uint8 tensors (F, 3, H, W) in 0..255, RGB.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, Self

import av
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from scd_sf.data.manifest import MANIFEST, Format, read_index, write_index
from scd_sf.data.sources.video_reader import AS_CODED, read_frames
from scd_sf.files import Json, new_file, parse_json, safe_path, sha256_file, typed, write_json
from scd_sf.types import UserError

INDEX = "clips.jsonl"
AGAIN = "make the clips again"
CLIPS = Format(
    "scd-sf-clips",
    1,
    "no such file; make the clips first (python data_prep/make_doom_clips.py)",
    "delete the directory and make the clips again",
)
Chroma = Literal["yuv420p", "yuv444p"]


@dataclass(frozen=True)
class Clip:
    """One clip: one place, one camera motion, two ways to say it.

    ``actions[f]`` is the motion that led to frame f (F entries, frame 0 too: the motion is under
    way when the clip starts). ``degrees_per_frame`` is the yaw, positive to the right.
    ``held_out_caption`` uses a paraphrase that no training caption uses. ``path`` is relative to
    the directory, with forward slashes.
    """

    id: str
    split: str
    place: str
    motion: str
    actions: tuple[str, ...]
    degrees_per_frame: float
    caption: str
    held_out_caption: str
    seed: int
    tries: int
    path: str
    bytes: int
    sha256: str

    def to_json(self) -> str:
        """One line of ``clips.jsonl``: fixed key order, so equal clips give equal bytes."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str, where: str) -> Self:
        """Parse one line. Raises UserError (naming ``where``) for bad json, missing or unknown
        fields, or a type."""
        return typed(parse_json(line, where, AGAIN), cls, where, AGAIN, exact=True)


def write_clips(
    root: Path, clips: Sequence[Clip], shape: Mapping[str, int], about: Mapping[str, object]
) -> None:
    """Write ``clips.jsonl``, then ``manifest.json``, for files that exist already.

    ``shape`` holds frames, height, width (pixels) and fps; ``about`` says where the clips come from
    (any json).
    """
    write_index(root / INDEX, clips)
    sections = {"clips_sha256": sha256_file(root / INDEX), "shape": dict(shape), **about}
    write_json(root / MANIFEST, CLIPS.sealed(sections))


@contextmanager
def video_writer(
    path: Path, fps: float | Fraction, *, crf: int = 16, chroma: Chroma = "yuv420p"
) -> Iterator[Callable[[Tensor], None]]:
    """A context with a function that appends uint8 RGB frames (F, 3, H, W) to an H.264 mp4, so that
    no whole video is in memory.

    Fast start; ``path`` appears whole at the end of the ``with`` body. ``fps`` in frames per
    second; ``crf`` 0 (best) .. 51. The default chroma plays in every browser; ``yuv444p`` keeps the
    full colour resolution (for training data). One thread, so equal input gives equal bytes. Raises
    UserError for another shape or dtype, odd sizes under ``yuv420p``, or no frame at all.
    """
    reformatter = VideoReformatter()
    with (
        new_file(path) as part,
        av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        # x264's macroblock tree reads memory nobody wrote, with AVX-512: equal frames would give
        # unequal bytes.
        options = {"crf": str(crf), "preset": "veryfast", "x264-params": "mbtree=0"}
        stream.pix_fmt, stream.options = chroma, options
        stream.codec_context.thread_count = 1
        size: list[tuple[int, int]] = []

        def append(frames_F3HW: Tensor) -> None:
            height, width = _check_frames(path, frames_F3HW, chroma)
            if not size:
                stream.width, stream.height = width, height
                size.append((height, width))
            if size != [(height, width)]:
                raise UserError(
                    f"{path}: frames of {width}x{height} after others of {size[0][1]}x{size[0][0]}"
                )
            for picture in frames_F3HW.permute(0, 2, 3, 1).contiguous().cpu().numpy():
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(reformatter.reformat(frame, format=chroma, threads=1)))

        yield append
        if not size:
            raise UserError(f"{path}: no frames were given; nothing is written")
        container.mux(stream.encode())


def _check_frames(path: Path, frames: Tensor, chroma: Chroma) -> tuple[int, int]:
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise UserError(
            f"{path}: needs uint8 frames (F, 3, H, W), got {frames.dtype} {tuple(frames.shape)}"
        )
    height, width = frames.shape[2:]
    if chroma == "yuv420p" and (height % 2 or width % 2):
        raise UserError(
            f"{path}: {width}x{height} has an odd size; yuv420p needs even sizes, or pass chroma='yuv444p'"
        )
    return height, width


def write_video(
    path: Path,
    frames_F3HW: Tensor,
    fps: float | Fraction,
    *,
    crf: int = 16,
    chroma: Chroma = "yuv420p",
) -> None:
    """Write uint8 RGB frames (F, 3, H, W) as a whole; see :func:`video_writer`."""
    _check_frames(path, frames_F3HW, chroma)
    with video_writer(path, fps, crf=crf, chroma=chroma) as append:
        append(frames_F3HW)


def read_video(path: Path, fps: float = AS_CODED) -> Tensor:
    """All frames of a video file as uint8 RGB (F, 3, H, W); see :func:`read_frames`."""
    return read_frames(path, str(path), fps=fps, remedy="write the video again")


@dataclass(frozen=True)
class ClipShape:
    """Number of frames, height and width in pixels, and frames per second of every clip of a
    set."""

    frames: int
    height: int
    width: int
    fps: int


def _shape(manifest: Json, path: Path) -> ClipShape:
    shape = typed(manifest.get("shape"), ClipShape, f"{path}: 'shape'", AGAIN)
    if min(asdict(shape).values()) < 1:
        raise UserError(
            f"{path}: 'shape' must hold numbers from 1 on, not {asdict(shape)}; {AGAIN}"
        )
    return shape


def _inside(root: Path, clip: Clip, where: str) -> Path:
    """The clip's file. Raises UserError for a path that leaves the directory, a missing or a
    truncated file."""
    path = safe_path(root, clip.path, f"{where}: 'path'")
    if not path.is_file():
        raise UserError(f"{path}: listed in clips.jsonl but missing; {AGAIN}")
    if (size := path.stat().st_size) != clip.bytes:
        raise UserError(f"{path}: {size} bytes instead of {clip.bytes} (truncated?); {AGAIN}")
    return path


class ClipSet:
    """The clips of a directory, validated when opened: manifest, the hash of ``clips.jsonl``, every
    path and size.

    ``captioned``: it was indexed from someone's own videos and captions (``encode_latents.py
    --captions``). Contents of the mp4 files are checked by :meth:`verify`. Raises UserError naming
    the file and the remedy.
    """

    def __init__(self, root: Path | str, split: str | None = None) -> None:
        self.root = Path(root)
        manifest = CLIPS.read(self.root)
        shape = _shape(manifest, self.root / MANIFEST)
        self.frames = shape.frames
        self.height = shape.height
        self.width = shape.width
        self.fps = shape.fps
        self.captioned = bool(manifest.get("captioned"))
        index = self.root / INDEX
        all_clips = read_index(index, Clip, manifest.get("clips_sha256"), AGAIN)
        self.hash = str(manifest.get("clips_sha256"))
        splits = sorted({clip.split for clip in all_clips})
        if split is not None and split not in splits:
            raise UserError(f"{index}: no split '{split}'; it holds {', '.join(splits)}")
        self.clips = [clip for clip in all_clips if split in (None, clip.split)]
        self.paths = [_inside(self.root, clip, f"{index}: {clip.id}") for clip in self.clips]
        self.places = sorted({clip.place for clip in all_clips})
        self.motions = sorted({clip.motion for clip in all_clips})

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Clip:
        return self.clips[index]

    def video(self, index: int) -> Tensor:
        """uint8 (F, 3, H, W) in 0..255, at the set's frames per second. UserError: damaged, or of
        another shape."""
        video = read_video(self.paths[index], self.fps)
        count, _, height, width = video.shape
        if (count, height, width) != (self.frames, self.height, self.width):
            raise UserError(
                f"{self.paths[index]}: {count} frames of {width}x{height} at {self.fps} per second, all others have "
                f"{self.frames} of {self.width}x{self.height}; cut and resize them alike"
            )
        return video

    def videos(self, indices: Sequence[int]) -> Tensor:
        """uint8 (B, F, 3, H, W) of the clips at ``indices``."""
        return torch.stack([self.video(index) for index in indices])

    def verify(self) -> None:
        """Compare every file's sha256 with ``clips.jsonl``. Raises UserError for the first that
        changed."""
        for clip, path in zip(self.clips, self.paths, strict=True):
            if sha256_file(path) != clip.sha256:
                raise UserError(
                    f"{path}: contents changed (sha256 differs from clips.jsonl); make the clips again"
                )
