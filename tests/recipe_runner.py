"""Run a script of this repository as ``python script.py arguments`` would, without paying for its imports each time.

A fork server imports torch and the library once; each run is a fresh fork that executes the real script file as
``__main__`` with its own ``sys.argv``, stdout and stderr, and can be killed like any other process.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
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
    "scd_sf.models.text",
    "scd_sf.models.transplant",
    "scd_sf.preview",
    "scd_sf.train.engine",
    "scd_sf.train.recipe",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


@dataclass(frozen=True)
class Result:
    """Exit code (negative: the signal), and what was printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class KillAt:
    """SIGKILL the process when it calls ``target`` ("module:attribute.path") for the ``call``-th time."""

    target: str
    call: int


def run(script: str, *arguments: object, kill: KillAt | None = None, timeout: float = 600) -> Result:
    """Run ``script`` (relative to the repository) in a fork; see the module's docstring."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _context.Process(target=_child, args=(script, [str(a) for a in arguments], out, err, kill))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            said = f"{out.read_text()[-2000:]}{err.read_text()[-2000:]}"
            raise TimeoutError(f"{script} ran longer than {timeout} s\n{said}")
        return Result(process.exitcode, out.read_text(), err.read_text())


def succeed(script: str, *arguments: object) -> Result:
    """As :func:`run`; fails with the script's output unless the exit code is 0."""
    result = run(script, *arguments)
    assert result.code == 0, f"{script}: exit code {result.code}\n{result.out[-2000:]}\n{result.err[-4000:]}"
    return result


def free_port() -> str:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def load_script(script: str) -> ModuleType:
    """The script's names without running its main; it is executed under a private name, so nothing can import it."""
    name = "script_" + Path(script).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _child(script: str, arguments: list[str], out: Path, err: Path, kill: KillAt | None) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), number)
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    if kill is not None:
        _arm(kill)
    runpy.run_path(script, run_name="__main__")


def _arm(kill: KillAt) -> None:
    module, _, path = kill.target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == kill.call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, dying)
