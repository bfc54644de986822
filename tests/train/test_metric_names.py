"""The table of metrics: its page, and names that vary."""

from __future__ import annotations

from pathlib import Path

from scd_sf.train.metric_names import MEANINGS, meaning, metrics_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "metrics.md"


def test_the_page_is_the_table() -> None:
    assert metrics_table() in PAGE.read_text(encoding="utf-8"), (
        "write it again from metrics_table()"
    )


def test_names_that_vary_and_unknown_ones() -> None:
    assert meaning("loss/t0.8-1.0") == MEANINGS["loss/t*"]
    assert meaning("alarm/static") == MEANINGS["alarm/*"]
    assert meaning("loss") == MEANINGS["loss"] != meaning("val/loss")
    for name in ("loss/", "losses", "xloss", ""):
        assert meaning(name) == ""
