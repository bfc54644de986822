"""The demo's world: balanced by construction, the same bytes whatever the workers, resumable, clear
about errors."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from scd_sf.data.clips import ClipSet
from scd_sf.files import locked

SCRIPT = Path(__file__).parents[2] / "data_prep" / "make_doom_clips.py"


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_doom_clips", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("doom") / "clips"
    done = run(out, "--train", "1", "--val", "1", "--frames", "9", "--workers", "2")
    assert done.returncode == 0, done.stderr
    return out


def test_captions_begin_with_their_motion(script: ModuleType) -> None:
    word = {"forward": "forward", "turn_left": "left", "turn_right": "right", "still": "still"}
    for place in script.PLACES:
        for motion in script.MOTIONS:
            pairs = [
                script.captions(place, motion, np.random.default_rng(seed)) for seed in range(60)
            ]
            assert pairs[0] == script.captions(place, motion, np.random.default_rng(0))
            assert all(caption.startswith(word[motion]) for pair in pairs for caption in pair)
            training, held_out = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
            assert len(training) == 8 and len(held_out) == 1 and not training & held_out
            other = {"left": "right", "right": "left"}.get(word[motion], "{}")
            assert all(other not in caption for pair in pairs for caption in pair)


def test_chunks_are_balanced(script: ModuleType) -> None:
    chunks = script.Request(seed=0, frames=33, train=200, val=16).chunks()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for chunk in chunks:
        sizes[chunk.split, chunk.place, chunk.motion] += chunk.end - chunk.first
    assert len(sizes) == 2 * 3 * 4
    assert all(size == {"train": 200, "val": 16}[key[0]] for key, size in sizes.items())
    assert len({chunk.name for chunk in chunks}) == len(chunks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--frames", "32"), "error: --frames: 32 is not 1 + 4*k (k >= 1); use 33"),
        (("--frames", "1"), "error: --frames: 1 is not 1 + 4*k (k >= 1); use 5"),
        (("--train", "-1"), "error: --train: -1 is too small; use 0 or more"),
        (("--train", "0", "--val", "0"), "error: --train/--val: both are 0"),
        (("--workers", "0"), "error: --workers: 0 is too small; use 1 or more"),
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
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as stop:
        script.cli([str(tmp_path / "file" / "out")])
    assert stop.value.code == 2
    assert "Not a directory" in capsys.readouterr().err


def test_a_directory_with_other_things(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        script.cli([str(tmp_path)])
    assert stop.value.code == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_directory_is_ours_from_the_first_file(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed before it, the same command goes on; while another has not come further, that is what
    is said."""
    (tmp_path / "out" / "work").mkdir(parents=True)
    assert not script.prepare(tmp_path / "out", script.Request(0, 9, 1, 1))
    with locked(tmp_path / "new", "another"):
        (tmp_path / "new" / "clips").mkdir()
        with pytest.raises(SystemExit) as stop:
            script.cli([str(tmp_path / "new")])
    assert stop.value.code == 2 and "is at work in it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_set(small: Path, script: ModuleType) -> None:
    clips = ClipSet(small)
    clips.verify()
    assert (clips.frames, clips.height, clips.width, clips.fps) == (9, 64, 64, 35)
    assert Counter((clip.split, clip.place, clip.motion) for clip in clips.clips) == {
        (split, place, motion): 1
        for split in script.SPLITS
        for place in script.PLACES
        for motion in script.MOTIONS
    }
    for index, clip in enumerate(clips.clips):
        video = clips.video(index).float()
        change = (video[1:] - video[:-1]).abs().mean()
        assert video.std() >= 15 and clip.actions == (clip.motion,) * 9
        assert change < 1 if clip.motion == "still" else change > 1
        low, high = {"turn_left": (-4, -3), "turn_right": (3, 4)}.get(clip.motion, (0, 0))
        assert low <= clip.degrees_per_frame <= high
    manifest = json.loads((small / "manifest.json").read_text())
    assert manifest["kept"] == {"meadow": 8, "hall": 8, "arena": 8}
    assert "BSD" in manifest["sources"]["freedoom"] and "MIT" in manifest["sources"]["vizdoom"]
    assert not (small / "work").exists()


@pytest.mark.slow
def test_turns_move_the_picture_the_right_way(small: Path) -> None:
    """A left turn shifts the middle row's pixels to the right, a right turn to the left."""
    clips = ClipSet(small)
    shifts: dict[str, list[int]] = {"turn_left": [], "turn_right": []}
    for index, clip in enumerate(clips.clips):
        if clip.motion in shifts:
            gray = clips.video(index).float().mean(1)
            errors = {
                shift: (gray[1:, :, 8 + shift : 56 + shift] - gray[:-1, :, 8:56])
                .abs()
                .mean()
                .item()
                for shift in range(-6, 7)
            }
            shifts[clip.motion].append(min(errors, key=errors.__getitem__))
    assert sum(shift > 0 for shift in shifts["turn_left"]) >= 5
    assert sum(shift < 0 for shift in shifts["turn_right"]) >= 5


@pytest.mark.slow
def test_resumed_by_one_worker_gives_the_same_clips(
    small: Path, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the parts of an interrupted run are there, one with its clip gone: one worker makes the
    rest.

    On a busy machine the game draws some frames a few grey levels apart: pictures are compared, not
    bytes.
    """
    request = script.Request(seed=0, frames=9, train=1, val=1)
    assert not script.prepare(tmp_path / "again", request)
    lines = {clip.id: clip.to_json() for clip in ClipSet(small).clips}
    for number, chunk in enumerate(request.chunks()[:12]):
        name = f"{chunk.split}-{chunk.place}-{chunk.motion}-00000"
        path = f"clips/{chunk.split}/{name}.mp4"
        if number:
            (tmp_path / "again" / path).write_bytes((small / path).read_bytes())
        part = json.dumps([[lines[name]], dict.fromkeys(script.REJECT, 0)])
        (tmp_path / "again" / "work" / f"{chunk.name}.json").write_text(part)
    monkeypatch.chdir(tmp_path)
    done = run(tmp_path / "again", "--train", "1", "--val", "1", "--frames", "9", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["again"], (
        "the engine left its _vizdoom.ini where we stand"
    )
    one, two = ClipSet(small), ClipSet(tmp_path / "again")
    two.verify()
    assert [replace(c, bytes=0, sha256="") for c in one.clips] == [
        replace(c, bytes=0, sha256="") for c in two.clips
    ]
    for index in range(len(one.clips)):
        difference = (one.video(index).float() - two.video(index).float()).abs()
        assert difference.mean() < 2 and difference.max() < 64, one.clips[index].id


@pytest.mark.slow
def test_run_again(small: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    before = ClipSet(small).hash
    with pytest.raises(SystemExit) as stop:
        script.cli([str(small), "--train", "1", "--val", "1", "--frames", "9"])
    assert stop.value.code == 0 and "already complete" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        script.cli([str(small), "--train", "2", "--val", "1", "--frames", "9"])
    assert stop.value.code == 2 and "another dataset is here" in capsys.readouterr().err
    assert ClipSet(small).hash == before
