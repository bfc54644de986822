"""Someone's own folder of videos and its captions, only read.

A caption is a row of a table (``metadata.csv``, ``metadata.jsonl``, ``metadata.json``,
``captions.csv`` or ``captions.jsonl`` in the folder, or a file elsewhere), else the text of
``NAME.txt`` beside the video ``NAME.mp4``, else one text for all. A table may also be two lists
that belong together line by line: the files in ``videos.txt``, the captions in ``prompts.txt``
(or ``prompt``, ``caption``, ``captions``) beside it. A ``metadata.json`` that is no list (a data
set's card), and ``video.txt`` beside a ``video.mp4``, are no tables. In a table the file is
``file``, ``file_name``, ``video``, ``video_path`` or ``path``, relative to the folder, and the
caption is ``caption``, ``prompt`` or ``text``; ``split``, ``place``, ``motion`` and
``held_out_caption`` are optional. Columns of a csv are
separated by commas, semicolons or tabs. So the layouts of diffusion-pipe, musubi-tuner, DiffSynth
and finetrainers are read as they are.

Nothing is left out without a word: what is not taken is a :class:`Refused` with its reason.
"""

from __future__ import annotations

import csv
import difflib
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from scd_sf.data.prompt_files import csv_fields, csv_lines
from scd_sf.data.sources.raw_files import Refused
from scd_sf.files import foreign, lines_of, parse_json, read_text, reason, safe_path
from scd_sf.types import UserError, printable

VIDEOS = (".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts")
OTHER_VIDEOS = (".mpg", ".mpeg", ".wmv", ".flv", ".gif", ".ogv", ".vob", ".rm", ".webp")
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.json", "captions.csv", "captions.jsonl")
CARD = "metadata.json"  # also what data sets say of themselves
# Of a table of two lists: the files, and their captions.
FILE_LISTS = ("videos.txt", "video.txt")
CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
FILE_KEYS = ("file", "file_name", "video", "video_path", "path")
CAPTION_KEYS = ("caption", "prompt", "text")
TAGS = ("place", "motion", "held_out_caption")
KNOWN = (*FILE_KEYS, *CAPTION_KEYS, "split", *TAGS)
MARKS = {",": "commas", ";": "semicolons", "\t": "tabs"}  # between the columns of a csv
CAPTION_BYTES = 2**16
SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
FIRST_LINE = 'its first line is like "file,caption", then one line per video'
ROW = '{"file": "a.mp4", "caption": "..."}'
CORRECT = f"correct it; rows are like {ROW}"
Rows = list[tuple[int | str, Mapping[str, object]]]  # a row's place in its table, and its values


@dataclass(frozen=True)
class CaptionedVideo:
    """A video and its caption. ``file``: relative to the folder, POSIX form. ``split``: "" where the
    table names none."""

    file: str
    caption: str
    split: str = ""
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VideoFolder:
    """What a folder holds. ``videos``: with captions, in name order. ``refused``: videos that are
    not taken. ``other_files``: number of files by suffix that are neither videos nor captions.
    ``notes``: sentences for people."""

    videos: list[CaptionedVideo]
    refused: list[Refused]
    other_files: dict[str, int]
    notes: list[str]


def read_video_folder(root: Path, table: Path | None = None, caption: str = "") -> VideoFolder:
    """The videos below ``root`` with their captions. ``table``: a file of captions elsewhere.
    ``caption``: that of all videos that have none.

    UserError: no such folder, several tables in it, or a table that cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder of the videos")
    files, refused, others = _files_of(root)
    notes: list[str] = []
    rows: dict[str, CaptionedVideo] = {}
    if table is None:
        table, notes = _own_table(root)
    if table is not None:
        rows, refused_rows, unread_notes = read_captions(table, root)
        notes += unread_notes
        refused += refused_rows
        refused_names = {part.name for part in refused}
        for name in sorted(rows.keys() - set(files) - refused_names):
            if (root / name).is_file():  # another suffix, but the table says that it is a video
                others[_suffix(name)] -= 1
                files.append(name)
            else:
                refused.append(Refused(name, f"is in {table.name}, but there is no such file"))
    videos = []
    for name in sorted(files):
        try:
            videos.append(rows.get(name) or _with_text_file(root, name, caption))
        except UserError as error:
            refused.append(Refused(name, str(error)))
    texts = others.get(".txt", 0) - sum(
        _as_stored((root / name).with_suffix(".txt")).is_file() for name in files
    )
    others[".txt"] = max(0, texts)
    if table is not None and table.parent == root:
        others[_suffix(table.name)] -= 2 if table.name in FILE_LISTS else 1
    return VideoFolder(
        videos,
        sorted(refused, key=lambda part: part.name),
        {suffix: count for suffix, count in sorted(others.items()) if count > 0},
        notes,
    )


def _files_of(root: Path) -> tuple[list[str], list[Refused], Counter[str]]:
    """Relative names of the video files below ``root``, refused ones, and counts of others."""
    names: list[str] = []
    refused: list[Refused] = []
    others: Counter[str] = Counter()
    home = os.path.realpath(root)

    def refuse(path: Path, fault: str) -> None:
        name = printable(path.relative_to(root).as_posix()).replace(
            "\n", "\N{REPLACEMENT CHARACTER}"
        )
        refused.append(Refused(name, fault))

    def on_error(error: OSError) -> None:
        refuse(Path(os.fsdecode(error.filename)), f"cannot be read ({error.strerror})")

    for folder, folders, entries in os.walk(root, onerror=on_error, followlinks=False):
        for name in sorted(folders):
            if (Path(folder) / name).is_symlink():
                refuse(Path(folder) / name, "is a link to a folder, and those are not followed")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(entries):
            path, suffix = Path(folder) / name, _suffix(name)
            if name.startswith(".") or suffix not in (*VIDEOS, *OTHER_VIDEOS):
                others["hidden" if name.startswith(".") else suffix] += 1
            elif fault := _fault_of_place(path, home, path.relative_to(root).as_posix()):
                refuse(path, fault)
            elif suffix in OTHER_VIDEOS:
                refuse(path, f"{suffix} is not read; convert it to mp4")
            else:
                names.append(path.relative_to(root).as_posix())
    return names, refused, others


def _suffix(name: str) -> str:
    """The suffix in small letters; "none" where there is none."""
    return printable(PurePosixPath(name).suffix.lower())[:16] or "none"


def _fault_of_place(path: Path, home: str, name: str = "") -> str:
    """Why a file is not opened; "" for a regular file with a plain ``name`` (its path in the folder,
    or what it is called) inside ``home``."""
    name = name or path.name
    if printable(name) != name or "\n" in name or "\\" in name:
        return "its name is no plain text; rename it"
    try:
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
            return "is a link that leaves the folder; copy the file"
        if not stat.S_ISREG(path.stat().st_mode):
            return "is not a regular file"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def _own_table(root: Path) -> tuple[Path | None, list[str]]:
    """The folder's table of captions, if it has one, and notes. UserError: it has several."""
    tables, notes = [root / name for name in TABLES if (root / name).is_file()], list[str]()
    if (card := root / CARD) in tables and not _decoded(card).lstrip("\ufeff \t\r\n").startswith(
        "["
    ):
        tables.remove(card)
        notes = [f"{CARD}: not read: it is no list of rows like {ROW}"]
    if _lists(root, CAPTION_LISTS):  # else they are captions themselves
        tables += _lists(root, FILE_LISTS)
    if len(tables) > 1:
        names = " and ".join(table.name for table in tables)
        raise UserError(f"{root}: has {names}; choose one with --captions")
    return (tables[0] if tables else None), notes


def _lists(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of these names but for the captions of a video of the same name."""
    lists = [folder / name for name in names if os.path.lexists(folder / name)]
    stems = (
        {path.stem for path in folder.iterdir() if _suffix(path.name) in VIDEOS} if lists else ()
    )
    return [path for path in lists if path.stem not in stems]


def _with_text_file(root: Path, name: str, caption: str) -> CaptionedVideo:
    """The video with the caption of ``NAME.txt``, or else ``caption``. UserError, with the reason
    alone: there is none, or it cannot be read."""
    path = _as_stored((root / name).with_suffix(".txt"))
    text = ""
    if os.path.lexists(path):
        if fault := _fault_of_place(path, os.path.realpath(root)):
            raise UserError(f"its caption {path.name} {fault}")
        text = _text_of(path)
    text = text or " ".join(caption.split())
    if not text:
        state = "is empty" if os.path.lexists(path) else "does not exist"
        raise UserError(f"has no caption: {path.name} {state}; write it, or give --caption")
    return CaptionedVideo(name, text)


def _text_of(path: Path) -> str:
    """A file's text on one line. UTF-8, or UTF-16 with a byte order mark."""
    try:
        return " ".join(_decoded(path, CAPTION_BYTES).split())
    except UserError as error:
        fault = str(error).removeprefix(f"{path}: ")
        raise UserError(f"its caption {path.name} cannot be used: {fault}") from error


def _decoded(path: Path, limit: int | None = None) -> str:
    """UserError naming ``path``: not text in UTF-8 or, with a byte order mark, in UTF-16."""
    remedy = "save it as UTF-8"
    with foreign(path, remedy):
        with path.open("rb") as file:
            is_wide = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
        if is_wide and path.stat().st_size <= (limit or path.stat().st_size):
            text = path.read_bytes().decode("utf-16")
        else:
            text = read_text(path, remedy, limit) if limit else read_text(path, remedy)
        if "\0" in text:
            raise ValueError("holds a NUL, so it is no text")
        return text


# ------------------------------------------------------------------------------------------- tables


def read_captions(
    table: Path, root: Path
) -> tuple[dict[str, CaptionedVideo], list[Refused], list[str]]:
    """Videos by file of a table (csv, json, jsonl, or a list of files with one of captions beside
    it), rows that are refused, and notes for people.

    UserError naming the line: it cannot be parsed, has no file or caption under a known name, or a
    file is listed twice.
    """
    kind = table.suffix.lower()
    readers = {
        ".csv": _csv_rows,
        ".json": _json_rows,
        ".jsonl": _jsonl_rows,
        ".ndjson": _jsonl_rows,
    }
    if table.name in FILE_LISTS:
        rows = _list_rows(table)
    elif kind in readers:
        rows = readers[kind](table)
    else:
        raise UserError(
            f"{table}: captions are read from .csv, .json, .jsonl and videos.txt; use one of them"
        )
    if not rows:
        raise UserError(f"{table}: no row; {FIRST_LINE if kind == '.csv' else CORRECT}")
    unread: Counter[str] = Counter()
    videos: dict[str, CaptionedVideo] = {}
    refused: list[Refused] = []
    for number, row in rows:
        where = f"{table}:{number}"
        unread.update(name for name in row if name not in KNOWN)
        name, fault = _inside(root, _one_of(row, FILE_KEYS, where), where)
        if fault:
            refused.append(Refused(printable(name[:80]), f"{table.name}:{number}: {fault}"))
            continue
        if name in videos:
            raise UserError(f"{where}: {printable(name)} is listed twice; list every video once")
        caption = " ".join(_one_of(row, CAPTION_KEYS, where).split())
        split = str(row.get("split") or "")
        if split and not SPLIT.fullmatch(split):
            raise UserError(
                f"{where}: split is {split[:80]!r}, which is no name of a folder; rename it"
            )
        if not caption:
            refused.append(Refused(name, f"has no caption: it is empty in {table.name}:{number}"))
            continue
        tags = {tag: str(row[tag]) for tag in TAGS if row.get(tag)}
        videos[name] = CaptionedVideo(name, caption, split, tags)
    # refused rows are not looked for again as files
    for part in refused:
        videos.pop(part.name, None)
    return videos, refused, _unread_note(table, unread)


def _unread_note(table: Path, unread: Mapping[str, int]) -> list[str]:
    """UserError for a name that is almost a known one; one note for all others."""
    for name in unread:
        close = difflib.get_close_matches(name, ("caption", "held_out_caption", "split"), 1, 0.8)
        if close and name not in CAPTION_KEYS:
            raise UserError(
                f"{table}: unknown field '{printable(name)}'; did you mean '{close[0]}'?"
            )
    names = ", ".join(printable(name[:40]) for name in list(unread)[:10])
    return [f"{table.name}: not read: {names}"] if unread else []


def _one_of(row: Mapping[str, object], names: Sequence[str], where: str) -> str:
    """The value of the one name that the row has. UserError: none, several, or no text."""
    present = [name for name in names if name in row]
    if len(present) != 1:
        several = " and ".join(f"'{name}'" for name in present) or f"none of {', '.join(names)}"
        raise UserError(f"{where}: has {several}; it must have one of them")
    value = row[present[0]]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: '{present[0]}' is {str(value)[:40]!r}, not a text; {CORRECT}")
    return value


def _inside(root: Path, name: str, where: str) -> tuple[str, str]:
    """(name relative to the folder, "") or (name, why it is refused)."""
    text = name.strip()
    if text.startswith(f"{root.absolute().as_posix()}/"):
        text = text.removeprefix(f"{root.absolute().as_posix()}/")
    text = str(PurePosixPath(text)) if text else ""
    if not text:
        return "(no name)", "names no file"
    try:
        path = safe_path(root, text, where)
    except UserError as error:
        return text, str(error).removeprefix(f"{where} is ")
    path = _as_stored(path)
    if os.path.lexists(path) and (fault := _fault_of_place(path, os.path.realpath(root))):
        return text, fault
    return path.relative_to(root).as_posix(), ""


def _as_stored(path: Path) -> Path:
    """``path``, or where it does not exist, the one that exists and looks the same: macOS stores
    letters with accents in two code points, other systems in one."""
    forms = (Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
    return next((form for form in (path, *forms) if os.path.lexists(form)), path)


def _list_rows(table: Path) -> Rows:
    """The files of a list, with the captions of the list beside it. UserError: none or several
    beside it, a link that leaves the folder, other numbers of lines."""
    folder = table.parent
    captions = _lists(folder, CAPTION_LISTS)
    if len(captions) != 1:
        names = " and ".join(file.name for file in captions) or "no list of captions"
        raise UserError(f"{table}: has {names} beside it; keep one, prompts.txt")
    for file in (table, captions[0]):
        if fault := _fault_of_place(file, os.path.realpath(folder)):
            raise UserError(f"{file}: {fault}")
    files, texts = (lines_of(_decoded(file)) for file in (table, captions[0]))
    if len(files) != len(texts):
        raise UserError(
            f"{captions[0]}: has {len(texts)} lines, {table.name} has {len(files)}; write one line for "
            "each video"
        )
    pairs = enumerate(zip(files, texts, strict=True), 1)
    return [
        (number, {"file": file, "caption": text})
        for number, (file, text) in pairs
        if file.strip() or text.strip()
    ]


def _json_rows(table: Path) -> Rows:
    rows = parse_json(_decoded(table), table, CORRECT)
    if not isinstance(rows, list):
        raise UserError(f"{table}: not a JSON list of rows; {CORRECT}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{table}:row {number}: not a JSON object; {CORRECT}")
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _jsonl_rows(table: Path) -> Rows:
    rows: Rows = []
    for number, line in enumerate(lines_of(_decoded(table)), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{table}:{number}", CORRECT)
        if not isinstance(row, dict):
            raise UserError(f"{table}:{number}: not a JSON object; {CORRECT}")
        rows.append((number, row))
    return rows


def _csv_rows(table: Path) -> Rows:
    text = _decoded(table)
    head = text.partition("\n")[0]
    mark = next((mark for mark in MARKS if mark in head), ",")
    lines = (f"{line}\n" for line in lines_of(text))
    reader = csv.reader(csv_lines(lines), delimiter=mark, strict=True)
    rows: Rows = []
    try:
        names = [name.strip().lower() for name in csv_fields(next(reader, []))]
        if doubled := [name for name, count in Counter(names).items() if count > 1 and name]:
            raise UserError(
                f"{table}:1: has two columns '{printable(doubled[0][:40])}'; remove one"
            )
        for fields in reader:
            if not fields:
                continue
            if len(fields) > len(names):
                raise UserError(
                    f"{table}:{reader.line_num}: {len(fields)} columns instead of {len(names)}; put texts that have "
                    f"{MARKS[mark]} into quotes"
                )
            rows.append((reader.line_num, dict(zip(names, csv_fields(fields), strict=False))))
    except csv.Error as error:
        raise UserError(f"{table}:{reader.line_num}: {reason(error)}; correct it") from error
    return rows
