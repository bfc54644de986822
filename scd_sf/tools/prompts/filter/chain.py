"""The chain: parse, clean, NSFW, length, letters, language, exact duplicates, near-duplicates, sample.

Every decision about a row depends on that row and on rows before it (in the order of ``inputs``, then of the file), so
appending rows changes nothing that was decided; only a ``sample`` of fixed size may trade a row for a newer one.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scd_sf.data.prompt_files import SCORES
from scd_sf.tools.prompts.filter import clean
from scd_sf.tools.prompts.filter.language import HEAD, Heads, foreign
from scd_sf.tools.prompts.filter.near_dup import NearDupConfig, near_duplicates
from scd_sf.tools.prompts.filter.table import BadRows, explain, find_list, read_good
from scd_sf.tools.prompts.filter.workers import Workers
from scd_sf.types import UserError, say

if TYPE_CHECKING:
    import polars as pl

CHUNK = 10_000  # texts a worker gets at a time
NSFW_REPORTED = (0.05, 0.2, 0.5)
ALWAYS_ALLOWED = 10  # rows that cannot be read
VIDPROM_LICENCE = "CC BY-NC 4.0 (VidProM)"


@dataclass(frozen=True)
class FilterConfig:
    """Which prompts are kept."""

    inputs: tuple[str, ...]
    """Lists, or folders that this command or the extender made: .csv with VidProM's columns, .jsonl
    ({"prompt": .., "uuid", "time", scores optional}) or one prompt per line."""
    out: str
    """Folder of the kept prompts and the report."""
    nsfw: float = 0.05
    """A row is dropped if one of its six Detoxify scores is at least this."""
    min_words: int = 3
    """Least number of words."""
    max_words: int = 120
    """Largest number of words."""
    letters: float = 0.6
    """Least share of letters among the characters."""
    run: int = 6
    """Longest run of one character."""
    language: str = "en"
    """The language that is kept."""
    language_score: float = 0.5
    """Another language is refused from this score on."""
    bad_rows: float = 0.1
    """Rows that cannot be read are counted and left out, up to this share of all (or ten)."""
    near: NearDupConfig = field(default_factory=NearDupConfig)
    """Near-duplicates."""
    sample: int = 0
    """How many of the kept prompts to draw; 0: all."""
    seed: int = 0
    """Seed of that draw."""
    licence: str = ""
    """Licence of lists that are not VidProM's."""
    examples: int = 5
    """Examples of each step in the report."""
    workers: int = 0
    """Processes; 0: one per core. They change nothing but the time."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("inputs is empty; name at least one file")
        for name in ("nsfw", "letters", "language_score", "bad_rows"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        if not 0 <= self.min_words <= self.max_words or min(self.run, self.examples) < 1:
            raise ValueError("min_words must be from 0 to max_words, run and examples at least 1")
        if self.sample < 0 or self.workers < 0:
            raise ValueError("sample and workers must not be negative")


@dataclass(frozen=True)
class Step:
    """What one step did: rows before, rows after, its settings, more counts, some of the dropped rows."""

    name: str
    rows_in: int
    rows_out: int
    settings: dict[str, object]
    counts: dict[str, object]
    examples: list[dict[str, object]]


class Chain:
    """Rows on their way through the steps: ``table`` holds those still there, ``steps`` what happened, ``seconds`` how
    long each took. Columns: ``source`` (which input), ``row``, ``uuid``, ``text`` (cleaned), ``nsfw`` (largest score),
    ``fate``; what else the inputs hold is read again at the end (:meth:`rows`), to save memory."""

    def __init__(self, cfg: FilterConfig, workers: Workers) -> None:
        self.cfg, self.workers = cfg, workers
        self.steps: list[Step] = []
        self.seconds: dict[str, float] = {}
        with self._timed("parse and clean"):
            bad = BadRows()
            self.sources, self.table, changed = _read(cfg, bad)
        rows = len(self.table)
        counts: dict[str, object] = {"rows that cannot be read": bad.count, "first": bad.first} if bad.count else {}
        names = [Path(path).name for path in cfg.inputs]
        self.steps.append(Step("parse", rows + bad.count, rows, {"inputs": names}, counts, []))
        if bad.count:
            say(f"left out: {bad.count} rows that cannot be read; the first: {bad.first}")
        self.steps.append(Step("clean", rows, rows, {}, {"changed": changed}, []))

    def run(self) -> int:
        """All steps after reading; how many rows are left."""
        self._measured()
        with self._timed("language"):
            self._language()
        with self._timed("exact duplicates"):
            self._exact()
        with self._timed("near-duplicates"):
            self._near()
        with self._timed("sample"):
            self._sample()
        names = self.table["uuid"]
        if names.n_unique() != len(names):
            twice = names.filter(names.is_duplicated())[0]
            raise UserError(f"inputs: uuid {twice} names two different prompts; give every prompt its own")
        self.table = self.table.select("source", "row", "uuid", "text")
        return len(self.table)

    def rows(self) -> Iterator[pl.DataFrame]:
        """The rows that are left, in their order and by input: uuid, prompt (cleaned), original (null where cleaning
        changed nothing), time, scores (null where there are none)."""
        import polars as pl

        scores = pl.when(pl.col(SCORES[0]).is_not_null()).then(pl.struct(SCORES)).alias("scores")
        original = pl.when(pl.col("prompt") != pl.col("text")).then(pl.col("prompt")).alias("original")
        for number, source in enumerate(self.sources):
            left = self.table.filter(pl.col("source") == number).select("row", "uuid", "text")
            chosen = source.filter(pl.col("row").is_in(left["row"].implode())).drop("uuid").collect()
            if not chosen["row"].equals(left["row"]):
                raise UserError(f"inputs: {self.cfg.inputs[number]} changed while it was read; run again")
            both = left.hstack(chosen.drop("row"))
            yield both.select("uuid", pl.col("text").alias("prompt"), original, "time", scores)

    def _measured(self) -> None:
        """The steps whose outcome was computed with the cleaning: ``fate`` is the step that a row does not pass."""
        import polars as pl

        cfg, table = self.cfg, self.table
        scored = int(table["nsfw"].is_not_null().sum())
        counts: dict[str, object] = {f"at {t}": int((table["nsfw"] >= t).sum()) for t in NSFW_REPORTED}
        settings: dict[str, object] = {"threshold": cfg.nsfw, "rows with scores": scored}
        self._drop("nsfw", pl.col("fate") == 1, settings, counts if scored else {"not applied": "no scores"})
        self._drop("length", pl.col("fate") == 2, {"words": [cfg.min_words, cfg.max_words]}, {})
        self._drop("letters", pl.col("fate") == 3, {"share": cfg.letters, "longest run": cfg.run}, {})

    def _language(self) -> None:
        import polars as pl

        cfg = self.cfg
        heads = self.table["text"].str.slice(0, HEAD)
        parts = (heads.slice(first, CHUNK).to_list() for first in range(0, len(heads), CHUNK))
        tasks = (Heads(part, cfg.language, cfg.language_score) for part in parts)
        gone: dict[int, tuple[str, float]] = {}
        for number, found in enumerate(self.workers.map(foreign, tasks)):
            gone |= {number * CHUNK + index: (name, score) for index, name, score in found}
        names = Counter(name for name, _ in gone.values())
        more: dict[int, dict[str, object]] = {row: {"language": n, "score": s} for row, (n, s) in gone.items()}
        settings: dict[str, object] = {"language": cfg.language, "refused from score": cfg.language_score}
        mask = pl.Series(_mask(list(gone), len(heads)))
        self._drop("language", mask, settings, {"languages": dict(sorted(names.items(), key=_most))}, more)

    def _exact(self) -> None:
        import polars as pl

        keys = _in_parts(self.table.select("text"), lambda part: part.select(clean.key(pl.col("text")).alias("key")))
        self.table = self.table.hstack(keys)
        self._drop("exact duplicates", ~pl.col("key").is_first_distinct(), {"key": "lower case, words only"}, {})

    def _near(self) -> None:
        import polars as pl

        near = self.cfg.near
        keys = self.table["key"]
        lengths = keys.str.len_bytes().cast(pl.Int64).to_numpy()
        if len(keys) and lengths.min() < near.shingle:
            keys = keys.str.pad_end(near.shingle, "\0")
        found = near_duplicates(lambda rows: keys.gather(rows).str.join("\n")[0].encode(), lengths, near, self.workers)
        shown = sorted(found)[: self.cfg.examples]
        more: dict[int, dict[str, object]] = {row: {"repeats": self.table["text"][found[row]]} for row in shown}
        settings: dict[str, object] = {name: getattr(near, name) for name in ("jaccard", "shingle", "permutations")}
        mask = pl.Series(_mask(list(found), len(self.table)))
        self._drop("near-duplicates", mask, settings | {"bands": near.bands}, {}, more)

    def _sample(self) -> None:
        """The ``sample`` rows with the smallest hash of (seed, uuid), in their old order."""
        import polars as pl

        cfg = self.cfg
        if not cfg.sample:
            return
        order = sorted(range(len(self.table)), key=[rank(cfg.seed, name) for name in self.table["uuid"]].__getitem__)
        gone = pl.Series(_mask(order[cfg.sample :], len(self.table)))
        self._drop("sample", gone, {"size": cfg.sample, "seed": cfg.seed, "order": "blake2b(seed, uuid)"}, {})

    def _drop(
        self,
        name: str,
        gone: pl.Expr | pl.Series,
        settings: dict[str, object],
        counts: dict[str, object],
        more: dict[int, dict[str, object]] | None = None,
    ) -> None:
        """One step: count, keep examples (``more`` adds to them, by row), drop."""
        mask = self.table.select(gone.alias("gone"))["gone"]
        numbers = mask.arg_true()[: self.cfg.examples].to_list() if name != "sample" else []
        examples = []
        for number in numbers:
            row = self.table.row(number, named=True)
            what = {"nsfw": round(row["nsfw"], 4)} if name == "nsfw" else {"text": row["text"]}  # NSFW is not shown
            examples.append({"uuid": row["uuid"], **what, **(more or {}).get(number, {})})
        before, self.table = len(self.table), self.table.filter(~mask) if mask.any() else self.table
        self.steps.append(Step(name, before, len(self.table), settings, counts, examples))
        said = f"not applied ({counts['not applied']})" if "not applied" in counts else f"{before} -> {len(self.table)}"
        say(f"{name}: {said}")

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 2)


def rank(seed: int, name: str) -> bytes:
    """Where a row stands in the sample's order: the same in every file, on every machine."""
    return hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()


def _read(cfg: FilterConfig, bad: BadRows) -> tuple[list[pl.LazyFrame], pl.DataFrame, int]:
    """Where rows are read again; all rows with text, largest score and fate; how many cleaning changed.

    Rows that cannot be read are counted in ``bad``. UserError where they are too many."""
    import polars as pl

    sources, parts, changed = [], [], 0
    for number, path in enumerate(find_list(Path(path)) for path in cfg.inputs):
        source, rows = read_good(path, bad)
        part = _in_parts(rows, lambda table: _decided(table, cfg))
        if wrong := int(part["bad"].sum()):
            bad.add(str(explain(path, ValueError("a row without uuid or with a score that is not from 0 to 1"))))
            bad.count += wrong - 1
            part = part.filter(~pl.col("bad"))
        changed += int(part["changed"].sum())
        sources.append(source)
        parts.append(part.drop("bad", "changed").with_columns(pl.lit(number, pl.UInt32).alias("source")))
    table = pl.concat(parts)
    if bad.count > max(ALWAYS_ALLOWED, cfg.bad_rows * (len(table) + bad.count)) or (bad.count and not len(table)):
        raise UserError(f"{bad.count} of {len(table) + bad.count} rows cannot be read; the first: {bad.first}")
    if not len(table):
        raise UserError(f"inputs: {', '.join(cfg.inputs)}: no prompt in it")
    return sources, table, changed


def _in_parts(table: pl.DataFrame, work: Callable[[pl.LazyFrame], pl.LazyFrame]) -> pl.DataFrame:
    """``work`` on slices of rows: polars' threads share them (it does not cut a column of texts by itself), and what
    its steps copy on the way is small."""
    import polars as pl

    size = 20 * CHUNK
    slices = [work(table.slice(first, size).lazy()) for first in range(0, max(1, len(table)), size)]
    return pl.concat(pl.collect_all(slices))


def _decided(table: pl.LazyFrame, cfg: FilterConfig) -> pl.LazyFrame:
    import polars as pl

    given = [pl.col(name).is_not_null() for name in SCORES]
    wrong = [pl.col(name).is_not_null() & ~pl.col(name).is_between(0, 1) for name in SCORES]
    bad = pl.col("uuid").is_null() | pl.any_horizontal(wrong) | (pl.any_horizontal(given) & ~pl.all_horizontal(given))
    table = table.with_columns(
        bad.alias("bad"), pl.col("prompt").fill_null(""), pl.max_horizontal(SCORES).alias("nsfw")
    )
    table = table.with_columns(clean.cleaned(pl.col("prompt")).alias("text"))
    text, count = pl.col("text"), clean.words(pl.col("text"))
    fate = (
        pl.when(pl.col("nsfw") >= cfg.nsfw).then(1)
        .when(~count.is_between(cfg.min_words, cfg.max_words)).then(2)
        .when((clean.letter_share(text) < cfg.letters) | clean.long_run(text, cfg.run)).then(3)
        .otherwise(0)
    )  # fmt: skip
    changed = (text != pl.col("prompt")).alias("changed")
    return table.select("row", "uuid", "text", "nsfw", "bad", changed, fate.cast(pl.UInt8).alias("fate"))


def _mask(rows: list[int], length: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    mask = np.zeros(length, np.bool_)
    mask[rows] = True
    return mask


def _most(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]
