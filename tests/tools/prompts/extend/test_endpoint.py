"""The endpoint against a server on loopback: what is asked, retries, refusals, and that the key stays where it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from chat_server import Reply, Server, completion, serving

from scd_sf.tools.prompts.extend.endpoint import Endpoint, EndpointConfig
from scd_sf.tools.prompts.extend.rules import Answer
from scd_sf.types import UserError, printable

KEY = "sk-very-secret-1234"


def endpoint(server: Server, key_env: str = "", timeout: float = 5.0, retries: int = 3) -> Endpoint:
    cfg = EndpointConfig(server.url + "/", key_env, timeout, retries, wait=0.01)
    return Endpoint.open(cfg, "qwen", 0.7, 0.8, 99)


def replies(given: Sequence[Reply]) -> Any:
    return lambda number, body: given[min(number, len(given) - 1)]


def test_what_is_asked_and_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # loopback is asked directly
    with serving(lambda number, body: completion(body["messages"][1]["content"].upper(), "length")) as server:
        found = endpoint(server, "A_KEY")
        assert found.write([], []) == [] and KEY not in repr(found)
        answers = found.write(["a", "b", "c"], [1, 2, 3])
    assert answers == [Answer(text, cut=True) for text in "ABC"]
    assert {body["seed"] for _, _, body in server.requests} == {1, 2, 3}
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    wanted = {"model": "qwen", "temperature": 0.7, "top_p": 0.8, "max_tokens": 99}
    assert {name: body[name] for name in wanted} == wanted
    with serving(replies([completion(None)])) as server:
        assert endpoint(server).write(["a"], [1]) == [Answer("")]
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"Retry-After": "0"}, b"slow down"),
        (503, {}, b""),
        (500, {}, b"\xff"),
        (200, {}, b"<html>"),
        (200, {}, b"[]"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": {"0": 1}}'),
        (200, {}, b'{"choices": [{"message": {"content": "a"}, "finish_reason": 1e999}]}'),
        (200, {}, b"[" * 9999),
        (429, {"Retry-After": "\xb2"}, b""),
        (200, {}, b'{"choices": [{"message": {"content": 5}}]}'),
        (200, {}, b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
        (200, {}, b" " * (2**20 + 1)),
    ],
)
def test_trouble_is_tried_again_and_then_told(trouble: Reply) -> None:
    with serving(replies([trouble, trouble, completion("fine")])) as server:
        assert endpoint(server).write(["a"], [7]) == [Answer("fine")]
        assert [body["seed"] for _, _, body in server.requests] == [7, 7, 7]
    with serving(replies([trouble])) as server:
        with pytest.raises(UserError, match=r"no answer in 2 tries .*run the same command again"):
            endpoint(server, retries=1).write(["a"], [7])
        assert len(server.requests) == 2


def test_refusals_and_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    echo = (401, {}, json.dumps({"error": f"Incorrect API key provided: {KEY}"}).encode())
    with serving(replies([echo])) as server:
        with pytest.raises(UserError, match=r"401 .*provided: \*\*\*") as caught:
            endpoint(server, "A_KEY").write(["a"], [1])
        assert KEY not in str(caught.value) and len(server.requests) == 1
    with serving(replies([completion("x")])) as other:
        moved = (307, {"Location": f"{other.url}/chat/completions"}, b"")
        with serving(replies([moved])) as server, pytest.raises(UserError, match="307"):
            endpoint(server, "A_KEY").write(["a"], [1])
        assert other.requests == []
    monkeypatch.delenv("A_KEY")
    with pytest.raises(UserError, match="the environment variable A_KEY holds no usable key"):
        endpoint(other, "A_KEY")
    with pytest.raises(UserError, match="no answer in 1 tries"):
        endpoint(other, retries=0).write(["a"], [1])  # nobody listens there any more
    with serving(replies([(400, {}, "\x1b[2J\u202ebad\r\nline".encode())])) as server:
        with pytest.raises(UserError, match="400") as caught:
            endpoint(server).write(["a"], [1])
        assert printable(str(caught.value)) == str(caught.value) and "\n" not in str(caught.value)
    for url in ("file:///etc/passwd", "localhost:8000"):
        with pytest.raises(ValueError, match="must begin with http"):
            EndpointConfig(url)
