"""Shared parts of the scripts that render clips with ViZDoom: the output directory, worker
processes, licences.

A game is a process of its own, needs a working directory that no other game uses, and must end with
its worker.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from scd_sf.config import stored_settings
from scd_sf.files import others_in, read_json, write_text
from scd_sf.types import UserError

Chunk = TypeVar("Chunk")


def sources() -> dict[str, str]:
    """Origins and licences of the pictures, for a manifest."""
    return {
        "vizdoom": f"{version('vizdoom')}: MIT (its own code); contains ZDoom: http://zdoom.org/wiki/license",
        "freedoom": "freedoom2.wad (textures, sprites): modified BSD license, https://freedoom.github.io",
    }


def begin(root: Path, request: object, folders: Sequence[str]) -> bool:
    """Make or resume a directory: ``work/request.json`` and ``folders``. Returns whether its
    ``manifest.json`` says that the same ``request``, a dataclass, is already complete.

    The caller holds the directory. Raises UserError if it holds other files."""
    plain_request = json.loads(json.dumps(asdict(cast("Any", request))))

    def is_same(stored: object, file: Path) -> bool:
        if not isinstance(stored, dict):
            return False
        return plain_request == stored_settings(type(request), stored, str(file))

    manifest, request_file = root / "manifest.json", root / "work" / "request.json"
    if manifest.is_file():
        stored = read_json(manifest, "choose another directory").get("request")
        if not is_same(stored, manifest):
            raise UserError(
                f"{manifest}: another dataset is here; choose another directory or delete {root}"
            )
        return True
    if request_file.is_file():
        if not is_same(read_json(request_file, "choose another directory"), request_file):
            raise UserError(
                f"{request_file}: an unfinished, different run is here; choose another directory or delete {root}"
            )
    # work/: killed before its first file
    elif others_in(root) not in ([], ["work"]) or others_in(root / "work"):
        raise UserError(f"{root}: the directory is not empty and holds no clips; choose another")
    (root / "work").mkdir(parents=True, exist_ok=True)
    write_text(request_file, json.dumps(plain_request))
    for name in folders:
        (root / name).mkdir(parents=True, exist_ok=True)
    return False


def run_chunks(
    function: Callable[[Chunk, Path], object], chunks: Sequence[Chunk], root: Path, workers: int
) -> Iterator[Chunk]:
    """Call ``function(chunk, root)`` for all in worker processes with separate scratch directories;
    yields each chunk as it is finished."""
    with (
        tempfile.TemporaryDirectory(prefix="doom-clips-") as scratch,
        ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _start_worker, (scratch,)
        ) as pool,
    ):
        futures: dict[Future[object], Chunk] = {
            pool.submit(function, chunk, root): chunk for chunk in chunks
        }
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(scratch: str) -> None:
    """Give a worker its own working directory, because games that share one crash at start. It ends
    when its parent does."""
    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp(dir=scratch))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Interrupt this worker when its parent is gone, which also ends its game. Otherwise it
    would wait for work for ever."""
    parent = multiprocessing.parent_process()
    while parent is not None and wait([parent.sentinel]):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
