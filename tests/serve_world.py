"""A served tiny student: two servers over one generator, one of them with a token, and a page that
speaks the protocol."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_run
from websockets.sync.client import connect

from scd_sf.config import from_yaml
from scd_sf.models.scd.transplant import TransplantConfig, run_transplant
from scd_sf.tools.serve.generator import ClipMaker, Generator
from scd_sf.tools.serve.protocol import HEADER
from scd_sf.tools.serve.safety import Names
from scd_sf.tools.serve.server import ServeConfig, Service, listen, open_maker, web_server

TOKEN = "a-token-of-32-characters-0123456"
HOST = "127.0.0.1"
KEPT = 20  # frames for a download


@dataclass
class Live:
    """Ports of the server without and of the one with a token, what they serve, and as which
    options."""

    port: int
    token_port: int
    maker: ClipMaker
    generator: Generator
    cfg: ServeConfig


@contextlib.contextmanager
def live(root: Path) -> Iterator[Live]:
    """Both servers, each in a thread, until the end of the ``with``."""
    tiny_run.write_wan(root / "wan")
    student = "scd: {encoder_layers: [0, 1, 2], decoder: {layers: [0, 5]}}, sampler: {steps: 2}"
    text = f"{{base: {root / 'wan'}, out: {root / 'student'}, {student}}}"
    run_transplant(from_yaml(TransplantConfig, text))
    cfg = ServeConfig(str(root / "student"), frames=9, height=32, width=32, keep=KEPT / 16)
    cfg.overlap = "on"
    maker, record = open_maker(cfg)
    generator = Generator(maker)
    generator.start()
    servers, threads, ports = [], [], []
    for token in ("", TOKEN):
        listener = listen(HOST, 0)
        ports.append(listener.getsockname()[1])
        server = web_server(Service(generator, record, token).app(Names(HOST, ports[-1])))
        servers.append(server)
        threads.append(threading.Thread(target=server.run, args=([listener],), daemon=True))
        threads[-1].start()
    try:
        yield Live(ports[0], ports[1], maker, generator, cfg)
    finally:
        for server in servers:
            server.should_exit = True
        generator.stop()
        for thread in threads:
            thread.join(20)
        assert generator.failure is None and not any(thread.is_alive() for thread in threads)


class Talk:
    """A page's side of a connection; ``with`` closes it."""

    def __init__(
        self, port: int, token: str | None = "", *, watch: bool = False, **options: Any
    ) -> None:
        options = {
            "origin": f"http://{HOST}:{port}",
            "compression": None,
            "close_timeout": 1,
        } | options
        self._stack = contextlib.ExitStack()
        connection = connect(f"ws://{HOST}:{port}/live", max_size=None, **options)
        self.socket = self._stack.enter_context(connection)
        if token is not None:
            self.say(type="hello", token=token, watch=watch)

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def say(self, **message: object) -> None:
        self.socket.send(json.dumps(message))

    def hear(self, seconds: float = 60) -> dict[str, Any] | bytes:
        """The next message. TimeoutError: none came."""
        data = self.socket.recv(timeout=seconds)
        return json.loads(data) if isinstance(data, str) else data

    def expect(self, kind: str) -> dict[str, Any]:
        """The next message, which must be of this kind."""
        message = self.hear()
        assert isinstance(message, dict) and message["type"] == kind, message
        return message

    def data(self) -> bytes:
        """The next message, which must be bytes."""
        message = self.hear()
        assert isinstance(message, bytes), message
        return message

    def chunk(self) -> tuple[dict[str, Any], list[tuple[tuple[int, ...], bytes]]]:
        """The next chunk: its message, and (header, JPEG) of its frames."""
        head = self.expect("chunk")
        frames = [self.data() for _ in range(head["frames"])]
        return head, [(HEADER.unpack(frame[:16]), frame[16:]) for frame in frames]


def until(is_true: Callable[[], bool], seconds: float = 60) -> None:
    """Asked again and again: for what another thread or process does."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.005)


def wait_for_nobody(live: Live) -> None:
    """Returns when everybody who left is gone: the server notices it later than the page, and tells
    the next viewer."""
    generator = live.generator
    until(lambda: generator._seat is None and len(generator.audience) == 0)


def seated(live: Live) -> Talk:
    """A page with the seat, which the page before may still be leaving."""
    end = time.monotonic() + 30
    while True:
        page = Talk(live.port)
        message = page.hear()
        assert isinstance(message, dict)
        if message["type"] == "ready":
            return page
        assert message["type"] == "busy" and time.monotonic() < end
        page.socket.close()
        time.sleep(0.02)
