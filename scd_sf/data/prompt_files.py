"""Lists of prompts: lines of a text file, a column of a csv file, jsonl with one object per row; or
the output folder of ``filter_vidprom.py`` or ``extend_prompts.py``. Rows are read one at a time, so
that a list may be of any length.

A jsonl row may say more, ``{"prompt": "...", "start": "image.png", "then": [[41, "another"]],
"seed": 7}``: frames that are there already, other prompts from a pixel frame on, the seed of its
noise; or, instead of ``start``, ``"video": "clip.mp4"``, a video that is made anew. What the
toolkit's own lists and VidProM say beside the prompt (``OTHERS``) is passed over; any other key is
refused. A csv file may have columns ``start``, ``uuid`` and ``seed``, and any others, as csv files
do (``video`` among them, the clips of many), but for names that mean a command's setting
(``SETTINGS``). Only ``\\n`` and ``\\r\\n`` end a line.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

from scd_sf.files import JSON_BYTES, Json, is_lfs_pointer, parse_json, read_json
from scd_sf.types import UserError, printable

LINE_BYTES = 2**20  # longest line
SEED_DIGITS = len(str(2**63))
# for Python's reader of csv a carriage return always ends a line; no file's text has this character
RETURN = "\ud800"
SHOWN = 40  # characters of a bad value, columns of a file
LIST, REPORT = "prompts.jsonl", "report.json"  # in the folder of a filter's or an extender's result
JSONL = (".jsonl", ".ndjson")
NOT_LISTS = (
    ".json",
    ".tsv",
    ".parquet",
    ".xlsx",
    ".yaml",
    ".yml",
    ".gz",
    ".zst",
    ".xz",
    ".zip",
    ".safetensors",
)
COLUMNS = ("prompt", "start", "then", "seed", "uuid")  # of a csv file, honoured
KEYS = (*COLUMNS, "video")  # of a jsonl row
# VidProM's, by Detoxify
SCORES = ("toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")
OTHERS = {"id", "held_out", "tags", "original", "time", "scores", "extended", "refused", *SCORES}
SETTINGS = {
    "negative",
    "negative_prompt",
    "frames",
    "num_frames",
    "fps",
    "height",
    "width",
    "size",
    "duration",
    "samples",
    "steps",
    "num_inference_steps",
    "sampler",
    "shift",
    "guidance",
    "guidance_scale",
    "cfg",
    "cfg_scale",
}


@dataclass(frozen=True)
class PromptRow:
    """Contents of one video: a prompt, ``then`` others from pixel frames on, ``start``: an image or
    video file that it continues, ``video``: a video file that it is made from.

    ``uuid``: the prompt's name in its collection (VidProM), where the file gives one. ``seed``: of
    its (first) video, 0 <= seed < 2**63; None: the command's own choice. ``held_out``: kept from
    training."""

    prompt: str
    then: tuple[tuple[int, str], ...] = ()
    start: str = ""
    uuid: str = ""
    seed: int | None = None
    held_out: bool = False
    video: str = ""


class Line(NamedTuple):
    """A line of a file: ``offset`` of its first byte, ``number`` from 1, ``text`` with its line
    end."""

    offset: int
    number: int
    text: str


def read_prompt_file(path: Path, column: str = "prompt") -> list[PromptRow]:
    """All rows of a list; paths in ``start`` and ``video`` are relative to it. UserError names file and line."""
    file = PromptFile(path, column)
    if file.size > JSON_BYTES:
        raise UserError(f"{file.label}: {file.size:,} bytes, more than {JSON_BYTES:,}; split it")
    return [row for _, row in file.rows()]


class PromptFile:
    """A list on disk: :meth:`rows` reads and checks all of it, :meth:`row` one row again, by its
    offset.

    UserError: no regular file, no list; for a folder, no finished result of the filter or the
    extender."""

    def __init__(self, path: Path, column: str = "prompt") -> None:
        self.column = column
        self.path, self._recorded_sha256 = list_in(path)
        self.label = f"prompt_file {self.path}"
        self.kind = self.path.suffix.lower()
        if self.kind in NOT_LISTS:
            raise UserError(
                f"{self.label}: {self.kind} is no list of prompts; use .txt, .csv or .jsonl"
            )
        with self._open() as (file, status):
            if is_lfs_pointer(self.path):  # before a csv file's columns are looked for
                raise UserError(
                    f"{self.label}: a Git LFS pointer, not the list itself; run 'git lfs pull'"
                )
            self.size, self._mtime_ns = status.st_size, status.st_mtime_ns
            self._names = self._columns(file) if self.kind == ".csv" else []
        self.sha256 = ""  # of the contents, known when all rows were read

    def rows(self) -> Iterator[tuple[int, PromptRow]]:
        """(offset of its first byte, row) in order.

        UserError: no row, an impossible one (with its line), a filter's or extender's result that
        was changed."""
        digest, count = hashlib.sha256(), 0
        with self._open() as (file, _):
            for line, row in self._checked_rows(
                _lines(file, self.label, digest.update), header=True
            ):
                count += 1
                yield line.offset, row
        self.sha256 = digest.hexdigest()
        if self._recorded_sha256 not in ("", self.sha256):
            raise UserError(
                f"{self.label}: was changed since {REPORT} was written; give a copy of the file itself"
            )
        if not count:
            raise UserError(f"{self.label}: no prompt in it; write one per line")

    def row(self, offset: int) -> PromptRow:
        """The row that begins at ``offset``. UserError if the file was changed since it was
        opened."""
        with self._open() as (file, status):
            if (status.st_size, status.st_mtime_ns) != (self.size, self._mtime_ns):
                raise UserError(
                    f"{self.label}: was changed while it was in use; put the old one back"
                )
            file.seek(offset)
            return next(self._checked_rows(_lines(file, self.label), header=False))[1]

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], os.stat_result]]:
        try:
            # without O_NONBLOCK, opening a pipe would wait for its writer
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.label}: cannot be read ({error}); check the path") from error
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(
                    f"{self.label}: cannot be read (not a regular file); copy the list into one"
                )
            yield file, status

    def _checked_rows(
        self, lines: Iterator[Line], *, header: bool
    ) -> Iterator[tuple[Line, PromptRow]]:
        """Rows with their first lines, each checked."""
        for line, value in self._csv(lines, header) if self.kind == ".csv" else self._values(lines):
            where = f"{self.label}: line {line.number}"
            yield (
                line,
                PromptRow(value)
                if isinstance(value, str)
                else _row(self.path, where, value, self.column),
            )

    def _values(self, lines: Iterator[Line]) -> Iterator[tuple[Line, str | Json]]:
        for line in lines:
            if text := line.text.strip():
                yield line, self._object(text, line.number) if self.kind in JSONL else text

    def _object(self, text: str, number: int) -> Json:
        where = f"{self.label}: line {number}"
        try:
            value = msgspec.json.decode(text)  # twenty times as fast, but its errors say less
        except (msgspec.MsgspecError, RecursionError):
            value = parse_json(text, where, "correct it")
        if not isinstance(value, dict):
            raise UserError(f'{where} is not an object; write {{"{self.column}": ...}}')
        for key in value:
            if key not in KEYS and key not in OTHERS and key != self.column:
                raise UserError(
                    f"{where}: unknown key '{printable(key[:SHOWN])}'; a row may have {', '.join(KEYS)}"
                )
        return value

    def _csv(self, lines: Iterator[Line], header: bool) -> Iterator[tuple[Line, Json]]:
        records = _csv_records(lines, self.label)
        if header:
            next(records, None)
        columns = [
            (name, place)
            for place, name in enumerate(self._names)
            if name in COLUMNS or name == self.column
        ]
        for line, fields in records:
            if len(fields) > (count := len(self._names)):
                raise UserError(
                    f"{self.label}: line {line.number} has {len(fields)} columns instead of {count}; put texts that "
                    "have commas into quotes"
                )
            yield line, {name: fields[place] for name, place in columns if place < len(fields)}

    def _columns(self, file: IO[bytes]) -> list[str]:
        _, names = next(_csv_records(_lines(file, self.label), self.label), (None, list[str]()))
        if self.column not in names:
            column_list = ", ".join(printable(name[:SHOWN]) for name in names[:SHOWN]) or "none"
            raise UserError(
                f"{self.label}: no column '{self.column}' (it has {column_list}); set prompt_column"
            )
        count = Counter(name.strip().lower() for name in names)
        for name in names:
            plain = name.strip().lower()
            if name != self.column and (
                plain in SETTINGS or (plain in COLUMNS and (name != plain or count[plain] > 1))
            ):
                raise UserError(
                    f"{self.label}: column '{printable(name[:SHOWN])}' is not read; remove or rename it (a list may "
                    f"have {', '.join(COLUMNS)})"
                )
        if names.count(self.column) > 1:
            raise UserError(f"{self.label}: column '{self.column}' is there twice; rename one")
        return names


def list_in(path: Path) -> tuple[Path, str]:
    """The list itself, and the sha256 that the report of a filter's or an extender's folder records
    ('' for a file)."""
    if not path.is_dir():
        return path, ""
    if not (path / REPORT).is_file():
        raise UserError(
            f"{path}: a folder without {REPORT}, so no finished list of prompts; give a file (.txt, .csv, .jsonl), or "
            "run the command that made the folder again"
        )
    remedy = "give the list itself"
    sums = read_json(path / REPORT, remedy).get("sha256")
    sha256 = sums.get(LIST) if isinstance(sums, dict) else None
    if not isinstance(sha256, str):
        raise UserError(f"{path / REPORT}: not the report of a filter or an extender; {remedy}")
    return path / LIST, sha256


def _lines(
    file: IO[bytes], label: str, on_bytes: Callable[[bytes], None] | None = None
) -> Iterator[Line]:
    """Lines from the file's position on; ``on_bytes`` is called with the bytes of each."""
    offset, number = file.tell(), 0
    while raw := file.readline(LINE_BYTES + 1):
        number += 1
        if len(raw) > LINE_BYTES:
            raise UserError(
                f"{label}: line {number} has more than {LINE_BYTES:,} bytes; is it a list of prompts?"
            )
        if on_bytes is not None:
            on_bytes(raw)
        try:
            text = raw.decode("utf-8-sig" if offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{label}: line {number} is not UTF-8 ({error.reason}); convert the file"
            ) from error
        if "\0" in text:
            raise UserError(
                f"{label}: line {number} holds a NUL, so it is no text; convert or correct the file"
            )
        yield Line(offset, number, text)
        offset += len(raw)


def csv_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines for Python's csv reader, whose fields :func:`csv_fields` restores. Carriage returns
    within a line, which it would take for a line's end, are replaced."""
    return (re.sub(r"\r(?!\n?\Z)", RETURN, line) for line in lines)


def csv_fields(record: Iterable[str]) -> list[str]:
    """A record's fields with the carriage returns that :func:`csv_lines` replaced."""
    return [field.replace(RETURN, "\r") for field in record]


def _csv_records(lines: Iterator[Line], label: str) -> Iterator[tuple[Line, list[str]]]:
    """(its first line, its fields) of every record that is not blank; a quoted field may go over
    several lines."""
    record_lines: list[Line] = []

    def texts() -> Iterator[str]:
        for line in lines:
            record_lines.append(line)
            yield line.text

    reader = csv.reader(csv_lines(texts()), strict=True)
    while True:
        record_lines.clear()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{label}: line {record_lines[0].number}: {error}; correct it"
            ) from error
        if fields is None:
            return
        if fields:
            yield record_lines[0], csv_fields(fields)


def _row(path: Path, where: str, row: Mapping[str, object], column: str) -> PromptRow:
    prompt, start, then = row.get(column), row.get("start") or "", row.get("then") or []
    if not isinstance(prompt, str) or not prompt.strip() or "\0" in prompt:
        raise UserError(f"{where}: '{column}' is {_excerpt(prompt)}, not a prompt; correct it")
    if not isinstance(start, str) or "\0" in start:
        raise UserError(
            f"{where}: 'start' is {_excerpt(start)}; it must be the path of an image or video"
        )
    video = row.get("video") or ""
    if not isinstance(video, str) or "\0" in video:
        raise UserError(f"{where}: 'video' is {_excerpt(video)}; it must be the path of a video")
    if video and start:
        raise UserError(f"{where}: has 'start' and 'video'; give one of them")
    changes: list[tuple[int, str]] = []
    for change in then if isinstance(then, list) else [then]:
        frame, text = change if isinstance(change, list) and len(change) == 2 else (None, None)
        if type(frame) is not int or frame < 1 or not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{where}: 'then' has {_excerpt(change)}; it must be [pixel frame >= 1, prompt]"
            )
        changes.append((frame, text.strip()))
    frames = [frame for frame, _ in changes]
    if twice := [frame for frame in frames if frames.count(frame) > 1]:
        raise UserError(f"{where}: 'then' has two prompts from frame {twice[0]} on; give one")
    uuid, held_out = row.get("uuid") or "", row.get("held_out") or False
    if not isinstance(uuid, str):
        raise UserError(f"{where}: 'uuid' is {_excerpt(uuid)}; it must be a text")
    if not isinstance(held_out, bool):
        raise UserError(f"{where}: 'held_out' is {_excerpt(held_out)}; it must be true or false")
    return PromptRow(
        prompt.strip(),
        tuple(sorted(changes)),
        str(path.parent / start) if start else "",
        uuid,
        _seed(row.get("seed"), where),
        held_out,
        str(path.parent / video) if video else "",
    )


def _seed(value: object, where: str) -> int | None:
    """A row's seed (csv files give text); None where it has none."""
    if value is None or value == "":
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= SEED_DIGITS:
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**63:
        raise UserError(
            f"{where}: 'seed' is {_excerpt(value)}; it must be a whole number from 0 to 2**63 - 1"
        )
    return value


def _excerpt(value: object) -> str:
    return repr(value)[: 2 * SHOWN]
