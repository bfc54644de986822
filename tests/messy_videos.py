"""A folder of videos as people have it: 14 that can be used, and all that can be wrong with one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import raw_videos

TURNED = (0, 1, -1, 0)  # stored lying, shown upright
CAPTION = "a walk in the hall"


def moving(count: int, seed: int = 0, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """``count`` frames of a square that moves over noise."""
    base = np.random.default_rng(seed).integers(0, 60, (height, width, 3), dtype=np.uint8)
    frames = []
    for number in range(count):
        frame = base.copy()
        left = number * 2 % (width - 8)
        frame[8:16, left : left + 8] = (250, 40 * seed % 200, 90)
        frames.append(frame)
    return frames


def write_with_sound(path: Path, pictures: Sequence[np.ndarray], rate: int) -> None:
    """A video with a track of AAC."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate)
        video.height, video.width = pictures[0].shape[:2]
        video.pix_fmt, video.options = "yuv444p", {"crf": "0"}
        audio = container.add_stream("aac", rate=8000)
        for picture in pictures:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        for number in range(4):
            samples = np.zeros((1, 1024), np.float32)
            sound = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 8000, 1024 * number
            sound.time_base = Fraction(1, 8000)
            container.mux(audio.encode(sound))
        container.mux(audio.encode())


def write_folder(root: Path) -> Path:
    """The folder, beside a file that a link in it leads to. At 8 frames per second and 5 frames a
    clip the videos of :data:`TAKEN` make that many clips."""
    (root / "day 2").mkdir(parents=True)
    raw_videos.write(root / "My clip 01 (red, right).mp4", moving(10, 1), rate=16)
    raw_videos.write(root / "day 2" / "hochkant_ü.mov", moving(12, 2), rate=16, matrix=TURNED)
    raw_videos.write(root / "fast.MP4", moving(48, 3, 64, 64), rate=60)
    times = [0, 30, 200, 260, 500, 520, 700, 900, 910, 1200]
    raw_videos.write(root / "uneven.mkv", moving(10, 4), times=times)
    write_with_sound(root / "sound.mp4", moving(16, 5), 16)
    raw_videos.write(root / "long.avi", moving(100, 6), rate=24, codec="mpeg4", pixels="yuv420p")
    raw_videos.write(root / "wide.mp4", moving(8, 7, 16, 128), rate=8)
    raw_videos.write(root / "damaged.mp4", moving(64, 8), rate=8)
    _damage(root / "damaged.mp4")
    # not taken
    raw_videos.write(root / "short.mp4", moving(4, 9), rate=8)
    raw_videos.write(root / "silent caption.mp4", moving(8, 10), rate=8)
    raw_videos.write(root / "latin.mp4", moving(8, 11), rate=8)
    whole = (root / "My clip 01 (red, right).mp4").read_bytes()
    (root / "day 2" / "same again.mp4").write_bytes(whole)
    (root / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "empty.mp4").write_bytes(b"")
    (root / "page.mp4").write_bytes(b"<html>not found</html>" * 50)
    (root / "old.wmv").write_bytes(b"x")
    (root / "not\nplain.mp4").write_bytes(whole)
    strange = Path(os.fsdecode(os.fsencode(root) + b"/latin\xfc"))
    strange.mkdir()
    (strange / "inside.mp4").write_bytes(whole)
    (root.parent / "outside.mp4").write_bytes(whole)
    (root / "link.mp4").symlink_to("../outside.mp4")
    (root / "loop.mp4").symlink_to("loop.mp4")
    (root / "folder").symlink_to("..")
    os.mkfifo(root / "pipe.mp4")
    (root / "._My clip 01 (red, right).mp4").write_bytes(b"\0\5\x16\7")
    (root / "holiday.jpg").write_bytes(b"x")
    for path in [*root.glob("*.[mMa]*"), *root.glob("day 2/*")]:
        if path.suffix in (".mp4", ".MP4", ".mov", ".mkv", ".avi") and path.is_file():
            path.with_suffix(".txt").write_text(CAPTION, encoding="utf-8")
    (root / "day 2" / "hochkant_ü.txt").write_text("left\r\n turn ü\n", encoding="utf-8-sig")
    (root / "uneven.txt").write_text("right turn", encoding="utf-16")
    (root / "silent caption.txt").write_text(" \n")
    (root / "latin.txt").write_bytes("grün".encode("latin-1"))
    (root / "wide.txt").write_text("left turn")
    return root


def _damage(path: Path) -> None:
    """Overwrite some bytes after the middle of the video's data."""
    data = bytearray(path.read_bytes())
    place = data.index(b"mdat") + (len(data) - data.index(b"mdat")) * 6 // 10
    data[place : place + 400] = bytes(400)
    path.write_bytes(bytes(data))
