"""Totals: published rows, refusals, files of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recipe_runner

from scd_sf.evaluation.vbench.aggregate import aggregate, read_scores
from scd_sf.evaluation.vbench.prompts import dimensions, packaged
from scd_sf.types import UserError

SCRIPT = "vbench_eval/aggregate.py"


def full() -> dict[str, float]:
    rows = packaged("published.json")["rows"]
    assert isinstance(rows, list)
    return {name: value / 100 for name, value in rows[0]["percent"].items()}


def test_published_rows() -> None:
    """Five rows of all 16 dimensions within 0.015 points; 13 of totals alone obey (4 Q + S) / 5."""
    rows = packaged("published.json")["rows"]
    assert isinstance(rows, list)
    complete = [row for row in rows if row["percent"]]
    assert (len(complete), len(rows)) == (5, 18)
    for row in complete:
        found = aggregate({name: value / 100 for name, value in row["percent"].items()})
        for name in ("quality", "semantic", "total"):
            assert abs(getattr(found, name) - row[name]) < 0.015, (row["model"], name)
    for row in rows:
        assert abs((4 * row["quality"] + row["semantic"]) / 5 - row["total"]) < 0.011, row["model"]


def test_the_formula() -> None:
    """Normalised without clipping; dynamic degree counts half."""
    low = {d.name: d.min for d in dimensions()}
    zero = aggregate(low)
    assert (zero.quality, zero.semantic, zero.total) == (0, 0, 0)
    assert aggregate(low | {"dynamic_degree": 1.0}).quality == pytest.approx(100 * 0.5 / 6.5)
    assert aggregate(low | {"temporal_flickering": 1.0}).quality == pytest.approx(100 / 6.5)
    assert aggregate(low | {"scene": 1.0}).semantic == pytest.approx(100 / 0.8222 / 9)
    assert aggregate(low | {"scene": 1.0}).total == pytest.approx(100 / 0.8222 / 9 / 5)


def test_refusals(tmp_path: Path) -> None:
    for change, words in (
        ({"scene": None}, "1 of 16 dimensions missing (scene); score them"),
        ({"beauty": 0.5}, "'beauty' is none of VBench's dimensions"),
        (
            {"scene": 56.57},
            "scene is 56.57; it must be a fraction in 0..1: write 0.5657 for 56.57 percent",
        ),
        ({"scene": -0.1}, "scene is -0.1"),
        ({"scene": float("nan")}, "NaN is not a JSON number"),
        ({"scene": "0.5"}, "'scene' is '0.5', not a number"),
        ({"scene": True}, "'scene' is True, not a number"),
        ({"object class": 0.5}, "'object_class' is given twice"),
    ):
        scores = {name: value for name, value in (full() | change).items() if value is not None}
        (tmp_path / "s.json").write_text(json.dumps(scores))
        with pytest.raises(UserError) as caught:
            aggregate(read_scores(tmp_path / "s.json").fractions, str(tmp_path / "s.json"))
        assert words in str(caught.value) and "s.json" in str(caught.value)
    for text, words in (
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
        ("[" * 10**5, "not JSON"),
        ("{}", "not a JSON object"),
        ('{"scores": {}, "reduced": 3}', "reduced"),
    ):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(UserError, match=words):
            read_scores(tmp_path / "s.json")


def test_the_script(tmp_path: Path) -> None:
    """Names with blanks, VBench's own results with too few videos (labelled), several files."""
    (tmp_path / "plain.json").write_text(
        json.dumps({k.replace("_", " "): v for k, v in full().items()})
    )
    out = recipe_runner.succeed(SCRIPT, tmp_path / "plain.json").out
    assert out.splitlines()[-1].split() == ["Total", "82.24"] and "not comparable" not in out
    own = {
        name: [value, [{"video_path": "x", "video_results": value}] * 3]
        for name, value in full().items()
    }
    (tmp_path / "a_eval_results.json").write_text(
        json.dumps({k: v for k, v in own.items() if k != "scene"})
    )
    result = recipe_runner.run(SCRIPT, tmp_path / "a_eval_results.json")
    assert result.code == 2 and "(scene)" in result.err and not result.out
    (tmp_path / "b.json").write_text(json.dumps({"scene": full()["scene"]}))
    files = [tmp_path / "a_eval_results.json", tmp_path / "b.json"]
    assert "not comparable: " in recipe_runner.succeed(SCRIPT, *files).out
    found = json.loads(recipe_runner.succeed(SCRIPT, *files, "--json").out)
    assert (
        abs(found["total"] - 82.24) < 0.015 and "human_action: 3 of 500 videos" in found["reduced"]
    )
    assert "given" not in recipe_runner.run(SCRIPT, files[1], files[1]).out
    assert "scene is in another file too" in recipe_runner.run(SCRIPT, files[1], files[1]).err
