"""Cleaning, its measures and the key: one table of texts; cleaning is done once."""

from __future__ import annotations

import polars as pl
import pytest

from scd_sf.tools.prompts.filter import clean

CLEANED = {
    "a cat -gs 16 -motion 2 -camera zoom in": "a cat",
    "a cat --ar 16:9 -fps 24 -seed 77 on a mat": "a cat on a mat",
    "a cat —motion 2 –gs: 12": "a cat",
    "-neg low-res, bad hands -ar 16:9": "",
    "a dog -neg blurry, low quality -motion 1": "a dog",
    "a dog -camera pan left, zoom out, cw runs": "a dog runs",
    "low-motion 2 video - motion blur, 16:9": "low-motion 2 video - motion blur, 16:9",
    "a well-seeded field, close-up -Motion 3": "a well-seeded field, close-up",
    "<https://a.example/b.png?c=1> a fox www.example.org": "a fox",
    "<@!1234> <:wow:99> hello <#77> @everyone there": "hello there",
    "a\u200bb\r\n\r\nc\x00d\u2028e\u00a0 f": "ab c d e f",
    "\uff26\uff55\uff4c\uff4c width \ufb01sh\u2026": "Full width fish...",
    "  ": "",
}
RUNS = {
    "wow!!!!!!": False,
    "wow!!!!!!!": True,
    "aaaaaaa": True,
    "ееееееее": True,
    "е" * 6: False,
    "a  a": False,
}


def computed(texts: list[str], expression: pl.Expr) -> list[object]:
    return pl.DataFrame({"text": texts}).lazy().select(expression).collect().to_series().to_list()


def test_cleaned() -> None:
    once = computed(list(CLEANED), clean.cleaned(pl.col("text")))
    assert dict(zip(CLEANED, once, strict=True)) == CLEANED
    assert computed([str(text) for text in once], clean.cleaned(pl.col("text"))) == once


def test_measures() -> None:
    text = pl.col("text")
    assert computed(["", "one", "one two  ".strip()], clean.words(text)) == [0, 1, 2]
    shares = computed(["", "ab 1!", "été", "123"], clean.letter_share(text))
    assert shares == pytest.approx([0.0, 0.5, 1.0, 0.0])
    assert computed(list(RUNS), clean.long_run(text, 6)) == list(RUNS.values())
    assert computed(["ab", "aab"], clean.long_run(text, 1)) == [False, True]


def test_key() -> None:
    keys = computed(
        ["A cat, 'running'!", "a CAT -- running", "Été; naïve", "…"], clean.key(pl.col("text"))
    )
    assert keys == ["a cat running", "a cat running", "été naïve", ""]
