"""What uvicorn alone would let happen: places held for ever, WebSockets without number. Real
sockets, an app without a model."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets import Origin
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from scd_sf.tools.serve import server as serving
from scd_sf.tools.serve.protocol import Error, Started
from scd_sf.tools.serve.safety import HEADERS, Guard, Names, Sweeper
from scd_sf.tools.serve.server import Outbox, listen, web_server

HOST = "127.0.0.1"
IDLE = 0.5  # seconds


@dataclass
class Running:
    """A server whose pages are sent megabytes without end. ``pages``: how many are there.
    ``sweeps``: whether the clock goes by which the idle are cut."""

    port: int
    sweeps: bool = True
    pages: list[WebSocket] = field(default_factory=list)

    def clock(self) -> float:
        return time.monotonic() if self.sweeps else 0.0

    async def flood(self, page: WebSocket) -> None:
        await page.accept()
        self.pages.append(page)
        try:
            await page.receive()
            while True:
                await page.send_bytes(bytes(2**20))
        except WebSocketDisconnect:
            pass
        finally:
            self.pages.remove(page)

    def status(self, method: str = "GET", path: str = "/") -> http.client.HTTPResponse:
        with contextlib.closing(http.client.HTTPConnection(HOST, self.port, timeout=20)) as talk:
            talk.request(method, path)
            return talk.getresponse()

    def connect(self) -> contextlib.AbstractContextManager[Any]:
        url, origin = f"ws://{HOST}:{self.port}/live", Origin(f"http://{HOST}:{self.port}")
        return connect(url, origin=origin, compression=None, ping_interval=None, close_timeout=1)

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(serving, "HELLO_SECONDS", IDLE)
    listener = listen(HOST, 0)
    running = Running(listener.getsockname()[1])
    app = Starlette(routes=[WebSocketRoute("/live", running.flood)])
    server = web_server(Guard(app, Names(HOST, running.port), 3))
    assert isinstance(server.config.callback_notify, Sweeper)
    server.config.callback_notify._clock = running.clock
    server.config.ws_ping_interval, server.config.ws_ping_timeout = 0.2, 0.3
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    yield running
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_connections_that_never_ask_are_cut(running: Running) -> None:
    """Silent ones, and those that send a request byte by byte, take all places, and lose them."""
    running.sweeps = False
    with contextlib.ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection((HOST, running.port))) for _ in range(100)
        ]
        for one in slow[::2]:
            one.sendall(b"GET / HTTP/1.1\r\nX: ")
        running.until(lambda: running.status().status == 503)
        running.sweeps = True
        running.until(lambda: running.status().status == 404)
        for one in slow:
            one.settimeout(60)
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b"", "cut"


def test_a_page_that_takes_nothing_frees_its_place(running: Running) -> None:
    """It does not answer pings behind megabytes that it never reads; uvicorn closes then, and would
    wait for it to read them."""
    with running.connect() as talk:
        running.until(lambda: len(running.pages) == 1)
        talk.send("go")  # and no recv: after a few messages the client reads no more
        running.until(lambda: not running.pages)


def test_no_more_pages_than_places(running: Running) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(running.connect())
        with running.connect():
            with pytest.raises(InvalidStatus) as refused, running.connect():
                pass
            assert refused.value.response.status_code == 403
        running.until(lambda: len(running.pages) == 2)
        stack.enter_context(running.connect())


def test_every_answer_has_the_policy(running: Running) -> None:
    for answer in (running.status(), running.status("POST"), running.status("GET", "/live")):
        assert answer.status == 404
        assert {name: answer.getheader(name) for name in HEADERS} == HEADERS


def test_a_port_that_browsers_leave_out() -> None:
    here = Names("127.0.0.1", 80)
    assert all(map(here.has, ("127.0.0.1", "localhost", "[::1]", "localhost:80")))
    assert not any(map(here.has, ("evil.example", "localhost:81", "", "192.168.1.5")))
    assert not Names("127.0.0.1", 8000).has("127.0.0.1")


def test_what_is_said_while_the_server_ends_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is closed between a look at it and the word; the generator's thread says it."""

    async def begin() -> Outbox:
        return Outbox()

    loop = asyncio.new_event_loop()
    outbox = loop.run_until_complete(begin())
    loop.close()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "is_closed", lambda: False)
        outbox.put(Started(0, ""))
    assert not outbox._waiting


def test_what_waits_is_bounded() -> None:
    """Also for a page that asks for more while nothing can be sent; of clips that were begun one
    after the other only the last is left."""

    async def check() -> None:
        outbox = Outbox()
        for _ in range(1000):
            outbox.put(Error("not made yet"))
        outbox.put(Started(0, ""))
        await asyncio.sleep(0)
        assert len(outbox._waiting) <= serving.MOST_WAITING + 1
        assert await outbox.next() is None
        outbox = Outbox()
        for seed in range(1000):
            outbox.put(Started(seed, ""))
        await asyncio.sleep(0)
        assert await outbox.next() == (Started(999, ""), ())
        assert not outbox._waiting

    asyncio.run(check())
