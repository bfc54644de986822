"""Prompts to sample from: lines of a text file, a column of a csv file, or jsonl with one object per video.

A jsonl line may say more, ``{"prompt": "...", "start": "image.png", "then": [[41, "another"]]}``: frames that are
there already, and other prompts from a pixel frame on. ``seed`` is its noise's. A csv file may have columns ``start``,
``uuid`` and ``seed``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scd_sf.types import UserError

SEED_DIGITS = len(str(2**63))


@dataclass(frozen=True)
class PromptRow:
    """What one video shows: a prompt, ``then`` others from pixel frames on, ``start``: an image or video file.

    ``uuid``: the prompt's name in its collection (VidProM), where the file gives one. ``seed``: of its (first) video,
    0 <= seed < 2**63; None: the command's own choice."""

    prompt: str
    then: tuple[tuple[int, str], ...] = ()
    start: str = ""
    uuid: str = ""
    seed: int | None = None


def read_prompt_file(path: Path, column: str = "prompt") -> list[PromptRow]:
    """The rows of a .txt, .csv or .jsonl file; paths in ``start`` are relative to it. UserError names file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file {path}: cannot be read ({error}); check the path") from error
    if path.suffix == ".csv":
        rows = _csv_rows(path, text, column)
    elif path.suffix in (".jsonl", ".ndjson"):
        rows = _jsonl_rows(path, text, column)
    else:
        rows = [PromptRow(line.strip()) for line in text.splitlines() if line.strip()]
    if not rows:
        raise UserError(f"prompt_file {path}: no prompt in it; write one per line")
    return rows


def _csv_rows(path: Path, text: str, column: str) -> list[PromptRow]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    rows = []
    try:
        if column not in (reader.fieldnames or ()):
            known = ", ".join(reader.fieldnames or ()) or "none"
            raise UserError(f"prompt_file {path}: no column '{column}' (it has {known}); set prompt_column")
        for row in reader:
            rows.append(_row(path, reader.line_num, row, column))
    except csv.Error as error:
        raise UserError(f"prompt_file {path}: line {reader.line_num}: {error}; correct it") from error
    return rows


def _jsonl_rows(path: Path, text: str, column: str) -> list[PromptRow]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold U+2028 and its like, as they are
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(f"prompt_file {path}: line {number} is not JSON ({error}); correct it") from error
            if not isinstance(value, dict):
                raise UserError(f'prompt_file {path}: line {number} is not an object; write {{"{column}": ...}}')
            rows.append(_row(path, number, value, column))
    return rows


def _row(path: Path, number: int, row: Mapping[str, object], column: str) -> PromptRow:
    where = f"prompt_file {path}: line {number}"
    prompt, start, then = row.get(column), row.get("start") or "", row.get("then") or []
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: '{column}' is {prompt!r}, not a prompt; correct it")
    if not isinstance(start, str):
        raise UserError(f"{where}: 'start' is {start!r}; it must be the path of an image or video")
    changes: list[tuple[int, str]] = []
    for change in then if isinstance(then, list) else [then]:
        frame, text = change if isinstance(change, list) and len(change) == 2 else (None, None)
        if type(frame) is not int or frame < 1 or not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: 'then' has {change!r}; it must be [pixel frame >= 1, prompt]")
        changes.append((frame, text.strip()))
    uuid = row.get("uuid") or ""
    if not isinstance(uuid, str):
        raise UserError(f"{where}: 'uuid' is {uuid!r}; it must be a text")
    file = str(path.parent / start) if start else ""
    return PromptRow(prompt.strip(), tuple(sorted(changes)), file, uuid, _seed(row.get("seed"), where))


def _seed(value: object, where: str) -> int | None:
    """A row's seed (csv files give text); None where it has none."""
    if value is None or value == "":
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= SEED_DIGITS:
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**63:
        raise UserError(f"{where}: 'seed' is {str(value)[:40]!r}; it must be a whole number from 0 to 2**63 - 1")
    return value
