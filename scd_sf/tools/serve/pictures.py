"""How pictures are sent: as JPEGs, or as H.264 for the browser's WebCodecs.

The H.264 is what a ``VideoDecoder`` without a ``description`` takes (Annex B, W3C's AVC
registration): constrained baseline, so that every picture can be shown as soon as it is there, and
parameter sets with every key frame.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image
from torch import Tensor

from scd_sf.types import UserError

Codec = Literal["jpeg", "h264"]
H264_CRF = 20  # of x264's scale: 0 (best) .. 51
KEY_SECONDS = 2  # between key frames
BT709, SRGB = 1, 13  # primaries and transfer, in the numbers of ITU-T H.273


@dataclass(frozen=True)
class EncodedPicture:
    """A picture as it is sent. ``is_key``: it needs none before it, as every JPEG."""

    data: bytes
    codec: Codec
    is_key: bool


def jpeg(picture_3HW: Tensor, quality: int) -> EncodedPicture:
    """A picture (3, H, W) uint8 as JPEG, ``quality`` 1 .. 95."""
    file = io.BytesIO()
    pixels = picture_3HW.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return EncodedPicture(file.getvalue(), "jpeg", True)


class H264:
    """A stream of H.264: a picture out for each that goes in, the first a key frame.

    UserError: sizes are odd (H.264 halves the colours' resolution), or PyAV has no libx264.
    """

    def __init__(self, width: int, height: int, fps: int) -> None:
        if width % 2 or height % 2:
            raise UserError(f"H.264 needs even sizes, and the video has {width}x{height}")
        if "libx264" not in av.codecs_available:
            raise UserError("PyAV has no libx264 here; install PyAV's own wheel")
        context = av.VideoCodecContext.create("libx264", "w")
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.time_base, context.framerate = Fraction(1, fps), Fraction(fps)
        context.gop_size, context.max_b_frames, context.thread_count = KEY_SECONDS * fps, 0, 1
        context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
        context.color_primaries, context.color_trc = BT709, SRGB
        context.options = {
            "preset": "veryfast",
            "tune": "zerolatency",
            "profile": "baseline",
            "crf": str(H264_CRF),
            "sc_threshold": "0",  # key frames at their times alone
        }
        self._context, self._reformatter, self._count = context, VideoReformatter(), 0

    def encode(self, picture_3HW: Tensor) -> EncodedPicture:
        """A picture (3, H, W) uint8."""
        pixels = picture_3HW.permute(1, 2, 0).contiguous().numpy()
        frame = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(pixels, format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        frame.pts, self._count = self._count, self._count + 1
        (packet,) = self._context.encode(frame)
        return EncodedPicture(bytes(packet), "h264", packet.is_keyframe)

    def name(self) -> str:
        """What WebCodecs calls such a stream, as avc1.42c01e: profile, constraints and level, as the
        encoder writes them with its first picture. The stream is for nothing else then."""
        black = torch.zeros(3, self._context.height, self._context.width, dtype=torch.uint8)
        units = nal_units(self.encode(black).data)
        parameters = next(unit for unit in units if unit[0] & 31 == 7)
        return f"avc1.{parameters[1:4].hex()}"


def nal_units(data: bytes) -> Iterator[bytes]:
    """The units of an Annex B stream, without their start codes."""
    for part in data.split(b"\0\0\1")[1:]:
        yield part.rstrip(b"\0")
