"""``scd plan`` of runs that were made: their own configuration, models and checkpoints."""

from __future__ import annotations

import json

import pytest
from tiny_run import Chain
from typer.testing import CliRunner

from scd_sf.cli import app


def test_a_real_run_is_planned_from_its_own_configuration(chain: Chain) -> None:
    """Model, clips, teacher and critic are read where they are; the checkpoint's size is what lies
    on the disk."""
    for stage in ("stage2", "stage3"):
        config = chain.root / stage / "config.yaml"
        out = CliRunner().invoke(
            app, ["plan", str(config), "--gpus-per-node", "1", "--json"], catch_exceptions=False
        )
        assert out.exit_code == 0, out.output
        found = json.loads(out.stdout)
        assert "counting a step on the meta device" in out.stderr
        assert found["assumed"] == [] and found["fits"] and found["world"] == 1
        newest = max((chain.root / stage / "checkpoints").glob("step_*"))
        size = sum(file.stat().st_size for file in newest.rglob("*.safetensors"))
        # headers weigh much at this size
        assert found["checkpoint"] == pytest.approx(size, rel=0.35)
    assert list(found["phases"]) == ["critic update", "student update"]
    assert set(found["phases"]["student update"]["parts"]) == {
        "rollout",
        "critic",
        "teacher",
        "student's backward",
    }
    shown = CliRunner().invoke(
        app, ["plan", str(config), "--gpus-per-node", "1", "--gpu-mem", "0.5"]
    )
    assert shown.exit_code == 1 and "DOES NOT FIT" in shown.output and "to change:" in shown.output
