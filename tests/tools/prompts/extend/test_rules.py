"""The gates, one answer each; seeds; what the model is asked."""

from __future__ import annotations

import pytest

from scd_sf.tools.prompts.extend.rules import SYSTEM, Answer, Gates, messages, refusal, seed_of

GOOD = (
    "A realistic wide shot of an old lighthouse keeper who climbs the narrow stairs of a white tower while the storm "
    "outside throws waves against the walls. He holds a brass lamp, breathes heavily and looks up to the light above "
    "him. The camera follows him slowly from below and turns with the stairs until the glass room opens."
)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (Answer(GOOD), ""),
        (Answer(f"  {GOOD}\n"), ""),
        (Answer(""), "empty"),
        (Answer(GOOD, cut=True), "cut"),
        (Answer(f"{GOOD}\n{GOOD}"), "lines"),
        (Answer(f"{GOOD}\u2028{GOOD}"), "lines"),
        (Answer(f"{GOOD}\x07"), "characters"),
        (Answer(f"Sure! {GOOD}"), "chatter"),
        (Answer(f"Here is the description: {GOOD}"), "chatter"),
        (Answer(f"**Extended prompt:** {GOOD}"), "chatter"),
        (Answer(f"I'm sorry, but {GOOD}"), "chatter"),
        (Answer(" ".join(GOOD.split()[:39])), "short"),
        (Answer(" ".join((GOOD * 3).split()[:161])), "long"),
        (Answer("una mujer caminando por la calle bajo la lluvia " * 6), "language"),
        (Answer(f"Heresy and sure footing. {GOOD}"), ""),
    ],
)
def test_gates(answer: Answer, wanted: str) -> None:
    assert refusal(answer, Gates()) == wanted


def test_limits_and_seeds() -> None:
    words = GOOD.split()
    assert refusal(Answer(" ".join(words[:40])), Gates()) == ""
    assert refusal(Answer(" ".join((words * 3)[:160])), Gates()) == ""
    seeds = {
        seed_of(seed, name, attempt)
        for seed in (0, 1)
        for name in ("a", "b")
        for attempt in range(3)
    }
    assert (
        len(seeds) == 12
        and all(0 <= seed < 2**31 for seed in seeds)
        and seed_of(0, "a", 1) == seed_of(0, "a", 1)
    )
    assert [message["role"] for message in messages("a cat")] == ["system", "user"]
    assert messages("a cat")[1]["content"] == "a cat" and all(
        f"{n}. " in SYSTEM for n in range(1, 8)
    )
    with pytest.raises(ValueError, match="min_words"):
        Gates(min_words=9, max_words=3)
