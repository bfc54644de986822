"""``scd serve`` over real sockets: what is sent is what generate() makes, credit, switches, and
who is refused."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import http.client
import io
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import serve_world
import torch
from PIL import Image
from serve_world import HOST, KEPT, TOKEN, Live, Talk, seated, until, wait_for_nobody
from tape import record
from torch._dynamo.utils import counters
from websockets import Origin
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from scd_sf.cli import serve
from scd_sf.data.clips import read_video, video_writer
from scd_sf.generation.compile import CompileConfig, compile_steps
from scd_sf.generation.generate import as_uint8, clip_latents, generate
from scd_sf.generation.inputs import ChunkInput, chunk_inputs
from scd_sf.generation.prompt_change import PromptChange
from scd_sf.models.replay import Replayed
from scd_sf.models.wan.vae import PixelDecoder, PixelStream
from scd_sf.tools.serve.audience import BEHIND
from scd_sf.tools.serve.camera import HEAD, MARK, MOST_BYTES, Camera, is_frame, read_frame
from scd_sf.tools.serve.generator import (
    TOO_LATE,
    ClipMaker,
    ClipRequest,
    Generator,
    Seat,
    warm_up,
)
from scd_sf.tools.serve.pictures import KEY_SECONDS, jpeg, nal_units
from scd_sf.tools.serve.protocol import (
    FLAGS_SHIFT,
    IS_H264,
    IS_KEY,
    MOST_PICTURE,
    Busy,
    ChangePrompt,
    Chunk,
    Error,
    Paused,
    Reply,
    Start,
    Started,
)
from scd_sf.tools.serve.recording import Recording
from scd_sf.tools.serve.safety import Names, Rate, choose_token, page_address
from scd_sf.tools.serve.server import ServeConfig, model_name, open_maker, start_picture
from scd_sf.tools.serve.stage import Moment, Streams, moment
from scd_sf.types import UserError

MEADOW, HALL = "left in meadow", "right in hall"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serve_world.live(tmp_path_factory.mktemp("live")) as running:
        yield running


@pytest.fixture
def live(served: Live) -> Iterator[Live]:
    yield served
    wait_for_nobody(served)


def made(live: Live, frames: int, prompt: str, seed: int, **options: Any) -> list[bytes]:
    """JPEGs of the first latent ``frames`` of generate()."""
    maker = live.maker
    changes = {
        at: PromptChange(maker.encode(text), history)
        for at, (text, history) in options.pop("changes", {}).items()
    }
    parts = generate(
        maker.student,
        maker.vae,
        maker.encode(prompt),
        [seed],
        replace(maker.shape, frames=frames),
        maker.sampler,
        window=maker.window,
        sink=maker.sink,
        changes=changes,
        **options,
    )
    return [jpeg(picture, maker.quality).data for part in parts for picture in as_uint8(part[0])]


def play(page: Talk, chunks: int) -> list[bytes]:
    """JPEGs of the next chunks, each shown at once; other messages may not come."""
    jpegs = []
    for _ in range(chunks):
        head, frames = page.chunk()
        jpegs += [data for _, data in frames]
        page.say(type="shown", chunk=head["chunk"])
    return jpegs


def test_what_is_sent_is_what_generate_makes(live: Live) -> None:
    """Numbers, times, bytes; past the window; another prompt from the frame that was promised on;
    then a restart, whose chunks are counted on."""
    with seated(live) as page:
        page.say(type="start", prompt=MEADOW, seed=7)
        assert page.expect("started") == {"type": "started", "seed": 7, "prompt": MEADOW}
        jpegs: list[bytes] = []
        for number in range(1, 7):
            head, frames = page.chunk()
            assert head["chunk"] == number and head["first"] == len(jpegs)
            for place, (numbers, data) in enumerate(frames):
                frame = head["first"] + place
                assert numbers == (frame, number, frame * 1_000_000 // 16)
                jpegs.append(data)
            assert head["dit_fps"] > 0 and head["vae_fps"] > 0 and head["first_seconds"] > 0
            if number <= 6 - live.generator.ahead:
                page.say(type="shown", chunk=number)
        page.say(type="prompt", prompt=HALL, history="recache")  # chunk 7 waits for credit
        page.say(type="shown", chunk=6)
        switch = None
        while len(jpegs) < 1 + 4 * 8:
            message = page.hear()
            if isinstance(message, bytes):
                jpegs.append(message[16:])
            elif message["type"] == "switched":
                switch = message
                assert message["frame"] == len(jpegs), "told between the last and the first frame"
            else:
                page.say(type="shown", chunk=message["chunk"])
        assert switch is not None and (switch["prompt"], switch["history"]) == (HALL, "recache")
        assert switch["frame"] == 1 + 4 * 5
        assert jpegs == made(live, 9, MEADOW, 7, changes={switch["frame"]: (HALL, "recache")})
        assert jpegs != made(live, 9, MEADOW, 7, changes={switch["frame"]: (HALL, "keep")})
        page.say(type="start", prompt=HALL, seed=8)
        while not (isinstance(message := page.hear(), dict) and message["type"] == "started"):
            pass
        head, frames = page.chunk()
        assert head["first"] == 0 and head["chunk"] > 9
        assert [data for _, data in frames] == made(live, 1, HALL, 8)


def test_credit_and_pause_stop_the_generator(live: Live) -> None:
    ahead = live.generator.ahead
    with seated(live) as page:
        page.say(type="start", prompt=MEADOW, seed=0)
        page.expect("started")
        for _ in range(ahead):
            page.chunk()
        with pytest.raises(TimeoutError):
            page.hear(0.5)
        page.say(type="shown", chunk=1)
        assert page.chunk()[0]["chunk"] == ahead + 1
        with pytest.raises(TimeoutError):
            page.hear(0.5)
        page.say(type="shown", chunk=99)
        assert "not made yet" in page.expect("error")["message"]
        page.say(type="pause", on=True)
        page.say(type="shown", chunk=ahead + 1)
        with pytest.raises(TimeoutError):
            page.hear(0.5)
        page.say(type="pause", on=False)
        following = [page.chunk()[0]["chunk"] for _ in range(ahead)]
        assert following == [ahead + 2 + place for place in range(ahead)]


def test_a_start_picture(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8)).save(file, "PNG")
    with seated(live) as page:
        page.say(type="start", prompt=MEADOW, seed=1, picture=True)
        assert "no start picture" in page.expect("error")["message"]
        page.socket.send(b"no picture")
        assert page.expect("error")["message"] == (
            "the picture cannot be read: no picture of the formats PNG, JPEG, WEBP; use a png, jpg or webp"
        )
        with monkeypatch.context() as patch:
            patch.setattr(type(live.maker.student), "chunk", 3)
            page.socket.send(file.getvalue())
            assert "makes 3 latent frames at a time, and a pic" in page.expect("error")["message"]
        page.socket.send(file.getvalue())
        assert page.expect("picture") == {"type": "picture", "width": 32, "height": 32}
        page.say(type="start", prompt=MEADOW, seed=1, picture=True)
        page.expect("started")
        start = start_picture(file.getvalue(), (32, 32))
        assert play(page, 3) == made(live, 3, MEADOW, 1, start=start[None, None])


def test_the_download(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last frames, whole chunks, and a manifest without a path of the server; a full disk is
    told."""

    def full(*given: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with seated(live) as page:
        page.say(type="download")
        assert "nothing has been made" in page.expect("error")["message"]
        page.say(type="start", prompt=MEADOW, seed=3)
        page.expect("started")
        play(page, 9)
        page.say(type="pause", on=True)
        page.say(type="download")
        message, _ = until_kind(page, "file")
        data = page.data()
        assert len(data) == message["bytes"]
        monkeypatch.setattr("tempfile.TemporaryDirectory", full)
        page.say(type="download")
        # a chunk that was begun before the pause may come first
        assert "the download: No space left" in until_kind(page, "error")[0]["message"]
    archive = zipfile.ZipFile(io.BytesIO(data))
    assert archive.namelist() == ["video.mp4", "manifest.json"]
    manifest = json.loads(archive.read("manifest.json"))
    assert manifest["sha256"] == hashlib.sha256(archive.read("video.mp4")).hexdigest()
    assert KEPT <= manifest["frames"] < KEPT + 4 and manifest["first_frame"] % 4 == 1
    assert (manifest["prompt"], manifest["seed"], manifest["then"]) == (MEADOW, 3, [])
    assert "/" not in archive.read("manifest.json").decode()
    (tmp_path / "video.mp4").write_bytes(archive.read("video.mp4"))
    video = read_video(tmp_path / "video.mp4").float()
    first, count = manifest["first_frame"], manifest["frames"]
    expected = [Image.open(io.BytesIO(data)) for data in made(live, 12, MEADOW, 3)]
    pictures = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in expected])
    pictures = pictures[first : first + count].float()
    assert video.shape == pictures.shape
    assert float((video - pictures).abs().mean()) < 12  # two lossy codecs
    assert float((video - pictures.flip(0)).abs().mean()) > 0  # not a comparison of constants


def test_one_download_at_a_time(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who leaves ends the encoding after the chunk that it is at; the next viewer's begins then."""
    may_go_on = threading.Event()
    chunks: list[int] = []  # of each download, so far

    @contextlib.contextmanager
    def gated(path: Path, fps: int, *, crf: int) -> Iterator[Callable[[torch.Tensor], None]]:
        number = len(chunks)
        chunks.append(0)
        with video_writer(path, fps, crf=crf) as append:

            def append_later(frames: torch.Tensor) -> None:
                chunks[number] += 1
                assert may_go_on.wait(60)
                append(frames)

            yield append_later

    monkeypatch.setattr("scd_sf.tools.serve.recording.video_writer", gated)
    for viewer in range(3):
        with seated(live) as page:
            page.say(type="start", prompt=MEADOW, seed=viewer)
            page.expect("started")
            play(page, 3)
            page.say(type="pause", on=True)
            page.say(type="download")
            if viewer < 2:
                until(lambda: chunks == [1])
                time.sleep(0.3)
                assert chunks == [1]
                continue
            may_go_on.set()
            until_kind(page, "file")
            data = page.data()
    manifest = json.loads(zipfile.ZipFile(io.BytesIO(data)).read("manifest.json"))
    assert manifest["seed"] == 2 and len(chunks) == 2
    assert chunks[0] == 1 and chunks[1] >= 3


STRENGTH = 0.8333  # the second of the tiny student's two levels


def camera_jpeg(number: int) -> bytes:
    """A picture of the model's size, another one for each number."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG" if number % 2 else "WEBP")
    return file.getvalue()


def film(page: Talk, numbers: range) -> None:
    for number in numbers:
        page.socket.send(HEAD.pack(MARK, number) + camera_jpeg(number))


def camera_clip(live: Live, numbers: list[int], strengths: list[float], **more: Any) -> list[bytes]:
    """JPEGs that generate() makes of these frames of the camera, chunk by chunk."""
    frames = torch.stack([read_frame(bytes(8) + camera_jpeg(n), (32, 32))[1] for n in numbers])
    inputs = [
        ChunkInput(part.latents, strength)
        for part, strength in zip(
            chunk_inputs(live.maker.vae, [frames[None]], 1, 1.0), strengths, strict=True
        )
    ]
    noise = ChunkInput(torch.zeros(1, 1, 1, 1, 1), 1.0)
    inputs += [noise] * (more.pop("frames") - len(inputs))
    return made(live, len(inputs), MEADOW, 7, inputs=inputs, **more)


def until_kind(page: Talk, kind: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The next message of this kind, and the JSON messages before it."""
    others: list[dict[str, Any]] = []
    while True:
        message = page.hear()
        if isinstance(message, dict) and message["type"] == kind:
            return message, others
        if isinstance(message, dict):
            others.append(message)


def camera_chunk(page: Talk) -> tuple[int, list[bytes], list[dict[str, Any]]]:
    """The next chunk, shown at once: its camera frame, its JPEGs, and what was said before it."""
    head, others = until_kind(page, "chunk")
    frames = [page.hear() for _ in range(head["frames"])]
    page.say(type="shown", chunk=head["chunk"])
    return head["camera"], [frame[16:] for frame in frames if isinstance(frame, bytes)], others


def test_a_camera(live: Live) -> None:
    """What is sent is what generate() makes of the camera's frames, each chunk with its strength;
    another prompt on the way; noise when the camera is off. The download says so."""
    with seated(live) as page:
        page.say(type="start", prompt=MEADOW, seed=7, camera=True, strength=STRENGTH)
        page.expect("started")
        with pytest.raises(TimeoutError):
            page.hear(0.3)  # no frame yet
        jpegs, numbers, said = list[bytes](), list[int](), list[dict[str, Any]]()
        for place, frames in enumerate((range(1), range(1, 5), range(5, 9), range(9, 13), None)):
            if place == 1:
                file = io.BytesIO()
                Image.new("RGB", (9, 9)).save(file, "PNG")
                page.socket.send(file.getvalue())  # a start picture is no frame of the camera
            if place in (2, 3):
                page.say(type="strength", strength=1 if place == 2 else STRENGTH)
            if place == 3:
                page.say(type="prompt", prompt=HALL)
            if frames is None:
                page.say(type="camera_off")
            else:
                film(page, frames)
            for _ in range(1 if frames is not None else 2):
                number, pictures, others = camera_chunk(page)
                numbers.append(number)
                jpegs += pictures
                said += others
        assert numbers == [0, 4, 8, 12, -1, -1]
        assert [message["type"] for message in said] == ["picture", "switched"]
        changes = {said[1]["frame"]: (HALL, "keep")}
        strengths = [STRENGTH, STRENGTH, 1.0, STRENGTH]
        more = {"frames": 6, "changes": changes}
        assert jpegs == camera_clip(live, list(range(13)), strengths, **more)
        assert jpegs != camera_clip(live, list(range(13)), [1.0] * 4, **more)
        page.say(type="pause", on=True)
        page.say(type="download")
        until_kind(page, "file")
        data = page.hear()
        assert isinstance(data, bytes)
        manifest = json.loads(zipfile.ZipFile(io.BytesIO(data)).read("manifest.json"))
        page.say(type="start", prompt=MEADOW, seed=7, camera=True, picture=True)
        # a chunk that was begun before the pause may come first
        error = until_kind(page, "error")[0]["message"]
        assert "a camera's clip has no start picture" in error
        assert manifest["camera"] is True
        assert manifest["camera_strengths"] == [[0, STRENGTH], [5, 1.0], [9, STRENGTH], [13, 1.0]]


def test_the_newest_frames_of_a_camera(live: Live) -> None:
    """Of frames that wait for credit the oldest groups of four are left out; what is used follows
    one another."""
    with seated(live) as page:
        page.say(type="start", prompt=MEADOW, seed=7, camera=True, strength=STRENGTH)
        page.expect("started")
        ahead = live.generator.ahead
        heads = []
        for chunk in range(ahead):
            film(page, range(1) if chunk == 0 else range(4 * chunk - 3, 4 * chunk + 1))
            heads.append(page.chunk())
        first = 4 * ahead - 3  # the next frame
        time.sleep(0.3)  # until so many more frames are allowed
        film(page, range(first, first + 11))
        page.say(type="shown", chunk=1)
        heads.append(page.chunk())
        page.say(type="shown", chunk=2)
        film(page, range(first + 11, first + 12))
        heads.append(page.chunk())
        used = [*range(first), *range(first + 4, first + 12)]
        assert [head["camera"] for head, _ in heads] == [used[4 * n] for n in range(ahead + 2)]
        jpegs = [data for _, frames in heads for _, data in frames]
        strengths = [STRENGTH] * (ahead + 2)
        assert jpegs == camera_clip(live, used, strengths, frames=ahead + 2)


def test_a_camera_without_frames_holds_nobody(live: Live) -> None:
    """Pause, another clip, leaving and the server's end get through while frames are awaited."""
    start = {"type": "start", "prompt": MEADOW, "seed": 7}
    with seated(live) as page:
        page.say(**start, camera=True, strength=STRENGTH)
        page.expect("started")
        for on in (True, False):
            page.say(type="pause", on=on)
        page.say(**start)
        page.expect("started")
        assert play(page, 2) == made(live, 2, MEADOW, 7)
        film(page, range(3))  # of no clip
        page.say(**start, camera=True, strength=STRENGTH)
        until_kind(page, "started")
    with seated(live) as page:
        page.say(**start)
        page.expect("started")
        assert play(page, 1) == made(live, 1, MEADOW, 7)
    _waits_for_frames(live, False)
    _waits_for_frames(live, True)


def _waits_for_frames(live: Live, off: bool) -> None:
    """A generator that waits for frames ends when it is stopped; without a camera it goes on."""
    chunks: list[Reply] = []
    with generating(live.maker) as generator:
        seat = generator.seat(lambda reply, binary: chunks.append(reply) if binary else None)
        assert seat is not None
        start, now = Start(MEADOW, 7, camera=True, strength=STRENGTH), time.monotonic()
        generator.play(seat, ClipRequest(start, None, "", now, live.maker.camera()))
        until(lambda: seat.begun == 1)
        if off:
            generator.camera_off(seat)
            until(lambda: len(chunks) == generator.ahead)
    assert not generator._thread.is_alive() and generator.failure is None
    assert len(chunks) == (generator.ahead if off else 0)


def test_speeds_without_the_wait_for_a_camera(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, which still runs the encoder while the camera is awaited, and where it is waited for
    in vain. Device and clock are simulated: its encoder takes 0.4 s, all else nothing."""
    clock, busy_until, work, moments = 0.0, 0.0, 0.4, 0
    advance = live.maker.student.advance

    @dataclass
    class Event:
        at: float

        def synchronize(self) -> None: ...

        def elapsed_time(self, later: Event) -> float:
            return 1000 * (later.at - self.at)

    def launch(*args: Any) -> Any:
        nonlocal busy_until
        result = advance(*args)
        busy_until = max(busy_until, clock) + work
        return result

    def fake_moment(device: torch.device) -> Moment:
        nonlocal moments
        moments += 1
        return Moment(clock, Event(max(clock, busy_until)))  # type: ignore[arg-type]

    monkeypatch.setattr(live.maker.student, "advance", launch)
    monkeypatch.setattr("scd_sf.tools.serve.generator.moment", fake_moment)
    heads: list[Chunk] = []
    with generating(live.maker) as generator:
        seat = generator.seat(lambda reply, binary: heads.append(reply) if binary else None)  # type: ignore[arg-type]
        assert seat is not None
        start = Start(MEADOW, 7, camera=True, strength=STRENGTH)
        request = ClipRequest(start, None, "", time.monotonic(), live.maker.camera())
        generator.play(seat, request)
        until(lambda: moments == 2)  # where a chunk and where its wait for the camera begins
        clock += work / 2
        generator.camera_frame(seat, 0, torch.zeros(3, 32, 32))
        until(lambda: len(heads) == 1 and moments == 6)  # and where both end, and begin again
        clock += 3 * work
        generator.camera_off(seat)
        until(lambda: len(heads) >= 2)
    # with the encoder's work while the camera was awaited, without the wait until it was off
    assert [heads[0].dit_fps, heads[1].dit_fps] == pytest.approx([1 / work, 5 / (2 * work)])


def test_frames_of_a_camera_that_are_refused(live: Live) -> None:
    """Each is answered by an error, and the next frames are used; too many end the connection. What
    waits is bounded."""
    png, small = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (32, 32)).save(png, "PNG")
    Image.new("RGB", (32, 24)).save(small, "JPEG")
    large = io.BytesIO()
    Image.new("RGB", (33, 32)).save(large, "JPEG")
    head = HEAD.pack(MARK, 5)
    with seated(live) as page:
        page.say(type="start", prompt=MEADOW, seed=7, camera=True, strength=STRENGTH)
        page.expect("started")
        film(page, range(1))
        page.chunk()
        for message, words in (
            (MARK, "has no number"),
            (head, "cannot be read"),
            (head + bytes(99), "cannot be read"),
            (head + png.getvalue(), "cannot be read"),
            (head + small.getvalue(), "is 32x24, the model's are 32x32"),
            (head + large.getvalue(), "33x32 is too large"),
            (head + bytes(MOST_BYTES), "more than 524288 bytes"),
            (HEAD.pack(MARK, 0) + camera_jpeg(0), "frame 0 came after frame 0"),
        ):
            page.socket.send(message)
            assert words in page.expect("error")["message"], message[:20]
        page.say(type="start", prompt=MEADOW, seed=7, camera=True, strength=STRENGTH, picture=True)
        assert "there is no start picture" in page.expect("error")["message"]
        film(page, range(1, 5))
        assert page.chunk()[0]["camera"] == 4
        with pytest.raises(ConnectionClosed) as closed:
            for number in itertools.count(5):
                page.socket.send(HEAD.pack(MARK, number))
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1008
    assert not any(is_frame(start) for start in (b"", b"\x89PNG", b"\xff\xd8\xff", b"RIFF"))
    camera = Camera(4, 8)
    for number in range(1000):
        camera.put(number, torch.full((3, 1, 1), float(number)))
        assert not camera.has(9)
    number, pixels = camera.take(4)
    assert pixels.shape == (1, 4, 3, 1, 1) and pixels[0, :, 0, 0, 0].tolist() == [
        number - 3,
        number - 2,
        number - 1,
        number,
    ]


BAD_TEXTS: list[str | bytes] = [
    "",
    "nonsense",
    "[]",
    "[" * 10_000,
    '{"type": "start"}',
    '{"type": "start", "prompt": "a", "seed": -1}',
    '{"type": "start", "prompt": "a", "seed": 1.5}',
    '{"type": "start", "prompt": "a", "seed": NaN}',
    '{"type": "start", "prompt": "a", "seed": 99999999999999999999}',
    '{"type": "start", "prompt": "a", "seed": 1, "path": "/etc/passwd"}',
    '{"type": "start", "prompt": "\\ud800", "seed": 1}',
    '{"type": "start", "prompt": "' + "x" * 2001 + '", "seed": 1}',
    '{"type": "start", "prompt": "' + "x" * 20_000 + '", "seed": 1}',
    '{"type": "prompt", "prompt": "before a start"}',
    '{"type": "open", "path": "/etc/passwd"}',
    '{"type": "start", "prompt": "a", "seed": 1, "camera": true, "strength": 0}',
    '{"type": "start", "prompt": "a", "seed": 1, "camera": true, "strength": 1.5}',
    '{"type": "start", "prompt": "a", "seed": 1, "camera": true, "strength": 0.5}',
    '{"type": "strength", "strength": NaN}',
    '{"type": "strength", "strength": 0.5}',
    '{"type": "shown", "chunk": 4294967296}',
    '{"type": "hello", "token": ""}',
]


def test_malformed_and_oversized_messages(
    live: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is answered by an error, and the page goes on; one that is too large to be read ends the
    connection, and so does text that is no UTF-8, without a word in the terminal; the next page
    plays."""
    for name in ("uvicorn.error", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [caplog.handler])
        monkeypatch.setattr(logging.getLogger(name), "propagate", False)
    for has_seat in (True, False):
        with seated(live) if has_seat else Talk(live.port, None) as page:
            if has_seat:
                page.say(type="start", prompt=MEADOW, seed=2)
                page.expect("started")
            page.socket.send(b"a\xff", text=True)
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    page.hear()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1007
    with seated(live) as page:  # such a text and a goodbye at once, without masks
        page.socket.socket.sendall(b"\x81\x81\0\0\0\0\xff" + b"\x88\x80\0\0\0\0")
        with pytest.raises(ConnectionClosed):
            page.hear()
    with seated(live):
        pass
    # asyncio's, where several frames were written to a connection that was cut
    logging.getLogger("asyncio").warning("socket.send() raised exception.")
    assert caplog.records == []
    logging.getLogger("asyncio").warning("another")
    assert len(caplog.records) == 1
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    pictures = [b"", b"nonsense", bomb.getvalue(), gif.getvalue(), b"\x89PNG\r\n\x1a\n" + bytes(99)]
    with seated(live) as page:
        for message in [*BAD_TEXTS, *pictures, bytes(MOST_PICTURE + 1)]:
            page.socket.send(message)
            error = page.expect("error")["message"]
            assert "\n" not in error and len(error) < 400, message[:60]
        hostile = "</script><img src=x onerror=alert(1)> \0 \u202e {{ 7*7 }} ; rm -rf / `id` $(id)"
        page.say(type="start", prompt=hostile, seed=2)
        assert page.expect("started")["prompt"] == hostile
        play(page, 1)
        with contextlib.suppress(ConnectionClosed):
            page.socket.send(bytes(MOST_PICTURE + 10_000))
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                page.hear()
        # the reason is lost where the rest of the message is still on its way
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
    with seated(live) as page:
        page.say(type="start", prompt=MEADOW, seed=2)
        page.expect("started")
        assert play(page, 1) == made(live, 1, MEADOW, 2)


def test_a_burst_of_requests(live: Live) -> None:
    """Of 60 restarts, and of 60 prompts, the last one holds; those before it that were not begun
    are answered by nothing, and no frame of theirs is sent."""
    with seated(live) as page:
        for seed in range(60):
            page.say(type="start", prompt=MEADOW, seed=seed)
        started = [page.expect("started")]
        while started[-1]["seed"] < 59:
            if isinstance(message := page.hear(), dict) and message["type"] == "started":
                started.append(message)
        seeds = [message["seed"] for message in started]
        assert seeds == sorted(set(seeds))
        jpegs = list[bytes]()
        for _ in range(live.generator.ahead):
            last, frames = page.chunk()
            jpegs += [data for _, data in frames]
        time.sleep(1.5)  # until so many more messages are allowed
        for number in range(60):
            page.say(type="prompt", prompt=f"{HALL} {number}" if number < 59 else HALL)
        page.say(type="shown", chunk=last["chunk"])
        switched = page.expect("switched")
        assert (switched["frame"], switched["prompt"]) == (len(jpegs), HALL)
        jpegs += play(page, 3)
        number = live.generator.ahead + 3
        changes = {switched["frame"]: (HALL, "keep")}
        assert jpegs == made(live, number, MEADOW, 59, changes=changes)


def test_too_many_messages_end_the_connection(live: Live) -> None:
    with seated(live) as page:
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                page.say(type="shown", chunk=0)
        # the reason is lost where more is on its way
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1008


def test_one_viewer_and_a_cut(live: Live) -> None:
    """The second is told so. A connection that is cut frees the seat, and the next clip is whole."""
    first = seated(live)
    first.say(type="start", prompt=MEADOW, seed=4)
    first.expect("started")
    with Talk(live.port) as second:
        second.expect("busy")
        with pytest.raises(ConnectionClosed) as closed:
            second.hear()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
    play(first, 2)
    first.socket.socket.shutdown(socket.SHUT_RDWR)  # no goodbye
    with seated(live) as page:
        page.say(type="start", prompt=HALL, seed=5)
        page.expect("started")
        assert play(page, 2) == made(live, 2, HALL, 5)
    first.socket.close()


WATCHERS_MAY_NOT: list[str | bytes] = [
    "nonsense",
    b"a picture",
    '{"type": "start", "prompt": "a", "seed": 1}',
    '{"type": "prompt", "prompt": "a"}',
    '{"type": "pause", "on": true}',
    '{"type": "download"}',
    '{"type": "hello", "token": ""}',
]


def test_watching_along(live: Live) -> None:
    """A watcher gets the viewer's chunks, prompts and switches from where it came in; nothing it
    says changes the clip; one that shows nothing misses whole chunks, and slows nobody."""
    ahead = live.generator.ahead
    with seated(live) as viewer:
        viewer.say(type="start", prompt=MEADOW, seed=9)
        viewer.expect("started")
        jpegs = [data for _ in range(ahead) for _, data in viewer.chunk()[1]]
        with Talk(live.port) as page:
            assert page.expect("busy")["may_watch"] is True
        with Talk(live.port, watch=True) as watcher:
            size = {"fps": 16, "width": 32, "height": 32}
            model = {"model": "student/step_00000000"}
            assert watcher.expect("watching") == {"type": "watching", **size, **model}
            assert watcher.expect("seat")["is_free"] is False
            assert watcher.expect("started")["prompt"] == MEADOW
            assert viewer.expect("watchers")["count"] == 1
            for message in WATCHERS_MAY_NOT:
                watcher.socket.send(message)
                watcher.expect("error")
            viewer.say(type="shown", chunk=1)
            for number in range(2, 2 + BEHIND):
                head, frames = viewer.chunk()
                assert watcher.chunk() == (head, frames) and head["chunk"] == ahead + number - 1
                jpegs += [data for _, data in frames]
                viewer.say(type="shown", chunk=number)
            for number in range(2 + BEHIND, 4 + BEHIND):  # two that the watcher misses
                jpegs += [data for _, data in viewer.chunk()[1]]
                if number == 2 + BEHIND:
                    viewer.say(type="shown", chunk=number)
            watcher.say(type="shown", chunk=ahead + BEHIND)
            (place,) = live.generator.audience._watchers
            until(lambda: not place.unshown)
            switch = len(jpegs)
            viewer.say(type="prompt", prompt=HALL)
            viewer.say(type="shown", chunk=3 + BEHIND)
            switched = viewer.expect("switched")
            head, frames = viewer.chunk()
            assert switched["frame"] == head["first"] == switch
            assert watcher.expect("switched") == switched
            assert watcher.expect("missed")["chunks"] == 2
            assert watcher.chunk() == (head, frames)
            jpegs += [data for _, data in frames]
            assert jpegs == made(live, head["chunk"], MEADOW, 9, changes={switch: (HALL, "keep")})
            viewer.say(type="pause", on=True)
            assert watcher.expect("paused")["on"] is True
            with Talk(live.port, watch=True) as late:
                messages = [late.hear() for _ in range(5)]
                kinds = [message["type"] for message in messages if isinstance(message, dict)]
                assert kinds == ["watching", "seat", "started", "switched", "paused"]
            viewer.say(type="start", prompt=HALL, seed=10)
            assert watcher.expect("paused")["on"] is False
            assert watcher.expect("started")["seed"] == 10
            assert [data for _, data in watcher.chunk()[1]] == made(live, 1, HALL, 10)
            viewer.socket.close()
            assert until_kind(watcher, "seat")[0] == {"type": "seat", "is_free": True}
            with seated(live):
                assert watcher.expect("seat")["is_free"] is False


def test_an_audience_is_bounded(live: Live) -> None:
    until(lambda: len(live.generator.audience) == 0)
    with contextlib.ExitStack() as stack:
        watchers = [stack.enter_context(Talk(live.port, watch=True)) for _ in range(8)]
        for watcher in watchers:
            watcher.expect("watching")
        with Talk(live.port, watch=True) as page:
            assert page.expect("busy")["may_watch"] is False
            with pytest.raises(ConnectionClosed) as closed:
                page.hear()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
        watchers[0].socket.close()
        until(lambda: live.generator.audience.has_room)
        with Talk(live.port, watch=True) as page:
            page.expect("watching")
    until(lambda: len(live.generator.audience) == 0)
    nobody = Generator(live.maker, most_watchers=0).audience
    assert not nobody.has_room and nobody.join(lambda reply, binary: None, Busy(False)) is None


def test_foreign_names_and_pages_are_refused(live: Live) -> None:
    port = live.port
    for origin in ("http://evil.example", f"http://localhost:{port}", "null", None):
        with pytest.raises(InvalidStatus) as refused:
            Talk(port, origin=origin)
        assert refused.value.response.status_code == 403
    with socket.create_connection((HOST, port)) as raw, pytest.raises(InvalidStatus):
        evil = f"evil.example:{port}"
        connect(f"ws://{evil}/live", sock=raw, origin=Origin(f"http://{evil}"))

    def answer(path: str, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(HOST, port, timeout=20)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        response.read()
        connection.close()
        return response

    assert answer("/", Host=f"evil.example:{port}").status == 421
    assert answer("/", Host=HOST).status == 421  # another port's
    assert answer("/", Origin="http://evil.example").status == 421
    for path in ("/", "/page.css", "/page.js"):
        page = answer(path)
        assert page.status == 200 and page.getheader("Access-Control-Allow-Origin") is None
        assert "default-src 'none'" in str(page.getheader("Content-Security-Policy"))
        assert "camera=(self), microphone=()" in str(page.getheader("Permissions-Policy"))
    for path in ("/page.py", "/../server.py", "/page/page.js", "/%2e%2e/server.py", "/live"):
        assert answer(path).status == 404


def test_the_token(live: Live, capfd: pytest.CaptureFixture[str]) -> None:
    for token in (None, "", "wrong", TOKEN[:-1], TOKEN + "x", "\u00e4"):
        with Talk(live.token_port, token) as page, pytest.raises(ConnectionClosed) as closed:
            if token is None:
                page.say(type="start", prompt="", seed=0)
            page.hear()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
        with Talk(live.token_port, token, watch=True) as page, pytest.raises(ConnectionClosed):
            if token is None:
                page.say(type="hello", watch=True)
            page.hear()
    with contextlib.closing(seated(live).socket), Talk(live.token_port, TOKEN) as page:
        page.expect("busy")
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err


def test_names_tokens_and_rates() -> None:
    everywhere = Names("0.0.0.0", 8000, ("live.example.org",))
    for said in ("192.168.1.5:8000", "[fe80::1]:8000", "localhost:8000", "live.example.org"):
        assert everywhere.has(said), said
    for said in ("evil.example:8000", "192.168.1.5", "192.168.1.5:80", "live.example.org:1", ""):
        assert not everywhere.has(said), said
    assert Names("127.0.0.1", 8000, ("Live.Example.org",)).has("live.example.org")
    for wrong in ("http://live.example.org/", "", "*"):
        with pytest.raises(UserError, match=r"--name .* write NAME or NAME:PORT"):
            Names("0.0.0.0", 8000, (wrong,))
    here = Names("127.0.0.1", 8000)
    assert here.has("localhost:8000") and not here.has("192.168.1.5:8000")
    assert choose_token("127.0.0.1", "") == choose_token("::1", "") == ""
    assert len(choose_token("0.0.0.0", "")) >= 32
    assert choose_token("0.0.0.0", "") != choose_token("0.0.0.0", "")
    assert page_address("0.0.0.0", 80, "secret") == f"http://{socket.gethostname()}:80/#secret"
    assert page_address("::1", 8000, "") == "http://[::1]:8000/"
    with pytest.raises(UserError, match="at least 16"):
        choose_token("127.0.0.1", "short")
    now = [0.0]
    rate = Rate(2, 3, lambda: now[0])
    assert [rate.allows() for _ in range(4)] == [True, True, True, False]
    now[0] = 0.6
    assert [rate.allows() for _ in range(2)] == [True, False]


def test_a_recording_is_bounded() -> None:
    frame = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    by_frames, by_bytes = Recording(10), Recording(10**9, limit=3 * frame.nbytes)
    for number in range(2000):
        for recording in (by_frames, by_bytes):
            recording.add(frame + number % 7)
            recording.changed(4 * number, "x", "keep")
    kept = by_frames.kept()
    assert len(kept.chunks) == 3 and kept.first == 4 * 1997 and len(kept.changes) == 1000
    assert kept.lost_changes == 1000 and len(by_bytes.kept().chunks) == 3


def decode(stream: list[bytes]) -> torch.Tensor:
    """Frames (F, 3, H, W) of pictures of an H.264 stream, none of which waits for the next."""
    context = av.VideoCodecContext.create("h264", "r")
    context.thread_count, context.flags = 1, av.codec.context.Flags.low_delay
    pictures = []
    for data in stream:
        (frame,) = context.decode(av.Packet(data))
        assert isinstance(frame, av.VideoFrame)
        pictures.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
    return torch.stack(pictures)


def test_h264(live: Live) -> None:
    """A stream begins with a key frame, with every clip and every change of the codec; its pictures
    are those of generate(), with their numbers and times; watchers get JPEGs all the same."""
    with seated(live) as viewer, Talk(live.port, watch=True) as watcher:
        assert [watcher.hear() for _ in range(2)][1] == {"type": "seat", "is_free": False}
        viewer.say(type="codec", codec="vp8")
        viewer.expect("watchers")
        assert "vp8" in viewer.expect("error")["message"]
        viewer.say(type="codec", codec="h264")
        for seed in (11, 12):
            viewer.say(type="start", prompt=MEADOW, seed=seed)
            while (message := viewer.hear()) and not (
                isinstance(message, dict) and message["type"] == "started"
            ):
                pass
            frames = []
            for _ in range(10):
                head, part = viewer.chunk()
                frames += part
                viewer.say(type="shown", chunk=head["chunk"])
            keys = []
            for place, ((frame, _, tagged), data) in enumerate(frames):
                flags, microseconds = divmod(tagged, 1 << FLAGS_SHIFT)
                assert flags & IS_H264 and (frame, microseconds) == (
                    place,
                    place * 1_000_000 // 16,
                )
                kinds = [unit[0] & 31 for unit in nal_units(data)]
                assert (kinds[:2] == [7, 8] and 5 in kinds) == bool(flags & IS_KEY)
                if flags & IS_KEY:
                    keys.append(place)
            assert keys == [0, KEY_SECONDS * 16]
            expected = [Image.open(io.BytesIO(data)) for data in made(live, 10, MEADOW, seed)]
            pictures = torch.stack(
                [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in expected]
            )
            decoded = decode([data for _, data in frames])
            difference = (decoded.float() - pictures.float()).abs().mean((1, 2, 3))
            assert decoded.shape == pictures.shape and float(difference.max()) < 12
        viewer.say(type="codec", codec="jpeg")
        last = head["chunk"] + live.generator.ahead
        while head["chunk"] < last + 1:
            head, part = viewer.chunk()
            viewer.say(type="shown", chunk=head["chunk"])
        assert part[0][0][2] >> FLAGS_SHIFT == 0 and part[0][1].startswith(b"\xff\xd8")
        viewer.say(type="codec", codec="h264")
        while not (flags := part[0][0][2] >> FLAGS_SHIFT):
            head, part = viewer.chunk()
            viewer.say(type="shown", chunk=head["chunk"])
        assert flags == IS_H264 | IS_KEY, "another stream"
        watcher.expect("started")
        assert watcher.chunk()[1][0][1].startswith(b"\xff\xd8")


def test_without_h264(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes, and a PyAV without its encoder: the reason is said, and asking is an error."""
    odd = replace(live.maker, shape=replace(live.maker.shape, spatial=1, height=33))
    assert "even sizes" in Generator(odd).no_h264 and Generator(live.maker).h264 == "avc1.42c00a"
    monkeypatch.setattr(av, "codecs_available", {"h264"})
    generator = Generator(live.maker)
    assert generator.h264 == "" and "libx264" in generator.no_h264
    with pytest.raises(UserError, match="libx264"):
        generator.use_codec(Watched(generator).seat, "h264")


class Gate:
    """A decoder that waits before each chunk until it may go on. ``broken``: the stream, from 1,
    that gives no numbers, or raises this."""

    def __init__(self, decoder: PixelDecoder, broken: int = 0, fault: Exception | None = None):
        self.geometry, self.device = decoder.geometry, decoder.device
        self.may_go_on, self.pushes, self.streams = threading.Event(), 0, 0
        self._decoder, self._broken, self._fault = decoder, broken, fault

    def stream(self) -> PixelStream:
        self.streams += 1
        gate, number, inner = self, self.streams, self._decoder.stream()

        class Waiting:
            def push(self, latents_BFCHW: torch.Tensor) -> torch.Tensor:
                gate.pushes += 1
                assert gate.may_go_on.wait(60)
                if number == gate._broken and gate._fault is not None:
                    raise gate._fault
                pixels = inner.push(latents_BFCHW)
                return pixels * torch.nan if number == gate._broken else pixels

        return Waiting()


class Watched:
    """A generator's seat without a server: what was said to it."""

    def __init__(self, generator: Generator) -> None:
        self.generator, self.said = generator, list[tuple[Reply, list[bytes]]]()
        seat = generator.seat(lambda reply, binary: self.said.append((reply, list(binary))))
        assert seat is not None
        self.seat: Seat = seat

    def play(self, seed: int) -> None:
        request = ClipRequest(Start(MEADOW, seed), None, "", time.monotonic())
        self.generator.play(self.seat, request)

    def kinds(self) -> list[str]:
        return [type(reply).__name__ for reply, _ in self.said]

    def frames(self) -> list[bytes]:
        return [part[16:] for reply, parts in self.said for part in parts]


@contextlib.contextmanager
def generating(maker: ClipMaker) -> Iterator[Generator]:
    generator = Generator(maker)
    generator.start()
    try:
        yield generator
    finally:
        generator.stop()
    assert generator.failure is None


@pytest.mark.parametrize("overlap", [True, False])
def test_a_clip_ends(live: Live, overlap: bool) -> None:
    """Without a server, both stages in one thread or in two: the limit of a clip."""
    frames = 3 if overlap else 2  # as many as may be ahead: the end is told when one was shown
    short = replace(live.maker, shape=replace(live.maker.shape, frames=frames), overlap=overlap)
    with generating(short) as generator:
        watched = Watched(generator)
        assert generator.seat(lambda reply, binary: None) is None
        watched.play(0)
        until(lambda: watched.seat.made == frames)
        generator.change_prompt(watched.seat, ChangePrompt(HALL))  # no chunk is left for it
        generator.shown(watched.seat, frames)
        until(lambda: len(watched.said) == frames + 3)
        assert watched.kinds() == ["Started", *["Chunk"] * frames, "Ended", "Error"]
        assert watched.said[-1][0] == Error(TOO_LATE)
        assert watched.frames() == made(live, frames, MEADOW, 0)
        late: list[Reply] = []
        generator.audience.join(lambda reply, binary: late.append(reply), Busy(False))
        assert [type(reply).__name__ for reply in late] == ["Busy", "SeatState", "Started", "Ended"]
        with pytest.raises(UserError, match="nothing is playing; press start first"):
            generator.change_prompt(watched.seat, ChangePrompt(HALL))
        with generator._changed:  # before the thread begins
            watched.play(1)
            assert not watched.seat.has_ended, "a prompt right after the clip began was refused"
            generator.change_prompt(watched.seat, ChangePrompt(HALL))
            generator.pause(watched.seat, True)
        until(lambda: len(late) == 7)
        assert late[4:] == [Paused(True), late[5], Paused(True)] and isinstance(late[5], Started)
        generator.pause(watched.seat, False)
        until(lambda: len(watched.said) >= frames + 7)
        assert watched.kinds()[frames + 3 :][:4] == ["Started", "Switched", "Chunk", "Chunk"]


def test_a_change_is_for_the_clip_that_is_wanted(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another clip and at once another prompt, while the clip before begins its next chunk."""
    with generating(live.maker) as generator:
        watched = Watched(generator)

        def asked(*given: Any, next_prompt: Callable[[], Any], **more: Any) -> Iterator[Any]:
            def before_it() -> Any:
                if len(starts) == 1:
                    watched.play(8)
                    generator.change_prompt(watched.seat, ChangePrompt(HALL))
                return next_prompt()

            starts.append(1)
            return clip_latents(*given, next_prompt=before_it, **more)

        starts: list[int] = []
        monkeypatch.setattr("scd_sf.tools.serve.generator.clip_latents", asked)
        watched.play(7)
        until(lambda: watched.kinds().count("Chunk") == generator.ahead)
        assert watched.kinds()[:4] == ["Started", "Started", "Switched", "Chunk"]
        assert watched.frames() == made(live, generator.ahead, HALL, 8)


def test_the_name_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of where it is, however it is named."""
    step = tmp_path / "run" / "checkpoints" / "step_00000007"
    step.mkdir(parents=True)
    (tmp_path / "student.safetensors").touch()
    assert model_name(tmp_path / "student.safetensors") == "student.safetensors"
    assert model_name(step) == model_name(step / ".") == "run/step_00000007"
    assert model_name(tmp_path / "run" / "step_00000007") == "run/step_00000007"
    assert model_name(Path("/checkpoints/step_00000007")) == "step_00000007"
    monkeypatch.chdir(step)
    assert model_name(Path("../step_00000007")) == model_name(Path(".")) == "run/step_00000007"


@pytest.mark.parametrize("kind", ["recorded", "compiled"])
def test_steps_are_made_fast_before_a_viewer_comes(live: Live, kind: str) -> None:
    """Recorded (by the tape that stands for CUDA graphs) or compiled in the warm-up; a clip, another
    prompt and a history that moves on then add nothing, and the frames are the same."""
    student, count = copy.deepcopy(live.maker.student), list[int]()

    def counted(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        count.append(1)
        return record(step)

    def num_made() -> int:
        return len(count) + int(counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    before = num_made()
    if kind == "recorded":
        student.replay = Replayed(counted)
    else:
        compile_steps(student, CompileConfig(enabled=True), torch.device("cpu"), "eager")
    maker = replace(live.maker, student=student)
    warm_up(maker)
    warm = num_made()
    assert warm > before
    with generating(maker) as generator:
        watched = Watched(generator)
        watched.play(7)
        for number in range(1, 9):
            until(lambda number=number: watched.seat.made >= number)  # type: ignore[misc]
            generator.shown(watched.seat, number)
    assert watched.frames()[:29] == made(live, 8, MEADOW, 7)
    assert num_made() == warm


@pytest.mark.gpu
def test_streams_of_a_gpu(live: Live) -> None:
    """The VAE on a stream of its own gives the frames of generate()."""
    assert live.maker.device.type == "cuda"
    with generating(replace(live.maker, overlap=True)) as generator:
        watched = Watched(generator)
        watched.play(0)
        for number in range(1, 9):
            until(lambda number=number: watched.seat.made >= number)  # type: ignore[misc]
            generator.shown(watched.seat, number)
        assert watched.frames()[:29] == made(live, 8, MEADOW, 0)


def test_streams_wait_for_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a record of the calls: no GPU is here."""
    calls: list[str] = []

    class Stream:
        def __init__(self, device: torch.device | int) -> None:
            self.device = torch.device("cuda", torch.device(device).index or 0)

        def wait_stream(self, other: str) -> None:
            calls.append(f"{self.device} after {other}")

        def wait_event(self, event: str) -> None:
            calls.append(f"{self.device} after {event}")

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        calls.append(f"on {stream.device}")
        yield
        calls.append(f"off {stream.device}")

    class Latents:
        device = torch.device("cuda", 0)

        def record_stream(self, stream: Stream) -> None:
            calls.append(f"kept for {stream.device}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the {device} of others")
    streams = Streams(torch.device("cuda"), torch.device("cuda", 0), torch.device("cuda", 1))
    assert calls == [f"cuda:{index} after the cuda:{index} of others" for index in (0, 1)]
    calls.clear()
    with streams.reading(Latents(), Moment(0, "the latents")):  # type: ignore[arg-type]
        calls.append("decode")
    assert calls == [
        "on cuda:0",
        "on cuda:1",
        "cuda:0 after the latents",
        "kept for cuda:0",
        "decode",
        "off cuda:1",
        "off cuda:0",
    ]
    with Streams(torch.device("cpu")).reading(torch.zeros(1), Moment(0)):
        pass


def test_seconds_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU those between two events of its stream, for which one waits; on a CPU those of the
    clock. No GPU is here."""
    calls: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            calls.append(stream)

        def synchronize(self) -> None:
            calls.append("waited")

        def elapsed_time(self, later: Event) -> float:
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    began, ended = moment(torch.device("cuda", 1)), moment(torch.device("cuda", 1))
    ended.wait()
    assert ended.since(began) == 0.25 and calls == ["stream of cuda:1"] * 2 + ["waited"]
    Moment(1.0).wait()
    assert Moment(3.0).since(Moment(1.0)) == 2.0


def test_a_chunk_is_decoded_while_the_next_one_is_made(live: Live) -> None:
    """While the first chunk waits to be decoded, credit is taken for all that may be ahead. A
    restart then drops them all; so does leaving."""
    gate = Gate(live.maker.decoder)
    with generating(replace(live.maker, decoder=gate)) as generator:
        watched = Watched(generator)
        watched.play(0)
        until(lambda: watched.seat.begun == generator.ahead and gate.pushes == 1)
        assert watched.kinds() == ["Started"]
        generator.change_prompt(watched.seat, ChangePrompt(HALL))
        watched.play(1)
        gate.may_go_on.set()
        until(lambda: len(watched.said) == 2 + generator.ahead)
        assert watched.kinds() == ["Started", "Started"] + ["Chunk"] * generator.ahead
        assert watched.frames() == made(live, generator.ahead, MEADOW, 1)
        gate.may_go_on.clear()
        pushes, count = gate.pushes, len(watched.said)
        generator.shown(watched.seat, watched.seat.made)
        until(lambda: gate.pushes == pushes + 1)
        generator.leave(watched.seat)
        following = Watched(generator)
        gate.may_go_on.set()
        following.play(2)
        until(lambda: len(following.said) == 1 + generator.ahead)
        assert following.frames() == made(live, generator.ahead, MEADOW, 2)
        assert len(watched.said) == count


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_is_not_swallowed(live: Live) -> None:
    """Frames that are no numbers are told, and the next clip plays; any other fault of either stage
    ends the generator."""
    gate = Gate(live.maker.decoder, broken=1)
    gate.may_go_on.set()
    with generating(replace(live.maker, decoder=gate)) as generator:
        watched = Watched(generator)
        watched.play(0)
        until(lambda: "Error" in watched.kinds())
        watched.play(1)
        until(lambda: len(watched.said) == 3 + generator.ahead)
        assert watched.kinds()[:4] == ["Started", "Error", "Started", "Chunk"]
        error = watched.said[1][0]
        assert isinstance(error, Error) and error.ended
    fault = RuntimeError("the decoder fails")
    gate = Gate(live.maker.decoder, 1, fault)
    gate.may_go_on.set()
    broken_decoder = replace(live.maker, decoder=gate)
    broken_text = replace(live.maker, text=None)  # type: ignore[arg-type]
    for maker, kind in (
        (broken_decoder, RuntimeError),
        (replace(broken_decoder, overlap=False), RuntimeError),
        (broken_text, AttributeError),
    ):
        ended: list[bool] = []
        generator = Generator(maker, lambda ended=ended: ended.append(True))  # type: ignore[misc]
        gate.streams = 0
        generator.start()
        Watched(generator).play(0)
        until(lambda ended=ended: bool(ended))  # type: ignore[misc]
        generator.stop()
        assert ended == [True] and isinstance(generator.failure, kind)
        assert generator.seat(lambda reply, binary: None) is None


def test_the_command_names_what_is_missing(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="window -1 and sink 1 must be >= 0"):
        open_maker(replace(live.cfg, window=-1))  # and not when a viewer presses start
    monkeypatch.delitem(sys.modules, "scd_sf.tools.serve.server")
    monkeypatch.delitem(sys.modules, "scd_sf.tools.serve.safety")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"uvicorn is missing: pip install 'scd-sf\[serve\]'"):
        serve("nowhere")
    with pytest.raises(UserError, match="quality is 0"):
        ServeConfig("nowhere", quality=0)
    with pytest.raises(UserError, match="overlap is 'yes'; use auto, on, off"):
        ServeConfig("nowhere", overlap="yes")
