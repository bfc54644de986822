"""Whose a folder or a file is: the lock of a running job (used through :func:`scd_sf.files.locked`), and the marks by
which a command knows what an earlier run of it has made. Nothing else is overwritten or deleted."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from scd_sf.types import UserError, printable

LEFT = re.compile(r"\.lock|\.writable|\.part-.*")  # in a folder in which a job did not come to begin
MARK_BYTES = 2**22  # of a file that are searched for its mark
OWNER = "process "  # what a lock's words begin with


def take_lock(path: Path, what: str) -> IO[str]:
    """The open lock ``path``; whoever closes it frees it. UserError: another process has it, or it is no lock."""
    while True:
        file = _opened(path)
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


def _opened(path: Path) -> IO[str]:
    """The lock's file, made if missing. UserError where something else has its name."""
    strange = UserError(f"{path}: not a lock of ours; move it away, or use another folder")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise strange from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise strange
    file = os.fdopen(handle, "r+", encoding="utf-8", errors="replace")
    if file.read(len(OWNER)) not in ("", OWNER):
        file.close()
        raise strange
    return file


def require_own_folder(folder: Path, marks: Iterable[str], remedy: str = "use another out=") -> None:
    """UserError where ``folder`` is no folder, or has contents and nothing that a command puts there first."""
    if not folder.is_dir():
        if folder.is_symlink() or folder.exists():
            raise UserError(f"{folder}: is there and no folder; nothing of others is touched: {remedy}")
        return
    names = {path.name for path in folder.iterdir() if not LEFT.fullmatch(path.name)}
    wanted = list(marks)
    if names and not any((folder / mark).exists() for mark in wanted):
        other, mark = printable(min(names))[:80], " or ".join(wanted)
        raise UserError(
            f"{folder}: holds other files ({other}) and no {mark} of ours; nothing of others is touched: {remedy}"
        )


def has_mark(path: Path, mark: str) -> bool:
    """Whether a path is a regular file, no link, with ``mark`` in its first :data:`MARK_BYTES` bytes."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with path.open("rb") as file:
            return mark.encode() in file.read(min(MARK_BYTES, path.stat().st_size))
    except OSError:
        return False


def require_own_file(path: Path, mark: str, remedy: str) -> None:
    """UserError when there is something called ``path`` that is not :func:`has_mark`."""
    if os.path.lexists(path) and not has_mark(path, mark):
        raise UserError(f"{path}: is there and not of ours; nothing is overwritten: {remedy}")
