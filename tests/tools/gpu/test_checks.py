"""The checks of `make gpu`, part 1: on a GPU all of them; on a CPU their own code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recipe_runner
from recipe_runner import load_script

CHECKS = list(load_script("tests/tools/gpu/checks.py").CHECKS)
# Engines and compilers take a process and a minute; the rest seconds.
SLOW = [
    name
    for name in CHECKS
    if name.startswith(("stage", "resume", "NCCL", "sampling, compiled", "sampling, graphs"))
]


def check(device: str, names: list[str], folder: Path) -> None:
    """Run them in one process; every value within its limit."""
    recipe_runner.succeed("tests/tools/gpu/checks.py", folder / "out.json", device, *names)
    found = json.loads((folder / "out.json").read_text())
    assert list(found) == names
    for name, differences in found.items():
        assert differences, name
        for what, (value, limit) in differences.items():
            assert value <= limit, f"{name}: {what} {value}, at most {limit}"


def test_fast_checks_on_the_cpu(tmp_path: Path) -> None:
    check("cpu", [name for name in CHECKS if name not in SLOW], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_engines_and_compilers_on_the_cpu(tmp_path: Path) -> None:
    # on a CPU the same as compiled
    check("cpu", [name for name in SLOW if name != "sampling, graphs"], tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_cuda_equals_cpu(name: str, tmp_path: Path) -> None:
    check("cuda", [name], tmp_path)
