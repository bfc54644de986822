"""Files that other files vouch for: hashing, atomic JSON, and paths that cannot leave their directory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from scd_sf.types import UserError

Json = dict[str, object]


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's contents. Raises UserError when it is missing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check that it exists") from error


def sha256_folder(root: Path, pattern: str = "*") -> str:
    """One hash over names and contents of the files directly in ``root`` that match ``pattern``, in name order."""
    files = sorted(path for path in root.glob(pattern) if path.is_file())
    if not files:
        raise UserError(f"{root}: no file {pattern} in it; check the path")
    return hash_json({path.name: sha256_file(path) for path in files})


def hash_json(value: object) -> str:
    """Hex sha256 of a JSON value in canonical form (sorted keys, no spaces): equal values, equal hash."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def safe_path(root: Path, relative: str, where: str) -> Path:
    """``root/relative``, for a path written by someone else (POSIX form).

    Raises UserError (naming ``where``) when it is absolute, has ``..`` or a backslash, or leaves ``root`` by a link.
    """
    pure = PurePosixPath(relative)
    path = root / pure
    outside = pure.is_absolute() or ".." in pure.parts or "\\" in relative
    if outside or not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{where} is {relative!r}, which leaves {root}; use a relative path inside it")
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees either the old or the whole new one (temporary file, fsync, rename)."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Atomic, indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Atomic JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path, remedy: str) -> Json:
    """A JSON object. Raises UserError (with ``remedy``) when it is missing, not JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; {remedy}")
    return value


def read_jsonl(path: Path, remedy: str) -> list[Json]:
    """JSON lines, each an object; blank lines are skipped. Raises UserError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold U+2028 and its like, as they are
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from error
    rows: list[Json] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); {remedy}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object; {remedy}")
        rows.append(row)
    return rows
