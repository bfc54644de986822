"""The system's Chromium for tests of pages."""

from __future__ import annotations

import shutil

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium(asked: str | None, path: str | None) -> str:
    """The program: the one asked for, else from ``path``. AssertionError that says how to install
    it."""
    program = (
        asked or shutil.which("chromium", path=path) or shutil.which("chromium-browser", path=path)
    )
    assert program, "no Chromium: apt-get install -y chromium, or set CHROMIUM to the program"
    return program
