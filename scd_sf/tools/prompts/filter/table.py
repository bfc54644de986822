"""Prompt lists as polars tables: VidProM's csv files, jsonl and txt. Rows that cannot be read are
counted and left out.

Columns of every table: ``row`` (from 1 within its file), ``uuid``, ``prompt``, ``time`` ('' where
unknown) and Detoxify's six ``SCORES`` (null where the list has none).
"""

from __future__ import annotations

import csv
import stat
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from scd_sf.data.prompt_files import (
    JSONL,
    LINE_BYTES,
    NOT_LISTS,
    SCORES,
    csv_fields,
    csv_lines,
    list_in,
)
from scd_sf.files import parse_json, refuse_lfs_pointer
from scd_sf.types import UserError, printable

if TYPE_CHECKING:
    import polars as pl

# of ids made here: uuid5(NAMESPACE, prompt)
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "scd_sf.tools.prompts.filter")
TEXTS = ("uuid", "prompt", "time")
ROWS = 50_000  # that are Python objects at a time
Row = tuple[object, ...]  # row, TEXTS, SCORES


@dataclass
class BadRows:
    """Rows that were left out: how many, and what is wrong with the first of them."""

    count: int = 0
    first_problem: str = ""

    def add(self, problem: str, count: int = 1) -> None:
        self.count += count
        self.first_problem = self.first_problem or problem


def find_list(path: Path) -> Path:
    """A list on disk: a regular file, or the list in the folder of a filter's or an extender's
    result.

    UserError: anything else, before it is read."""
    file, _ = list_in(path)
    if file.suffix.lower() in NOT_LISTS:
        raise UserError(
            f"inputs: {file}: {file.suffix} is not read; convert it to .csv, .jsonl or .txt"
        )
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
    except (OSError, ValueError) as error:
        raise UserError(f"inputs: {file}: cannot be read ({error}); check the path") from error
    if not regular:
        raise UserError(
            f"inputs: {file}: cannot be read (not a regular file); copy the list into one"
        )
    refuse_lfs_pointer(file)
    return file


def read_list(path: Path, bad: BadRows) -> pl.DataFrame:
    """The rows of one file, by its ending (.csv, .jsonl, .ndjson, else one prompt per line). What
    cannot be read is counted in ``bad``.

    UserError: unreadable, a csv column missing, quotes that do not match, a line that is too
    long."""
    import polars as pl

    path = find_list(path)
    if path.suffix.lower() == ".csv":
        names = _header(path)
        try:
            table = _read_csv(path, names)
        except pl.exceptions.PolarsError:  # some row is damaged: Python's reader says which
            table = _table_of(_csv_rows(path, names, bad))
    else:
        table = _table_of(
            _jsonl_rows(path, bad) if path.suffix.lower() in JSONL else _text_rows(path, bad)
        )
    return _without_bad(table, path, bad)


def _without_bad(table: pl.DataFrame, path: Path, bad: BadRows) -> pl.DataFrame:
    """The rows with a uuid and, in a list that has scores, six of them from 0 to 1."""
    import polars as pl

    faults = {"uuid": pl.col("uuid").fill_null("") == ""}
    if any(table[name].null_count() < len(table) for name in SCORES):
        faults |= {name: ~pl.col(name).is_between(0, 1).fill_null(False) for name in SCORES}
    fault_table = table.select(test.alias(name) for name, test in faults.items())
    mask = fault_table.select(pl.any_horizontal(*faults)).to_series()
    if mask.any():
        index = int(mask.arg_true()[0])
        name = next(name for name in faults if fault_table[name][index])
        place = f"{path}: row {table['row'][index]}: '{name}' is {table[name][index]!r}"
        bad.add(
            f"{place}, not a {'name' if name == 'uuid' else 'number from 0 to 1'}", int(mask.sum())
        )
    return table.filter(~mask).with_columns(pl.col("prompt", "time").fill_null(""))


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        try:
            names = csv_fields(next(csv.reader(csv_lines(file)), []))
        except csv.Error as error:
            raise UserError(
                f"{path}: line 1: the header cannot be read ({error}); is it a csv file?"
            ) from error
    if duplicates := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(
            f"{path}: line 1: column '{printable(duplicates[0])[:80]}' is there twice; rename one"
        )
    needed_columns = ("uuid", "prompt", *(SCORES if any(name in names for name in SCORES) else ()))
    if missing_columns := [name for name in needed_columns if name not in names]:
        has = printable(", ".join(names))[:200]
        raise UserError(
            f"{path}: no column '{missing_columns[0]}' in its header ({has}); VidProM's are uuid, prompt, time, "
            f"{', '.join(SCORES)}"
        )
    return names


def _read_csv(path: Path, names: list[str]) -> pl.DataFrame:
    """The rows of a csv file, read by polars. PolarsError for a row of another width, a score that
    is no number, or bad UTF-8."""
    import polars as pl

    kinds = {name: pl.Float64() if name in SCORES else pl.String() for name in names}
    table = pl.read_csv(path, schema=kinds, row_index_name="row", row_index_offset=1)
    empty = [
        pl.lit(None, kind).alias(name)
        for name, kind in _schema().items()
        if name not in table.columns
    ]
    return table.with_columns(empty).select(*_schema())


def _csv_rows(path: Path, names: list[str], bad: BadRows) -> Iterator[Row]:
    """The rows of a csv file, read by Python's reader. UserError where quotes do not match, because
    the next row cannot be found then."""
    with (
        _long_fields(),
        path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file,
    ):
        reader = csv.reader(csv_lines(file), strict=True)
        next(reader)
        for number in range(1, sys.maxsize):
            place = f"{path}: row {number} (line {reader.line_num + 1})"
            try:
                record = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"{place}: quotes do not match ({error}); correct or remove it"
                ) from error
            if record is None:
                return
            fields = csv_fields(record)
            row = dict(zip(names, fields, strict=False))
            if len(fields) != len(names):
                bad.add(f"{place}: {len(fields)} columns instead of {len(names)}")
            elif not "".join(fields).isprintable() and _has_surrogates("".join(fields)):
                bad.add(f"{place}: not UTF-8; convert the file")
            elif bad_columns := [
                name for name in SCORES if name in row and not _is_number(row[name])
            ]:
                bad.add(
                    f"{place}: '{bad_columns[0]}' is {printable(row[bad_columns[0]])[:40]!r}, not a number from 0 to 1"
                )
            else:
                scores = [float(row[name]) if name in row else None for name in SCORES]
                yield number, *(row.get(name, "") for name in TEXTS), *scores


@contextmanager
def _long_fields() -> Iterator[None]:
    """csv's limit of a field is the whole process's; other readers keep theirs."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _has_surrogates(text: str) -> bool:
    """Whether a text has surrogates, as which bytes that are not UTF-8 are read."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _lines(path: Path, bad: BadRows) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that hold something. Only a line feed ends a line: U+2028 may
    stand in a prompt."""
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), 1):
            place = f"{path}: line {number}"
            if len(raw) > LINE_BYTES:
                raise UserError(
                    f"{place}: more than {LINE_BYTES:,} bytes; is it a list of prompts?"
                )
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                bad.add(f"{place}: not UTF-8 ({error.reason}); convert the file")
                continue
            if text:
                yield number, text


def _text_rows(path: Path, bad: BadRows) -> Iterator[Row]:
    for row, (_, line) in enumerate(_lines(path, bad), 1):
        yield row, _name(line), line, "", *[None] * len(SCORES)


def _jsonl_rows(path: Path, bad: BadRows) -> Iterator[Row]:
    for number, line in _lines(path, bad):
        place = f"{path}: line {number}"
        try:
            value = parse_json(line, place, "correct it")
        except UserError as error:
            bad.add(str(error))
            continue
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            bad.add(f'{place}: not {{"prompt": "..."}}; correct it')
            continue
        prompt, inner = value["prompt"], value.get("scores")
        texts = (value.get("uuid") or _name(prompt), prompt, value.get("time") or "")
        scores = [(inner if isinstance(inner, dict) else value).get(name) for name in SCORES]
        if not all(isinstance(text, str) for text in texts):
            bad.add(f"{place}: 'uuid' is {texts[0]!r} and 'time' {texts[2]!r}; both are texts")
        elif bad_columns := [
            name for name, score in zip(SCORES, scores, strict=True) if not _is_score(score)
        ]:
            bad.add(f"{place}: '{bad_columns[0]}' is no number from 0 to 1")
        else:
            yield number, *texts, *scores


def _is_score(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _name(prompt: str) -> str:
    return str(uuid.uuid5(NAMESPACE, prompt))


def _schema() -> dict[str, pl.DataType]:
    import polars as pl

    texts = dict.fromkeys(TEXTS, pl.String())
    return {"row": pl.UInt32(), **texts, **dict.fromkeys(SCORES, pl.Float64())}


def _table_of(rows: Iterator[Row]) -> pl.DataFrame:
    import polars as pl

    parts = (
        pl.DataFrame(part, _schema(), orient="row")
        for part in iter(lambda: list(islice(rows, ROWS)), [])
    )
    return pl.concat([pl.DataFrame(schema=_schema()), *parts])
