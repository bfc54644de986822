"""Who may talk to the server: the names it answers to, its token, and how often.

A page of another site can open WebSockets to this machine (they are outside the browsers' same-origin
policy), and a name of another site can be made to point here (DNS rebinding). So ``Host`` must be
a name of this server, and ``Origin`` the page of that name.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from scd_sf.types import UserError

SHORTEST_TOKEN = 16  # characters
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), display-capture=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or name that a server listens on."""
    if host == "localhost":
        return True
    address = _address(host)
    return address is not None and address.is_loopback


def choose_token(host: str, wanted: str) -> str:
    """The token of a server on ``host``: the one of the environment, a random one where others can
    reach the server, else none. UserError: too short."""
    if wanted and len(wanted) < SHORTEST_TOKEN:
        raise UserError(
            f"SCD_SERVE_TOKEN has {len(wanted)} characters; give at least {SHORTEST_TOKEN} random ones"
        )
    return wanted or ("" if is_loopback(host) else secrets.token_urlsafe(24))


def page_address(host: str, port: int, token: str) -> str:
    """What to open in a browser: for a server on all addresses by the machine's name."""
    address = _address(host)
    if address is not None and address.is_unspecified:
        host = socket.gethostname()
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/{f'#{token}' if token else ''}"


def is_token(said: str, token: str) -> bool:
    """Compared in a time that does not depend on how much of it is right."""
    return hmac.compare_digest(said.encode(), token.encode())


@dataclass(frozen=True)
class Names:
    """What ``Host`` may say: ``host`` and ``names``, with the port (none: 80 or 443, of a proxy).
    A server on all addresses also answers to every address and to the machine's own name: an
    address cannot be rebound. UserError: one of ``names`` is none."""

    host: str
    port: int
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in self.names:
            if not name or any(mark.isspace() or mark in "/@?#*" for mark in name):
                raise UserError(
                    f"--name {name!r}: no browser says that; write NAME or NAME:PORT, as in its address"
                )

    def has(self, said: str) -> bool:
        """Whether a ``Host`` header is one of the server."""
        if said.lower() in (name.lower() for name in self.names):
            return True
        if self.port == 80 and (":" not in said or said.endswith("]")):
            said += ":80"  # which browsers leave out
        name, _, port = said.rpartition(":")
        if port != str(self.port):
            return False
        name = name.removeprefix("[").removesuffix("]").lower()
        listens = _address(self.host)
        if listens is not None and listens.is_unspecified:
            return _address(name) is not None or name in ("localhost", socket.gethostname().lower())
        return name == self.host or (
            is_loopback(self.host) and name in ("localhost", "127.0.0.1", "::1")
        )

    def is_own_page(self, origin: str, host: str) -> bool:
        """Whether ``Origin`` is the page that ``Host`` serves."""
        return origin in (f"http://{host}", f"https://{host}")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


@dataclass
class Guard:
    """Refuses what comes by a foreign name or from a foreign page, and WebSockets beyond
    ``most_pages``, before ``app`` sees it. Adds :data:`HEADERS` to all answers."""

    app: ASGIApp
    names: Names
    most_pages: int
    _pages: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        hosts = Headers(scope=scope).getlist("host")
        origins = Headers(scope=scope).getlist("origin")
        is_own = len(hosts) == 1 and self.names.has(hosts[0])
        is_own_page = is_own and all(self.names.is_own_page(origin, hosts[0]) for origin in origins)
        needs_origin = scope["type"] == "websocket"
        if not is_own_page or (needs_origin and len(origins) != 1):
            if scope["type"] == "websocket":
                await _refuse_page(receive, send)
            else:
                refusal = PlainTextResponse(
                    "this server has another name; start it with --name NAME", 421, headers=HEADERS
                )
                await refusal(scope, receive, send)
        elif scope["type"] == "http":
            await self.app(scope, receive, _with_headers(send))
        elif self._pages >= self.most_pages:
            await _refuse_page(receive, send)
        else:
            self._pages += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self._pages -= 1


async def _refuse_page(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1008})  # an HTTP 403


def _with_headers(send: Send) -> Send:
    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return answer


class Sweeper:
    """Cuts connections that hold a place for ``seconds`` and do nothing with it: no whole request
    has come, or they close and the other side takes nothing. uvicorn would wait for ever. Called
    again and again."""

    def __init__(
        self,
        connections: Collection[Any],
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connections, self._seconds, self._clock = connections, seconds, clock
        self._idle_since: dict[Any, float] = {}

    async def __call__(self) -> None:
        now = self._clock()
        idle = [connection for connection in self._connections if _is_idle(connection)]
        self._idle_since = {one: self._idle_since.get(one, now) for one in idle}
        for connection, since in self._idle_since.items():
            if now - since >= self._seconds:
                connection.transport.abort()


def _is_idle(connection: Any) -> bool:
    """Of uvicorn's: whether no request is answered. A WebSocket that is open has its own pings."""
    if isinstance(connection, H11Protocol):
        return connection.cycle is None or connection.cycle.response_complete
    return bool(connection.transport.is_closing())


class Rate:
    """A bucket of ``burst`` permits that gets ``per_second`` more."""

    def __init__(
        self, per_second: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._permits, self._at = burst, clock()

    def allows(self) -> bool:
        """Takes a permit, if there is one."""
        now = self._clock()
        self._permits = min(self._burst, self._permits + (now - self._at) * self._per_second)
        self._at = now
        if self._permits < 1:
            return False
        self._permits -= 1
        return True
