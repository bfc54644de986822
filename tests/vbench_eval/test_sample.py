"""The suite by the real script at tiny size: names, seeds, the filter, resuming, ranks,
refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
import torch
from recipe_runner import At
from torchvision.models.optical_flow import raft_large

from scd_sf.data.clips import read_video
from scd_sf.files import sha256_file

SCRIPT = "vbench_eval/sample.py"
LIST = [
    ("a wall, still", ["temporal_flickering"]),
    ("left in meadow", ["scene", "background_consistency"]),
    ("Left in meadow", ["appearance_style"]),
    ("left in meadow", ["overall_consistency"]),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transplanted student, a short list of prompts, their extended wordings, RAFT weights that
    see no motion."""
    root = tmp_path_factory.mktemp("suite")
    tiny_run.write_wan(root / "wan")
    layers = ["scd.encoder_layers=[0, 1, 2]", "scd.decoder.layers=[0, 5]"]
    recipe_runner.succeed(
        "recipes/stage1_transplant.py", f"base={root}/wan", f"out={root}/stage1", *layers
    )
    rows = [{"prompt_en": prompt, "dimension": dims} for prompt, dims in LIST]
    (root / "full.json").write_text(json.dumps(rows))
    (root / "long.txt").write_text(
        "".join(f"still in hall {number}\n" for number in range(len(LIST)))
    )
    torch.save(
        {k: torch.zeros_like(v) for k, v in raft_large(weights=None).state_dict().items()},
        root / "raft.pth",
    )
    return root


def arguments(world: Path, out: Path) -> list[str]:
    size = ["sampling.frames=1", "sampling.height=128", "sampling.width=128", "sampling.batch=2"]
    sampler = [
        "sampling.sampler={name: euler, steps: 1, shift: 5.0}",
        "sampling.guidance.text.scale=2",
    ]
    return [
        f"sampling.checkpoint={world}/stage1",
        f"sampling.out={out}",
        f"full_info={world}/full.json",
        *size,
        *sampler,
    ]


def files(out: Path) -> dict[str, str]:
    return {
        str(f.relative_to(out)): sha256_file(f)
        for f in sorted(out.rglob("*"))
        if f.suffix == ".mp4"
    }


@pytest.mark.slow
def test_the_suite(world: Path, tmp_path: Path) -> None:
    """Killed twice, resumed by two ranks: the files of an unbroken run; five per prompt, each
    prompt once."""
    few = ["samples=2", "flicker_samples=1", f"raft={world}/raft.pth", f"extended={world}/long.txt"]
    given = [*arguments(world, tmp_path / "a"), *few]
    recipe_runner.succeed(SCRIPT, *given)
    names = [
        f"{prompt}-{n}.mp4" for prompt in ("Left in meadow", "left in meadow") for n in range(2)
    ]
    assert list(files(tmp_path / "a")) == [
        "flickering/a wall, still-0.mp4",
        "static/a wall, still-0.mp4",
        *(f"videos/{name}" for name in names),
    ]
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert len(manifest["videos"]) == 5
    record = manifest["videos"]["videos/Left in meadow-1.mp4"]
    assert (record["seed"], record["title"], record["prompt"]) == (
        200001,
        "Left in meadow",
        "still in hall 2",
    )
    assert manifest["videos"]["flickering/a wall, still-0.mp4"]["seed"] == 0
    assert manifest["videos"]["videos/left in meadow-0.mp4"]["seed"] == 100000
    assert manifest["settings"]["suite"]["extended_sha256"] == sha256_file(world / "long.txt")
    assert manifest["settings"]["sampler"] == {
        "name": "euler",
        "steps": 1,
        "shift": 5.0,
        "times": [],
    }
    protocol = manifest["protocol"]
    assert protocol["guidance"] == {"standard_w": 2.0, "additive_s": 1.0, "corruption": 1.0}
    assert (protocol["samples_per_prompt"], protocol["flickering_candidates"]) == (2, 1)
    assert protocol["versions"]["torch"] == torch.__version__
    assert read_video(tmp_path / "a" / "videos" / names[0]).shape == (1, 3, 128, 128)

    again = [*arguments(world, tmp_path / "b"), *few]
    assert recipe_runner.run(SCRIPT, *again, at=At("scd_sf.generation.folder:make", 2)).code == -9
    assert (
        recipe_runner.run(
            SCRIPT, *again, at=At("scd_sf.evaluation.vbench.static_filter:_place", 1)
        ).code
        == -9
    )
    assert all(result.code == 0 for result in recipe_runner.run_ranks(SCRIPT, *again, world=2))
    assert files(tmp_path / "b").keys() == files(tmp_path / "a").keys()
    told = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert {n: v["seed"] for n, v in told["videos"].items()} == {
        n: v["seed"] for n, v in manifest["videos"].items()
    }
    result = recipe_runner.run(SCRIPT, *again[:-1])
    assert result.code == 2 and "suite." in result.err and "nothing is overwritten" in result.err


def test_refused_before_any_work(world: Path, tmp_path: Path) -> None:
    given = arguments(world, tmp_path / "out")
    (tmp_path / "bad.json").write_text(json.dumps([{"prompt_en": "../x", "dimension": ["scene"]}]))
    for more, words in (
        ([], "raft-things.pth"),
        ([f"raft={tmp_path}/none.pth"], "none.pth"),
        (["samples=6"], "samples is 6"),
        (["dimensions=[beauty]"], "'beauty' is none of VBench's"),
        (["sampling.prompts=[x]"], "sampling.prompts is set"),
        (["sampling.seed=3"], "sampling.seed is set"),
        (["sampling.history=flush"], "sampling.history is set"),
        (["sampling.strength=0.5"], "sampling.strength is set"),
        (["sampling.samples=5"], "sampling.samples is set"),
        (["sampling.decoder=tiny"], "sampling.decoder is set, but a tiny decoder is for previews"),
        ([f"extended={tmp_path}/bad.json"], "1 lines for 4 prompts"),
        ([f"full_info={tmp_path}/bad.json"], "cannot be a file's name"),
    ):
        result = recipe_runner.run(SCRIPT, *given, *more)
        assert result.code == 2 and words in result.err and "Traceback" not in result.err, (
            more,
            result.err,
        )
    assert not (tmp_path / "out").exists()
