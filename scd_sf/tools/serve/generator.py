"""The thread that makes video, and the seat of the one viewer it is made for.

The server's loop asks (start, another prompt, pause, credit); the thread reads the wishes between
two chunks. It makes latents; what follows them (pixels, pictures, messages) is the job of a second
stage (stage.py), which a chunk may be in while the next one is made. A chunk is begun only while
the page has acknowledged all but :attr:`Generator.ahead` of those begun before: a slow viewer slows
the thread, and nothing piles up.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from scd_sf.data.start import check_start
from scd_sf.diffusion.samplers import Sampler, first_step
from scd_sf.distributed import release_freed_memory
from scd_sf.generation.generate import as_uint8, clip_latents, pixels_of
from scd_sf.generation.inputs import ChunkInput
from scd_sf.generation.prompt_change import PromptChange
from scd_sf.models.build import Student
from scd_sf.models.wan.text import TextEncoder
from scd_sf.models.wan.vae import PixelDecoder, PixelStream, Vae
from scd_sf.tools.serve.audience import Audience
from scd_sf.tools.serve.camera import Camera
from scd_sf.tools.serve.pictures import H264, Codec, EncodedPicture, jpeg
from scd_sf.tools.serve.protocol import (
    ChangePrompt,
    Chunk,
    Ended,
    Error,
    Reply,
    Say,
    Start,
    Started,
    Switched,
    Watchers,
    frame_of,
)
from scd_sf.tools.serve.recording import KeptClip, Recording
from scd_sf.tools.serve.stage import Moment, Stage, Streams, moment
from scd_sf.types import Conditioning, UserError, VideoShape

# Chunks that may be begun before the first of them was shown: one is shown, one is ready, and in
# a pipeline one more is on its way.
AHEAD, AHEAD_IN_A_PIPELINE = 2, 3
RECENT = 8  # chunks over which speeds are measured
TOO_LATE = "the clip ended before the new prompt could hold; press start for a clip with it"
TRIM = 100  # chunks after which freed memory goes back to the kernel: in pieces it adds up


@dataclass(frozen=True)
class ClipMaker:
    """What clips are made with. ``decoder``: ``vae``, or a tiny one instead. ``shape``: of the
    longest clip. ``window``, ``sink``: latent frames of history. ``kept_frames``: of a clip, for its
    download. ``quality``: of the JPEGs, 1 .. 95. ``overlap``: decode a chunk while the next one is
    made. ``name``: of the model, for its viewers."""

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
    overlap: bool = False
    name: str = ""

    @property
    def camera_frames(self) -> tuple[int, int]:
        """Frames of a camera that the first chunk of a clip takes, and each later one."""
        temporal, chunk = self.shape.temporal, self.student.chunk
        return 1 + (chunk - 1) * temporal, chunk * temporal

    def camera(self) -> Camera:
        temporal = self.shape.temporal
        return Camera(temporal, self.camera_frames[1] + temporal)

    def encode(self, prompt: str) -> Conditioning:
        return self.text.encode([prompt]).to(self.device)


def warm_up(maker: ClipMaker) -> None:
    """Latents of a clip whose history fills and moves on: what is compiled or recorded is so
    afterwards, and no viewer waits for it."""
    chunk = maker.student.chunk
    count = (maker.window + maker.sink) // chunk + 3
    shape = replace(maker.shape, frames=min(maker.shape.frames, count * chunk))
    clip = clip_latents(
        maker.student,
        maker.vae,
        maker.encode(""),
        [0],
        shape,
        maker.sampler,
        window=maker.window,
        sink=maker.sink,
    )
    deque(clip, maxlen=0)


@dataclass(frozen=True)
class ClipRequest:
    """A clip that is wanted. ``picture`` (3, H, W) in [0, 1] of the maker's size, or None; ``since``
    by the monotonic clock; ``camera``: what it is made from, or None."""

    start: Start
    picture: Tensor | None
    picture_sha256: str
    since: float
    camera: Camera | None = None


@dataclass
class Seat:
    """The viewer's connection as the thread sees it: what was said to it, and what it wants. Chunks
    count from 1 over all clips of the seat: those ``begun``, of which so many were ``made`` and
    sent, and ``shown``. ``strength``: of a camera's frames. ``h264``: the stream that its pictures
    are in; None: they are JPEGs. ``has_ended``: the viewer was told that the ``clip`` goes no
    further."""

    say: Say
    begun: int = 0
    made: int = 0
    shown: int = 0
    is_paused: bool = False
    has_ended: bool = False
    h264: H264 | None = None
    wanted: ClipRequest | None = None
    change: ChangePrompt | None = None
    strength: float = 1.0
    clip: ClipRequest | None = None
    recording: Recording = field(default_factory=lambda: Recording(1))


@dataclass
class LiveClip:
    """A clip that is made. ``num_frames``: sent so far; ``first_seconds``: from the request to the
    first of them; ``camera``: number and strength of the camera's newest frame in the chunk that is
    made, if one is in it; ``idle``: from when to when that chunk waited for the camera, if it did;
    ``is_broken``: its pixels could not be made."""

    seat: Seat
    request: ClipRequest
    pixels: PixelStream
    speeds: Speeds
    num_frames: int = 0
    first_seconds: float = 0.0
    camera: tuple[int, float] | None = None
    idle: tuple[Moment, Moment] | None = None
    is_broken: bool = False


@dataclass(frozen=True)
class ChunkLatents:
    """Latents (1, n, C, H, W) on their way to the second stage: the moments at which their making
    ``began`` and they are ``ready``, another prompt that holds from them on, if there is one, and the
    camera's newest frame in them and the time it was waited for, as in :class:`LiveClip`."""

    latents: Tensor
    began: Moment
    ready: Moment
    change: ChangePrompt | None
    camera: tuple[int, float] | None
    idle: tuple[Moment, Moment] | None

    @property
    def seconds(self) -> float:
        """That the device took, once they are ready."""
        waited = 0.0 if self.idle is None else self.idle[1].since(self.idle[0])
        return self.ready.since(self.began) - waited


class Generator:
    """Clips for one viewer at a time, made in a thread of its own. ``at_end`` is called in the
    thread when it ends, by :meth:`stop` or by ``failure``, that of either stage. ``h264``: what
    WebCodecs calls its H.264; empty: it has none, for the reason ``no_h264``. ``most_watchers``:
    pages that may watch along."""

    def __init__(
        self,
        maker: ClipMaker,
        at_end: Callable[[], None] = lambda: None,
        most_watchers: int = 8,
    ) -> None:
        self.maker = maker
        self.ahead = AHEAD_IN_A_PIPELINE if maker.overlap else AHEAD
        self.failure: BaseException | None = None
        self.h264 = self.no_h264 = ""
        try:
            self.h264 = self._new_h264().name()
        except UserError as error:
            self.no_h264 = str(error)
        self.audience = Audience(most_watchers)
        self._at_end = at_end
        self._seat: Seat | None = None
        self._is_stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="scd serve: generator", daemon=True)
        self._stage = Stage(maker.overlap, self._fail)
        devices = (maker.device, maker.decoder.device) if maker.overlap else ()
        self._streams = Streams(*devices)

    def start(self) -> None:
        """Begin to wait for a viewer."""
        self._stage.start()
        self._thread.start()

    def stop(self) -> None:
        """Returns when both stages have ended: after the chunks that they are at."""
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
            self.audience.seat(is_free=False)
            return self._seat

    def leave(self, seat: Seat) -> None:
        """Frees the seat at once, and the thread after the chunk that it is making."""
        with self._changed:
            if self._seat is seat:
                self._seat = None
                self.audience.seat(is_free=True)
            self._changed.notify_all()

    def count_watchers(self) -> None:
        """Tells the viewer, if there is one, how many watch along."""
        with self._changed:
            if self._seat is not None:
                self._seat.say(Watchers(len(self.audience)), ())

    def play(self, seat: Seat, request: ClipRequest) -> None:
        """Another clip instead of the one that is made. UserError: a camera's frames with less
        noise than the sampler can begin with."""
        first_step(self.maker.sampler, request.start.strength)
        with self._changed:
            seat.wanted, seat.change, seat.is_paused = request, None, False
            seat.has_ended = False
            self.audience.pause(False)
            seat.strength = request.start.strength
            self._changed.notify_all()

    def change_prompt(self, seat: Seat, change: ChangePrompt) -> None:
        """UserError: there is no clip whose prompt could change."""
        with self._changed:
            if seat.wanted is None and (seat.clip is None or seat.has_ended):
                raise UserError("nothing is playing; press start first")
            seat.change = change

    def change_strength(self, seat: Seat, strength: float) -> None:
        """Of the camera's frames, from the next chunk on. UserError as :meth:`play`."""
        first_step(self.maker.sampler, strength)
        with self._changed:
            seat.strength = strength

    def has_camera(self, seat: Seat) -> bool:
        """Whether the clip that plays, or that is wanted, is made from a camera that is on."""
        with self._changed:
            camera = _camera_of(seat)
            return camera is not None and camera.is_on

    def camera_frame(self, seat: Seat, number: int, pixels_3HW: Tensor) -> None:
        """A frame in [0, 1] of the maker's size; without a camera's clip it is passed over.
        UserError: a number that does not rise."""
        with self._changed:
            if (camera := _camera_of(seat)) is not None:
                camera.put(number, pixels_3HW)
                self._changed.notify_all()

    def camera_off(self, seat: Seat) -> None:
        """What there is of whole chunks is still used, then the clip goes on from noise."""
        with self._changed:
            if (camera := _camera_of(seat)) is not None:
                camera.is_on = False
                self._changed.notify_all()

    def pause(self, seat: Seat, on: bool) -> None:
        with self._changed:
            seat.is_paused = on
            self.audience.pause(on)
            if (camera := _camera_of(seat)) is not None:
                camera.clear()  # what comes later does not follow on it
            self._changed.notify_all()

    def use_codec(self, seat: Seat, codec: Codec) -> None:
        """From the next chunk on. UserError: there is no such codec here."""
        stream = self._new_h264() if codec == "h264" else None
        with self._changed:
            seat.h264 = stream

    def _new_h264(self) -> H264:
        shape = self.maker.shape
        return H264(shape.pixel_width, shape.pixel_height, self.maker.fps)

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
            while (clip := self._next_clip()) is not None:
                try:
                    self._play(clip)
                except UserError as error:
                    self._stage.put(partial(self._tell, clip, Error(str(error), ended=True)))
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._is_stopped = True
            self._stage.close()
            self._at_end()

    def _fail(self, error: BaseException) -> None:
        """Ends the thread after the chunk that it is making."""
        with self._changed:
            self.failure = self.failure or error
            self._is_stopped = True
            self._changed.notify_all()

    def _next_clip(self) -> LiveClip | None:
        """The clip that the viewer wants, which becomes the clip of the seat; None at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_stopped or (self._seat is not None and self._seat.wanted)
            )
            seat = self._seat
            if self._is_stopped or seat is None or seat.wanted is None:
                return None
            request, seat.clip, seat.wanted = seat.wanted, seat.wanted, None
            # what is left of the clip before is void, here and on the page
            seat.begun = seat.shown = seat.made
            seat.recording = Recording(self.maker.kept_frames)
            seat.h264 = None if seat.h264 is None else self._new_h264()
            return LiveClip(seat, request, self.maker.decoder.stream(), Speeds())

    def _is_over(self, clip: LiveClip) -> bool:
        seat = clip.seat
        is_current = self._seat is seat and seat.clip is clip.request and seat.wanted is None
        return self._is_stopped or clip.is_broken or not is_current

    def _may_begin(self, clip: LiveClip) -> bool:
        """Waits for credit, and takes it; False where the clip is over."""
        seat = clip.seat

        def has_credit() -> bool:
            return not seat.is_paused and seat.begun - seat.shown < self.ahead

        with self._changed:
            self._changed.wait_for(lambda: self._is_over(clip) or has_credit())
            seat.begun += 1
            return not self._is_over(clip)

    def _play(self, clip: LiveClip) -> None:
        """The first stage: latents, chunk by chunk."""
        maker, seat, request = self.maker, clip.seat, clip.request
        start = None
        if request.picture is not None:
            check_start(1, maker.student.chunk, maker.shape, "picture")
            start = request.picture[None, None]
        self._tell(clip, Started(request.start.seed, request.start.prompt))
        change: ChangePrompt | None = None  # from this chunk on

        def next_prompt() -> PromptChange | None:
            nonlocal change
            with self._changed:
                if self._is_over(clip):
                    return None  # what is wanted now is for the clip after this one
                change, seat.change = seat.change, None
            if change is None:
                return None
            return PromptChange(maker.encode(change.prompt), change.history)

        chunks = clip_latents(
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
            inputs=None if request.camera is None else self._camera_inputs(clip, request.camera),
        )
        while self._may_begin(clip):
            began, clip.idle = moment(maker.device), None
            latents = next(chunks, None)
            if latents is None:
                self._stage.put(lambda: self._tell(clip, Ended(clip.num_frames)))
                return
            now = moment(maker.device)
            chunk = ChunkLatents(latents, began, now, change, clip.camera, clip.idle)
            self._stage.put(partial(self._show, clip, chunk))
            if seat.begun % TRIM == 0:
                release_freed_memory()

    def _camera_inputs(self, clip: LiveClip, camera: Camera) -> Iterator[ChunkInput]:
        """A camera's frames, chunk by chunk as they come; pure noise when it is off. Ends where the
        clip is over."""
        (count, later), vae = self.maker.camera_frames, self.maker.vae
        stream = vae.encoder_stream()
        while self._await_frames(clip, camera, count):
            with self._changed:
                (number, pixels), strength = camera.take(count), clip.seat.strength
            clip.camera, count = (number, strength), later
            yield ChunkInput(stream.push(pixels * 2 - 1), strength)
        clip.camera = None
        while not self._is_over(clip):
            yield ChunkInput(torch.zeros(1, 1, 1, 1, 1), 1.0)

    def _await_frames(self, clip: LiveClip, camera: Camera, count: int) -> bool:
        """Waits for ``count`` frames; False where the clip is over or there will not be so many."""
        began = moment(self.maker.device)
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_over(clip) or not camera.is_on or camera.has(count)
            )
            clip.idle = began, moment(self.maker.device)
            return camera.has(count) and not self._is_over(clip)

    # -------------------------------------------------------------------------- the second stage

    def _tell(self, clip: LiveClip, reply: Reply) -> None:
        """Unless the clip is over: what is said then is about another one. A prompt that came too
        late for the clip is answered."""
        with self._changed:
            if self._is_over(clip):
                return
            seat = clip.seat
            seat.has_ended = isinstance(reply, Ended | Error)
            self._say_to_all(seat, reply)
            if seat.has_ended and seat.change is not None:
                seat.change = None
                seat.say(Error(TOO_LATE), ())

    def _say_to_all(self, seat: Seat, reply: Reply) -> None:
        seat.say(reply, ())
        self.audience.tell(reply)

    def _show(self, clip: LiveClip, chunk: ChunkLatents) -> None:
        """A chunk's pixels and pictures, recorded and sent."""
        seat, stream = clip.seat, clip.seat.h264
        if self._is_over(clip):
            return
        chunk.ready.wait()
        began = time.monotonic()
        try:
            with self._streams.reading(chunk.latents, chunk.ready):
                pictures = as_uint8(pixels_of(clip.pixels, chunk.latents)[0]).cpu()
        except UserError as error:
            self._tell(clip, Error(str(error), ended=True))
            with self._changed:
                clip.is_broken = True
                self._changed.notify_all()
            return
        needs_jpegs = stream is None or len(self.audience) > 0
        jpegs = self._jpegs(pictures) if needs_jpegs else []
        sent = jpegs if stream is None else [stream.encode(picture) for picture in pictures]
        now = time.monotonic()
        clip.speeds.add(len(pictures), chunk.seconds, now - began)
        clip.first_seconds = clip.first_seconds or now - clip.request.since
        with self._changed:
            if self._is_over(clip):
                return
            first = clip.num_frames
            if (change := chunk.change) is not None:
                seat.recording.changed(first, change.prompt, change.history)
                self._say_to_all(seat, Switched(first, change.prompt, change.history))
            seat.made += 1
            seat.recording.add(pictures)
            speeds = clip.speeds.frames_per_second()
            number, strength = chunk.camera or (-1, 1.0)
            if clip.request.camera is not None:
                seat.recording.with_strength(first, strength)
            head = Chunk(seat.made, first, len(pictures), *speeds, clip.first_seconds, number)
            seat.say(head, self._frames(first, seat.made, sent))
            self.audience.tell(head, self._frames(first, seat.made, jpegs))
            clip.num_frames += len(pictures)

    def _jpegs(self, pictures_F3HW: Tensor) -> list[EncodedPicture]:
        return [jpeg(picture, self.maker.quality) for picture in pictures_F3HW]

    def _frames(self, first: int, chunk: int, pictures: list[EncodedPicture]) -> list[bytes]:
        fps = self.maker.fps
        return [
            frame_of(first + place, chunk, fps, picture) for place, picture in enumerate(pictures)
        ]


def _camera_of(seat: Seat) -> Camera | None:
    """The camera of the clip that is wanted, or else of the one that plays."""
    request = seat.wanted or seat.clip
    return None if request is None else request.camera


class Speeds:
    """Pixel frames per second of the DiT and of what comes after it, over the last chunks."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=RECENT)

    def add(self, frames: int, dit_seconds: float, other_seconds: float) -> None:
        self._recent.append((frames, dit_seconds, other_seconds))

    def frames_per_second(self) -> tuple[float, float]:
        frames, dit, other = (sum(column) for column in zip(*self._recent, strict=True))
        return frames / max(dit, 1e-9), frames / max(other, 1e-9)
