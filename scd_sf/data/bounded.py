"""A folder of reproducible files that any number of processes keep within a budget of bytes."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from scd_sf.files import files_below, new_file, sweep

# share of the budget that stays in use when room is made, so that not every write has to make room
REMAINING_SHARE = 0.9


class BoundedFolder:
    """Files ``FOLDER/name`` below ``root``, together at most ``limit`` bytes: where one more would
    not fit, the oldest are removed. The folder is measured when its recorded size says that it is
    full, or when there is no record."""

    def __init__(self, root: Path, limit: int, pattern: str) -> None:
        self.root, self.limit, self.pattern = root, limit, pattern

    def write(self, file: Path, data: bytes) -> None:
        """Write ``file`` atomically. Data larger than the whole budget are not written. Raises
        OSError."""
        if len(data) > self.limit:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with self._size_lock() as record:
            total = self._recorded_size(record) + len(data)
            if total > self.limit:
                total = self._make_room(
                    max(0, round(REMAINING_SHARE * self.limit) - len(data))
                ) + len(data)
            record.seek(0)
            record.truncate()
            record.write(str(total))
            # first: a kill in between leaves a record that is too high, never too low
            record.flush()
            file.parent.mkdir(exist_ok=True)
            with new_file(file, durable=False) as part:
                part.write_bytes(data)

    @contextmanager
    def _size_lock(self) -> Iterator[IO[str]]:
        """The open record of the folder's size, locked against other processes where the file
        system has locks."""
        with (self.root / ".size").open("a+", encoding="utf-8", errors="replace") as record:
            with suppress(OSError):
                fcntl.flock(record, fcntl.LOCK_EX)
            yield record

    def _recorded_size(self, record: IO[str]) -> int:
        record.seek(0)
        text = record.read(20).strip()
        return int(text) if text.isascii() and text.isdigit() else self._make_room(self.limit)

    def _make_room(self, size: int) -> int:
        """Remove the oldest files until at most ``size`` bytes remain. Returns the remaining
        bytes."""
        for folder in self.root.iterdir():
            sweep(folder)
        entries = []
        for file in files_below(self.root):
            if file.match(self.pattern):
                with suppress(FileNotFoundError):
                    entries.append((file.stat().st_mtime_ns, file.stat().st_size, file))
        total = sum(length for _, length, _ in entries)
        for _, length, file in sorted(entries):
            if total <= size:
                break
            file.unlink(missing_ok=True)
            total -= length
        return total
