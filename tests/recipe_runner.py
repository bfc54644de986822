"""Run a script of this repository as ``python script.py arguments`` would, without paying for its
imports each time.

A fork server imports torch and the library once; each run is a fresh fork that executes the real
script file as ``__main__`` with its own ``sys.argv``, stdout and stderr, and can be killed like any
other process.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import itertools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = [
    "torch._dynamo",
    "torch.utils.tensorboard",
    "scd_sf.losses.dmd",
    "scd_sf.losses.flow_matching",
    "scd_sf.models.wan.text",
    "scd_sf.models.scd.transplant",
    "scd_sf.generation.preview",
    "scd_sf.train.engine",
    "scd_sf.train.loop",
    # what the library imports where it is used
    "diffusers.loaders.single_file_utils",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.schedulers.scheduling_unipc_multistep",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.umt5.modeling_umt5",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)
_FIRST_PORT, _NUM_PORTS = 10_000, 22_000
_ports = itertools.count(os.getpid() * 7919)  # neighbours are far apart


@dataclass(frozen=True)
class Result:
    """Exit code (negative: the signal), what was printed, and how often ``At.target`` was called in
    a whole run."""

    code: int
    out: str
    err: str
    calls: int = 0


@dataclass(frozen=True)
class At:
    """Do something to the process when it calls ``target`` ("module:attribute.path") for the
    ``call``-th time: send it a ``signal``, or with 0 let that call fail as on a full disk. Calls of
    all names together count when there are several, joined by "|"."""

    target: str
    call: int
    signal: int = signal.SIGKILL


def run(
    script: str,
    *arguments: object,
    at: At | None = None,
    timeout: float = 600,
    folder: Path = ROOT,
    environ: Mapping[str, str] | None = None,
) -> Result:
    """Run ``script`` (relative to the repository; ``scd``: our command) in a fork, in ``folder``;
    see the module's docstring."""
    return run_ranks(
        script,
        *arguments,
        world=1,
        at={0: at} if at else {},
        timeout=timeout,
        folder=folder,
        environ=environ,
    )[0]


def run_ranks(
    script: str,
    *arguments: object,
    world: int,
    at: Mapping[int, At] | None = None,
    timeout: float = 600,
    folder: Path = ROOT,
    environ: Mapping[str, str] | None = None,
) -> list[Result]:
    """``world`` processes of one process group, as a launcher would start them; ``at`` by rank."""
    with tempfile.TemporaryDirectory() as logs:
        files = [
            tuple(Path(logs, f"{name}{rank}") for name in ("out", "err", "calls"))
            for rank in range(world)
        ]
        port = free_port()
        processes = []
        for rank, place in enumerate(files):
            variables = {} if world == 1 else _environment(rank, world, port)
            variables |= environ or {}
            words = [str(a) for a in arguments]
            given = (script, words, *place, (at or {}).get(rank), variables, folder)
            processes.append(_context.Process(target=_child, args=given))
            processes[-1].start()
        until = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        late = [process for process in processes if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        if late:
            said = "\n".join(file.read_text()[-2000:] for place in files for file in place[:2])
            raise TimeoutError(f"{script} ran longer than {timeout} s\n{said}")
        return [
            Result(
                process.exitcode or 0,
                out.read_text(),
                err.read_text(),
                int(calls.read_text() if calls.exists() else 0),
            )
            for process, (out, err, calls) in zip(processes, files, strict=True)
        ]


def succeed(script: str, *arguments: object, at: At | None = None) -> Result:
    """As :func:`run`; fails with the script's output unless the exit code is 0."""
    result = run(script, *arguments, at=at)
    assert result.code == 0, (
        f"{script}: exit code {result.code}\n{result.out[-2000:]}\n{result.err[-4000:]}"
    )
    return result


def free_port() -> str:
    """A port of the loopback address that nobody listens on now, and that is handed out once: below
    those that the kernel gives to connections, and for each test process another part of them."""
    while True:
        port = _FIRST_PORT + next(_ports) % _NUM_PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)


def load_script(script: str) -> ModuleType:
    """The script's names without running its main; it is executed under a private name, so nothing
    can import it."""
    name = "script_" + Path(script).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _environment(rank: int, world: int, port: str) -> dict[str, str]:
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_PORT": port,
    }
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def _child(
    script: str,
    arguments: list[str],
    out: Path,
    err: Path,
    counted: Path,
    at: At | None,
    environ: dict[str, str],
    folder: Path,
) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), number)
    os.chdir(folder)
    os.environ.update(environ)
    sys.argv = [script, *arguments]
    calls = itertools.count(1)
    for target in at.target.split("|") if at is not None else ():
        _arm(target, at, calls)
    try:
        if script == "scd":
            runpy.run_module("scd_sf.cli", run_name="__main__")
        else:
            runpy.run_path(script, run_name="__main__")
    finally:
        counted.write_text(str(next(calls) - 1))


def _arm(target: str, at: At | None, calls: Iterator[int]) -> None:
    assert at is not None
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)

    def armed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at.call:
            if not at.signal:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), at.signal)
        return original(*args, **kwargs)

    setattr(owner, name, armed)
