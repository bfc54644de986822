"""VBench's own Python environment, because its pins (numpy below 2, transformers 4.33) conflict
with this project's."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scd_sf.files import parse_json, read_json, require_own_folder, typed, write_json
from scd_sf.types import UserError, say

VERSION = "0.1.5"
# setuptools 81 has no pkg_resources any more, which openai-clip imports: without it 7 dimensions do
# not load (2026-11).
PINS = (
    f"vbench=={VERSION}",
    "numpy<2",
    "transformers==4.33.2",
    "timm>=0.9,<=1.0.12",
    "torchvision",
    "setuptools<81",
)
READY = ".scd-sf-ready.json"  # the environment's pins; {} while it is being built
_PROBE = """
import importlib.metadata as m, importlib.util as u, json, sys
spec = u.find_spec("vbench")
names = ("vbench", "torch", "torchvision", "numpy", "transformers", "timm", "opencv-python")
installed = {d.metadata["Name"]: d.version for d in reversed(list(m.distributions()))}
print(json.dumps({"detectron2": u.find_spec("detectron2") is not None,
    "folder": list(spec.submodule_search_locations)[0] if spec else "",
    "versions": {"python": sys.version.split()[0]} | {n: installed.get(n, "") for n in names}}))
"""


@dataclass(frozen=True)
class Environment:
    """A Python that has VBench: the ``folder`` of VBench's package, versions of packages, and
    whether detectron2 is installed."""

    folder: str
    versions: dict[str, str]
    detectron2: bool


def default_folder() -> Path:
    """``~/.cache/scd-sf/vbench-0.1.5``, or under XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "scd-sf" / f"vbench-{VERSION}"


def build(folder: Path, torch: str = "torch", detectron2: str = "") -> Path:
    """A virtual environment with VBench in ``folder``; returns its python. One with
    the same pins is used again.

    Every command is printed. ``torch``: a requirement, e.g. "torch==2.5.1" for an older GPU driver;
    ``detectron2``: its requirement, installed last (it is compiled and needs torch). UserError
    naming the command that failed.
    """
    pins: dict[str, object] = {"pins": [*PINS, torch], "detectron2": detectron2}
    folder = folder.resolve()
    python, ready = folder / "bin" / "python", folder / READY
    if ready.is_file() and read_json(ready, f"delete {folder}") == pins:
        return python
    require_own_folder(folder, [READY], "use another env=")
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(ready, {})
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    commands = [[sys.executable, "-m", "venv", str(folder)], [*pip, *PINS, torch]]
    if detectron2:
        commands.append([*pip, "--no-build-isolation", detectron2])
    for command in commands:
        say(f"+ {shlex.join(command)}")
        if code := subprocess.run(command, check=False).returncode:
            raise UserError(
                f"environment: '{' '.join(command[1:4])} ..' ended with code {code}, see above. Without a package "
                "index give a python that has VBench: python=/path/to/env/bin/python"
            )
    write_json(ready, pins)
    return python


def examine(python: Path) -> Environment:
    """The environment of this Python. UserError unless it has VBench in the version
    :data:`VERSION`, and numpy 1."""
    try:
        process = subprocess.run(
            [python, "-I", "-c", _PROBE], capture_output=True, text=True, check=False, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"python {python}: cannot be run ({error}); give the python of VBench's environment"
        ) from error
    last_line = (process.stderr or process.stdout).strip().splitlines()[-1:]
    description = f"python {python}: not a Python that answers ({last_line})"
    environment = typed(
        parse_json(process.stdout, description, "check the path"),
        Environment,
        description,
        "check the path",
    )
    vbench, numpy = environment.versions.get("vbench", ""), environment.versions.get("numpy", "")
    if vbench != VERSION:
        vbench_text = f"vbench {vbench}" if vbench else "no vbench"
        raise UserError(
            f"python {python}: has {vbench_text}; it must be {VERSION}: leave python empty to build an environment"
        )
    if not numpy.startswith("1."):
        raise UserError(
            f"python {python}: has numpy {numpy}; VBench {VERSION} needs numpy<2: install that"
        )
    return environment
