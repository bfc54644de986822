"""Which data a run that diverged leaves out, as its directory says."""

from __future__ import annotations

from pathlib import Path

import pytest

from scd_sf.train.skipped import (
    ROLLBACKS,
    Rollback,
    left_out_ranges,
    position,
    read_rollbacks,
    write_rollback,
)
from scd_sf.types import UserError


def positions(rollbacks: list[Rollback], steps: int) -> list[int]:
    ranges = left_out_ranges(rollbacks)
    return [position(step, ranges) for step in range(1, steps + 1)]


def test_nothing_is_left_out_of_a_run_that_never_diverged(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == [] and positions([], 3) == [1, 2, 3]


def test_steps_after_a_rollback_take_the_data_that_comes_next(tmp_path: Path) -> None:
    """At step 4 back to 2; then at step 5, which took the 7th batch, back to 4; then further back
    than before."""
    write_rollback(tmp_path, Rollback(4, 2, 2))
    assert positions(read_rollbacks(tmp_path), 6) == [1, 2, 5, 6, 7, 8]
    write_rollback(tmp_path, Rollback(5, 4, 3))
    assert positions(read_rollbacks(tmp_path), 6) == [1, 2, 5, 6, 8, 9]
    write_rollback(tmp_path, Rollback(2, 1, 1))
    assert positions(read_rollbacks(tmp_path), 6) == [1, 5, 6, 8, 9, 10]
    write_rollback(tmp_path, Rollback(6, 0, 10))
    assert positions(read_rollbacks(tmp_path), 3) == [11, 12, 13]
    assert all(row.time > 1e9 for row in read_rollbacks(tmp_path))


def test_a_line_that_came_twice_counts_once() -> None:
    """An earlier version, killed before its next checkpoint, met the same data and noted it
    again."""
    assert positions([Rollback(4, 2, 2)] * 2, 4) == positions([Rollback(4, 2, 2)], 4)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"at_step": 4, "back_to": 2}',
        '{"at_step": "4", "back_to": 2, "left_out": 2}',
        '{"at_step": 2, "back_to": 2, "left_out": 2}',
        '{"at_step": 4, "back_to": -1, "left_out": 9}',
        '{"at_step": 4, "back_to": 2, "left_out": 1}',
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / ROLLBACKS).write_text(line + "\n")
    with pytest.raises(UserError, match=r"rollbacks\.jsonl.*restore it"):
        read_rollbacks(tmp_path)
