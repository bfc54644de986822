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
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorPrimaries, ColorTrc, Interpolation, VideoReformatter
from torch import Tensor
from torch.nn.functional import interpolate

from scd_sf.files import foreign, refuse_lfs_pointer
from scd_sf.types import UserError

FORMATS = "mp4, mov, mkv, webm, avi, ts"
DEMUXERS = "mov,matroska,avi,mpegts"  # ffmpeg's names of them
LARGEST_FRAME = 4096 * 4096  # pixels: a header can ask for any amount of memory
LARGEST_VIDEO = 2**31  # bytes of all frames as they are returned: 345 frames of 1920x1080
# of the frames that the header promises; some writers count a few that they do not write
WHOLE = 0.9
SAME_RATE = 0.01  # 29.97 frames per second pass for 30
TIMING = "set fps to the file's own rate, or as_coded to take its frames one by one"
AS_CODED = 0.0  # as ``fps``: frame after frame, whatever the timestamps say
# Titles that are not UTF-8 are ignored; av before 19 needs an option for this.
LENIENT: dict[str, Any] = (
    {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}
)
HDR = {ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67}
WIDE = {ColorPrimaries.BT2020, ColorPrimaries.SMPTE431, ColorPrimaries.SMPTE432}


@dataclass(frozen=True)
class Picture:
    """One upright frame, ``pixels`` uint8 (H, W, 3). ``start`` and ``length`` are in seconds, or
    None where the file has none."""

    pixels: np.ndarray
    start: Fraction | None
    length: Fraction | None


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
        with file, av.open(file, "r", options=options, **LENIENT) as container:
            yield container


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


def pictures(source: Path | bytes, where: str, remedy: str = "copy it again") -> Iterator[Picture]:
    """The frames as they are coded, upright, with square pixels, in the colours of an ordinary
    screen (BT.709).

    UserError as :func:`read_frames`.
    """
    with _open(source, where, remedy) as container:
        stream = _stream_of(container)
        num_frames, aspect = int(stream.frames), stream.sample_aspect_ratio
        reformatter = VideoReformatter()
        count, size, matrix, angle = 0, (0, 0), (1, 0, 0, 1), 0
        for frame in container.decode(stream):
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
            pixels = _turn(_rgb(frame, reformatter, aspect), matrix)
            yield Picture(
                pixels,
                frame.pts * base if has_time else None,
                frame.duration * base if base else None,
            )
        if not count:
            raise ValueError("it holds no frame")
        if count < WHOLE * num_frames:
            raise ValueError(f"{count} frames of {num_frames} can be decoded")


def _rgb(
    frame: av.VideoFrame, reformatter: VideoReformatter, aspect: Fraction | None
) -> np.ndarray:
    """uint8 (H, W, 3) with square pixels: the side that is stretched grows. One thread: the
    default's thread pool costs five times the work at this size."""
    width, height = frame.width, frame.height
    if aspect and aspect > 1:
        width = round(width * aspect)
    elif aspect:
        height = round(height / aspect)
    _check_size(width, height)
    interpolation = (
        Interpolation.BICUBIC if (width, height) != (frame.width, frame.height) else None
    )
    wide = frame.color_trc in HDR or frame.color_primaries in WIDE
    return reformatter.reformat(
        frame,
        width,
        height,
        "rgb24",
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
    current: np.ndarray | None = None
    starts: list[Fraction] = []
    count, end = 0, Fraction(0)
    for picture in frames:
        if picture.start is None or (starts and picture.start < starts[-1]):
            raise ValueError(
                f"frame {len(starts)} has no timestamp, or one before the last frame's"
            )
        starts.append(picture.start)
        if exact:
            yield picture.pixels
            continue
        place = _nearest((picture.start - starts[0]) * Fraction(fps))
        while current is not None and count < place:
            yield current
            count += 1
        current = picture.pixels
        mean = (starts[-1] - starts[0]) / max(1, len(starts) - 1)
        end = picture.start - starts[0] + (picture.length or mean or 1 / Fraction(fps))
    if exact:
        _check_rate(starts, fps)
        return
    if current is not None:
        yield from [current] * max(_nearest(end * Fraction(fps)) - count, 0 if count else 1)


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
    coded_pictures = pictures(source, where, remedy)
    if fps == AS_CODED:
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
    (``exact``: a file of another rate is refused); :data:`AS_CODED`: frame after frame. ``size``:
    each is resized and cropped to a square of so many pixels; 0: as it is. ``where`` names the
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


def resize_crop(picture_HW3: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (size, size, 3): short side to ``size`` (bilinear, antialiased), then the
    middle square."""
    height, width = picture_HW3.shape[:2]
    short = min(height, width)
    picture = picture_HW3
    if short != size:
        pixels = torch.from_numpy(np.ascontiguousarray(picture_HW3)).permute(2, 0, 1)[None].float()
        to = (int(size * height / short), int(size * width / short))
        pixels = interpolate(pixels, to, mode="bilinear", antialias=True).round_().clamp_(0, 255)
        picture = pixels[0].to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    top, left = round((picture.shape[0] - size) / 2), round((picture.shape[1] - size) / 2)
    return np.ascontiguousarray(picture[top : top + size, left : left + size])
