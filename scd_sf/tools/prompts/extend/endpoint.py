"""A server that speaks OpenAI's chat protocol (vLLM, SGLang, llama.cpp, a vendor): ``POST <url>/chat/completions``.

The key comes from an environment variable that the user names. It goes into one request header and nowhere else: it is
taken out of messages, and redirects, which would carry it to another host, are not followed.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.message import Message
from typing import IO

from scd_sf.files import parse_json, typed
from scd_sf.tools.prompts.extend.rules import Answer, messages
from scd_sf.types import UserError, printable

LARGEST = 2**20  # bytes of an answer
LONGEST_WAIT_SECONDS = 60.0
SHOWN = 300  # characters of an error's body
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class EndpointConfig:
    """A server with OpenAI's chat interface."""

    url: str = ""
    """Its address, up to and with ``/v1``; empty: the model runs here."""
    key_env: str = ""
    """Environment variable that holds the key; empty: none is sent."""
    timeout: float = 120.0
    """Seconds that an answer may take."""
    retries: int = 6
    """How often a call without an answer, or with 429 or 5xx, is tried again."""
    wait: float = 1.0
    """Seconds before the first repetition; they double."""

    def __post_init__(self) -> None:
        if self.url and urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"url is {self.url!r}; it must begin with http:// or https://")
        if self.timeout <= 0 or self.retries < 0 or self.wait < 0:
            raise ValueError("timeout must be positive, retries and wait not negative")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error like any other."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """Answers of ``model`` behind ``cfg.url``; the calls of one batch are made side by side."""

    cfg: EndpointConfig
    model: str
    temperature: float
    top_p: float
    max_tokens: int
    key: str = field(default="", repr=False)

    @classmethod
    def open(cls, cfg: EndpointConfig, model: str, temperature: float, top_p: float, max_tokens: int) -> Endpoint:
        """UserError when the named variable holds no key."""
        key = os.environ.get(cfg.key_env, "") if cfg.key_env else ""
        if cfg.key_env and (not key or not key.isascii() or not key.isprintable()):
            raise UserError(f"endpoint.key_env: the environment variable {cfg.key_env} holds no usable key; set it")
        return cls(cfg, model, temperature, top_p, max_tokens, key)

    def write(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Answer]:
        """One answer per prompt. UserError when the server refuses, or does not answer after all retries."""
        if not prompts:
            return []
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self._ask, prompts, seeds))

    def _ask(self, prompt: str, seed: int) -> Answer:
        body = {
            "model": self.model,
            "messages": messages(prompt),
            "seed": seed,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        url = f"{self.cfg.url.rstrip('/')}/chat/completions"
        problem = ""
        for attempt in range(self.cfg.retries + 1):
            request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")  # noqa: S310
            asked = ""
            try:
                with self._opener().open(request, timeout=self.cfg.timeout) as answer:
                    return _answer(answer.read(LARGEST + 1))
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason}: {_body(error)}"
                if error.code != 429 and error.code < 500:
                    raise UserError(f"endpoint.url {url}: {self._safe(problem)}; correct the request") from None
                asked = error.headers.get("Retry-After", "")
            except (OSError, http.client.HTTPException, ValueError) as error:  # no answer, or not one that can be read
                problem = f"{type(error).__name__}: {error}"
            if attempt < self.cfg.retries:
                time.sleep(self._pause(attempt, asked))
        tries = self.cfg.retries + 1
        raise UserError(
            f"endpoint.url {url}: no answer in {tries} tries ({self._safe(problem)}); what is finished is kept: "
            "run the same command again"
        )

    def _opener(self) -> urllib.request.OpenerDirector:
        host = urllib.parse.urlsplit(self.cfg.url).hostname
        direct = [urllib.request.ProxyHandler({})] if host in LOOPBACK else []
        return urllib.request.build_opener(_NoRedirects, *direct)

    def _pause(self, attempt: int, asked: str) -> float:
        if (asked := asked.strip()).isascii() and asked.isdigit():
            return min(float(asked), LONGEST_WAIT_SECONDS)
        return min(self.cfg.wait * 2.0**attempt, LONGEST_WAIT_SECONDS) * random.uniform(0.75, 1.25)  # noqa: S311

    def _safe(self, text: str) -> str:
        hidden = text.replace(self.key, "***") if self.key else text
        return printable(" ".join(hidden.split()))[:SHOWN]


@dataclass(frozen=True)
class Reply:
    """Of an answer. ``content`` may be null."""

    content: str | None = None


@dataclass(frozen=True)
class Choice:
    """One answer, and why it ended."""

    message: Reply
    finish_reason: str | None = None


@dataclass(frozen=True)
class Completion:
    """What is read of a server's answer."""

    choices: list[Choice]


def _body(error: urllib.error.HTTPError) -> str:
    """What the server says beside its code."""
    try:
        return error.read(LARGEST).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def _answer(data: bytes) -> Answer:
    """ValueError where it is not a chat completion."""
    if len(data) > LARGEST:
        raise ValueError(f"an answer of more than {LARGEST} bytes")
    completion = typed(parse_json(data, "the answer", "ask again"), Completion, "not a chat completion", "ask again")
    if not completion.choices:
        raise ValueError("not a chat completion: no choice in it")
    choice = completion.choices[0]
    return Answer(choice.message.content or "", cut=choice.finish_reason == "length")
