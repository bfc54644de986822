"""`scd runs` on runs that the real recipes made."""

from __future__ import annotations

import json
import time
from pathlib import Path

import recipe_runner
from recipe_runner import At
from tiny_run import BACKWARD, SCRIPTS, STEPS2, Chain, metrics
from typer.testing import CliRunner

from scd_sf.cli import app
from scd_sf.tools.runs.state import find_runs, read_run


def scd(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["runs", *map(str, arguments)])
    return result.exit_code, result.output


def test_finished_killed_and_resumed(chain: Chain, tmp_path: Path) -> None:
    """The unbroken run's exported curve is a reference that a killed run falls short of, and meets
    once resumed."""
    assert find_runs(chain.root) == [chain.root / "stage2", chain.root / "stage3"]
    for stage, steps in (("stage2", [3, 6]), ("stage3", [2, 4])):  # validation videos are measured
        rows = [row for row in metrics(chain.root / stage) if "quick/motion" in row]
        assert [row["step"] for row in rows] == steps and all(
            {"quick/flicker", "quick/saturation"} < set(r) for r in rows
        )
    run, reference = tmp_path / "run", tmp_path / "reference.jsonl"
    assert scd("export", chain.root / "stage2", reference)[0] == 0
    assert [row["step"] for row in map(json.loads, reference.read_text().splitlines())] == list(
        range(1, STEPS2 + 1)
    )
    assert "time" not in reference.read_text()

    recipe_runner.run(SCRIPTS["stage2"], *chain.stage2(run), at=At(BACKWARD, 10))
    view = read_run(run, time.time())
    assert (view.state, view.stage, view.curve.last) == ("running", "stage2_flow_matching", 4)
    assert read_run(run, time.time() + 3600).state == "stale"
    recipe_runner.succeed(SCRIPTS["stage2"], *chain.stage2(run))
    view = read_run(run, time.time() + 3600)
    assert (view.state, view.curve.last, view.total, [s.intact for s in view.checkpoints]) == (
        "finished",
        STEPS2,
        STEPS2,
        [True, True],
    )

    code, out = scd("compare", reference, run, chain.root / "stage2", "--tolerance", "0")
    assert code == 0 and out.count("same bits, 6 steps") >= 6 and "val/loss" in out
    code, out = scd("show", chain.root / "stage3")
    assert (
        code == 0
        and "stage3_self_forcing" in out
        and str(chain.root / "stage2") in out
        and "critic/loss" in out
    )
