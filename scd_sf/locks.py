"""The file that says whose a folder is while a job runs; :func:`scd_sf.files.locked` is the way to use it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import IO

from scd_sf.types import UserError, printable

OWNER = "process "  # what a lock's words begin with


def take_lock(path: Path, what: str) -> IO[str]:
    """The open lock ``path``; whoever closes it frees it. UserError: another process has it, or it is no lock."""
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
