"""The versions that `make test-oldest` installs are pyproject.toml's lower bounds."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import recipe_runner
from packaging.requirements import Requirement
from packaging.version import Version


def lower_bounds() -> dict[str, Version]:
    """Package -> the version after >=, of every dependency and extra."""
    project = tomllib.loads((recipe_runner.ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [Requirement(text) for texts in (project["dependencies"], *extras) for text in texts]
    return {
        one.name: Version(bound.version)
        for one in wanted
        for bound in one.specifier
        if bound.operator == ">="
    }


def test_the_oldest_environment_has_the_lower_bounds() -> None:
    lines = (recipe_runner.ROOT / "tests" / "oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(version) for name, version in pinned.items()} == lower_bounds()


def test_make_venv_keeps_the_torch_that_is_there(tmp_path: Path) -> None:
    """Left alone, pip replaces it: the newest torchvision wants a newer one (measured: 2.11.0
    became 2.12.1)."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    planned = subprocess.check_output(
        ["make", "-n", f"VENV={venv}", "venv"], text=True, cwd=recipe_runner.ROOT
    )
    keep, rest = planned[planned.index(f"{venv}/bin/python -c '") :].split(f" > {venv}/kept.txt\n")
    kept = subprocess.check_output(["sh", "-c", keep], text=True).split()
    assert sorted(kept) == [
        f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "torchvision")
    ]
    assert f" -c {venv}/kept.txt -e " in rest.splitlines()[0]
