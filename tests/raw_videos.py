"""Small videos as others make them: turned, stretched, uneven in time, deep."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

HEIGHT, WIDTH = 32, 48
# upper left and right, lower left and right
CORNERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))


def corners() -> np.ndarray:
    """uint8 (H, W, 3): another colour in each quarter."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    rows, columns = (
        (slice(0, HEIGHT // 2), slice(HEIGHT // 2, None)),
        (slice(0, WIDTH // 2), slice(WIDTH // 2, None)),
    )
    for number, colour in enumerate(CORNERS):
        picture[rows[number // 2], columns[number % 2]] = colour
    return picture


def grey(value: int) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), value, np.uint8)


def write(
    path: Path,
    pictures: Sequence[np.ndarray],
    *,
    rate: int = 16,
    times: Sequence[int] | None = None,
    pixels: str = "yuv444p",
    aspect: Fraction | None = None,
    matrix: Sequence[int] | None = None,
    codec: str = "libx264",
    colours: dict[str, int] | None = None,
    live: bool = False,
    interlaced: bool = False,
) -> Path:
    """A video; ``times`` in milliseconds for frames that do not follow the rate. ``colours``: tags
    of the stream. ``live``: Matroska as a browser records it, without lengths."""
    options = {"live": "1"} if live else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        stream.options = {"crf": "0", "bf": "0"} if codec == "libx264" else {"qscale": "1"}
        if interlaced:
            stream.options = {"x264-params": "interlaced=1:tff=1", "bf": "0"}
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix is not None:
            stream.set_display_matrix(
                [value * 65536 for value in (*matrix[:2], 0, *matrix[2:], 0, 0, 0)] + [2**30]
            )
        for name, value in (colours or {}).items():
            setattr(stream.codec_context, name, value)
        for number, picture in enumerate(pictures):
            form = {3: "rgb24", 4: "rgba"}[picture.shape[2]]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=form)
            kind = (colours or {}).get("colorspace", 0)
            frame = frame.reformat(
                format=pixels, dst_colorspace={1: "ITU709", 9: "BT2020"}.get(kind, "ITU601")
            )
            frame.pts = None if times is None else times[number]
            if times is not None:
                frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels(video: Tensor) -> list[int]:
    """The grey of each frame."""
    return [int(value) for value in video.float().mean((1, 2, 3)).round()]
