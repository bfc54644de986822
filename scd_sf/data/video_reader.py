"""Decoding videos of any codec, from a file or from bytes, frame by frame: whoever needs small frames never holds the
large ones. Letters: F frames, H W pixel height and width; videos are uint8 (F, 3, H, W), RGB.
"""

from __future__ import annotations

import io
from pathlib import Path

import av
import av.error
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torch.nn.functional import interpolate

from scd_sf.types import UserError

LARGEST_FRAME = 4096 * 4096  # pixels: a header can ask for any amount of memory
LARGEST_VIDEO = 2**32  # bytes of all frames as they are returned
WHOLE = 0.9  # of the frames that the header promises; some writers count a few that they do not write


def read_frames(source: Path | bytes, where: str, *, size: int = 0, remedy: str = "copy it again") -> Tensor:
    """All frames of a video. ``size``: each is resized and cropped to a square of so many pixels; 0: as it is.

    ``where`` names the source in errors. Raises UserError (with ``remedy``) when it is missing, cut, damaged, empty or
    too large.
    """
    if isinstance(source, Path) and not source.is_file():
        raise UserError(f"{where}: no such file; {remedy}")
    reformatter = VideoReformatter()  # one thread: at this size the default's thread pool costs five times the work
    pictures: list[np.ndarray] = []
    try:
        file = str(source) if isinstance(source, Path) else io.BytesIO(source)
        with av.open(file, metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise UserError(f"{where}: its codec is unknown; {remedy}")
            stream.codec_context.thread_count = 1
            promised = int(stream.frames)
            for frame in container.decode(stream):
                if frame.width * frame.height > LARGEST_FRAME:
                    raise UserError(f"{where}: frames of {frame.width}x{frame.height} are too large; {remedy}")
                picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                pictures.append(resize_crop(picture, size) if size else picture)
                if len(pictures) * pictures[-1].size > LARGEST_VIDEO:
                    raise UserError(f"{where}: more than {LARGEST_VIDEO} bytes of frames; {remedy}")
    except (av.error.FFmpegError, IndexError) as error:
        raise UserError(f"{where}: cannot be decoded ({error}); {remedy}") from error
    if not pictures:
        raise UserError(f"{where}: holds no frame; {remedy}")
    if len(pictures) < WHOLE * promised:
        raise UserError(f"{where}: {len(pictures)} frames of {promised} can be decoded; {remedy}")
    if any(picture.shape != pictures[0].shape for picture in pictures):
        raise UserError(f"{where}: its frames differ in size; {remedy}")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def resize_crop(picture_HW3: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (size, size, 3): short side to ``size`` (bilinear, antialiased), then the middle square."""
    height, width = picture_HW3.shape[:2]
    short = min(height, width)
    picture = picture_HW3
    if short != size:
        pixels = torch.from_numpy(picture_HW3).permute(2, 0, 1)[None].float()
        to = (int(size * height / short), int(size * width / short))
        resized = interpolate(pixels, to, mode="bilinear", antialias=True).round_().clamp_(0, 255)
        picture = resized[0].to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    top, left = round((picture.shape[0] - size) / 2), round((picture.shape[1] - size) / 2)
    return np.ascontiguousarray(picture[top : top + size, left : left + size])
