"""Sampling by the real script: files, seeds, resuming, the checkpoint's own sampler and size, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recipe_runner
from recipe_runner import KillAt
from tiny_run import Chain

from scd_sf.data.clips import read_video
from scd_sf.data.manifest import sha256_file

SCRIPT = "recipes/sample.py"
PROMPTS = ["left in meadow", "still in hall"]


def arguments(chain: Chain, out: Path, stage: str = "stage3") -> list[str]:
    return [f"checkpoint={chain.root}/{stage}", f"out={out}", f"prompts={json.dumps(PROMPTS)}", "samples=2", "batch=3"]


def manifest(out: Path) -> dict[str, dict[str, dict[str, object]]]:
    content: dict[str, dict[str, dict[str, object]]] = json.loads((out / "manifest.json").read_text())
    return content


@pytest.fixture(scope="module")
def made(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "samples"
    result = recipe_runner.succeed(SCRIPT, *arguments(chain, out))
    assert "3/4 videos" in result.out and "left 0:00" in result.out
    return out


def test_files_and_manifest(made: Path) -> None:
    names = ["0000-00.mp4", "0000-01.mp4", "0001-00.mp4", "0001-01.mp4"]
    assert sorted(file.name for file in made.iterdir()) == [*names, "manifest.json"]
    content = manifest(made)
    assert list(content["videos"]) == names
    for name, entry in content["videos"].items():
        assert read_video(made / name).shape == (9, 3, 32, 32)
        assert entry["sha256"] == sha256_file(made / name)
        assert entry["prompt"] == PROMPTS[int(name[:4])]
    assert len({entry["seed"] for entry in content["videos"].values()}) == 4
    assert len({entry["sha256"] for entry in content["videos"].values()}) == 4
    assert content["settings"]["sampler"] == {"name": "renoise", "steps": 4, "shift": 5.0}


def test_a_second_run_makes_only_what_is_missing(chain: Chain, made: Path) -> None:
    before = manifest(made)
    times = {file.name: file.stat().st_mtime_ns for file in made.glob("*.mp4")}
    (made / "0001-00.mp4").write_bytes(b"damaged")
    result = recipe_runner.succeed(SCRIPT, *arguments(chain, made))
    assert "3 finished before" in result.out
    assert manifest(made) == before
    changed = [name for name, time in times.items() if (made / name).stat().st_mtime_ns != time]
    assert changed == ["0001-00.mp4"]


def test_seeds_do_not_depend_on_batch_or_on_the_other_videos(chain: Chain, made: Path, tmp_path: Path) -> None:
    """A run for one sample per prompt, killed before its second video and resumed, makes the same files."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    few = [f"checkpoint={chain.root}/stage3", f"out={tmp_path}/out", f"prompt_file={tmp_path}/prompts.txt", "batch=1"]
    killed = recipe_runner.run(SCRIPT, *few, kill=KillAt("scd_sf.models.vae:Vae.decode", 2))
    assert killed.code == -9 and len(manifest(tmp_path / "out")["videos"]) == 1
    recipe_runner.succeed(SCRIPT, *few)
    ours, theirs = manifest(tmp_path / "out")["videos"], manifest(made)["videos"]
    assert list(ours) == ["0000-00.mp4", "0001-00.mp4"]
    for name, entry in ours.items():
        assert entry["seed"] == theirs[name]["seed"]
        left, right = read_video(tmp_path / "out" / name).float(), read_video(made / name).float()
        assert (left - right).abs().mean() < 1.0  # batches round differently, then the video is compressed


def refused(*given: object) -> str:
    result = recipe_runner.run(SCRIPT, *given)
    assert result.code == 2, result.err
    line = result.err.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in result.err
    return line


def test_other_sampler_of_a_distilled_checkpoint(chain: Chain, tmp_path: Path) -> None:
    other = [*arguments(chain, tmp_path / "out"), "sampler={name: euler, steps: 3}"]
    assert "distilled for sampler" in refused(*other) and not (tmp_path / "out").exists()
    recipe_runner.succeed(SCRIPT, *other, "force=true", "samples=1")
    assert manifest(tmp_path / "out")["settings"]["sampler"]["name"] == "euler"


def test_other_sampler_and_size_of_a_checkpoint_that_is_not_distilled(chain: Chain, tmp_path: Path) -> None:
    given = [*arguments(chain, tmp_path / "out", "stage2"), "sampler={name: renoise, steps: 2}", "frames=5"]
    recipe_runner.succeed(SCRIPT, *given, "samples=1")
    assert read_video(tmp_path / "out" / "0000-00.mp4").shape == (5, 3, 32, 32)


def test_nothing_is_overwritten(chain: Chain, made: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in made.iterdir()}
    assert "seed is 0 there but 1 now" in refused(*arguments(chain, made), "seed=1")
    other = [argument for argument in arguments(chain, made) if not argument.startswith("prompts=")]
    assert "made for prompt 'left in meadow'" in refused(*other, 'prompts=["right in hall"]')
    (tmp_path / "mine.txt").write_text("mine")
    assert "no manifest.json" in refused(*arguments(chain, tmp_path))
    assert {file: file.read_bytes() for file in made.iterdir()} == before


def test_bad_input(chain: Chain, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stage1 = arguments(chain, out, "stage1")
    assert "set frames=, height=, width=" in refused(*stage1)
    assert "use 9" in refused(*arguments(chain, out), "frames=10")
    assert "neither config.json nor vae/config.json" in refused(*arguments(chain, out), f"base={tmp_path}")
    assert "either prompts or prompt_file" in refused(*arguments(chain, out), "prompt_file=x")
    assert not out.exists()
