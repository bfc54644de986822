"""The small VAE's two runs: one part of the batch a rank, resumed bit for bit, and a VAE that loads
at the end."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
import torch
from recipe_runner import At
from tiny_run import BACKWARD

from scd_sf.data.clips import Clip, write_clips, write_video
from scd_sf.files import sha256_file
from scd_sf.models.wan.vae import WEIGHTS, load_vae
from scd_sf.tensor_files import read_tensors

SCRIPT = "recipes/pretrain_vae.py"
MODEL = "model={base_dim: 4, decoder_base_dim: 4, channels: 4, dim_mult: [1, 2, 2]}"
STAGES = [
    "distil={steps: 3, batch: 4, warmup: 2}",
    "video={steps: 3, batch: 2, frames: [5], warmup: 1, lr: 1e-2}",
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    (root / "clips").mkdir()
    rng, rows = torch.Generator().manual_seed(0), []
    for number, split in enumerate(("train", "train", "train", "val")):
        file = root / f"clips/{number}.mp4"
        video = torch.randint(256, (5, 3, 16, 16), generator=rng, dtype=torch.uint8)
        write_video(file, video, 16, crf=0, chroma="yuv444p")
        about = (
            f"c{number}",
            split,
            "hall",
            "still",
            ("still",) * 5,
            0.0,
            "a hall",
            "a room",
            0,
            1,
        )
        rows.append(Clip(*about, f"clips/{number}.mp4", file.stat().st_size, sha256_file(file)))
    write_clips(
        root, rows, {"frames": 5, "height": 16, "width": 16, "fps": 16}, {"made_by": "a test"}
    )
    return root


def arguments(clips: Path, out: Path) -> list[str]:
    return [
        f"data={clips}",
        f"out={out}",
        MODEL,
        *STAGES,
        "eval_every=2",
        "save_every=2",
        "eval_clips=1",
    ]


def outcome(out: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Every logged number of both runs, and the weights at the end."""
    return [*tiny_run.metrics(out / "distil"), *tiny_run.metrics(out / "video")], read_tensors(
        out / "vae" / WEIGHTS
    )


def test_killed_in_either_run_and_on_two_ranks(clips: Path, tmp_path: Path) -> None:
    whole, killed, two = (tmp_path / name for name in ("whole", "killed", "two"))
    made = recipe_runner.succeed(SCRIPT, *arguments(clips, whole))
    tiny_run.check_words(made.out, whole / "video")
    assert "part 1 of 2" in made.out and "part 2 of 2" in made.out
    rows, weights = outcome(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 1, 2, 3]
    assert [row["lr"] for row in rows[:3]] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert rows[3]["lr"] == 1e-2 and rows[5]["lr"] == pytest.approx(5e-3)  # half of the cosine
    report = json.loads((whole / "vae" / "evaluation.json").read_text())
    assert report["steps"] == 6 and report["clips"] == 1
    assert load_vae(whole / "vae").geometry.channels == 4

    # in the third step of the first run, then stopped in it, its last; then killed in the second
    for call, number, code in (
        (3, signal.SIGKILL, -9),
        (1, signal.SIGUSR1, 75),
        (3, signal.SIGKILL, -9),
    ):
        at = At(BACKWARD, call, number)
        result = recipe_runner.run(SCRIPT, *arguments(clips, killed), at=at)
        assert result.code == code, result.err
    recipe_runner.succeed(SCRIPT, *arguments(clips, killed))
    again, same = outcome(killed)
    assert again == rows and all(torch.equal(same[name], weights[name]) for name in weights)

    both = recipe_runner.run_ranks(SCRIPT, *arguments(clips, two), world=2)
    assert [result.code for result in both] == [0, 0], both[0].err
    for row, other in zip(outcome(two)[0], rows, strict=True):
        assert row == pytest.approx(other, rel=1e-3), "each rank took its part of the same batch"


def test_what_does_not_fit_is_refused_before_anything_is_trained(
    clips: Path, tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").touch()
    (tmp_path / "old" / "state.pt").touch()
    for out, more, words in (
        ("old", "seed=0", "state.pt: of an earlier version"),
        ("long", "video.frames=[9]", "video.frames asks for 9 frames; the clips in"),
    ):
        result = recipe_runner.run(SCRIPT, *arguments(clips, tmp_path / out), more)
        assert result.code == 2 and words in result.err
        assert not (tmp_path / out / "distil").exists()
    both = recipe_runner.run_ranks(
        SCRIPT, *arguments(clips, tmp_path / "odd"), "distil.batch=3", world=2
    )
    assert all(
        r.code == 2 and "distil.batch is 3; it must be a multiple of the 2 processes" in r.err
        for r in both
    )
