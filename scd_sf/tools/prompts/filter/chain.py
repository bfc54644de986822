"""The chain: parse, clean, NSFW, length, letters, language, exact duplicates, near-duplicates,
sample.

Every decision about a row depends on that row and on rows before it (in the order of ``inputs``,
then of the file), so appending rows changes nothing that was decided; only a ``sample`` of fixed
size may trade a row for a newer one.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scd_sf.data.prompt_files import SCORES
from scd_sf.files import place_digest
from scd_sf.tools.prompts.filter import clean
from scd_sf.tools.prompts.filter.language import HEAD, other_language
from scd_sf.tools.prompts.filter.near_dup import NearDupConfig, near_duplicates
from scd_sf.tools.prompts.filter.table import BadRows, read_list
from scd_sf.types import UserError, say

if TYPE_CHECKING:
    import polars as pl

CHUNK = 10_000  # texts a process gets at a time
NSFW_REPORTED = (0.05, 0.2, 0.5)
ALWAYS_ALLOWED = 10  # rows that cannot be read
VIDPROM_LICENCE = "CC BY-NC 4.0 (VidProM)"
Refusals = list[tuple[int, str, float]]  # index, language, score
More = Mapping[int, Mapping[str, object]]  # row -> what its example says besides


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
class FilterStep:
    """Result of one step: rows before, rows after, its settings, more counts, some of the dropped
    rows."""

    name: str
    rows_in: int
    rows_out: int
    settings: Mapping[str, object]
    counts: Mapping[str, object]
    examples: list[dict[str, object]]


class Chain:
    """``table``: the remaining rows. ``steps``: results of the steps so far. ``seconds``: by step.

    Columns: uuid, prompt (cleaned), original (null where cleaning changed nothing), time, the six
    scores, nsfw (the largest of them)."""

    def __init__(self, cfg: FilterConfig) -> None:
        self.cfg = cfg
        self.steps: list[FilterStep] = []
        self.seconds: dict[str, float] = {}

    def run(self) -> pl.DataFrame:
        """The rows that pass. UserError: too many rows cannot be read, one uuid for two prompts."""
        steps = {
            "parse and clean": self._parse_and_clean,
            "nsfw, length, letters": self._measure,
            "language": self._language,
            "exact duplicates": self._exact_duplicates,
            "near-duplicates": self._near_duplicates,
            "sample": self._sample,
        }
        for name, step in steps.items():
            with self._time_step(name):
                step()
        names = self.table["uuid"]
        if names.n_unique() != len(names):
            twice = names.filter(names.is_duplicated())[0]
            raise UserError(
                f"inputs: uuid {twice} names two different prompts; give every prompt its own"
            )
        return self.table

    def _parse_and_clean(self) -> None:
        import polars as pl

        cfg, bad = self.cfg, BadRows()
        text, raw = clean.cleaned(pl.col("prompt")), pl.col("prompt")
        tables = (
            read_list(Path(path), bad).lazy().with_columns(text.alias("text"))
            for path in cfg.inputs
        )
        original = pl.when(raw != pl.col("text")).then(raw).alias("original")
        columns = ("uuid", pl.col("text").alias("prompt"), original, "time", *SCORES)
        nsfw = pl.max_horizontal(SCORES).alias("nsfw")
        self.table = pl.concat(
            [table.select(*columns, nsfw).collect(engine="streaming") for table in tables]
        )
        rows = len(self.table)
        if bad.count > max(ALWAYS_ALLOWED, cfg.bad_rows * (rows + bad.count)) or (
            bad.count and not rows
        ):
            raise UserError(
                f"{bad.count} of {rows + bad.count} rows cannot be read; the first: {bad.first_problem}"
            )
        if not rows:
            raise UserError(f"inputs: {', '.join(cfg.inputs)}: no prompt in it")
        counts = (
            {"rows that cannot be read": bad.count, "first": bad.first_problem} if bad.count else {}
        )
        names = [Path(path).name for path in cfg.inputs]
        self.steps.append(
            FilterStep("parse", rows + bad.count, rows, {"inputs": names}, counts, [])
        )
        if bad.count:
            say(f"left out: {bad.count} rows that cannot be read; the first: {bad.first_problem}")
        changed_count = rows - self.table["original"].null_count()
        self.steps.append(FilterStep("clean", rows, rows, {}, {"changed": changed_count}, []))

    def _measure(self) -> None:
        import polars as pl

        cfg, text, scores = self.cfg, pl.col("prompt"), self.table["nsfw"]
        scored_count = len(scores) - scores.null_count()
        counts = {f"at {limit}": int((scores >= limit).sum()) for limit in NSFW_REPORTED}
        settings = {"threshold": cfg.nsfw, "rows with scores": scored_count}
        is_nsfw = (pl.col("nsfw") >= cfg.nsfw).fill_null(False)
        self._drop(
            "nsfw", is_nsfw, settings, counts if scored_count else {"not applied": "no scores"}
        )
        has_length = clean.words(text).is_between(cfg.min_words, cfg.max_words)
        self._drop("length", ~has_length, {"words": [cfg.min_words, cfg.max_words]})
        few_letters = (clean.letter_share(text) < cfg.letters) | clean.long_run(text, cfg.run)
        self._drop("letters", few_letters, {"share": cfg.letters, "longest run": cfg.run})

    def _language(self) -> None:
        import polars as pl

        cfg = self.cfg
        heads = self.table["prompt"].str.slice(0, HEAD)
        parts = (heads.slice(start, CHUNK).to_list() for start in range(0, len(heads), CHUNK))
        foreign_rows: dict[int, dict[str, object]] = {}
        work = partial(other_language, language=cfg.language, limit=cfg.language_score)
        with processes(work, parts, cfg.workers) as answers:
            for number, answer in enumerate(answers):
                for index, name, score in answer:
                    foreign_rows[number * CHUNK + index] = {"language": name, "score": score}
        names = Counter(str(entry["language"]) for entry in foreign_rows.values())
        counts = dict(sorted(names.items(), key=lambda item: (-item[1], item[0])))
        mask = np.zeros(len(heads), np.bool_)
        mask[list(foreign_rows)] = True
        settings = {"language": cfg.language, "refused from score": cfg.language_score}
        self._drop(
            "language", pl.lit(pl.Series(mask)), settings, {"languages": counts}, foreign_rows
        )

    def _exact_duplicates(self) -> None:
        import polars as pl

        keys = self.table.lazy().with_columns(clean.key(pl.col("prompt")).alias("key"))
        self.table = keys.collect(engine="streaming")
        self._drop(
            "exact duplicates",
            ~pl.col("key").is_first_distinct(),
            {"key": "lower case, words only"},
        )

    def _near_duplicates(self) -> None:
        import polars as pl

        near, texts = self.cfg.near, self.table["prompt"]
        flags, repeats = near_duplicates(self.table["key"], near, self.cfg.examples)
        self.table = self.table.drop("key")
        settings = {
            name: getattr(near, name) for name in ("jaccard", "shingle", "permutations", "bands")
        }
        more = {row: {"repeats": texts[earlier]} for row, earlier in repeats.items()}
        self._drop("near-duplicates", pl.lit(pl.Series(flags)), settings, more=more)

    def _sample(self) -> None:
        """The ``sample`` rows with the smallest hash of (seed, uuid), in their old order."""
        import polars as pl

        cfg = self.cfg
        if not cfg.sample:
            return
        ranks = pl.Series([rank(cfg.seed, name) for name in self.table["uuid"]], dtype=pl.Binary)
        mask = np.ones(len(ranks), np.bool_)
        mask[ranks.arg_sort()[: cfg.sample].to_numpy()] = False
        self._drop(
            "sample",
            pl.lit(pl.Series(mask)),
            {"size": cfg.sample, "seed": cfg.seed, "order": "blake2b(seed, uuid)"},
        )

    def _drop(
        self,
        name: str,
        condition: pl.Expr,
        settings: Mapping[str, object],
        counts: Mapping[str, object] | None = None,
        more: More | None = None,
    ) -> None:
        """One step: drop the rows of ``condition`` and keep examples of them, each with its entry
        in ``more``."""
        table, counts = self.table, counts or {}
        mask = table.lazy().select(condition.alias("gone")).collect(engine="streaming")["gone"]
        examples: list[dict[str, object]] = []
        for number in mask.arg_true()[: self.cfg.examples if name != "sample" else 0].to_list():
            row = table.row(number, named=True)
            # NSFW is not shown
            detail = {"nsfw": round(row["nsfw"], 4)} if name == "nsfw" else {"text": row["prompt"]}
            examples.append({"uuid": row["uuid"], **detail, **(more or {}).get(number, {})})
        self.table = table.filter(~mask)
        self.steps.append(FilterStep(name, len(table), len(self.table), settings, counts, examples))
        change = f"{len(table)} -> {len(self.table)}"
        say(
            f"{name}: not applied ({counts['not applied']})"
            if "not applied" in counts
            else f"{name}: {change}"
        )

    @contextmanager
    def _time_step(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 2)


@contextmanager
def processes(
    work: Callable[[list[str]], Refusals], parts: Iterable[list[str]], count: int
) -> Iterator[Iterator[Refusals]]:
    """``work`` of every part, in order, from ``count`` processes (0: one per core that this process
    may use).

    Language identification holds the interpreter's lock, so threads do not help. Processes come
    from a fork server: a fork of this one could copy a lock that one of polars' threads holds."""
    number = count or len(os.sched_getaffinity(0))
    if number == 1:
        yield map(work, parts)
        return
    with multiprocessing.get_context("forkserver").Pool(number) as pool:
        yield pool.imap(work, parts)


def rank(seed: int, name: str) -> bytes:
    """Sort key of a row in the sample's order, the same in every file and on every machine."""
    return place_digest(seed, name)
