"""VBench's own Python environment: its pins (numpy below 2, transformers 4.33) do not go with this project's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scd_sf.files import has_mark, parse_json, read_json, require_own_file, typed, write_json, write_text
from scd_sf.types import UserError, say

VERSION = "0.1.5"
# setuptools 81 has no pkg_resources any more, which openai-clip imports: without it 7 dimensions do not load (2026-11).
PINS = (f"vbench=={VERSION}", "numpy<2", "transformers==4.33.2", "timm>=0.9,<=1.0.12", "torchvision", "setuptools<81")
READY = ".scd-sf-ready.json"
LOG_MARK = "scd-sf builds the environment"  # a log's first words; whose folder it is stands behind
_PROBE = """
import importlib.metadata as m, importlib.util as u, json, sys
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return ""
spec = u.find_spec("vbench")
names = ("vbench", "torch", "torchvision", "numpy", "transformers", "timm", "opencv-python")
print(json.dumps({"python": sys.version.split()[0], "detectron2": u.find_spec("detectron2") is not None,
    "folder": list(spec.submodule_search_locations)[0] if spec else "", "versions": {n: version(n) for n in names}}))
"""


@dataclass(frozen=True)
class Environment:
    """A Python that has VBench: its executable, VBench's folder there, versions, and whether detectron2 is there."""

    python: Path
    folder: Path
    versions: dict[str, str]
    detectron2: bool


def default_folder() -> Path:
    """``~/.cache/scd-sf/vbench-0.1.5``, or under XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "scd-sf" / f"vbench-{VERSION}"


def build(folder: Path, torch: str = "torch", detectron2: str = "") -> Path:
    """A virtual environment with VBench in ``folder``; returns its python. Kept if it is there for the same pins.

    Every command is printed. ``torch``: a requirement, e.g. "torch==2.5.1" for an older GPU driver; ``detectron2``: its
    requirement, installed last (it is compiled and needs torch). UserError names the log of the step that failed.
    """
    wanted = {"pins": [*PINS, torch], "detectron2": detectron2}
    python, ready = folder / "bin" / "python", folder / READY
    if ready.is_file() and read_json(ready, f"delete {folder}") == wanted:
        return python
    log = folder.with_name(folder.name + ".log")
    begun = f"{LOG_MARK} {folder.absolute()}\n"
    require_own_file(log, LOG_MARK, "use another env=")
    if folder.exists() and any(folder.iterdir()) and not (ready.is_file() or has_mark(log, begun)):
        raise UserError(f"env {folder}: holds other files; nothing is overwritten: use another env=")
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_text(log, begun)
    ready.unlink(missing_ok=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    commands = [[sys.executable, "-m", "venv", "--clear", str(folder)], [*pip, *PINS, torch]]
    if detectron2:
        commands.append([*pip, "--no-build-isolation", detectron2])
    for command in commands:
        _run(command, log)
    write_json(ready, wanted)
    return python


def _run(command: Sequence[str], log: Path) -> None:
    say("+ " + " ".join(f"'{word}'" if set(word) & set(" <>=") else word for word in command))
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
        raise UserError(
            f"environment: '{' '.join(command[1:4])} ..' ended with code {code} ({last.strip()[:200]}); see {log}. "
            "Without a package index give a python that has VBench: python=/path/to/env/bin/python"
        )


def examine(python: Path) -> Environment:
    """What this Python has. UserError unless VBench is there in the version that this project knows, with numpy 1."""
    try:
        done = subprocess.run([python, "-I", "-c", _PROBE], capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"python {python}: cannot be run ({error}); give the python of VBench's environment") from error
    said = (done.stderr or done.stdout).strip().splitlines()
    answer = f"python {python}: not a Python that answers ({said[-1:]})"
    found = typed(parse_json(done.stdout, answer, "check the path"), _Answer, answer, "check the path")
    vbench, numpy = found.versions.get("vbench", ""), found.versions.get("numpy", "")
    if vbench != VERSION:
        has = f"vbench {vbench}" if vbench else "no vbench"
        raise UserError(f"python {python}: has {has}; it must be {VERSION}: leave python empty to build an environment")
    if not numpy.startswith("1."):
        raise UserError(f"python {python}: has numpy {numpy}; VBench {VERSION} needs numpy<2: install that")
    return Environment(python, Path(found.folder), found.versions, found.detectron2)


@dataclass(frozen=True)
class _Answer:
    """What the probe prints."""

    folder: str
    versions: dict[str, str]
    detectron2: bool
