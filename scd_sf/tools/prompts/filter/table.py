"""Prompt lists as lazy tables: VidProM's csv files, jsonl and txt. A bad row is an error that says where it is, or
(:func:`read_good`) counted and left out.

Columns of every table: ``row`` (u32, from 1 within its file), ``uuid``, ``prompt``, ``time`` ('' where unknown) and
Detoxify's six ``SCORES`` (null where the list has none).
"""

from __future__ import annotations

import csv
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from scd_sf.data.prompt_files import JSONL, LINE_BYTES, NOT_LISTS, SCORES, list_in
from scd_sf.files import is_lfs_pointer, parse_json
from scd_sf.types import UserError, printable

if TYPE_CHECKING:
    import polars as pl

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "scd_sf.tools.prompts.filter")  # of ids made here: uuid5(NAMESPACE, prompt)
SEEN_IN_A_MESSAGE = 40  # characters of a bad value


@dataclass
class BadRows:
    """Rows that were left out: how many, and what is wrong with the first of them."""

    count: int = 0
    first: str = ""

    def add(self, problem: str) -> None:
        self.count += 1
        self.first = self.first or problem


def find_list(path: Path) -> Path:
    """A list on disk: a regular file, or the list in the folder of a filter's or an extender's result.

    UserError: anything else, before it is read."""
    file, _ = list_in(path)
    if file.suffix.lower() in NOT_LISTS:
        raise UserError(f"inputs: {file}: {file.suffix} is not read; convert it to .csv, .jsonl or .txt")
    try:
        if not file.is_file() and file.exists():
            raise UserError(f"inputs: {file}: cannot be read (not a regular file); copy the list into one")
        with file.open("rb"):
            pass
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"inputs: {file}: cannot be read ({reason}); check the path") from error
    if is_lfs_pointer(file):
        raise UserError(f"inputs: {file}: a Git LFS pointer, not the list itself; run 'git lfs pull'")
    return file


def scan(path: Path, bad: BadRows | None = None) -> pl.LazyFrame:
    """The rows of one file, by its ending (.csv, .jsonl, .ndjson, else one prompt per line).

    UserError here: unreadable, a column missing; a bad row of a jsonl or text file, or with ``bad`` it is counted there
    and left out. Bad rows of a csv file show when the table is computed: see :func:`explain`.
    """
    path = find_list(path)
    if path.suffix.lower() == ".csv":
        return _scan_csv(path)
    return _from_rows(_jsonl_rows(path, bad) if path.suffix.lower() in JSONL else _text_rows(path, bad))


def read_good(path: Path, bad: BadRows) -> tuple[pl.LazyFrame, pl.DataFrame]:
    """The rows of one file that can be read, to be read again, and now. What cannot be is counted in ``bad``."""
    source = scan(path, bad)
    if path.suffix.lower() != ".csv":
        return source, source.collect()
    try:
        return source, collect(path, source)
    except UserError:
        source = _from_rows(_good_csv_rows(path, bad))
        return source, source.collect()


def collect(path: Path, table: pl.LazyFrame) -> pl.DataFrame:
    """Compute a table that was made from ``path``. Every column is parsed, also those that are not asked for: polars
    would not notice rows that are too long else. UserError for a row that cannot be read."""
    import polars as pl

    try:
        return table.collect(optimizations=pl.QueryOptFlags(projection_pushdown=False))
    except pl.exceptions.PolarsError as error:
        raise explain(path, error) from error


def explain(path: Path, error: Exception) -> UserError:
    """What is wrong with a file that polars could not read or in which it found an impossible value: the first bad row,
    found with Python's csv reader. Rows count from 1 after the header, lines as an editor counts them."""
    if path.suffix.lower() == ".csv":
        for row, line, _, problem in _csv_rows(path):
            if problem:
                return UserError(f"{path}: row {row} (line {line}): {problem}; correct or remove it")
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{path}: cannot be read ({first}); check the file")


# ----------------------------------------------------------------------------------------------------------------- csv


def _scan_csv(path: Path) -> pl.LazyFrame:
    import polars as pl

    names = _header(path)
    has_scores = any(name in names for name in SCORES)
    needed = ("uuid", "prompt", *(SCORES if has_scores else ()))
    if lacking := [name for name in needed if name not in names]:
        has = printable(", ".join(names))[:200]
        raise UserError(
            f"{path}: no column '{lacking[0]}' in its header ({has}); VidProM's are uuid, prompt, time, "
            f"{', '.join(SCORES)}"
        )
    kinds = {name: pl.Float64() if name in SCORES else pl.String() for name in names}
    table = pl.scan_csv(path, schema=kinds, row_index_name="row", row_index_offset=1)
    added = [pl.lit("").alias("time")] if "time" not in names else []
    added += [] if has_scores else [pl.lit(None, pl.Float64).alias(name) for name in SCORES]
    return table.with_columns(pl.col("row").cast(pl.UInt32), *added).select("row", "uuid", "prompt", "time", *SCORES)


def _header(path: Path) -> list[str]:
    with _opened(path) as file:
        try:
            names = next(csv.reader(file), [])
        except csv.Error as error:
            raise UserError(f"{path}: line 1: the header cannot be read ({error}); is it a csv file?") from error
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path}: line 1: column '{printable(twice[0])[:80]}' is there twice; rename one")
    return names


def _good_csv_rows(path: Path, bad: BadRows) -> Iterator[dict[str, object]]:
    """The rows that can be right. UserError where quotes do not match: nothing tells where the next row begins."""
    for number, line, row, problem in _csv_rows(path):
        if problem:
            where = f"{path}: row {number} (line {line}): {problem}"
            if not row:
                raise UserError(f"{where}; correct or remove it")
            bad.add(where)
            continue
        scores = {name: float(row[name]) if name in row else None for name in SCORES}
        yield {"uuid": row["uuid"], "prompt": row["prompt"], "time": row.get("time", ""), **scores}


def _csv_rows(path: Path) -> Iterator[tuple[int, int, dict[str, str], str]]:
    """(number, first line, columns, what is wrong or '') of every row; without columns where the rest is lost."""
    csv.field_size_limit(sys.maxsize)
    with _opened(path) as file:
        seen: list[str] = []
        reader = csv.reader(_kept(file, seen), strict=True)
        names = next(reader)
        number = 0
        while True:
            number, line = number + 1, reader.line_num + 1
            seen.clear()
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield number, line, {}, f"quotes do not match ({error})"
                return
            if fields is None:
                return
            row = dict(zip(names, fields, strict=False)) or {"": ""}
            yield number, line, row, _problem(names, fields, "".join(seen))


def _opened(path: Path) -> TextIO:
    """Bytes that are not UTF-8 come out as lone surrogates, so that they do not end the search for their row."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _kept(lines: Iterator[str], seen: list[str]) -> Iterator[str]:
    for line in lines:
        seen.append(line)
        yield line


def _problem(names: list[str], fields: list[str], raw: str) -> str:
    if len(fields) != len(names):
        return f"{len(fields)} columns instead of {len(names)}"
    row = dict(zip(names, fields, strict=True))
    for name in SCORES:
        if name in row and not _is_score(row[name]):
            return f"'{name}' is {row[name][:SEEN_IN_A_MESSAGE]!r}, not a number from 0 to 1"
    if not row["uuid"]:
        return "'uuid' is empty"
    for name, value in row.items():
        if any("\ud800" <= char <= "\udfff" for char in value):
            return f"'{name}' is not UTF-8; convert the file"
        quoted = value.replace('"', '""')
        if '"' in value and f'"{quoted}"' not in raw:
            return f"'{name}' has a quote but does not begin with one ({value[:SEEN_IN_A_MESSAGE]!r})"
    return ""


def _is_score(text: str) -> bool:
    try:
        return 0.0 <= float(text) <= 1.0
    except ValueError:
        return False


# -------------------------------------------------------------------------------------------------------- jsonl and txt


def _from_rows(rows: Iterator[dict[str, object]]) -> pl.LazyFrame:
    import polars as pl

    kinds: dict[str, type[pl.DataType]] = {"uuid": pl.String, "prompt": pl.String, "time": pl.String}
    kinds |= dict.fromkeys(SCORES, pl.Float64)
    parts, part = [pl.DataFrame(schema=kinds)], []
    for row in rows:
        part.append(row)
        if len(part) == 50_000:
            parts.append(pl.DataFrame(part, schema=kinds))
            part = []
    parts.append(pl.DataFrame(part, schema=kinds))
    return pl.concat(parts).with_row_index("row", offset=1).with_columns(pl.col("row").cast(pl.UInt32)).lazy()


def _lines(path: Path, bad: BadRows | None) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines that hold something. Only a line feed ends a line: U+2028 may stand in a prompt."""
    number = 0
    with path.open("rb") as file:
        while raw := file.readline(LINE_BYTES + 1):
            number += 1
            if len(raw) > LINE_BYTES:
                raise UserError(f"{path}: line {number}: more than {LINE_BYTES:,} bytes; is it a list of prompts?")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                _leave_out(UserError(f"{path}: line {number}: not UTF-8 ({error.reason}); convert the file"), bad)
                continue
            if line:
                yield number, line


def _leave_out(problem: UserError, bad: BadRows | None) -> None:
    """Count a row that cannot be read, or end with its problem."""
    if bad is None:
        raise problem
    bad.add(str(problem))


def _text_rows(path: Path, bad: BadRows | None) -> Iterator[dict[str, object]]:
    for _, line in _lines(path, bad):
        yield {"uuid": str(uuid.uuid5(NAMESPACE, line)), "prompt": line, "time": ""}


def _jsonl_rows(path: Path, bad: BadRows | None) -> Iterator[dict[str, object]]:
    scored: bool | None = None
    for number, line in _lines(path, bad):
        where = f"{path}: line {number}"
        try:
            value = parse_json(line, where, "correct it")
            if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
                raise UserError(f'{where}: not {{"prompt": "..."}}; correct it')
            row = _jsonl_row(value, where)
        except UserError as problem:
            _leave_out(problem, bad)
            continue
        has = row[SCORES[0]] is not None
        if scored is not None and has != scored:
            raise UserError(f"{where}: some lines have scores and some have not; give all or none")
        scored = has
        yield row


def _jsonl_row(value: Mapping[str, object], where: str) -> dict[str, object]:
    prompt, when = str(value["prompt"]), value.get("time") or ""
    name = value.get("uuid") or str(uuid.uuid5(NAMESPACE, prompt.encode("utf-8", "replace").decode()))
    if not isinstance(name, str) or not isinstance(when, str):
        raise UserError(f"{where}: 'uuid' is {name!r} and 'time' {when!r}; both are texts")
    inner = value.get("scores")
    scores = inner if isinstance(inner, dict) else value
    row: dict[str, object] = {"uuid": name, "prompt": prompt, "time": when}
    given = {name: scores.get(name) for name in SCORES}
    if any(score is not None for score in given.values()):
        for name, score in given.items():
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
                raise UserError(f"{where}: '{name}' is {score!r}, not a number from 0 to 1")
    return row | {name: None if score is None else float(str(score)) for name, score in given.items()}
