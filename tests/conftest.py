"""One thread, no network, no accounts and no cache of the user for every test, set before torch is
imported."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path

import pytest

# Tests use tiny tensors: more threads are slower, and the order of sums must not depend on the
# machine.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "offline",
}.items():
    os.environ.setdefault(name, value)

# What DeepSpeed compiles (half a minute) stays in the user's cache; elsewhere it would be compiled
# in every session.
cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
python = f"py{sys.version_info.major}{sys.version_info.minor}-torch{version('torch')}"
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR", os.path.join(cache, "torch_extensions", f"scd-sf-tests-{python}")
)
# where scd_sf keeps encoded prompts
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="scd-sf-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests begin first, so that two workers end together
    (``--no-loadscope-reorder``)."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Captured output as UTF-8 can hold it: two workers speak UTF-8, hostile texts are not."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def doom_actions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training clips and a test clip of 40 frames 64x64 in TECO's layout, walked in ViZDoom.
    Only to be read."""
    from raw_sets import make_doom
    from shared import built_once

    def walk(folder: Path) -> None:
        done = make_doom(
            folder / "set", "--train", "4", "--test", "1", "--frames", "40", "--size", "64"
        )
        assert done.returncode == 0, done.stderr

    return built_once(tmp_path_factory, "doom-actions", walk) / "set"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kill-points", default="3", help="test_faults.py: so many points to kill at, per case"
    )
    parser.addoption("--tally", default=None, help="test_faults.py: JSON file that gets the sums")
