"""What stages 2 and 3 say at their start and end; the commands that they end with run as printed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
from tiny_run import SCRIPTS, Chain
from typer.testing import CliRunner

from scd_sf.cli import app


def printed(out: str, name: str) -> list[str]:
    """The words of the command that a training printed under ``name``."""
    (line,) = [line for line in out.splitlines() if line.startswith(f"  {name} ")]
    return shlex.split(line)[1:]


def scd(words: list[str], *more: str) -> None:
    assert words[0] == "scd"
    result = CliRunner().invoke(app, [*words[1:], *more])
    assert result.exit_code == 0, result.output


def test_from_stage_2_to_a_video_by_the_printed_commands(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 2, then what it prints, stage 3, then what that prints; and a resumed run says so."""
    run = tmp_path / "tuned"
    arguments = chain.stage2(run)
    made = recipe_runner.succeed(SCRIPTS["stage2"], *arguments, "train.steps=2")
    tiny_run.check_words(made.out, run, "best" if "  best" in made.out else "last", "distil")
    assert f"scd student from {chain.stage1}/step_00000000 (ema)" in made.out
    assert "16 clips of 9 frames of 32x32" in made.out and "steps     2, new" in made.out
    assert "4 = 1 rank x micro-batch 2 x accumulation 2" in made.out
    resumed = recipe_runner.succeed(SCRIPTS["stage2"], *arguments, "train.steps=4")
    assert f"steps     4, from step 2 of {run}" in resumed.out
    assert "finished: 2 steps in 0:00:" in resumed.out

    python, script, *words = printed(resumed.out, "distil")
    assert (python, script) == ("python", SCRIPTS["stage3"])
    small = [word for word in chain.stage3(run) if word.split("=")[0].endswith(("engine", "train"))]
    small = [word.replace("validate_every: 2", "validate_every: 1") for word in small]
    distilled = recipe_runner.succeed(script, *words, *small, "train.steps=2", "critic_warmup=0")
    folder = Path(f"{run}-distilled")
    tiny_run.check_words(distilled.out, folder, "best", "critic", "teacher", "sample", "export")
    assert f"teacher {chain.wan}, critic {chain.wan}" in distilled.out
    assert "parameters, all frozen" in distilled.out
    monkeypatch.chdir(tmp_path)
    scd(printed(distilled.out, "export"))
    assert Path(f"{folder}.safetensors").is_file()
    scd(printed(distilled.out, "sample"), "text_cache=off")
    assert (tmp_path / "videos" / folder.name / "0000-00.mp4").is_file()
    scd(printed(resumed.out, "figures"))
