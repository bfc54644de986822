"""Scoring around a stand-in for VBench: weights, packages, missing videos, resuming, what VBench
leaves out.

The stand-in is a Python whose ``vbench`` scores a file by its size; VBench's own runs are in
docs/results/metrics.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_runner
from recipe_runner import At

from scd_sf.evaluation.vbench import environment
from scd_sf.evaluation.vbench.environment import build, examine
from scd_sf.evaluation.vbench.prompts import chosen_dimensions, load_entries, video_name
from scd_sf.evaluation.vbench.weights import DETECTRON2, link_dino, needed, require_weights, weights
from scd_sf.files import LFS_POINTER
from scd_sf.types import UserError

SCRIPT = "vbench_eval/score.py"
COMPUTE = """
import json, os
def compute_{0}(info, device, submodules):
    rows = [r for r in json.load(open(info)) if "{0}" in r["dimension"]]
    files = [f for r in rows for f in r["video_list"]]
    open(os.environ["VBENCH_CACHE_DIR"] + "/calls", "a").write("{0}\\n")
    read = [f for f in files if os.path.getsize(f)]
    score = sum(map(os.path.getsize, read)) / len(read) / 100
    return score, [dict(video_path=f, video_results=os.path.getsize(f) / 100) for f in read]
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("environment")
    package = root / "site" / "vbench"
    package.mkdir(parents=True)
    rows = [{"prompt_en": e.prompt, "dimension": list(e.dimensions)} for e in load_entries()]
    (package / "VBench_full_info.json").write_text(json.dumps(rows))
    (package / "__init__.py").touch()
    (package / "utils.py").write_text(
        "def init_submodules(names, local):\n    return dict.fromkeys(names, [])\n"
    )
    (package / "distributed.py").write_text(
        "def get_rank():\n    return 0\n\ndef dist_init():\n    pass\n"
    )
    # quick to import
    (root / "site" / "torch.py").write_text("def device(name):\n    return name\n")
    for name in ("temporal_flickering", "scene", "background_consistency"):
        (package / f"{name}.py").write_text(COMPUTE.format(name))
    for name, version in (("vbench", "0.1.5"), ("numpy", "1.26.4")):
        folder = root / "site" / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    (root / "python").write_text(
        f'#!/bin/sh\nshift\nPYTHONPATH="{root}/site" exec "{sys.executable}" "$@"\n'
    )
    (root / "python").chmod(0o755)
    return root / "python"


def videos(folder: Path, dimension: str, size: int = 50) -> list[Path]:
    folder.mkdir(exist_ok=True)
    prompts = [entry.prompt for entry in load_entries() if dimension in entry.dimensions]
    files = [folder / video_name(prompt, 0) for prompt in prompts]
    for file in files:
        file.write_bytes(b"x" * size)
    return files


def refused(*given: object) -> tuple[str, str]:
    result = recipe_runner.run(SCRIPT, *given)
    assert result.code == 2 and "Traceback" not in result.err, result.err
    return result.err.splitlines()[-1], result.out


@pytest.mark.slow
def test_dimensions_one_after_another(python: Path, tmp_path: Path) -> None:
    """Killed after the first, the second goes on; changed videos are scored again; the summary is
    what totals read."""
    files, cache = videos(tmp_path / "v", "temporal_flickering"), tmp_path / "cache"
    for weight in needed(["background_consistency"]):
        (cache / weight.path).parent.mkdir(parents=True, exist_ok=True)
        (cache / weight.path).touch()
    (tmp_path / "v" / "a stray file.txt").touch()
    videos(tmp_path / "v", "background_consistency", 80)
    names = "dimensions=[temporal flickering, background_consistency]"
    given = [
        f"videos={tmp_path}/v",
        f"python={python}",
        f"cache={cache}",
        "gpus=0",
        "samples=1",
        "unfiltered=true",
        names,
    ]
    assert recipe_runner.run(SCRIPT, *given, at=At("subprocess:run", 3)).code == -9
    out = recipe_runner.succeed(SCRIPT, *given).out
    assert (
        "[1/2 background_consistency] finished before" in out
        and "temporal_flickering      0.500000" in out
    )
    assert (cache / "calls").read_text().split() == [
        "background_consistency",
        "temporal_flickering",
    ]
    summary = json.loads((tmp_path / "v" / "scores" / "summary.json").read_text())
    assert summary["scores"] == {"background_consistency": 0.8, "temporal_flickering": 0.5}
    assert len(summary["reduced"]) == 2 and summary["environment"]["vbench"] == "0.1.5"
    own = json.loads((tmp_path / "v" / "scores" / "vbench_eval_results.json").read_text())
    assert own["temporal_flickering"][0] == 0.5 and len(own["temporal_flickering"][1]) == 75
    result = recipe_runner.run(
        "vbench_eval/aggregate.py", tmp_path / "v" / "scores" / "summary.json"
    )
    assert result.code == 2 and "14 of 16 dimensions missing" in result.err
    files[0].write_bytes(b"x" * 60)
    assert "temporal_flickering] 0.501" in recipe_runner.succeed(SCRIPT, *given).out
    videos(tmp_path / "v", "background_consistency", 70)
    out = recipe_runner.succeed(SCRIPT, *given[:-1], "dimensions=[temporal_flickering]").out
    assert (
        "background_consistency: left out of the summary" in out
        and "background_consistency   " not in out
    )
    files[3].write_bytes(b"")
    assert f"could not read 1 videos, such as {files[3]}" in refused(*given)[0]
    files[3].write_bytes(b"x" * 50_000)
    assert "temporal_flickering is 7" in refused(*given)[0]  # no fraction
    files[3].unlink()
    assert (
        f"1 videos of temporal_flickering are missing, such as '{files[3].name}'"
        in refused(*given)[0]
    )


def test_refused_before_any_work(python: Path, tmp_path: Path) -> None:
    videos(tmp_path / "v", "scene")
    given = [
        f"videos={tmp_path}/v",
        "dimensions=[scene]",
        "samples=1",
        f"cache={tmp_path}/cache",
        "gpus=0",
    ]
    error, out = refused(*given, f"python={python}")
    assert "4 files of VBench's networks are missing" in error and "download=true" in error
    for weight in needed(["scene"]):
        assert f"{tmp_path}/cache/{weight.path}, from {weight.url}" in out
    for weight in needed(["scene"]):
        (tmp_path / "cache" / weight.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / weight.path).write_bytes(
            LFS_POINTER + b".github.com/spec/v1\noid sha256:0\nsize 1\n"
        )
    with pytest.raises(UserError, match=r"cache/.*: a Git LFS pointer.*run `git lfs pull`"):
        require_weights(["scene"], tmp_path / "cache")
    assert "has no vbench" in refused(*given, f"python={sys.executable}", "download=true")[0]
    assert "cannot be run" in refused(*given, f"python={tmp_path}/none", "download=true")[0]
    assert "samples is 9" in refused(*given[:2], "samples=9")[0]
    videos(tmp_path / "v", "color")
    more = [given[0], "dimensions=[color]", *given[2:], f"python={python}", "download=true"]
    assert "no detectron2, which color need" in refused(*more)[0]
    (tmp_path / "v" / "manifest.json").write_text('{"settings": {"decoder": "/tiny"}}')
    assert "made with decoder /tiny, which is for previews" in refused(*more)[0]
    assert not (tmp_path / "v" / "scores").exists()


def test_an_environment_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept for the same pins; built again, from nothing, for other pins and after a failure."""
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, int("broken" in command))

    monkeypatch.setattr(subprocess, "run", run)
    folder = tmp_path / "env"
    assert build(folder) == build(folder) == folder / "bin" / "python" and len(commands) == 2
    assert commands[0][1:] == ["-m", "venv", str(folder)] and set(environment.PINS) < set(
        commands[1]
    )
    (folder / "mark").touch()
    with pytest.raises(UserError, match=r"'-m pip .*' ended with code 1, .*python=/path/to/env"):
        build(folder, torch="broken")
    assert not (folder / "mark").exists()
    build(folder, detectron2="git+x")
    assert len(commands) == 7 and commands[-1][-2:] == ["--no-build-isolation", "git+x"]


def test_environment_and_weights(python: Path, tmp_path: Path) -> None:
    found = examine(python)
    assert (found.versions["vbench"], found.detectron2) == (
        "0.1.5",
        False,
    ) and found.folder.endswith("/vbench")
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="holds other files"):
        build(tmp_path)
    mine = tmp_path / "venv"
    mine.mkdir()
    (mine / "pyvenv.cfg").touch()  # somebody's environment is not ours to clear
    with pytest.raises(UserError, match="holds other files"):
        build(mine)
    assert (mine / "pyvenv.cfg").is_file()
    of_weights = {name for weight in weights() for name in weight.dimensions}
    assert {*of_weights, "temporal_flickering"} == set(chosen_dimensions([])) > set(DETECTRON2)
    assert len({weight.path for weight in weights()}) == len(weights()) == 16
    dino = tmp_path / "dino_model" / "dino_vitbase16_pretrain.pth"
    dino.parent.mkdir()
    dino.write_text("weights")
    link_dino(tmp_path)
    link_dino(tmp_path)
    assert (tmp_path / "torch_home" / "hub" / "checkpoints" / dino.name).read_text() == "weights"
