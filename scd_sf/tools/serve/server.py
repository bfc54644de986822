"""The server: a page, and a WebSocket per viewer (starlette on uvicorn, one process)."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp
from starlette.websockets import WebSocket, WebSocketDisconnect
from torch import Tensor
from websockets.exceptions import InvalidState

from scd_sf.checkpoint import find, weights_sha256
from scd_sf.data.sources.picture_reader import picture_of
from scd_sf.data.start import picture_pixels
from scd_sf.distributed import keep_freed_memory
from scd_sf.files import Json, foreign
from scd_sf.generation.compile import CompileConfig
from scd_sf.generation.generate import check_window
from scd_sf.generation.sampling import SampleConfig, open_generator
from scd_sf.tools.serve import camera
from scd_sf.tools.serve.generator import ClipMaker, ClipRequest, Generator, Seat, warm_up
from scd_sf.tools.serve.protocol import (
    MOST_PICTURE,
    PICTURE_FORMATS,
    PICTURE_PIXELS,
    Busy,
    CameraOff,
    ChangePrompt,
    ChangeStrength,
    Chunk,
    Download,
    Ended,
    Error,
    File,
    Hello,
    Pause,
    PictureRead,
    Ready,
    Reply,
    Request,
    Shown,
    Start,
    Started,
    Switched,
    UseCodec,
    Watching,
    read_request,
    text_of,
)
from scd_sf.tools.serve.recording import as_zip
from scd_sf.tools.serve.safety import (
    Guard,
    Names,
    Rate,
    Sweeper,
    choose_token,
    is_token,
    page_address,
)
from scd_sf.types import LARGEST, UserError, check_within, device_of, printable, say

PAGE = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css")}
PAGE |= {"/page.js": ("page.js", "text/javascript")}
OVERLAPS = ("auto", "on", "off")
HELLO_SECONDS = 10.0  # in which a connection has to say hello
PER_SECOND, BURST = 40.0, 80.0  # messages of a page, but for frames of a camera
FRAMES_PER_SECOND, FRAMES_BURST = 150.0, 600.0  # of a camera; a slow network lets many come at once
MOST_WAITING = 64  # things that wait to be sent; a page that takes none of them is cut off
OF_A_CLIP = (Started, Chunk, Switched, Ended)
MOST_CONNECTIONS = 64
BUSY, REFUSED = 1013, 1008  # WebSocket close codes: try again later; policy


@dataclass
class ServeConfig:
    """What is served, and how. Sizes of 0 are the trained ones."""

    checkpoint: str
    """A run directory, a step_N of it, or an exported file."""
    base: str = ""
    """Its Wan directory; empty: as in the checkpoint."""
    decoder: str = ""
    """A tiny decoder instead of the VAE's own; empty: the VAE's."""
    weights: str = "ema"
    """ema, model or best."""
    frames: int = 0
    """Pixel frames of a training clip."""
    height: int = 0
    """Pixels."""
    width: int = 0
    """Pixels."""
    window: int = 0
    """Latent frames of history; 0: what a training clip has, less the sink."""
    sink: int = -1
    """First latent frames that stay; -1: one chunk."""
    dtype: str = "fp32"
    """fp32, bf16 or fp16; the VAE computes in fp32."""
    fps: int = 16
    """Frames per second of the page and the download."""
    seconds: float = 0
    """Longest clip; 0: as long as positions go."""
    keep: float = 30
    """Seconds that can be downloaded."""
    quality: int = 90
    """Of the JPEGs."""
    crf: int = 16
    """Of the download."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """0: a free one."""
    names: tuple[str, ...] = ()
    """Further names of the server, as ``Host`` says them."""
    watchers: int = 8
    """Pages that may watch along with the viewer; 0: none."""
    overlap: str = "auto"
    """Decode a chunk while the next one is made: on, off, or auto (off on one core without a GPU)."""
    vae_device: str = ""
    """Device of the VAE or tiny decoder, such as cuda:1; empty: that of the student."""
    compile: CompileConfig = field(default_factory=CompileConfig)
    """What is compiled or replayed, before the first viewer comes."""

    def __post_init__(self) -> None:
        check_within(self, {"seconds": (0, 1e9), "keep": (1, 3600), "quality": (1, 95)})
        check_within(self, {"port": (0, 65535), "sink": (-1, 1e6), "watchers": (0, 32)})
        if self.overlap not in OVERLAPS:
            raise UserError(f"overlap is '{self.overlap}'; use {', '.join(OVERLAPS)}")


def open_maker(cfg: ServeConfig) -> tuple[ClipMaker, Json]:
    """Load everything; also what a downloaded clip's manifest says of it. UserError as
    :func:`~scd_sf.generation.sampling.open_generator`."""
    path = Path(cfg.checkpoint)
    path = path if path.is_file() else find(path, cfg.weights)
    sample = SampleConfig(
        cfg.checkpoint,
        "",
        base=cfg.base,
        decoder=cfg.decoder,
        weights=cfg.weights,
        frames=cfg.frames,
        height=cfg.height,
        width=cfg.width,
        dtype=cfg.dtype,
        fps=cfg.fps,
        crf=cfg.crf,
        compile=cfg.compile,
        text_cache="off",  # a cache would grow with every prompt
    )
    device = device_of("")
    vae_device = device_of(cfg.vae_device) if cfg.vae_device else device
    parts, settings = open_generator(sample, device, path, vae_device)
    chunk, trained = parts.student.chunk, parts.shape.frames
    sink = chunk if cfg.sink < 0 else cfg.sink
    window = cfg.window or max(chunk, trained - sink)
    check_window(window, sink, chunk)
    most = LARGEST["frames"]
    if cfg.seconds:
        most = min(most, 1 + int(cfg.seconds * cfg.fps - 1) // parts.shape.temporal)
    has_two_workers = "cuda" in (device.type, vae_device.type) or len(os.sched_getaffinity(0)) > 1
    maker = ClipMaker(
        parts.student,
        parts.sampler,
        parts.vae,
        parts.decoder or parts.vae,
        parts.text,
        replace(parts.shape, frames=max(chunk, most // chunk * chunk)),
        device,
        window,
        sink,
        cfg.fps,
        round(cfg.keep * cfg.fps),
        cfg.quality,
        cfg.overlap == "on" or (cfg.overlap == "auto" and has_two_workers),
        model_name(path) + (", tiny decoder" if parts.decoder is not None else ""),
    )
    # paths are nobody's business
    known = ("weights", "dtype", "sampler", "fps", "crf", "decoder_sha256")
    record: Json = {name: settings[name] for name in known if name in settings}
    record |= {
        "checkpoint": path.name,
        "checkpoint_sha256": weights_sha256(path, cfg.weights),
        "window": [window, sink],
        "size": [parts.shape.pixel_height, parts.shape.pixel_width],
    }
    return maker, record


def model_name(path: Path) -> str:
    """What a checkpoint is called: a file's own name, or FOLDER/step_N; nothing of where it is."""
    path = Path(os.path.abspath(path))  # it may be named as "." or ".."
    if path.is_file():
        return printable(path.name)
    run = path.parents[1] if path.parent.name == "checkpoints" else path.parent
    return printable(f"{run.name}/{path.name}".lstrip("/"))


class Outbox:
    """What waits to be sent to one page, in order. :meth:`put` may be called from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Reply, Sequence[bytes]]] = deque()
        self._filled = asyncio.Event()
        self._is_over = False

    def put(self, reply: Reply, binary: Sequence[bytes] = ()) -> None:
        """``binary`` is sent right after ``reply``. Where a clip begins, what was not sent yet of the
        one before is dropped."""
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._put, reply, binary)

    def _put(self, reply: Reply, binary: Sequence[bytes]) -> None:
        if self._is_over:
            return
        if isinstance(reply, Started):
            self._waiting = deque(old for old in self._waiting if not isinstance(old[0], OF_A_CLIP))
        self._waiting.append((reply, binary))
        self._is_over = len(self._waiting) > MOST_WAITING
        self._filled.set()

    async def next(self) -> tuple[Reply, Sequence[bytes]] | None:
        """The next message; None where the page leaves too much untaken."""
        while not self._waiting and not self._is_over:
            self._filled.clear()
            await self._filled.wait()
        return None if self._is_over else self._waiting.popleft()


class Connection:
    """One page: sends what waits for it, and hands over what it says. ``take``: raises UserError
    for what is refused."""

    def __init__(
        self, page: WebSocket, outbox: Outbox, take: Callable[[str | bytes], Awaitable[None]]
    ) -> None:
        self._page, self._outbox, self._take = page, outbox, take

    async def serve(self) -> None:
        """Until the page is gone, breaks a rule or takes nothing any more."""
        tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._listen())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        await self._page.close(REFUSED)

    async def _send(self) -> None:
        """Until the page leaves too much untaken."""
        while (message := await self._outbox.next()) is not None:
            await self._page.send_text(text_of(message[0]))
            for part in message[1]:
                await self._page.send_bytes(part)

    async def _listen(self) -> None:
        """Until the page says too much at a time. WebSocketDisconnect: it is gone."""
        rate, frame_rate = Rate(PER_SECOND, BURST), Rate(FRAMES_PER_SECOND, FRAMES_BURST)
        while True:
            message = await self._page.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1006))
            data = message.get("bytes")
            is_camera = data is not None and camera.is_frame(data)
            if not (frame_rate if is_camera else rate).allows():
                return
            try:
                await self._take(message["text"] if data is None else data)
            except UserError as error:
                self._outbox.put(Error(str(error)))


class Viewer:
    """The page that has the seat: what it says."""

    def __init__(self, service: Service, seat: Seat, outbox: Outbox) -> None:
        self._service, self._seat, self._outbox = service, seat, outbox
        self._picture: Tensor | None = None
        self._picture_sha256 = ""
        self._frame_rate = Rate(2.0 * service.generator.maker.fps, service.generator.maker.fps)
        self._download: asyncio.Task[None] | None = None
        self._is_gone = threading.Event()

    def close(self) -> None:
        """Ends what is still being made for the page; a chunk of a download that is being encoded
        comes to its end."""
        self._is_gone.set()
        if self._download is not None:
            self._download.cancel()

    def _say(self, reply: Reply) -> None:
        self._outbox.put(reply)

    async def take(self, message: str | bytes) -> None:
        """UserError: it is refused."""
        if isinstance(message, str):
            self._obey(read_request(message))
        elif camera.is_frame(message):
            await self._take_frame(message)
        else:
            await self._take_picture(message)

    async def _take_frame(self, data: bytes) -> None:
        """A camera's frame. More than twice the model's rate are passed over, and so are those that
        no clip is made from. UserError: none that can be read."""
        generator, seat = self._service.generator, self._seat
        if not generator.has_camera(seat) or not self._frame_rate.allows():
            return
        shape = generator.maker.shape
        size = (shape.pixel_height, shape.pixel_width)
        generator.camera_frame(seat, *await asyncio.to_thread(camera.read_frame, data, size))

    async def _take_picture(self, data: bytes) -> None:
        """The picture that the next clips may begin with. UserError: none that can be read, or the
        model cannot begin with one."""
        if len(data) > MOST_PICTURE:
            raise UserError(f"the picture has more than {MOST_PICTURE} bytes; make it smaller")
        maker, self._picture = self._service.generator.maker, None
        if (chunk := maker.student.chunk) > 1:
            raise UserError(
                f"this model makes {chunk} latent frames at a time, and a picture is one; start without it"
            )
        shape = maker.shape
        size = (shape.pixel_height, shape.pixel_width)
        self._picture = await asyncio.to_thread(start_picture, data, size)
        self._picture_sha256 = hashlib.sha256(data).hexdigest()
        self._say(PictureRead(size[1], size[0]))

    def _start(self, request: Start) -> None:
        generator, source = self._service.generator, None
        if request.picture and self._picture is None:
            raise UserError("there is no start picture; choose one, or start without")
        if request.picture and request.camera:
            raise UserError("a camera's clip has no start picture; choose one of them")
        if request.camera:
            source = generator.maker.camera()
        picture = self._picture if request.picture else None
        sha256 = self._picture_sha256 if request.picture else ""
        clip = ClipRequest(request, picture, sha256, time.monotonic(), source)
        generator.play(self._seat, clip)

    def _obey(self, request: Request) -> None:
        generator, seat = self._service.generator, self._seat
        match request:
            case Start():
                self._start(request)
            case ChangePrompt():
                generator.change_prompt(seat, request)
            case ChangeStrength():
                generator.change_strength(seat, request.strength)
            case CameraOff():
                generator.camera_off(seat)
            case Pause():
                generator.pause(seat, request.on)
            case UseCodec():
                generator.use_codec(seat, request.codec)
            case Shown():
                generator.shown(seat, request.chunk)
            case Download():
                self._begin_download()
            case Hello():
                raise UserError("hello was said already")

    def _begin_download(self) -> None:
        if self._download is not None and not self._download.done():
            raise UserError("a download is being made; wait for it")
        self._download = asyncio.create_task(self._make_download())

    async def _make_download(self) -> None:
        try:
            clip, kept = self._service.generator.kept(self._seat)
            record = {
                "prompt": clip.start.prompt,
                "seed": clip.start.seed,
                "picture_sha256": clip.picture_sha256,
                "camera": clip.camera is not None,
                "settings": self._service.record,
            }
            fps, crf = self._service.generator.maker.fps, self._service.crf
            make = partial(as_zip, kept, fps, crf, record, lambda: not self._is_gone.is_set())
            with foreign("the download", "look at the server's disk for temporary files"):
                encoder = self._service.encoder
                data = await asyncio.get_running_loop().run_in_executor(encoder, make)
        except UserError as error:
            self._say(Error(str(error)))
            return
        self._outbox.put(File(f"scd-live-{clip.start.seed}.zip", len(data)), [data])


def start_picture(data: bytes, size: tuple[int, int]) -> Tensor:
    """(3, *size) in [0, 1] of an uploaded picture, cropped and resized. UserError: no picture of
    the formats that are read, or too large."""
    where = "the picture"
    with foreign(f"{where} cannot be read", "use a png, jpg or webp"):
        pixels = picture_of(io.BytesIO(data), where, PICTURE_PIXELS, PICTURE_FORMATS)
    return picture_pixels(pixels, size, where)


class Service:
    """What all connections share: the generator, the manifest's record, the token, and the one
    thread in which downloads are encoded."""

    def __init__(
        self, generator: Generator, record: Mapping[str, object], token: str, crf: int = 16
    ) -> None:
        self.generator, self.record, self.crf = generator, record, crf
        self.encoder = ThreadPoolExecutor(1, "scd serve: download")
        self._token = token

    def app(self, names: Names) -> ASGIApp:
        """The page and the WebSocket, for those who come by one of ``names``."""
        routes = [Route(path, page_file) for path in PAGE]
        app = Starlette(routes=[*routes, WebSocketRoute("/live", self._live)])
        return Guard(app, names, MOST_CONNECTIONS)

    async def _live(self, page: WebSocket) -> None:
        await page.accept()
        try:
            await self._welcome(page)
        except WebSocketDisconnect:
            return

    async def _welcome(self, page: WebSocket) -> None:
        """One connection from its hello to its end."""
        hello = await self._hello(page)
        if hello is None:
            await page.close(REFUSED)
            return
        outbox = Outbox()
        is_served = await (self._watch if hello.watch else self._view)(page, outbox)
        if not is_served:
            await page.send_text(text_of(Busy(self.generator.audience.has_room)))
            await page.close(BUSY)

    async def _view(self, page: WebSocket, outbox: Outbox) -> bool:
        """A viewer until it leaves; False where the seat is taken."""
        seat = self.generator.seat(outbox.put)
        if seat is None:
            return False
        maker = self.generator.maker
        shape, seconds = maker.shape, maker.kept_frames / maker.fps
        size = (shape.pixel_width, shape.pixel_height)
        codecs = (self.generator.h264, self.generator.no_h264)
        levels = tuple(round(t, 4) for t in maker.sampler.times)
        ahead = self.generator.ahead
        outbox.put(Ready(maker.fps, *size, seconds, ahead, *codecs, levels, maker.name))
        if len(self.generator.audience):
            self.generator.count_watchers()
        viewer = Viewer(self, seat, outbox)
        try:
            await Connection(page, outbox, viewer.take).serve()
        finally:
            viewer.close()
            self.generator.leave(seat)
        return True

    async def _watch(self, page: WebSocket, outbox: Outbox) -> bool:
        """One who watches along until it leaves; False where there are too many."""
        maker, audience = self.generator.maker, self.generator.audience
        size = (maker.shape.pixel_width, maker.shape.pixel_height)
        watcher = audience.join(outbox.put, Watching(maker.fps, *size, maker.name))
        if watcher is None:
            return False

        async def take(message: str | bytes) -> None:
            request = read_request(message) if isinstance(message, str) else None
            if not isinstance(request, Shown):
                raise UserError("who watches along changes nothing; take the seat when it is free")
            audience.shown(watcher, request.chunk)

        self.generator.count_watchers()
        try:
            await Connection(page, outbox, take).serve()
        finally:
            audience.leave(watcher)
            self.generator.count_watchers()
        return True

    async def _hello(self, page: WebSocket) -> Hello | None:
        """What the page says first; None unless it is a hello, in time, with the token."""
        try:
            text = await asyncio.wait_for(page.receive_text(), HELLO_SECONDS)
            hello = read_request(text)
        except (TimeoutError, KeyError, UserError):
            return None
        if not isinstance(hello, Hello):
            return None
        return hello if not self._token or is_token(hello.token, self._token) else None


async def page_file(request: HttpRequest) -> Response:
    """A file of the page."""
    name, kind = PAGE[request.url.path]
    content = (resources.files("scd_sf.tools.serve") / "page" / name).read_bytes()
    return Response(content, media_type=kind)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. UserError: it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen(64)
    except OSError as error:
        server.close()
        raise UserError(
            f"--host {host} --port {port}: {error.strerror}; give another --port, or an address of this machine"
        ) from error
    return server


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Not what any page can cause: a traceback for text that is no UTF-8, also right before a
    goodbye; a line for each frame to a page that was cut."""
    error = record.exc_info[1] if record.exc_info else None
    is_known = str(record.msg).startswith(("Invalid UTF-8", "socket.send() raised"))
    return not (is_known or isinstance(error, InvalidState))


def web_server(app: ASGIApp) -> uvicorn.Server:
    """uvicorn without a log of requests, with limits on messages and connections."""
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(_is_worth_a_line)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            http="h11",
            ws="websockets-sansio",
            ws_max_size=MOST_PICTURE + 1024,
            ws_ping_interval=5,
            ws_ping_timeout=10,
            ws_per_message_deflate=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=2,
            timeout_notify=1,
        )
    )
    server.config.callback_notify = Sweeper(server.server_state.connections, HELLO_SECONDS)
    return server


def run_server(cfg: ServeConfig) -> None:
    """Until Ctrl-C. UserError: what cannot be loaded or listened on."""
    keep_freed_memory(one_heap=True)  # else the generator's thread took 2.5 GiB after 500 chunks
    token = choose_token(cfg.host, os.environ.get("SCD_SERVE_TOKEN", ""))
    listener = listen(cfg.host, cfg.port)
    with listener:
        port = listener.getsockname()[1]
        names = Names(cfg.host, port, cfg.names)
        maker, record = open_maker(cfg)
        if cfg.compile.enabled or cfg.compile.cuda_graphs:
            say("making the steps fast, for which the page waits ..")
            warm_up(maker)
        generator = Generator(
            maker, lambda: setattr(server, "should_exit", True), most_watchers=cfg.watchers
        )
        service = Service(generator, record, token, cfg.crf)
        server = web_server(service.app(names))
        generator.start()
        if generator.no_h264:
            say(f"pictures are JPEGs alone: {generator.no_h264}")
        is_own = not os.environ.get("SCD_SERVE_TOKEN")
        address = page_address(cfg.host, port, token if is_own else "")
        say(f"open {address}{'' if is_own else '#YOUR_TOKEN'}  (Ctrl-C ends it)")
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            say("ended")
        finally:
            generator.stop()
        if generator.failure is not None:
            raise RuntimeError("the generator failed") from generator.failure
