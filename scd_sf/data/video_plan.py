"""What becomes of someone's own videos: their size and length, the clips that are cut from them,
and the folder of each.

A video is scanned once (:func:`scan_video`): it is hashed, its first frame decoded, its timestamps
read. :func:`plan_videos` needs nothing else. Frames are counted at the model's rate from here on.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av

from scd_sf.data.sources.raw_files import Refused
from scd_sf.data.sources.video_reader import VideoInfo, check_crop, video_info
from scd_sf.data.video_captions import CaptionedVideo
from scd_sf.files import sha256_file
from scd_sf.types import UserError, plural, printable

WAN_FPS = 16.0
Rest = Literal["drop", "overlap"]
REPAIR = "copy or convert it again"
# Errors of a disk, a network or a machine that is short of something, not of a file.
PASSING = {
    errno.EIO,
    errno.ENOENT,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENODEV,
}


@dataclass(frozen=True)
class VideoScan:
    """What a video file is. ``seconds``: a fraction as text. ``fault``: why it cannot be used, or
    "". ``mtime_ns`` and ``bytes`` tell whether it must be scanned again."""

    file: str
    bytes: int
    mtime_ns: int
    sha256: str = ""
    fault: str = ""
    height: int = 0
    width: int = 0
    coded_frames: int = 0
    seconds: str = "0"

    @property
    def info(self) -> VideoInfo:
        return VideoInfo(self.height, self.width, self.coded_frames, Fraction(self.seconds))


@dataclass(frozen=True)
class CutConfig:
    """How clips are cut from videos."""

    frames: int = 81
    """Frames of a clip."""
    fps: float = WAN_FPS
    """Frames per second, to which all videos are resampled."""
    sizes: tuple[tuple[int, int], ...] = ((832, 480),)
    """(width, height); a video goes to the one of the nearest shape."""
    rest: Rest = "drop"
    """What happens to the end of a video that fills no clip: it is dropped, or a last clip overlaps
    the one before."""
    val: float = 0.05
    """Below 1 the share of the videos that go to val, from 1 on their number."""

    def __post_init__(self) -> None:
        if self.frames < 1 or not 0 < self.fps <= 1000:
            raise UserError(
                f"--frames is {self.frames} and --fps {self.fps:g}; they must be at least 1 and between 0 and 1000"
            )
        if not self.sizes or len(set(self.sizes)) < len(self.sizes):
            raise UserError("--size: give every size once, like 832x480")
        if self.rest not in ("drop", "overlap"):
            raise UserError(f"--rest is '{self.rest}'; use drop or overlap")
        if not self.val >= 0 or (self.val > 1 and self.val % 1):
            raise UserError(
                f"--val is {self.val:g}; give a share below 1 or a whole number of videos"
            )


@dataclass(frozen=True)
class PlannedVideo:
    """One line of ``videos.jsonl``. ``starts``: the first frames of its clips, ``frames`` of the
    video at the model's rate, of which ``unused`` are in no clip. ``kept``: share of the picture
    that the crop leaves. ``enlarged``: the picture is smaller than the clip."""

    file: str
    sha256: str
    caption: str
    folder: str
    size: tuple[int, int]
    source_size: tuple[int, int]
    source_fps: float
    seconds: float
    frames: int
    starts: tuple[int, ...]
    unused: int
    kept: float
    enlarged: bool
    tags: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """The videos that are taken, in name order, those that are not, and sentences for people."""

    videos: list[PlannedVideo]
    refused: list[Refused]
    notes: list[str]

    @property
    def folders(self) -> list[str]:
        """Names of the output folders."""
        return sorted({video.folder for video in self.videos})


def scan_video(root: Path, file: str) -> VideoScan:
    """Hash a video and read its size and length. What is broken has a ``fault``. OSError where the
    disk, not the file, is at fault."""
    path = root / file
    status = path.stat()
    if not status.st_size:
        return VideoScan(file, 0, status.st_mtime_ns, fault="is empty; copy it again")
    try:
        digest = sha256_file(path)
        info = video_info(path, file, REPAIR)
    except UserError as error:
        raise_disk_error(error)
        fault = printable(str(error).removeprefix(f"{file}: ").removeprefix(f"{path}: "))
        return VideoScan(file, status.st_size, status.st_mtime_ns, fault=fault)
    return VideoScan(
        file,
        status.st_size,
        status.st_mtime_ns,
        digest,
        "",
        info.height,
        info.width,
        info.frames,
        str(info.seconds),
    )


def raise_disk_error(error: UserError) -> None:
    """Raise the cause of a reader's error where that is the disk's or the memory's, which may pass:
    the video itself is not at fault."""
    cause = error.__cause__
    if isinstance(cause, MemoryError) or (
        isinstance(cause, OSError)
        and not isinstance(cause, av.FFmpegError)
        and cause.errno in PASSING
    ):
        raise error


def plan_videos(
    videos: Sequence[CaptionedVideo], scans: Mapping[str, VideoScan], cut: CutConfig
) -> Plan:
    """The clips of every video. A video is in one split as a whole, chosen by the hash of its
    contents, unless a table named splits."""
    taken: list[PlannedVideo] = []
    refused: list[Refused] = []
    seen: dict[tuple[str, str], str] = {}
    lengths: list[int] = []
    for video in videos:
        scan = scans[video.file]
        if scan.fault:
            refused.append(Refused(video.file, scan.fault))
            continue
        if (twin := seen.setdefault((scan.sha256, video.caption), video.file)) != video.file:
            refused.append(Refused(video.file, f"has the contents and the caption of {twin}"))
            continue
        frames = scan.info.frames_at(cut.fps)
        lengths.append(frames)
        if frames < cut.frames:
            refused.append(
                Refused(
                    video.file,
                    f"is too short: {frames} frames at {cut.fps:g} per second, a clip has {cut.frames}",
                )
            )
            continue
        planned = _planned(video, scan, frames, cut)
        try:
            width, height = planned.size
            check_crop(scan.height, scan.width, height, width)
        except UserError as error:
            refused.append(Refused(video.file, str(error)))
            continue
        taken.append(planned)
    splits = _splits(videos, taken, cut)
    placed = [_placed(video, splits[video.file], cut) for video in taken]
    return Plan(placed, refused, _notes(placed, lengths, cut))


def _planned(video: CaptionedVideo, scan: VideoScan, frames: int, cut: CutConfig) -> PlannedVideo:
    width, height = nearest_size(scan.width, scan.height, cut.sizes)
    starts = list(range(0, frames - cut.frames + 1, cut.frames))
    unused = frames - len(starts) * cut.frames
    if unused and cut.rest == "overlap":
        starts.append(frames - cut.frames)
        unused = 0
    scale = max(width / scan.width, height / scan.height)
    kept = width * height / (scan.width * scan.height * scale * scale)
    seconds = Fraction(scan.seconds)
    return PlannedVideo(
        video.file,
        scan.sha256,
        video.caption,
        "",
        (width, height),
        (scan.width, scan.height),
        round(float(scan.coded_frames / seconds), 3) if seconds else 0.0,
        round(float(seconds), 3),
        frames,
        tuple(starts),
        unused,
        round(min(1.0, kept), 3),
        scale > 1,
        video.tags,
    )


def nearest_size(width: int, height: int, sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The size whose shape is nearest to that of the video, so that least is cropped; the first of
    equals."""

    def difference(size: tuple[int, int]) -> float:
        return round(abs(math.log(width * size[1] / (height * size[0]))), 9)

    return min(sizes, key=difference)


def _splits(
    videos: Sequence[CaptionedVideo], taken: Sequence[PlannedVideo], cut: CutConfig
) -> dict[str, str]:
    """The split of each taken video. Videos of the same contents are in the same split."""
    named = {video.file: video.split for video in videos}
    if any(named.values()):
        return {video.file: named[video.file] or "train" for video in taken}
    splits = {video.file: "train" for video in taken}
    for size in cut.sizes:
        hashes = sorted({video.sha256 for video in taken if video.size == size})
        val = set(hashes[: validation_count(len(hashes), cut.val)])
        splits |= {v.file: "val" for v in taken if v.size == size and v.sha256 in val}
    return splits


def validation_count(total: int, val: float) -> int:
    """How many of ``total`` are kept for validation: the share ``val`` of them, rounded, or ``val``
    from 1 on. One at least where ``val`` is not 0, and never all."""
    if val == 0 or total < 2:
        return 0
    count = round(total * val) if val < 1 else round(val)
    return min(max(1, count), total - 1)


def _placed(video: PlannedVideo, split: str, cut: CutConfig) -> PlannedVideo:
    width, height = video.size
    several = len(cut.sizes) > 1
    return replace(video, folder=f"{width}x{height}/{split}" if several else split)


def _short_notes(lengths: Sequence[int], cut: CutConfig) -> list[str]:
    """What lengths of clips would take the videos that are too short: half of them, and all."""
    short = sorted((length for length in lengths if length < cut.frames), reverse=True)
    offers = {}
    for length in (short[(len(short) - 1) // 2], short[-1]) if short else ():
        frames = 1 + (length - 1) // 4 * 4
        if frames >= 5:
            offers[frames] = sum(length >= frames for length in short)
    if offers:
        words = ", ".join(f"--frames {frames} takes {count}" for frames, count in offers.items())
        return [f"{plural(len(short), 'video')} too short for --frames {cut.frames}: {words}"]
    return []


def _notes(taken: Sequence[PlannedVideo], lengths: Sequence[int], cut: CutConfig) -> list[str]:
    notes = _short_notes(lengths, cut)
    cropped = [video for video in taken if video.kept < 0.5]
    if cropped:
        hint = "their shape is far from every --size"
        for width, height in cut.sizes:
            turned = (height, width)
            if turned not in cut.sizes and all(
                nearest_size(*video.source_size, (video.size, turned)) == turned
                for video in cropped
            ):
                hint = f"add --size {height}x{width}"
        notes.append(
            f"{plural(len(cropped), 'video')} cropped to less than half of the picture; {hint}"
        )
    first: dict[str, PlannedVideo] = {}
    for video in taken:
        twin = first.setdefault(video.sha256, video)
        if twin.folder != video.folder:
            notes.append(
                f"{twin.file} and {video.file} have the same contents and are in {twin.folder} and {video.folder}"
            )
    folders = {video.folder for video in taken}
    for folder in sorted(folders):
        other = folder.removesuffix("train") + "val"
        if folder.endswith("train") and other not in folders and cut.val:
            notes.append(
                f"{folder}: has too few videos for a {other}, which stage 2 needs; add videos"
            )
    return notes
