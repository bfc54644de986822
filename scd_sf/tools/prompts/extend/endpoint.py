"""A server that speaks OpenAI's chat protocol (vLLM, SGLang, llama.cpp, a vendor), asked by
OpenAI's own client.

The key comes from an environment variable that the user names. It goes into one request header and
nowhere else: it is taken out of messages, and redirects, which would carry the prompts to another
host, are not followed.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from scd_sf.tools.prompts.extend.rules import Answer, messages
from scd_sf.tools.prompts.result import require
from scd_sf.types import UserError, printable

SHOWN = 300  # characters of an error
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
    """How often a call without an answer, or with 429 or 5xx, is tried again; the client waits
    longer each time."""

    def __post_init__(self) -> None:
        if self.url and urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"url is {self.url!r}; it must begin with http:// or https://")
        if self.timeout <= 0 or self.retries < 0:
            raise ValueError("timeout must be positive, retries not negative")


class Endpoint:
    """Answers of ``model`` behind ``cfg.url``; the calls of one batch are made side by side.

    UserError: the package ``openai`` is missing, the named variable holds no key."""

    def __init__(self, cfg: EndpointConfig, model: str, **sampling: float) -> None:
        require("openai")
        import openai

        self._key = os.environ.get(cfg.key_env, "") if cfg.key_env else ""
        if cfg.key_env and (
            not self._key or not self._key.isascii() or not self._key.isprintable()
        ):
            raise UserError(
                f"endpoint.key_env: the environment variable {cfg.key_env} holds no usable key; set it"
            )
        self._url = cfg.url.rstrip("/")
        self._request: dict[str, Any] = {"model": model, **sampling}
        if not self._key:
            self._request["extra_headers"] = {"Authorization": openai.Omit()}
        # whatever proxy the environment names
        direct = urllib.parse.urlsplit(cfg.url).hostname in LOOPBACK
        http = openai.DefaultHttpxClient(follow_redirects=False, trust_env=not direct)
        self._client = openai.OpenAI(
            base_url=self._url,
            api_key=self._key or "none",  # else the client takes one from the environment
            timeout=cfg.timeout,
            max_retries=cfg.retries,
            http_client=http,
        )

    def write(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Answer]:
        """One answer per prompt. UserError when the server refuses, does not answer after all
        retries, or says what is no chat completion."""
        if not prompts:
            return []
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self._ask, prompts, seeds))

    def _ask(self, prompt: str, seed: int) -> Answer:
        import openai

        request = {**self._request, "messages": messages(prompt), "seed": seed}
        try:
            choice = self._client.chat.completions.create(**request).choices[0]
            text = choice.message.content or ""
            if not isinstance(text, str):
                raise TypeError("the client checks no types")
            return Answer(text, cut=choice.finish_reason == "length")
        except openai.APIStatusError as error:
            problem = f"{error.status_code} {error.response.text}"
        except openai.OpenAIError as error:
            problem = str(error)
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
            problem = "the answer is no chat completion"
        message = problem.replace(self._key, "***") if self._key else problem
        detail = printable(" ".join(message.split()))[:SHOWN]
        remedy = "what is finished is kept: correct the request, or run the same command again"
        raise UserError(f"endpoint.url {self._url}: {detail}; {remedy}")
