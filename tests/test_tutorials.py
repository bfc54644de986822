"""The tutorials and how-tos with an example: every command of their text, in order, at toy size.

A page's commands run in a folder that looks like the repository's root. A block with a title
(```text title="prompts.txt"```) is that file. :data:`TOY` makes numbers smaller; everything else is
the page's own.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import recipe_runner
import torch

from scd_sf.data.clips import write_video

ROOT = recipe_runner.ROOT
TREES = ("recipes", "data_prep", "assets", "vbench_eval", "benchmarks", "scd_sf")
TOY = {
    r"train\.steps=\d+": "train.steps=2",
    r"--train \d+": "--train 8",
    r"--test \d+": "--test 2",
    r"rounds=\d+": "rounds=1",
    r"clips: \d+": "clips: 2",
    r"sampler\.steps=\d+": "sampler.steps=2",
}
MOST_LINES = 6  # of a file that the page gives
BLOCK = re.compile(r"^```(?:(\w+) title=\"([\w./-]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def steps(page: str) -> list[tuple[str, str]]:
    """(file name, text) of titled blocks and ("", command) of every command, in their order."""
    found = []
    for _, title, text in BLOCK.findall((ROOT / page).read_text()):
        if title:
            found.append((title, text))
        else:
            lines = text.replace("\\\n", " ").splitlines()
            found += [("", line) for line in lines if line.strip() and line[0] != "#"]
    return found


def follow(page: str, folder: Path) -> None:
    """Do what the page says in ``folder``; AssertionError with the command that fails."""
    for tree in TREES:
        if not (folder / tree).exists():
            (folder / tree).symlink_to(ROOT / tree)
    for title, text in steps(page):
        if title:
            (folder / title).parent.mkdir(parents=True, exist_ok=True)
            (folder / title).write_text("".join(text.splitlines(keepends=True)[:MOST_LINES]))
            continue
        command = text
        for pattern, small in TOY.items():
            command = re.sub(pattern, small, command)
        program, *words = shlex.split(command, comments=True)
        assert program in ("python", "deepspeed", "scd"), f"{page}: {text}"
        script, arguments = ("scd", words) if program == "scd" else (words[0], words[1:])
        cache = {"XDG_CACHE_HOME": str(folder / "cache")}
        result = recipe_runner.run(script, *arguments, folder=folder, environ=cache)
        assert result.code == 0, f"{page}: {command}\n{result.out[-2000:]}\n{result.err[-4000:]}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_scratch(tmp_path: Path) -> None:
    follow("docs/tutorials/from_scratch.md", tmp_path)
    assert (tmp_path / "runs" / "scratch" / "score").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_own_videos_and_the_fusion(tmp_path: Path) -> None:
    """Twelve clips of three shapes and rates with captions, then the comparison on their latents."""
    for number in range(12):
        width, height = ((96, 64), (64, 112), (80, 80))[number % 3]
        frames = torch.rand(1, 3, height, width).repeat(60, 1, 1, 1)
        frames[:, :, :, :: 2 + number] = 0.5
        file = tmp_path / "videos" / f"My clip {number:02d}.mp4"
        file.parent.mkdir(exist_ok=True)
        write_video(file, (frames * 255).to(torch.uint8), fps=(24, 25, 30)[number % 3])
        file.with_suffix(".txt").write_text(f"stripes, number {number}")
    before = sorted((tmp_path / "videos").iterdir())
    follow("docs/tutorials/own_videos.md", tmp_path)
    assert sorted((tmp_path / "videos").iterdir()) == before
    assert (tmp_path / "runs" / "mine" / "videos.html").is_file()
    follow("docs/tutorials/fusion.md", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_prompts(tmp_path: Path) -> None:
    follow("docs/tutorials/prompts.md", tmp_path)
    assert (tmp_path / "runs" / "prompts" / "compare.html").is_file()
