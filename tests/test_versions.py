"""The versions that `make test-oldest` installs are pyproject.toml's lower bounds."""

from __future__ import annotations

import tomllib

import recipe_runner
from packaging.requirements import Requirement
from packaging.version import Version

NO_CODE_YET = {"serve"}


def lower_bounds() -> dict[str, Version]:
    """Package -> the version after >=, of every dependency and extra."""
    project = tomllib.loads((recipe_runner.ROOT / "pyproject.toml").read_text())["project"]
    extras = [texts for extra, texts in project["optional-dependencies"].items() if extra not in NO_CODE_YET]
    wanted = [Requirement(text) for texts in (project["dependencies"], *extras) for text in texts]
    return {one.name: Version(bound.version) for one in wanted for bound in one.specifier if bound.operator == ">="}


def test_the_oldest_environment_has_the_lower_bounds() -> None:
    lines = (recipe_runner.ROOT / "tests" / "oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(version) for name, version in pinned.items()} == lower_bounds()
