"""The one thread that makes video, and the seat of the one viewer it is made for.

The server's loop asks (start, another prompt, pause, credit); the thread reads the wishes between
two chunks and hands out what it made. A chunk is begun only while the page has acknowledged all but
:data:`AHEAD` of those before: a slow viewer slows the thread, and nothing piles up.
"""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from scd_sf.data.start import check_start
from scd_sf.diffusion.samplers import Sampler
from scd_sf.generation.generate import as_uint8, clip_latents, decoded
from scd_sf.models.build import Student
from scd_sf.models.wan.text import TextEncoder
from scd_sf.models.wan.vae import PixelDecoder, Vae
from scd_sf.tools.serve.protocol import (
    Chunk,
    Ended,
    Error,
    Say,
    Start,
    Started,
    Switched,
    frame_of,
)
from scd_sf.tools.serve.recording import KeptClip, Recording
from scd_sf.types import Conditioning, UserError, VideoShape

AHEAD = 2  # chunks that may be made before the first of them was shown
RECENT = 8  # chunks over which speeds are measured


@dataclass(frozen=True)
class ClipMaker:
    """What clips are made with. ``decoder``: ``vae``, or a tiny one instead. ``shape``: of the
    longest clip. ``window``, ``sink``: latent frames of history. ``kept_frames``: of a clip, for its
    download. ``quality``: of the JPEGs, 1 .. 95."""

    student: Student
    sampler: Sampler
    vae: Vae
    decoder: PixelDecoder
    text: TextEncoder
    shape: VideoShape
    device: torch.device
    window: int
    sink: int
    fps: int
    kept_frames: int
    quality: int

    def encode(self, prompt: str) -> Conditioning:
        return self.text.encode([prompt]).to(self.device)


@dataclass(frozen=True)
class ClipRequest:
    """A clip that is wanted. ``picture`` (3, H, W) in [0, 1] of the maker's size, or None; ``since``
    by the monotonic clock."""

    start: Start
    picture: Tensor | None
    picture_sha256: str
    since: float


@dataclass
class Seat:
    """The viewer's connection as the thread sees it: what was said to it, and what it wants. A chunk
    counts from 1 over all clips of the seat."""

    say: Say
    made: int = 0
    shown: int = 0
    is_paused: bool = False
    wanted: ClipRequest | None = None
    prompt: str | None = None
    clip: ClipRequest | None = None
    recording: Recording = field(default_factory=lambda: Recording(1))


class Generator:
    """Clips for one viewer at a time, made in a thread of its own. ``at_end`` is called in the
    thread when it ends, by :meth:`stop` or by ``failure``."""

    def __init__(self, maker: ClipMaker, at_end: Callable[[], None] = lambda: None) -> None:
        self.maker = maker
        self.failure: BaseException | None = None
        self._at_end = at_end
        self._seat: Seat | None = None
        self._is_stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="scd serve: generator", daemon=True)

    def start(self) -> None:
        """Begin to wait for a viewer."""
        self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended: after the chunk that it is making."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        self._thread.join()

    # ------------------------------------------------------------------- from the server's loop

    def seat(self, say: Say) -> Seat | None:
        """The seat, or None where somebody has it."""
        with self._changed:
            if self._seat is not None or self._is_stopped:
                return None
            self._seat = Seat(say)
            return self._seat

    def leave(self, seat: Seat) -> None:
        """Frees the seat at once, and the thread after the chunk that it is making."""
        with self._changed:
            if self._seat is seat:
                self._seat = None
            self._changed.notify_all()

    def play(self, seat: Seat, request: ClipRequest) -> None:
        """Another clip instead of the one that is made."""
        with self._changed:
            seat.wanted, seat.prompt, seat.is_paused = request, None, False
            self._changed.notify_all()

    def change_prompt(self, seat: Seat, prompt: str) -> None:
        """UserError: there is no clip whose prompt could change."""
        with self._changed:
            if seat.clip is None and seat.wanted is None:
                raise UserError("nothing is playing; press start first")
            seat.prompt = prompt

    def pause(self, seat: Seat, on: bool) -> None:
        with self._changed:
            seat.is_paused = on
            self._changed.notify_all()

    def shown(self, seat: Seat, chunk: int) -> None:
        """UserError: a chunk that was not made yet."""
        with self._changed:
            if chunk > seat.made:
                raise UserError(f"chunk {chunk} was not made yet, {seat.made} were")
            seat.shown = max(seat.shown, chunk)
            self._changed.notify_all()

    def kept(self, seat: Seat) -> tuple[ClipRequest, KeptClip]:
        """The clip that plays, or that ended, and its kept frames. UserError: there is none."""
        with self._changed:
            if seat.clip is None:
                raise UserError("nothing has been made yet; press start first")
            return seat.clip, seat.recording.kept()

    # ------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while (seat := self._next_seat()) is not None:
                try:
                    self._play(seat)
                except UserError as error:
                    seat.say(Error(str(error)), ())
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self._is_stopped = True
            self._at_end()

    def _next_seat(self) -> Seat | None:
        """The seat whose viewer wants a clip, which becomes the clip of the seat; None at the
        end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_stopped or (self._seat is not None and self._seat.wanted)
            )
            seat = self._seat
            if self._is_stopped or seat is None:
                return None
            seat.clip, seat.wanted = seat.wanted, None
            seat.shown = seat.made  # the page forgets what is left of the clip before
            seat.recording = Recording(self.maker.kept_frames)
            return seat

    def _is_over(self, seat: Seat) -> bool:
        return self._is_stopped or self._seat is not seat or seat.wanted is not None

    def _may_go_on(self, seat: Seat) -> bool:
        """Waits for credit; False where the clip is over."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._is_over(seat) or (not seat.is_paused and seat.made - seat.shown < AHEAD)
                )
            )
            return not self._is_over(seat)

    def _play(self, seat: Seat) -> None:
        maker, request = self.maker, seat.clip
        assert request is not None
        start = None
        if request.picture is not None:
            check_start(1, maker.student.chunk, maker.shape, "picture")
            start = request.picture[None, None]
        seat.say(Started(request.start.seed, request.start.prompt), ())
        num_frames, first_seconds = 0, 0.0

        def next_prompt() -> Conditioning | None:
            with self._changed:
                prompt, seat.prompt = seat.prompt, None
                if prompt is None:
                    return None
                seat.recording.changed(num_frames, prompt)
            seat.say(Switched(num_frames, prompt), ())
            return maker.encode(prompt)

        latents = Timed(
            clip_latents(
                maker.student,
                maker.vae,
                maker.encode(request.start.prompt),
                [request.start.seed],
                maker.shape,
                maker.sampler,
                window=maker.window,
                sink=maker.sink,
                start=start,
                next_prompt=next_prompt,
            )
        )
        frames, speeds = decoded(maker.decoder, latents), Speeds()
        while self._may_go_on(seat):
            began = time.monotonic()
            pixels = next(frames, None)
            if pixels is None:
                seat.say(Ended(num_frames), ())
                return
            pictures = as_uint8(pixels[0]).cpu()
            jpegs = [jpeg(picture, maker.quality) for picture in pictures]
            now = time.monotonic()
            speeds.add(len(jpegs), latents.seconds, now - began - latents.seconds)
            first_seconds = first_seconds or now - request.since
            with self._changed:
                if self._is_over(seat):
                    return
                seat.made += 1
                seat.recording.add(pictures)
                head = Chunk(
                    seat.made, num_frames, len(jpegs), *speeds.frames_per_second(), first_seconds
                )
                parts = [
                    frame_of(num_frames + place, seat.made, maker.fps, data)
                    for place, data in enumerate(jpegs)
                ]
                seat.say(head, parts)
            num_frames += len(jpegs)


class Timed:
    """An iterator that measures how long its last item took: ``seconds``."""

    def __init__(self, items: Iterable[Tensor]) -> None:
        self._items, self.seconds = iter(items), 0.0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        began = time.monotonic()
        item = next(self._items)
        self.seconds = time.monotonic() - began
        return item


class Speeds:
    """Pixel frames per second of the DiT and of what comes after it, over the last chunks."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=RECENT)

    def add(self, frames: int, dit_seconds: float, other_seconds: float) -> None:
        self._recent.append((frames, dit_seconds, other_seconds))

    def frames_per_second(self) -> tuple[float, float]:
        frames, dit, other = (sum(column) for column in zip(*self._recent, strict=True))
        return frames / max(dit, 1e-9), frames / max(other, 1e-9)


def jpeg(picture_3HW: Tensor, quality: int) -> bytes:
    """A picture (3, H, W) uint8 as JPEG."""
    file = io.BytesIO()
    pixels = picture_3HW.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()
