"""Wan 14B's real layers are partitioned while they are built: nobody ever holds the teacher (two
layers of forty)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scd_sf.nn.layers import WanBlock

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_one_of_eight_holds_an_eighth(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [
        sys.executable,
        "benchmarks/teacher_14b.py",
        "--layers",
        "2",
        "--world",
        "8",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    with torch.device("meta"):
        layer = sum(p.numel() for p in WanBlock(5120, 13824, 40, True, 1e-6).parameters())
    assert found["parameters"] == 14_288_491_584 - 38 * layer
    assert found["whole_gib"] / 8 <= found["held_gib"] < 1.01 * found["whole_gib"] / 8
    assert found["peak_rss_gib"] - found["rss_before_gib"] < found["whole_gib"], (
        "the whole was never there"
    )
