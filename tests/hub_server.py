"""A hub of Hugging Face's kind on this machine: one repository out of a folder, at one commit."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """``downloads``: the files that were sent, in order; ``requests``: all that was asked."""

    url: str
    downloads: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def _answers(files: dict[str, bytes], repo: str, commit: str) -> dict[str, object]:
    """What the hub's API says of the repository, by path."""
    tree = [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in files.items()
    ]
    info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
    answers: dict[str, object] = {}
    for revision in ("main", commit):
        answers[f"/api/models/{repo}/revision/{revision}"] = info
        answers[f"/api/models/{repo}/tree/{revision}"] = tree
    return answers


@contextmanager
def hub_of(root: Path, repo: str, commit: str = COMMIT, delay: float = 0.0) -> Iterator[Hub]:
    """Serve ``root`` as ``repo``, whose ``main`` is ``commit``. ``delay``: seconds before a file."""
    files = {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }
    answers = _answers(files, repo, commit)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(send=True)

        def do_HEAD(self) -> None:
            self._answer(send=False)

        def _answer(self, send: bool) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            prefix = f"/{repo}/resolve/{commit}/"
            name = path.removeprefix(prefix) if path.startswith(prefix) else ""
            if name in files:
                data, status = files[name], 200
                if send:
                    time.sleep(delay)
                    hub.downloads.append(name)
            elif path in answers:
                data, status = json.dumps(answers[path]).encode(), 200
            else:
                data, status = b'{"error": "not found"}', 404
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if status == 404:
                self.send_header(
                    "X-Error-Code", "RepoNotFound" if repo not in path else "RevisionNotFound"
                )
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if send:
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            return None

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(
        target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield hub
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
