"""A viewer's camera: its frames on their way from the page to the chunks that are made from them.

A chunk is made from the newest frames. Where there are more than it takes, the oldest are left out,
in whole groups of as many as a latent frame stands for, so that the frames of a latent frame
follow one another; where there are fewer, it waits. Letters: H W pixel height and width.
"""

from __future__ import annotations

import io
import struct
from collections import deque

import torch
from torch import Tensor

from scd_sf.data.sources.picture_reader import picture_of
from scd_sf.files import foreign
from scd_sf.types import UserError

HEAD = struct.Struct(">4sI")  # before a frame's picture: MARK, and its number, which rises
MARK = b"cam\0"  # no picture file begins so
MOST_BYTES = 2**19  # of a frame's message
FORMATS = ("JPEG", "WEBP")


def is_frame(message: bytes) -> bool:
    """Whether a binary message of a page is a camera's frame, and not a start picture."""
    return message.startswith(MARK)


def read_frame(message: bytes, size: tuple[int, int]) -> tuple[int, Tensor]:
    """Number and pixels (3, H, W) in [0, 1] of a camera's frame. UserError: too large, no picture,
    or of another size than (H, W)."""
    if len(message) > MOST_BYTES:
        raise UserError(f"a camera frame has more than {MOST_BYTES} bytes; send smaller ones")
    if len(message) < HEAD.size:
        raise UserError("a camera frame has no number; load the page again")
    _, number = HEAD.unpack_from(message)
    where = "a camera frame"
    with foreign(f"{where} cannot be read", "send jpeg or webp"):
        pixels = picture_of(io.BytesIO(message[HEAD.size :]), where, size[0] * size[1], FORMATS)
    if pixels.shape[1:] != size:
        raise UserError(
            f"{where} is {pixels.shape[2]}x{pixels.shape[1]}, the model's are {size[1]}x{size[0]}"
        )
    return number, pixels


class Camera:
    """Frames (3, H, W) in [0, 1] that wait, at most ``most``. ``group``: pixel frames of a latent
    frame. ``is_on``: the page still sends some. Not for several threads at once: the generator's
    lock is held around it."""

    def __init__(self, group: int, most: int) -> None:
        self._group, self._most = group, most
        self._waiting: deque[tuple[int, Tensor]] = deque()
        self._last = -1  # the number of the newest frame that came
        self.is_on = True

    def put(self, number: int, pixels: Tensor) -> None:
        """UserError: a number that does not rise."""
        if number <= self._last:
            raise UserError(f"camera frame {number} came after frame {self._last}")
        self._last = number
        self._waiting.append((number, pixels))
        if len(self._waiting) > self._most:
            self._leave_out()

    def clear(self) -> None:
        self._waiting.clear()

    def has(self, count: int) -> bool:
        return len(self._waiting) >= count

    def take(self, count: int) -> tuple[int, Tensor]:
        """The newest ``count`` frames that follow one another in whole groups, of those that wait:
        the number of the last one, and (1, count, 3, H, W)."""
        while len(self._waiting) >= count + self._group:
            self._leave_out()
        frames = [self._waiting.popleft() for _ in range(count)]
        return frames[-1][0], torch.stack([pixels for _, pixels in frames])[None]

    def _leave_out(self) -> None:
        for _ in range(self._group):
            self._waiting.popleft()
