"""Folders that several workers of one test run read."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """A folder that one worker of this test run builds and all of them read."""
    workers = os.environ.get("PYTEST_XDIST_WORKER")
    root = factory.getbasetemp().parent if workers else factory.mktemp("shared")
    folder, lock = root / name, root / f"{name}.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (root / f"{name}.done").exists():
            folder.mkdir(exist_ok=True)
            build(folder)
            (root / f"{name}.done").touch()
    return folder
