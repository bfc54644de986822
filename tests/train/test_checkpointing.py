"""A checkpoint by several ranks: the main rank commits after the others' parts, and waits for none
that cannot come."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest
import torch

from scd_sf.checkpoint import Checkpoints
from scd_sf.distributed import Ranks
from scd_sf.train.checkpointing import BackgroundSave, _Saved
from scd_sf.types import UserError


class Agreed(Ranks):
    """Two ranks whose answer to ``any`` is known: ``local_rank`` 1 stands for a failure
    somewhere."""

    def any(self, flag: bool) -> bool:
        return flag or self.local_rank == 1


def saving(
    root: Path,
    rank: int,
    committed: list[int],
    *,
    fails_elsewhere: bool = False,
    full: bool = False,
) -> BackgroundSave:
    ranks = Agreed(rank, 2, int(fails_elsewhere), torch.device("cpu"))

    def write_state(folder: Path) -> None:
        if full:
            raise OSError(28, "No space left on device")
        (folder / f"rank{rank}").write_text("part")

    return BackgroundSave(Checkpoints(root), ranks, 3, write_state, lambda: committed.append(rank))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Checkpoints(tmp_path).prepare(3, 0)
    return tmp_path


def test_the_main_rank_commits_after_the_other_has_written(root: Path) -> None:
    committed: list[int] = []
    main = saving(root, 0, committed)
    time.sleep(0.1)
    assert committed == [], "rank 1 has not written yet"
    other = saving(root, 1, committed)
    assert [other.wait(), main.wait(), committed] == ["", "", [0]]
    assert not list(root.glob("step_*/.rank_*"))


def test_a_part_that_cannot_be_written_is_everybodys_failure(root: Path) -> None:
    committed: list[int] = []
    main, other = saving(root, 0, committed), saving(root, 1, committed, full=True)
    assert "No space left" in other.wait() and "rank 1: OSError" in main.wait() and committed == []


def test_nobody_waits_for_a_mark_that_could_not_be_left(root: Path) -> None:
    """Rank 1's disk has no room even for its mark: it is known by agreement only."""
    committed: list[int] = []
    assert "another process" in saving(root, 0, committed, fails_elsewhere=True).wait()
    assert committed == []


def test_a_mark_is_never_seen_without_its_words(root: Path) -> None:
    """Rank 1's mark says what went wrong from the moment it is there."""
    seen: list[str] = []
    watching = threading.Event()

    def watch() -> None:
        is_over = False
        while not is_over:
            is_over = watching.is_set()  # and a last time: the mark of the last save stays
            with contextlib.suppress(OSError):
                seen.extend(mark.read_text() for mark in root.rglob(".rank_00001"))

    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(30):
        assert "No space left" in saving(root, 1, [], full=True).wait()
    watching.set()
    thread.join()
    assert seen and all("No space left" in said for said in seen)


def test_a_record_of_an_earlier_version_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have been saved within a step, which is made again and said so; what else is no number
    is refused."""
    saved = _Saved(3, 3, {"left_out": 2.0, "begun/turns": 1.0, "begun/critic/loss": None}, [])
    assert saved.numbers(tmp_path) == {"left_out": 2.0}
    assert "within step 4, which is made again" in caplog.text
    with pytest.raises(UserError, match=r"record\.best_value is no number"):
        _Saved(3, 3, {"best_value": None}, []).numbers(tmp_path)
