"""Writing, locking, hashing and reading of files.

Writing: :func:`write_text`, :func:`write_json`, :func:`new_file`, :func:`own_file` and
:func:`new_folder` build beside the place, under a name of this process, and rename. :func:`sweep`
removes what a dead process left. :func:`locked` holds a folder. Reading: :func:`read_bytes`
compares sizes before it reads. :func:`read_json` and :func:`typed` refuse what is nested too
deeply, not finite or of another type. :func:`foreign` turns whatever a parser raises into one line.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from scd_sf.types import UserError, printable

if TYPE_CHECKING:  # tools that need no tensors start without torch
    from torch import Tensor

Json = dict[str, object]
T = TypeVar("T")

# largest JSON or JSON-lines file that is read: a million long prompts take a third of it
JSON_BYTES = 512 * 2**20
NAME_BYTES = 255  # of one file name, on every file system in use
LOCK = ".lock"  # in every folder that a command owns
LFS_POINTER = b"version https://git-lfs"
POINTER = "a Git LFS pointer, not the file itself: run `git lfs pull`"
_PART = re.compile(r"^\.part-(?P<host>[^-]+)-(?P<pid>\d+)-[0-9a-f]{8}$")

# ------------------------------------------------------------------------------------------ hashing


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's contents. Raises UserError when it is missing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check that it exists"
        ) from error


def sha256_folder(root: Path, pattern: str = "*") -> str:
    """One hash over names and contents of the files directly in ``root`` that match ``pattern``, in
    name order."""
    files = sorted(path for path in root.glob(pattern) if path.is_file())
    if not files:
        raise UserError(f"{root}: no file {pattern} in it; check the path")
    return hash_json({path.name: sha256_file(path) for path in files})


def sha256_bytes(data: bytes | memoryview) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def place_digest(*place: int | str) -> bytes:
    """8 bytes that depend on all of ``place``, e.g. (seed, "noise", step), for seeds and orders."""
    return hashlib.blake2b(":".join(str(part) for part in place).encode(), digest_size=8).digest()


def hash_json(value: object) -> str:
    """Hex sha256 of a JSON value in canonical form (sorted keys, no spaces): equal values, equal
    hash."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def identity(record: object, first: Sequence[str]) -> dict[str, Any]:
    """Name -> value of a flat dataclass instance, to be hashed or compared: its fields ``first``, and
    of the others those that are not at their default. So what was made before a field was added keeps
    its hash."""
    values: dict[str, Any] = {}
    for item in fields(cast("Any", record)):
        value = getattr(record, item.name)
        is_default = value == (
            item.default if item.default_factory is MISSING else item.default_factory()
        )
        if item.name in first or not is_default:
            values[item.name] = value
    return values


# -------------------------------------------------------------------------------------------- paths


def safe_path(root: Path, relative: str, where: str, *, links: bool = False) -> Path:
    """``root/relative``, for a path written by someone else (POSIX form).

    Raises UserError (naming ``where``) when it is absolute, has ``..``, a backslash or a NUL, has a
    name that no file system takes, or leaves ``root`` by a link (``links``: a link may lead
    anywhere).
    """
    pure = PurePosixPath(relative)
    remedy = "use a relative path inside it"
    try:
        is_unusable = any(len(part.encode()) > NAME_BYTES for part in pure.parts)
    except UnicodeEncodeError:
        is_unusable = True
    if is_unusable or "\0" in relative:
        raise UserError(f"{where} is {relative[:80]!r}, which is no file name; {remedy}")
    path = root / pure
    leaves_root = pure.is_absolute() or ".." in pure.parts or "\\" in relative
    if leaves_root or not (
        links or Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
    ):
        raise UserError(f"{where} is {relative!r}, which leaves {root}; {remedy}")
    return path


def files_below(root: Path) -> Iterator[Path]:
    """Regular files below ``root`` in name order. Links, to files or folders, are neither followed
    nor listed."""
    for folder, folders, names in os.walk(root, followlinks=False):
        folders.sort()
        for name in sorted(names):
            path = Path(folder) / name
            if stat.S_ISREG(path.lstat().st_mode):
                yield path


# ------------------------------------------------------------------------------------------ writing


def part_of(path: Path) -> Path:
    """A name beside ``path`` for an unfinished file. No other process uses it, and :func:`sweep`
    can tell its owner."""
    host = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname()) or "host"
    return path.with_name(f".part-{host[:64]}-{os.getpid()}-{secrets.token_hex(4)}")


def sweep(folder: Path) -> None:
    """Remove unfinished files in ``folder`` of processes of this host that no longer exist."""
    host = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:64] or "host"
    for path in folder.glob(".part-*") if folder.is_dir() else ():
        match = _PART.match(path.name)
        if match is None or match["host"] != host or process_lives(int(match["pid"])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_part(path: Path) -> bool:
    """Whether the name is one of :func:`part_of`."""
    return _PART.match(path.name) is not None


def others_in(folder: Path) -> list[str]:
    """Sorted names in a folder without its lock and unfinished files; empty where there is no
    folder."""
    names = (
        path.name for path in (folder.iterdir() if folder.is_dir() else ()) if not is_part(path)
    )
    return sorted(name for name in names if name != LOCK)


def process_lives(pid: int) -> bool:
    """Whether a process of this host is there and not a zombie (Linux knows; elsewhere a zombie
    counts as alive)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (ProcessLookupError, OverflowError):
        return False
    except (PermissionError, FileNotFoundError, IndexError):
        return True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The boundary around code that writes ``path``: a disk that takes no more is an OSError that
    names it, also where a library says it in words of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        name = (
            os.fsdecode(error.filename)
            if isinstance(error.filename, str | bytes | os.PathLike)
            else ""
        )
        if error.errno is None or (
            name and not any(is_part(Path(part)) for part in Path(name).parts)
        ):
            raise
        # PyAV's own error types take no file name
        raise OSError(error.errno, error.strerror, str(path)) from error
    except (RuntimeError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))
        # torch.save's writer, which gives no number
        if number is None and "inline_container" not in str(error):
            raise
        code = errno.EIO if number is None else int(number[1])
        raise OSError(
            code, reason(error) if number is None else os.strerror(code), str(path)
        ) from error


@contextmanager
def new_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path to write; at the end it becomes ``path``, or at an error it is gone. ``durable``: it
    is on the disk then, a power cut included; not for what is written again every second."""
    part = part_of(path)
    try:
        with writing(path):
            yield part
            if durable:
                fsync(part)
            part.replace(path)
            if durable:
                fsync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def own_file(path: Path, *, fresh: bool = False) -> Iterator[Path]:
    """:func:`new_file` for a path that a person named, in a folder that no job holds. The folder is
    created, and unfinished files of killed runs in it are removed first.

    ``fresh``: nothing is overwritten. UserError where something is at ``path``, also when it came
    meanwhile.
    """
    exists_error = UserError(f"{path}: exists already, nothing is overwritten; choose another name")
    if fresh and os.path.lexists(path):
        raise exists_error
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    work = part_of(path)  # a folder: what is written has its own name and ending
    try:
        with writing(path):
            work.mkdir()
            part = work / path.name
            yield part
            fsync(part)
            _publish(part, path, exists_error if fresh else None)
            fsync(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(part: Path, path: Path, exists_error: UserError | None) -> None:
    """``part`` becomes ``path``; with ``exists_error``, that is raised where ``path`` exists."""
    if exists_error is None:
        part.replace(path)
        return
    try:
        os.link(part, path)
    except FileExistsError as error:
        raise exists_error from error
    except OSError as error:  # a file system without links
        if os.path.lexists(path):
            raise exists_error from error
        part.replace(path)


@contextmanager
def new_folder(path: Path, remedy: str = "choose another name") -> Iterator[Path]:
    """A folder to fill; at the end it is on the disk and becomes ``path``, or at an error it is
    gone.

    Raises UserError when ``path`` is there (an empty folder is taken). What a killed run left is
    removed first.
    """
    exists_error = UserError(f"{path}: is already there and is never overwritten; {remedy}")
    if path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise exists_error
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    part = part_of(path)
    part.mkdir()
    try:
        with writing(path):
            yield part
            fsync_tree(part)
        try:
            part.rename(path)  # replaces an empty folder, and nothing else
        except OSError as error:
            raise exists_error from error
        fsync(path.parent)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flush a file's contents, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(root: Path) -> None:
    """Flush every file and folder below ``root`` to the disk, without following links. Unfinished
    files of other processes are skipped."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not is_part(Path(name))]
        for path in (*(Path(folder, name) for name in names), Path(folder)):
            with suppress(FileNotFoundError):
                if not path.is_symlink():
                    fsync(path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees either the old or the whole new contents, whatever
    other processes write."""
    with new_file(path) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a UTF-8 text file atomically."""
    with new_file(path, durable=durable) as part:
        part.write_text(text, encoding="utf-8")


NOT_FINITE = "nothing is written: find out what it was computed from"


def finite_json(
    value: Mapping[str, object],
    where: str | Path,
    remedy: str = NOT_FINITE,
    *,
    indent: int | None = 2,
) -> str:
    """JSON and a line feed; ``indent`` None: on one line. UserError naming the field that is NaN or
    infinite: JSON has no such number, and other readers refuse the whole file."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        field = _non_finite_field(value)
        raise UserError(
            f"{where}: '{field}' is NaN or infinite, which is no JSON; {remedy}"
        ) from error


def _non_finite_field(value: object) -> str | None:
    """The dotted name of the first number in a tree that is NaN or infinite ("" for the tree
    itself); None if all are finite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    parts: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    for name, part in parts:
        field = _non_finite_field(part)
        if field is not None:
            return f"{name}.{field}" if field else str(name)
    return None


def write_json(path: Path, value: Mapping[str, object], *, durable: bool = True) -> None:
    """Write indented JSON atomically. UserError as :func:`finite_json`; a number that may be
    missing is None, JSON's null."""
    write_text(path, finite_json(value, path), durable=durable)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write JSON lines atomically. UserError as :func:`finite_json`, naming the line."""
    lines = [
        finite_json(row, f"{path}:{number}", indent=None) for number, row in enumerate(rows, 1)
    ]
    write_text(path, "".join(lines))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write safetensors atomically, with the rights that the umask gives. The library alone would
    use mode 0600."""
    from safetensors.torch import save_file

    # a folder, because the library makes a file of its own beside the one it writes
    work = part_of(path)
    try:
        with new_file(path) as part:
            work.mkdir()
            file = work / "tensors"
            save_file(
                dict(tensors), str(file), metadata=None if metadata is None else dict(metadata)
            )
            file.chmod(0o666 & ~current_umask())
            file.rename(part)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold ``folder`` (made if missing) for this job; ``what`` names it. The kernel frees it when
    the process ends. What killed jobs left unfinished, here and in two levels of folders below, is
    removed.

    Raises UserError when another process holds it, and where there is something else than a folder.
    A job that is refused, or fails, leaves no lock where there was none, and no folder with nothing
    in it. On file systems without locks nothing is held, and nothing is said.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        kind = "a link to nothing" if folder.is_symlink() and not folder.exists() else "no folder"
        raise UserError(
            f"{folder}: is there and is {kind}; nothing is overwritten: use another place for {what}"
        )
    is_new = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    is_new_lock = not os.path.lexists(folder / LOCK)
    with take_lock(folder / LOCK, what):
        for part in ("", "*/", "*/*/"):
            for subfolder in folder.glob(part) if part else [folder]:
                sweep(subfolder)
        try:
            yield
        except BaseException:
            if is_new_lock:
                # removed while it is held: take_lock detects a removed lock
                (folder / LOCK).unlink(missing_ok=True)
                if is_new:
                    with suppress(OSError):
                        folder.rmdir()
            raise


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold the lock ``path`` (made if missing, with its folder), after whoever holds it now. The
    kernel frees it when the process ends. On file systems without locks nothing is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open_lock(path) as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------------------------ reading


@contextmanager
def foreign(where: str | Path, remedy: str) -> Iterator[None]:
    """The boundary around a parser of bytes that others wrote: whatever it raises becomes one
    UserError line.

    Wrap the parser alone, not our own code: a fault of ours must keep its traceback.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{where}: needs more memory than there is; {remedy}") from error
    # parsers raise KeyError, RecursionError, library errors ..: no list of types is complete
    except BaseException as error:
        # a panic of a library in Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{where}: {reason(error)}; {remedy}") from error


def reason(error: BaseException) -> str:
    """The first line of what went wrong, fit for a terminal, at most 200 characters."""
    words = str(error).strip().splitlines()
    text = getattr(error, "strerror", None) or (words[0] if words else "") or type(error).__name__
    return printable(text if not isinstance(error, KeyError) else f"lacks {text}")[:200]


def read_bytes(path: Path, remedy: str, limit: int = JSON_BYTES) -> bytes:
    """A regular file of at most ``limit`` bytes. Raises UserError for anything else, before it is
    read, and for a pointer of Git LFS."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file; {remedy}")
        if status.st_size > limit:
            raise UserError(
                f"{path}: {status.st_size:,} bytes, more than the {limit:,} that are read of such a file; {remedy}"
            )
        with path.open("rb") as file:
            data = file.read(status.st_size + 1)
        if len(data) > status.st_size:
            raise UserError(f"{path}: grows while it is read; {remedy}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    if data.startswith(LFS_POINTER):
        raise UserError(f"{path}: {POINTER}")
    return data


def read_text(path: Path, remedy: str, limit: int = JSON_BYTES) -> str:
    """The UTF-8 text of a file, without a byte order mark."""
    data = read_bytes(path, remedy, limit)
    with foreign(path, remedy):
        return data.decode("utf-8-sig")


def lines_of(text: str) -> list[str]:
    """Lines as every editor counts them: only ``\\n`` and ``\\r\\n`` end one, not U+2028, U+0085 or
    a vertical tab."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines and not lines[-1] else lines


def parse_json(text: str | bytes, where: str | Path, remedy: str) -> object:
    """A JSON value: finite numbers, integers of 64 bits, at most ``JSON_DEPTH`` deep, no half
    surrogates."""
    try:
        return loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{where}: not JSON ({reason(error)}); {remedy}") from error


def read_json(path: Path, remedy: str, limit: int = JSON_BYTES) -> Json:
    """A JSON object. Raises UserError (with ``remedy``) when it is missing, not JSON, or not an
    object."""
    value = parse_json(read_text(path, remedy, limit), path, remedy)
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; {remedy}")
    return value


def read_jsonl(path: Path, remedy: str, limit: int = JSON_BYTES) -> list[Json]:
    """JSON lines, each an object; blank lines are skipped. Raises UserError naming the line."""
    rows: list[Json] = []
    for number, line in enumerate(lines_of(read_text(path, remedy, limit)), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}:{number}", remedy)
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object; {remedy}")
        rows.append(row)
    return rows


def typed(
    value: object, kind: type[T], where: str | Path, remedy: str, *, exact: bool = False
) -> T:
    """``value`` (plain lists, mappings, numbers, text) as ``kind``: a dataclass, TypedDict or
    built-in container type.

    Strict: "1" is no number, 1 no truth value. Unknown keys are ignored, or with ``exact`` (of a
    dataclass) refused, as are missing ones. Raises UserError that names the field.
    """
    if exact:
        names = set(kind.__dataclass_fields__)  # type: ignore[attr-defined]
        different = sorted(set(value) ^ names) if isinstance(value, dict) else ["no object"]
        if different:
            raise UserError(
                f"{where}: fields differ from the format ({', '.join(different)}); {remedy}"
            )
    with foreign(where, remedy):
        return msgspec.convert(value, kind, strict=True)


def read_typed(path: Path, kind: type[T], remedy: str, limit: int = JSON_BYTES) -> T:
    """A JSON file as ``kind``: :func:`read_json`, then :func:`typed`."""
    return typed(read_json(path, remedy, limit), kind, path, remedy)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a pointer that Git LFS leaves in place of the contents."""
    with foreign(path, "check the path"), path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def refuse_lfs_pointer(path: Path) -> None:
    """UserError for a file that :func:`is_lfs_pointer`: for readers that hand the path to a
    library."""
    if is_lfs_pointer(path):
        raise UserError(f"{path}: {POINTER}")


# --------------------------------------------------------------------------------------------- JSON

JSON_DEPTH = 64
INTEGER_DIGITS = 20  # 64 bits


def loads(text: str | bytes) -> object:
    """A JSON value within bounds: depth, finite numbers, 64 bits. ValueError, RecursionError or
    MemoryError for everything else; :func:`parse_json` words them."""
    value: object = json.loads(
        text, parse_constant=_no_number, parse_int=_integer, parse_float=_finite
    )
    _check_tree(value)
    return value


def _no_number(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > INTEGER_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _check_tree(value: object) -> None:
    """ValueError for a tree that is nested too deeply or has text that UTF-8 cannot hold."""
    stack: list[tuple[object, int]] = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, str):
            item.encode()
        elif isinstance(item, dict | list):
            if depth > JSON_DEPTH:
                raise ValueError(f"nested more than {JSON_DEPTH} deep")
            inner = item if isinstance(item, list) else [*item, *item.values()]
            stack += [(child, depth + 1) for child in inner if isinstance(child, str | dict | list)]


# ---------------------------------------------------------------------------------------- ownership

# names in a folder whose job ended before it began to write
LEFTOVERS = re.compile(r"\.lock|\.writable|\.part-.*")
MARK_BYTES = 2**22  # of a file that are searched for its mark
OWNER = "process "  # what a lock's words begin with


def take_lock(path: Path, what: str) -> IO[str]:
    """The open lock ``path``; whoever closes it frees it. UserError: another process has it, or it
    is no lock."""
    while True:
        file = _open_lock(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = printable(file.read(200)).strip() or "another process"
            file.close()
            remedy = f"wait for it, or use another folder for {what}"
            raise UserError(f"{path.parent}: {owner} is at work in it; {remedy}") from error
        except OSError:  # a file system without locks
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its owner removed it between our opening and locking it
    file.seek(0)
    file.truncate()
    file.write(f"{OWNER}{os.getpid()} of {socket.gethostname()} ({what})\n")
    file.flush()
    return file


def _open_lock(path: Path) -> IO[str]:
    """The lock's file, made if missing. UserError where something else has its name."""
    not_ours = UserError(f"{path}: not a lock of ours; move it away, or use another folder")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise not_ours from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise not_ours
    file = os.fdopen(handle, "r+", encoding="utf-8", errors="replace")
    if file.read(len(OWNER)) not in ("", OWNER):
        file.close()
        raise not_ours
    return file


def require_own_folder(
    folder: Path, marks: Iterable[str], remedy: str = "use another out="
) -> None:
    """UserError where ``folder`` is no folder, or has contents and nothing that a command puts
    there first."""
    if not folder.is_dir():
        if folder.is_symlink() or folder.exists():
            raise UserError(
                f"{folder}: is there and no folder; nothing of others is touched: {remedy}"
            )
        return
    names = {path.name for path in folder.iterdir() if not LEFTOVERS.fullmatch(path.name)}
    mark_names = list(marks)
    if names and not any((folder / mark).exists() for mark in mark_names):
        example, mark = printable(min(names))[:80], " or ".join(mark_names)
        raise UserError(
            f"{folder}: holds other files ({example}) and no {mark} of ours; nothing of others is touched: {remedy}"
        )


def has_mark(path: Path, mark: str) -> bool:
    """Whether a path is a regular file, no link, with ``mark`` in its first :data:`MARK_BYTES`
    bytes."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with path.open("rb") as file:
            return mark.encode() in file.read(min(MARK_BYTES, path.stat().st_size))
    except OSError:
        return False


def require_own_file(path: Path, mark: str, remedy: str) -> None:
    """UserError when ``path`` exists and :func:`has_mark` is false for it."""
    if os.path.lexists(path) and not has_mark(path, mark):
        raise UserError(f"{path}: is there and not of ours; nothing is overwritten: {remedy}")
