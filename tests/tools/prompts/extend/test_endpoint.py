"""The endpoint against a server on loopback: what is asked, retries, refusals, and that the key
stays where it is."""

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
SOON = {"retry-after-ms": "5"}


def endpoint(server: Server, key_env: str = "", retries: int = 3) -> Endpoint:
    cfg = EndpointConfig(server.url + "/", key_env, timeout=5.0, retries=retries)
    return Endpoint(cfg, "qwen", temperature=0.7, top_p=0.8, max_tokens=99)


def replies(given: Sequence[Reply]) -> Any:
    return lambda number, body: given[min(number, len(given) - 1)]


def test_what_is_asked_and_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # loopback is asked directly
    with serving(
        lambda number, body: completion(body["messages"][1]["content"].upper(), "length")
    ) as server:
        found = endpoint(server, "A_KEY")
        assert found.write([], []) == [] and KEY not in repr(found)
        answers = found.write(["a", "b", "c"], [1, 2, 3])
    assert answers == [Answer(text, cut=True) for text in "ABC"]
    assert {body["seed"] for _, _, body in server.requests} == {1, 2, 3}
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["authorization"] == f"Bearer {KEY}"
    wanted = {"model": "qwen", "temperature": 0.7, "top_p": 0.8, "max_tokens": 99}
    assert {name: body[name] for name in wanted} == wanted
    for variable in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(variable, KEY)  # a key is sent where it was named, and only then
    with serving(replies([completion(None)])) as server:
        assert endpoint(server).write(["a"], [1]) == [Answer("")]
    assert "authorization" not in server.requests[0][1] and KEY not in str(server.requests)


@pytest.mark.parametrize(
    "trouble", [(429, SOON, b"slow down"), (503, SOON, b""), (500, SOON, b"\xff")]
)
def test_trouble_is_tried_again_and_then_told(trouble: Reply) -> None:
    with serving(replies([trouble, trouble, completion("fine")])) as server:
        assert endpoint(server).write(["a"], [7]) == [Answer("fine")]
        assert [body["seed"] for _, _, body in server.requests] == [7, 7, 7]
    with serving(replies([trouble])) as server:
        with pytest.raises(UserError, match=rf"{trouble[0]}.*run the same command again"):
            endpoint(server, retries=1).write(["a"], [7])
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b'{"choices": []}',
        b'{"choices": {"0": 1}}',
        b'{"choices": [{"message": null}]}',
        b"[" * 9999,
        b'{"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}',
    ],
)
def test_what_is_no_chat_completion(body: bytes) -> None:
    with serving(replies([(200, {}, body)])) as server:
        with pytest.raises(UserError, match=r"no chat completion") as caught:
            endpoint(server, retries=0).write(["a"], [1])
        assert "\n" not in str(caught.value)


def test_refusals_and_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    echo: Reply = (401, {}, json.dumps({"error": f"Incorrect API key provided: {KEY}"}).encode())
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
    with pytest.raises(UserError, match=r"Connection error.*run the same command again"):
        endpoint(other, retries=0).write(["a"], [1])  # nobody listens there any more
    with serving(replies([(400, {}, "\x1b[2J\u202ebad\r\nline".encode())])) as server:
        with pytest.raises(UserError, match="400") as caught:
            endpoint(server).write(["a"], [1])
        assert printable(str(caught.value)) == str(caught.value) and "\n" not in str(caught.value)
    for url in ("file:///etc/passwd", "localhost:8000"):
        with pytest.raises(ValueError, match="must begin with http"):
            EndpointConfig(url)
