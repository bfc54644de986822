"""A folder within its budget: the oldest files go first, whoever writes, whatever was killed."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest

from scd_sf.data import bounded
from scd_sf.data.bounded import BoundedFolder


def sizes(root: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in root.rglob("*.bin")}


def fill(root: Path, names: range, limit: int = 1000, size: int = 100) -> None:
    folder = BoundedFolder(root, limit, "*.bin")
    for number in names:
        file = root / f"{number % 3}" / f"{number:03d}.bin"
        folder.write(file, bytes(size))
        with contextlib.suppress(FileNotFoundError):  # it was too large, or another writer's limit
            os.utime(file, ns=(number, number))


def test_the_oldest_go_first(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    fill(root, range(10))
    (root / "note.txt").write_bytes(bytes(5000))  # not one of its files
    assert sum(sizes(root).values()) == 1000
    fill(root, range(10, 11))
    assert sorted(sizes(root)) == [f"{n:03d}.bin" for n in range(2, 11)]
    fill(root, range(11, 12), size=1001)
    assert "011.bin" not in sizes(root) and len(sizes(root)) == 9
    fill(root, range(12, 13), limit=450)  # a smaller budget than the last time
    assert (
        sorted(sizes(root)) == ["008.bin", "009.bin", "010.bin", "012.bin"]
        and (root / "note.txt").exists()
    )


def test_many_writers_keep_the_budget(tmp_path: Path) -> None:
    writers = [threading.Thread(target=fill, args=(tmp_path, range(n, 60, 4))) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert 700 <= sum(sizes(tmp_path).values()) <= 1000


@pytest.mark.parametrize("record", ["", "nonsense", "0"])
def test_a_lost_or_killed_record_is_measured_again(
    tmp_path: Path, record: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    fill(tmp_path, range(9))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bounded, "new_file", killed)
        fill(tmp_path, range(9, 10))
    assert (tmp_path / ".size").read_text() == "1000"  # too high, never too low
    if record != "0":
        (tmp_path / ".size").write_text(record)
    fill(tmp_path, range(10, 30))
    assert sum(sizes(tmp_path).values()) <= 1000 and "029.bin" in sizes(tmp_path)
