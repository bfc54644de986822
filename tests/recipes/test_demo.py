"""What the demo says of its results: every goal, the line for people, and a machine that was too
busy to tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recipe_runner

from scd_sf.evaluation.table import Adherence, ResultRow, read_rows, write_rows
from scd_sf.files import typed
from scd_sf.types import UserError

demo: Any = recipe_runner.load_script("recipes/demo.py")


def row(
    name: str, family: str, stage: str, steps: int, distance: float, right: float = 1.0
) -> ResultRow:
    return ResultRow(
        name,
        family,
        stage,
        steps,
        "euler",
        distance,
        1.0,
        Adherence(right, right),
        28.0,
        0.001,
        0.001,
    )


ROWS = [
    row("teacher", "bidirectional", "teacher", 50, 50.0),
    row("causal 50", "causal", "2", 50, 60.0),
    row("causal 4", "causal", "2", 4, 300.0),
    row("scd 50", "scd", "2", 50, 60.0),
    row("scd 4", "scd", "2", 4, 300.0),
    row("scd 4 renoise", "scd", "2", 4, 200.0),
    row("distilled", "scd", "3", 4, 100.0, 0.85),
]
ROUNDS = {
    "causal 50": [9.0, 5.0, 5.2],
    "scd 50": [2.5, 2.0, 8.0],
    "causal 4": [0.4] * 3,
    "scd 4": [0.25, 0.2, 0.3],
}


def test_goals_of_a_quiet_machine() -> None:
    """The speeds are ratios of medians over the rounds, not of the rows' least."""
    found = demo.goals(ROWS, demo.Timing([], ROUNDS))
    assert [(goal.measured, goal.met) for goal in found.values()] == [
        ("50.0 %", True),
        ("1.000", True),
        ("15.0", False),
        ("15.0", False),
        ("1.60x", False),
        ("2.08x", True),
    ]
    lines = [goal.line(name) for name, goal in found.items()]
    assert (
        lines[0]
        == "met     distance below the better undistilled 4-step sampler: 50.0 % (goal >= 15 %)"
    )
    assert lines[4] == "MISSED  SCD faster than causal per frame, 4 steps: 1.60x (goal >= 1.7x)"
    better = demo.goals(
        [*ROWS[:-1], row("distilled", "scd", "3", 4, 180.0)], demo.Timing([], ROUNDS)
    )
    assert [goal.met for goal in better.values()][:4] == [False, True, True, True]


def test_a_busy_machine_gets_no_verdict_on_speed_and_keeps_the_others() -> None:
    sign = "other processes used 1.9 of 2 cores"
    for timing, why in (
        (demo.Timing([sign, "and more"], ROUNDS), f"{sign}; and more"),
        (demo.Timing([], {**ROUNDS, "scd 4": [], "scd 50": []}), "no rounds of scd 4"),
        (
            typed({"date": "2026-11-28"}, demo.Timing, "results.json", ""),
            "timed in one pass, by an older version",
        ),
    ):
        found = list(demo.goals(ROWS, timing).values())
        assert [goal.met for goal in found] == [True, True, False, False, None, None]
        assert {goal.measured for goal in found[4:]} == {"not measured: machine busy"} and found[
            4
        ].note == why
        line = found[4].line("SCD faster")
        assert (
            line == f"not measured: machine busy  SCD faster: {why} (goal >= 1.7x)"
            and "MISSED" not in line
        )


def test_rows_that_are_missing_or_not_scored_are_named() -> None:
    for rows in (ROWS[:-1], [*ROWS[:-1], replace(ROWS[-1], adherence=None)]):
        with pytest.raises(UserError, match="no scored row of scd, stage 3, 4 steps"):
            demo.goals(rows, demo.Timing([], ROUNDS))


def test_what_the_demo_writes_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From an evaluation's files alone (no log is needed): the table, a line per goal,
    results.json, the gallery."""
    run, busy = tmp_path / "run", "other processes used 1.9 of 2 cores"
    (run / "results").mkdir(parents=True)
    (run / ".done").mkdir()
    (run / "results" / "gallery.html").write_text("<html>")
    monkeypatch.setattr(demo, "run_steps", lambda run, groups: {"clips": 1.0})
    monkeypatch.setattr("sys.argv", ["demo.py", "--run", str(run)])
    for signs, verdict in (([], "MISSED  SCD"), ([busy], "not measured: machine busy  SCD")):
        context = {"date": "today", "machine_busy": signs, "seconds_per_frame_by_round": ROUNDS}
        write_rows(run / "results" / "results.json", ROWS, context)
        demo.main()
        said = capsys.readouterr().out
        assert "distilled" in said and verdict in said and f"open       {run}/gallery.html" in said
        assert f"live       scd serve {run}/stage3-scd --fps 35" in said
        assert (f"remove {run}/results/results.json" in said.replace("\n", " ")) == bool(signs)
        rows, about = read_rows(run / "results.json")
        assert (
            rows == ROWS
            and about["step_seconds"] == {"clips": 1.0}
            and about["machine_busy"] == signs
        )
        goals: Any = about["goals"]
        assert goals["SCD faster than causal per frame, 4 steps"]["met"] is (
            None if signs else False
        )
    assert (run / "gallery.html").read_text() == "<html>"


def test_the_table_on_a_narrow_terminal_is_lines_and_nothing_is_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = demo.result_table(ROWS, "Held-out prompts")
    demo.print_table(table)
    wide = capsys.readouterr().out
    assert "\u2502" in wide and max(map(len, wide.splitlines())) <= 140
    demo.print_table(table, width=60)
    narrow = capsys.readouterr().out
    assert "\u2502" not in narrow and "\u2026" not in narrow
    assert max(map(len, narrow.splitlines())) <= 60
    words = " ".join(narrow.split())
    for row in ROWS:
        assert f"{row.name}: " in words and f"{row.video_frechet:.1f}" in words
