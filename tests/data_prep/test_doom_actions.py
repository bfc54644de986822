"""Walks with actions: in TECO's layout, actions on their frames, resumable, clear about errors."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from raw_sets import SCRIPT, make_doom

from scd_sf.data.clips import read_video
from scd_sf.files import LOCK


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_doom_actions", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def shifts(path: Path) -> np.ndarray:
    """Of every frame but the first: by how many pixels the middle of the picture moved to the
    right."""
    gray = read_video(path).float().mean(1)[:, 16:48]
    found = []
    for before, after in itertools.pairwise(gray):
        errors = [
            (after[:, 12 + s : 52 + s] - before[:, 12:52]).abs().mean().item()
            for s in range(-11, 12)
        ]
        found.append(int(np.argmin(errors)) - 11)
    return np.asarray(found)


def test_a_small_set(doom_actions: Path) -> None:
    names = sorted(
        path.relative_to(doom_actions).as_posix()
        for path in doom_actions.rglob("*.*")
        if path.name != LOCK
    )
    stems = ["test/my_way_home/00000", *(f"train/my_way_home/{number:05d}" for number in range(4))]
    assert names == sorted(
        ["manifest.json", *(stem + end for stem in stems for end in (".mp4", ".npz"))]
    )
    manifest = json.loads((doom_actions / "manifest.json").read_text())
    assert manifest["actions"] == ["turn_left", "turn_right", "move_forward"]
    assert "BSD" in manifest["sources"]["freedoom"] and "MIT" in manifest["sources"]["vizdoom"]
    videos = [read_video(doom_actions / f"{stem}.mp4") for stem in stems]
    for stem, video in zip(stems, videos, strict=True):
        with np.load(doom_actions / f"{stem}.npz", allow_pickle=False) as stored:
            actions = stored["actions"]
        assert actions.dtype == np.int64 and actions.shape == (40,) and set(actions) <= {0, 1, 2}
        assert video.shape == (40, 3, 64, 64)
        assert (video[1:].float() - video[:-1].float()).abs().mean((1, 2, 3)).min() > 0.5, (
            "the walker stands still"
        )
    assert all((videos[0].float() - other.float()).abs().mean() > 5 for other in videos[1:])


def test_a_turn_moves_the_picture_in_its_own_frame(doom_actions: Path) -> None:
    """Left turns move the picture to the right in the very frames that they are stored with, not a
    frame beside."""
    right = {-1: [], 0: [], 1: []}  # type: dict[int, list[float]]
    for path in sorted(doom_actions.rglob("*.mp4")):
        moved = np.sign(shifts(path)[1:-1])
        actions = np.load(path.with_suffix(".npz"), allow_pickle=False)["actions"]
        for offset in right:
            stored = actions[2 + offset : len(actions) - 1 + offset]
            expected = np.array([1, -1, 0])[stored]
            turns = expected != 0
            right[offset] += list(moved[turns] == expected[turns])
    share = {offset: float(np.mean(hits)) for offset, hits in right.items()}
    assert share[0] > 0.9 and share[0] > share[-1] + 0.03 and share[0] > share[1] + 0.03, share


def test_distances_to_walls(script: ModuleType) -> None:
    """In a room of 200 x 100: rays end at the first wall, and where they start aside counts."""
    walls = np.array(
        [
            [0, 0, 200, 0],
            [200, 0, 200, 100],
            [200, 100, 0, 100],
            [0, 100, 0, 0],
            [150, 40, 150, 60],
        ],
        float,
    )
    degrees = np.array([0.0, 90.0, 180.0, -90.0, 0.0, 45.0])
    aside = np.array([0.0, 0.0, 0.0, 0.0, 20.0, 0.0])
    far = script.distances(walls, 50.0, 50.0, degrees, aside)
    np.testing.assert_allclose(far, [100, 50, 50, 50, 150, 50 * 2**0.5])
    walker = script.Walker(walls, np.random.default_rng(0))
    assert walker.next(130.0, 50.0, 0.0, 10.0) != script.FORWARD, "a wall is 20 units ahead"
    assert (
        script.Walker(walls, np.random.default_rng(0)).next(20.0, 80.0, 0.0, 10.0) == script.FORWARD
    )
    stuck = script.Walker(walls, np.random.default_rng(0))
    assert stuck.next(20.0, 80.0, 0.0, 0.0) != script.FORWARD and stuck.stuck == 1


@pytest.mark.slow
def test_an_interrupted_run_goes_on(
    doom_actions: Path, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of five clips are there; two workers make the rest: the same actions, pictures alike (a
    busy machine draws some frames a few grey levels apart)."""
    again = tmp_path / "set"
    request = script.Request(0, 40, 64, ("my_way_home",), 4, 1)
    script.begin(again, request, [f"{split}/my_way_home" for split in script.SPLITS])
    for stem in ("train/my_way_home/00001", "test/my_way_home/00000"):
        for end in (".mp4", ".npz"):
            shutil.copy(doom_actions / (stem + end), again / (stem + end))
    (again / "train/my_way_home/00002.mp4").write_bytes(b"cut")
    options = ("--train", "4", "--test", "1", "--frames", "40", "--size", "64")
    monkeypatch.chdir(tmp_path)
    done = make_doom(again, *options, "--workers", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["set"], (
        "the engine left its _vizdoom.ini where we stand"
    )
    assert done.returncode == 0, done.stderr
    for path in doom_actions.rglob("*.npz"):
        other = again / path.relative_to(doom_actions)
        assert other.read_bytes() == path.read_bytes()
        one, two = (
            read_video(path.with_suffix(".mp4")).float(),
            read_video(other.with_suffix(".mp4")).float(),
        )
        assert (one - two).abs().mean() < 2
    assert "already complete" in make_doom(again, *options).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train", "-1"), "error: --train: -1 is too small; use 0 or more"),
        (("--train", "0", "--test", "0"), "error: --train/--test: both are 0"),
        (("--frames", "1"), "error: --frames: 1 is too small; use 2 or more"),
        (("--size", "63"), "error: --size: 63 is odd or more than 240"),
        (("--workers", "0"), "error: --workers: 0 is too small"),
        (("--scenario", "e1m1"), "error: --scenario: 'e1m1' is unknown; use one of my_way_home,"),
    ],
)
def test_bad_options(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        script.cli([str(tmp_path / "out"), *options])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(message)
    assert not list(tmp_path.iterdir())
