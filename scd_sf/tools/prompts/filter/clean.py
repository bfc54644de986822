"""Cleaning of prompts and their measures, as polars expressions.

Pika's bot takes flags inside a prompt (``-gs 16 -motion 2 -camera zoom in -ar 16:9 -fps 24 -seed 7
-neg blurry``); Discord adds mentions and emoji codes. Neither describes a video.
"""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

# Rust's regex syntax. A flag begins the text or follows a blank; people also type -- and the dashes
# of their phone.
_DASH = r"(?:^|\s)[-\u2010-\u2015\u2212]{1,2}\s?"
_VALUED = r"gs|guidance(?:[ _]scale)?|fps|seed|motion|ar|aspect(?:[ _]ratio)?"
_WAYS = r"zoom|pan|rotate|tilt|roll|in|out|up|down|left|right|cw|ccw|clockwise|(?:counter|anti)-?clockwise"
_NEGATIVE = rf"(?i){_DASH}neg(?:ative)?(?:[ _]prompt)?\b.*?((?:{_DASH}(?:{_VALUED}|camera)\b.*)?$)"
_FLAGS = rf"(?i){_DASH}(?:(?:{_VALUED})\s*[:=]?\s*\d[\d.:]*|camera\b(?:[\s,:=]+(?:{_WAYS})\b)*)"
_ADDRESS = r"(?i)<?\b(?:https?://|www\.)\S+"
_DISCORD = r"<(?:@[!&]?|#|a?:\w{2,32}:)\d+>|@(?:everyone|here)\b"
_INVISIBLE = r"[\p{Cf}\p{Co}\x{FFFD}]"
_BLANK = r"[[\s\p{Cc}]--[ ]]"  # but not the plain blank: patterns that seldom match are fast
_BLANKS = r" {2,}"
_NOT_WORD = r"[^\p{L}\p{M}\p{N} ]"


def cleaned(prompt: pl.Expr) -> pl.Expr:
    """The cleaned text: in NFKC, without control, zero-width and private characters, addresses,
    mentions, emoji codes and Pika flags, with single blanks. Cleaning it again changes nothing,
    unless removals bring a flag together."""
    import polars as pl

    # null elsewhere, where NFKC does nothing
    beyond_ascii = pl.when(prompt.str.contains(r"[^\x00-\x7F]")).then(prompt)
    text = pl.coalesce(beyond_ascii.str.normalize("NFKC").str.replace_all(_INVISIBLE, ""), prompt)
    text = text.str.replace_all(_BLANK, " ").str.replace_all(f"{_DISCORD}|{_ADDRESS}", " ")
    text = text.str.replace(_NEGATIVE, "$1").str.replace_all(_FLAGS, " ")
    return text.str.replace_all(_BLANKS, " ").str.strip_chars()


def words(text: pl.Expr) -> pl.Expr:
    """Number of words of a cleaned text, in which blanks are single."""
    import polars as pl

    return pl.when(text == "").then(0).otherwise(text.str.count_matches(" ", literal=True) + 1)


def letter_share(text: pl.Expr) -> pl.Expr:
    """Letters and their accents among the characters that are not blanks, 0..1; 0 for an empty
    text."""
    import polars as pl

    solid = text.str.len_chars().cast(pl.Float64) - text.str.count_matches(" ", literal=True)
    symbols = text.str.count_matches(r"[^\p{L}\p{M}\s]")
    return pl.when(solid > 0).then(1.0 - symbols / solid).otherwise(0.0)


def long_run(text: pl.Expr, longest: int) -> pl.Expr:
    """Whether some character stands more than ``longest`` times in a row."""
    import polars as pl

    ascii_run = "|".join(
        f"{re.escape(char)}{{{longest + 1},}}" for char in string.printable if not char.isspace()
    )
    any_run = re.compile(rf"(\S)\1{{{longest}}}")

    def beyond_ascii(column: pl.Series) -> pl.Series:
        """Rust's regexes cannot refer back to a group; few texts have other characters, so Python
        looks at those."""
        hits = [
            text is not None and not text.isascii() and any_run.search(text) is not None
            for text in column
        ]
        return pl.Series(column.name, hits, dtype=pl.Boolean)

    return text.str.contains(ascii_run) | text.map_batches(beyond_ascii, return_dtype=pl.Boolean)


def key(text: pl.Expr) -> pl.Expr:
    """Key of exact duplicates: the words of a prompt in lower case."""
    plain = text.str.to_lowercase().str.replace_all(_NOT_WORD, " ")
    return plain.str.replace_all(_BLANKS, " ").str.strip_chars()
