"""The project's only reader of video files: upright frames of square pixels, at the rate that the
caller needs.

Files are untrusted. Only regular files (or bytes) are opened, only as the containers of
:data:`FORMATS`, and nothing that they point to. Sizes are compared with :data:`LARGEST_FRAME`
before a frame is decoded, and whoever needs small frames never holds the large ones. Letters: F
frames, H W pixel height and width; videos are uint8 (F, 3, H, W), RGB.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorPrimaries, ColorTrc, Interpolation, VideoReformatter
from torch import Tensor
from torch.nn.functional import interpolate

from scd_sf.files import foreign, refuse_lfs_pointer
from scd_sf.types import UserError, plural

FORMATS = "mp4, mov, mkv, webm, avi, ts"
DEMUXERS = "mov,matroska,avi,mpegts"  # ffmpeg's names of them
LARGEST_FRAME = 4096 * 4096  # pixels: a header can ask for any amount of memory
LARGEST_VIDEO = 2**31  # bytes of all frames as they are returned: 345 frames of 1920x1080
# of the frames that the header promises; some writers count a few that they do not write
WHOLE = 0.9
MOST_CROPPED = 20  # a picture that is scaled to cover a size is at most so many times as large
LONGEST_STILL = 60  # seconds: two frames can claim any length of time between them
SAME_RATE = 0.01  # 29.97 frames per second pass for 30
CLEAR = (
    "has transparent parts (alpha), which are not read; flatten it on a background "
    "(ffmpeg's overlay filter), or write it again without them (-pix_fmt yuv420p)"
)
PROGRESSIVE = (
    "is interlaced: the even and odd lines of a frame are of two moments, which would show as combs; "
    "write it again without (ffmpeg -i OLD -vf bwdif NEW)"
)
TIMING = "set fps to the file's own rate, or as_coded to take its frames one by one"
AS_CODED = 0.0  # as ``fps``: frame after frame, whatever the timestamps say
# Titles that are not UTF-8 are ignored; av before 19 needs an option for this.
LENIENT: dict[str, Any] = (
    {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}
)
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # elements of Matroska (RFC 9559)
PARTS = (  # of a segment, and of a cluster
    "EC BF 114D9B74 1549A966 1654AE6B 1043A770 1F43B675 1C53BB6B 1941A469 1254C367",
    "E7 5854 A7 AB A3 A0 AF",
)
MATROSKA = {EBML, SEGMENT, *(bytes.fromhex(name) for part in PARTS for name in part.split())}
HDR = {ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67}
WIDE = {ColorPrimaries.BT2020, ColorPrimaries.SMPTE431, ColorPrimaries.SMPTE432}


@dataclass(frozen=True)
class Picture:
    """One upright frame. ``start`` and ``length`` are in seconds, or None where the file has none.
    ``convert`` makes :attr:`pixels`, because most frames of a resampled video are not looked at."""

    convert: Callable[[], np.ndarray]
    start: Fraction | None
    length: Fraction | None

    @cached_property
    def pixels(self) -> np.ndarray:
        """uint8 (H, W, 3)."""
        return self.convert()


@dataclass(frozen=True)
class VideoInfo:
    """Size of the upright frames with square pixels, number of coded frames, and seconds from the
    first frame to the end of the last."""

    height: int
    width: int
    frames: int
    seconds: Fraction

    def frames_at(self, fps: float) -> int:
        """Number of frames of :func:`resampled`."""
        return max(1, _nearest(self.seconds * Fraction(fps)))


@contextmanager
def _open(source: Path | bytes, where: str, remedy: str) -> Iterator[av.container.InputContainer]:
    """The container, sniffed among ``FORMATS``; a file is opened by Python, so that no name is
    taken for a URL."""
    if isinstance(source, Path) and not source.is_file():
        raise UserError(f"{where}: no such file; {remedy}")
    if isinstance(source, Path):
        refuse_lfs_pointer(source)
    with foreign(f"{where}: cannot be decoded", f"{remedy} (video files may be {FORMATS})"):
        file = source.open("rb") if isinstance(source, Path) else io.BytesIO(source)
        options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
        with file:
            _check_matroska(file)
            with av.open(file, "r", options=options, **LENIENT) as container:
                yield container


def _check_matroska(file: BinaryIO) -> None:
    """ValueError for a Matroska file that ends inside an element: ffmpeg reads what is left of it as
    a shorter video. One that was written as a stream (elements of unknown size, RFC 8794 6.2) and
    cut between two frames cannot be told from a whole one."""
    end = file.seek(0, io.SEEK_END)
    position = 0
    while position < end:
        file.seek(position)
        head = file.read(12)
        id_bytes = 9 - head[0].bit_length()
        if position == 0 and head[:4] != EBML:
            break
        size_bytes = 9 - head[id_bytes].bit_length() if id_bytes < len(head) else 1
        name, size = head[:id_bytes], head[id_bytes : id_bytes + size_bytes]
        if size_bytes > 8 or not any(element.startswith(name) for element in MATROSKA):
            break  # what others leave behind the video
        position += id_bytes + size_bytes
        if position <= end:
            number = int.from_bytes(size) - (1 << 7 * size_bytes)
            if number == (1 << 7 * size_bytes) - 1:  # unknown: its own elements follow
                continue
            position += number
        if position > end:
            raise ValueError(f"it was cut, at least {plural(position - end, 'byte')} too early")
        if name == SEGMENT:
            break
    file.seek(0)


def _stream_of(container: av.container.InputContainer) -> av.VideoStream:
    """The video's stream, not that of a cover picture. ValueError: none, of an unknown codec, or
    too large."""
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
        raise ValueError("it has no video, or its codec is unknown")
    _check_size(stream.codec_context.width, stream.codec_context.height)
    # the codec pads its frames
    stream.codec_context.options = {"max_pixels": str(2 * LARGEST_FRAME)}
    stream.codec_context.thread_count = 1
    return stream


def _check_size(width: int, height: int) -> None:
    if width * height > LARGEST_FRAME:
        raise ValueError(
            f"frames of {width}x{height} are too large, {LARGEST_FRAME:,} pixels are read at most"
        )


def frame_count(source: Path, where: str, remedy: str = "copy it again") -> int:
    """How many frames the header promises, at least 1; the first one is decoded. UserError as
    :func:`read_frames`."""
    with _open(source, where, remedy) as container:
        stream = _stream_of(container)
        if next(container.decode(stream), None) is None:
            raise ValueError("it holds no frame")
        return max(1, stream.frames)


def pictures(
    source: Path | bytes,
    where: str,
    remedy: str = "copy it again",
    *,
    interlaced: bool = False,
) -> Iterator[Picture]:
    """The frames as they are coded, upright, with square pixels, in the colours of an ordinary
    screen (BT.709).

    ``interlaced``: frames whose lines are of two moments are taken, too. UserError as
    :func:`read_frames`, and for transparent parts of a frame that is looked at.
    """
    with _open(source, where, remedy) as container:
        stream = _stream_of(container)
        promised, end = _promised_seconds(stream), Fraction(0)
        num_frames, aspect = int(stream.frames), stream.sample_aspect_ratio
        reformatter = VideoReformatter()
        count, size, matrix, angle = 0, (0, 0), (1, 0, 0, 1), 0
        for frame in _decoded(container, stream, where, interlaced):
            # only once: a frame asked for its matrix stays in memory until garbage collection
            if not count:
                size, matrix, angle = (frame.width, frame.height), _matrix(frame), frame.rotation
            if (frame.width, frame.height) != size:
                raise ValueError(
                    f"frame {count} is {frame.width}x{frame.height}, those before {size[0]}x{size[1]}"
                )
            if frame.rotation != angle:
                raise ValueError(f"frame {count} is turned otherwise than those before")
            if frame.is_corrupt:
                raise ValueError(f"frame {count} is damaged")
            count += 1
            base = frame.time_base
            has_time = frame.pts is not None and base is not None
            if has_time:
                end = max(end, (frame.pts + (frame.duration or 0)) * base)
            yield Picture(
                partial(_upright, frame, reformatter, aspect, matrix, where),
                frame.pts * base if has_time else None,
                frame.duration * base if base else None,
            )
        if not count:
            raise ValueError("it holds no frame")
        if count < WHOLE * num_frames:
            raise ValueError(f"{count} frames of {num_frames} can be decoded")
        if end < WHOLE * promised:
            raise ValueError(f"{float(end):.4g} seconds of {float(promised):.4g} can be decoded")


def _decoded(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    where: str,
    interlaced: bool,
) -> Iterator[av.VideoFrame]:
    """All frames. UserError for a webm's alpha, which lies beside the frames, where ffmpeg's decoders
    do not look, and for interlaced frames unless they are wanted."""
    says_alpha = stream.metadata.get("alpha_mode") == "1"  # browsers write it without any, too
    for packet in container.demux(stream):
        if says_alpha and packet.has_sidedata("matroska_block_additional"):
            raise UserError(f"{where}: {CLEAR}")
        for frame in packet.decode():
            if frame.interlaced_frame and not interlaced:
                raise UserError(f"{where}: {PROGRESSIVE}")
            yield frame


def _promised_seconds(stream: av.VideoStream) -> Fraction:
    """Where the last frame ends, as a Matroska file says, which does not count its frames; 0 where
    it does not say so."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", stream.metadata.get("DURATION", ""))
    if match is None or stream.frames:
        return Fraction(0)
    hours, minutes, seconds = match.groups()
    return 3600 * int(hours) + 60 * int(minutes) + Fraction(seconds)


def _upright(
    frame: av.VideoFrame,
    reformatter: VideoReformatter,
    aspect: Fraction | None,
    matrix: tuple[int, int, int, int],
    where: str,
) -> np.ndarray:
    picture_HWC = _rgb(frame, reformatter, aspect)
    if (picture_HWC[..., 3:] < 255).any():
        raise UserError(f"{where}: {CLEAR}")
    return _turn(picture_HWC[..., :3], matrix)


def _rgb(
    frame: av.VideoFrame, reformatter: VideoReformatter, aspect: Fraction | None
) -> np.ndarray:
    """uint8 (H, W, 3), or (H, W, 4) of a format with alpha, with square pixels: the side that is
    stretched grows. One thread: the default's thread pool costs five times the work at this size."""
    width, height = frame.width, frame.height
    if aspect and aspect > 1:
        width = round(width * aspect)
    elif aspect:
        height = round(height / aspect)
    _check_size(width, height)
    interpolation = (
        Interpolation.BICUBIC if (width, height) != (frame.width, frame.height) else None
    )
    has_alpha = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    wide = frame.color_trc in HDR or frame.color_primaries in WIDE
    return reformatter.reformat(
        frame,
        width,
        height,
        "rgba" if has_alpha else "rgb24",
        interpolation=interpolation,
        threads=1,
        dst_color_trc=ColorTrc.BT709 if wide else None,
        dst_color_primaries=ColorPrimaries.BT709 if wide else None,
    ).to_ndarray()


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d of the display matrix: what is coded at (x, y) is shown at (a x + c y, b x + d
    y)."""
    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data))
    return a, b, c, d


def _turn(picture_HW3: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """The picture turned and mirrored as a display matrix says. ValueError: by an angle that is no
    quarter."""
    a, b, c, d = matrix
    small = max(map(abs, matrix)) / 100
    if max(abs(b), abs(c)) <= small:
        across, down = a, d
    elif max(abs(a), abs(d)) <= small:
        picture_HW3, across, down = picture_HW3.transpose(1, 0, 2), c, b
    else:
        raise ValueError("it is to be shown turned by an angle that is no quarter turn")
    return picture_HW3[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def resampled(
    frames: Iterable[Picture], fps: float, *, exact: bool = False
) -> Iterator[np.ndarray]:
    """(H, W, 3) as they are on the screen every ``1 / fps`` seconds, from the first frame to the
    end of the last.

    As ffmpeg's ``fps`` filter: each frame goes to the nearest place, the last one for a place is
    taken, and a place without any repeats the one before. ``exact``: nothing is repeated or left
    out; ValueError for a file of another rate or of uneven timestamps.
    """
    if not exact:
        yield from (picture.pixels for picture in at_rate(frames, fps))
        return
    starts: list[Fraction] = []
    for picture in frames:
        starts.append(_start_after(picture, len(starts), starts[-1] if starts else None))
        yield picture.pixels
    _check_rate(starts, fps)


def at_rate(frames: Iterable[Picture], fps: float) -> Iterator[Picture]:
    """The pictures of :func:`resampled`, not converted yet. Memory does not grow."""
    current: Picture | None = None
    first = last = end = Fraction(0)
    number = count = 0
    for number, picture in enumerate(frames):
        last = _start_after(picture, number, last if number else None)
        first = first if number else last
        place = _nearest((last - first) * Fraction(fps))
        while current is not None and count < place:
            yield current
            count += 1
        current = picture
        end = last - first + _last_length(picture.length, last - first, number + 1, fps)
    if current is not None:
        for _ in range(max(_nearest(end * Fraction(fps)) - count, 0 if count else 1)):
            yield current


def _start_after(picture: Picture, number: int, last: Fraction | None) -> Fraction:
    """The picture's start. ValueError: it has none, or one before the ``last`` frame's."""
    if picture.start is None or (last is not None and picture.start < last):
        raise ValueError(f"frame {number} has no timestamp, or one before the last frame's")
    return picture.start


def _last_length(length: Fraction | None, span: Fraction, count: int, fps: float) -> Fraction:
    """Seconds that the last of ``count`` frames is shown: its own length, or the mean of the others
    over ``span`` seconds, or one frame."""
    return length or span / max(1, count - 1) or 1 / Fraction(fps)


def video_info(source: Path, where: str, remedy: str = "copy it again") -> VideoInfo:
    """Size and length of a video, from its first frame and the timestamps of its packets. Only the
    first frame is decoded, unless packets have no timestamps.

    UserError as :func:`read_frames`, and where a frame stands for more than
    :data:`LONGEST_STILL` seconds, for which a few bytes suffice.
    """
    with foreign(where, remedy):
        height, width = next(iter(pictures(source, where, remedy))).pixels.shape[:2]
    times = _packet_times(source, where, remedy)
    if times is None:
        with foreign(where, remedy):
            coded = pictures(source, where, remedy)
            times = _summed((picture.start, picture.length) for picture in coded)
    if times is None:
        raise UserError(f"{where}: its frames have no timestamps; write it again with timestamps")
    count, span, last_length, still = times
    if still > LONGEST_STILL:
        raise UserError(
            f"{where}: one frame stands for {float(still):.0f} seconds, more than {LONGEST_STILL}; cut the video there"
        )
    return VideoInfo(height, width, count, span + _last_length(last_length, span, count, 16))


_Times = tuple[int, Fraction, Fraction | None, Fraction]


def _packet_times(source: Path, where: str, remedy: str) -> _Times | None:
    with _open(source, where, remedy) as container:
        stream = _stream_of(container)
        base = stream.time_base
        if base is None:
            return None
        return _summed(
            (
                None if packet.pts is None else packet.pts * base,
                packet.duration * base if packet.duration else None,
            )
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard
        )


def _summed(times: Iterable[tuple[Fraction | None, Fraction | None]]) -> _Times | None:
    """Number of frames, seconds between the starts of the first and the last, length of the last,
    and the longest gap, of (start, length) in any order. None where a start is missing, or all."""
    count, first, last = 0, Fraction(0), Fraction(0)
    length: Fraction | None = None
    gap = Fraction(0)
    for start, own_length in times:
        if start is None:
            return None
        if not count or start > last:
            gap = max(gap, start - last if count else Fraction(0))
            last, length = start, own_length
        first = start if not count else min(first, start)
        count += 1
    return (count, last - first, length, max(gap, length or Fraction(0))) if count else None


def _nearest(value: Fraction) -> int:
    """Halves go up: a file of twice the rate gives every second frame."""
    return math.floor(value + Fraction(1, 2))


def _check_rate(starts: list[Fraction], fps: float) -> None:
    span = starts[-1] - starts[0] if starts else Fraction(0)
    if len(starts) < 2:
        return
    if not span:
        raise ValueError("all frames have the same timestamp")
    rate = (len(starts) - 1) / span
    if abs(rate / Fraction(fps) - 1) > SAME_RATE:
        raise ValueError(f"has {float(rate):.5g} frames per second, not the {fps:g} that fps says")
    if any(abs((start - starts[0]) * rate - number) > 0.5 for number, start in enumerate(starts)):
        raise ValueError(f"has uneven timestamps, not {fps:g} frames per second")


def frames_of(
    source: Path | bytes,
    where: str,
    *,
    fps: float,
    exact: bool = False,
    remedy: str = "copy it again",
) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3), one after another; see :func:`read_frames`."""
    coded_pictures = pictures(source, where, remedy, interlaced=exact or fps == AS_CODED)
    if fps == AS_CODED:
        with foreign(where, remedy):
            yield from (picture.pixels for picture in coded_pictures)
        return
    with foreign(where, TIMING if exact else "write it again with timestamps"):
        yield from resampled(coded_pictures, fps, exact=exact)


def read_frames(
    source: Path | bytes,
    where: str,
    *,
    fps: float = AS_CODED,
    exact: bool = False,
    size: int = 0,
    remedy: str = "copy it again",
) -> Tensor:
    """All frames of a video, uint8 (F, 3, H, W): upright, with square pixels, at most
    :data:`LARGEST_VIDEO` bytes.

    ``fps``: resampled by timestamps to so many frames per second, as :func:`resampled` says
    (``exact``: a file of another rate is refused), interlaced ones refused; :data:`AS_CODED`: frame
    after frame. ``size``: each is resized and cropped to a square of so many pixels; 0: as it is. ``where`` names the
    source in errors. Raises UserError (with ``remedy``) when it is missing, cut, damaged, empty or
    too large, or its frames change their size.
    """
    frames = frames_of(source, where, fps=fps, exact=exact, remedy=remedy)
    return stacked((resize_crop(frame, size) if size else frame for frame in frames), where, remedy)


def stacked(frames: Iterable[np.ndarray], where: str, remedy: str) -> Tensor:
    """uint8 (F, 3, H, W) of pictures (H, W, 3) of one size. UserError: more than ``LARGEST_VIDEO``
    bytes."""
    data, height, width = bytearray(), 0, 0
    for frame in frames:
        height, width = frame.shape[:2]
        data += frame.transpose(2, 0, 1).tobytes()
        if len(data) > LARGEST_VIDEO:
            raise UserError(
                f"{where}: more than {LARGEST_VIDEO:,} bytes of frames, which is too large; {remedy}"
            )
    return torch.frombuffer(data, dtype=torch.uint8).view(-1, 3, height, width)


def cut_clips(
    source: Path,
    where: str,
    starts: Sequence[int],
    *,
    frames: int,
    height: int,
    width: int,
    fps: float,
    remedy: str = "copy it again",
) -> Iterator[Tensor]:
    """uint8 (frames, 3, height, width) of the clips that begin at the frames ``starts`` (rising) of
    the video at ``fps``, each scaled and cropped at the middle to cover the size.

    Holds the clips that overlap at a time, whatever the video's length, and stops after the last.
    UserError as :func:`read_frames`, and where the video ends before.
    """
    waiting, open_clips = deque(starts), deque[tuple[int, Tensor]]()
    place = -1
    with foreign(where, remedy):
        for place, picture in enumerate(at_rate(pictures(source, where, remedy), fps)):
            if waiting and waiting[0] == place:
                empty = torch.empty(frames, 3, height, width, dtype=torch.uint8)
                open_clips.append((waiting.popleft(), empty))
            if open_clips:
                pixels = cover(picture.pixels, height, width)
                for start, clip in open_clips:
                    clip[place - start] = pixels
                if place == open_clips[0][0] + frames - 1:
                    yield open_clips.popleft()[1]
            if not waiting and not open_clips:
                return
    raise UserError(
        f"{where}: ends after {place + 1} frames of {fps:g} per second, {(starts[-1] if starts else 0) + frames} "
        f"were to be read; {remedy}"
    )


def check_crop(height: int, width: int, new_height: int, new_width: int, where: str = "") -> None:
    """UserError where less than 1 / :data:`MOST_CROPPED` of a picture would be left when it is scaled
    to cover a size and cropped: the scaled picture can be of any size."""
    if height * new_width > MOST_CROPPED * width * new_height or (
        width * new_height > MOST_CROPPED * height * new_width
    ):
        place = f"{where}: " if where else ""
        raise UserError(
            f"{place}a picture of {width}x{height} is too long for {new_width}x{new_height}: "
            f"less than a {MOST_CROPPED}th of it would be left; crop it first"
        )


def cover(picture_HW3: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 (H, W, 3) -> (3, height, width): resized (bicubic, antialiased) so that it just covers
    the size, then cropped at the middle."""
    old_height, old_width = picture_HW3.shape[:2]
    check_crop(old_height, old_width, height, width)
    scale = max(height / old_height, width / old_width)
    new_size = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    pixels = torch.from_numpy(np.ascontiguousarray(picture_HW3)).permute(2, 0, 1)
    if new_size != (old_height, old_width):
        pixels = interpolate(pixels[None], new_size, mode="bicubic", antialias=True)[0]
    top, left = (new_size[0] - height) // 2, (new_size[1] - width) // 2
    return pixels[:, top : top + height, left : left + width]


def resize_crop(picture_HW3: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (size, size, 3): short side to ``size`` (bilinear, antialiased), then the
    middle square."""
    height, width = picture_HW3.shape[:2]
    check_crop(height, width, size, size)
    short = min(height, width)
    picture = picture_HW3
    if short != size:
        pixels = torch.from_numpy(np.ascontiguousarray(picture_HW3)).permute(2, 0, 1)[None].float()
        to = (int(size * height / short), int(size * width / short))
        pixels = interpolate(pixels, to, mode="bilinear", antialias=True).round_().clamp_(0, 255)
        picture = pixels[0].to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    top, left = round((picture.shape[0] - size) / 2), round((picture.shape[1] - size) / 2)
    return np.ascontiguousarray(picture[top : top + size, left : left + size])
