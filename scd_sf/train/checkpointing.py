"""One checkpoint on its way to the disk, by all ranks, in a thread while the training goes on or is waited for.

Every rank writes its own part of the training state; then the main rank, when it has seen the others' marks, writes the
rest and commits. The thread uses no collective; marks are files in the checkpoint's own directory, which all ranks must
see. ``latest`` moves after the commit, never before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from scd_sf.checkpoint import STATE, Checkpoints, problem_of
from scd_sf.distributed import Ranks
from scd_sf.files import fsync_tree
from scd_sf.types import UserError

_PATIENCE = 3600.0  # seconds that the main rank waits for another rank's part


class Saving:
    """Writes ``step`` from now on. ``write_state(dir)`` is this rank's part, ``commit`` the main rank's end of it."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        ranks: Ranks,
        step: int,
        write_state: Callable[[Path], None],
        commit: Callable[[], None],
    ) -> None:
        self.step, self.problem = step, ""
        self._folder, self._ranks = checkpoints.path(step).with_suffix(".tmp"), ranks
        self._write_state, self._commit = write_state, commit
        self._part_done, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> str:
        """Until the checkpoint is on the disk, on every rank: what went wrong on this one, or nothing.

        All ranks call it. They agree before the main rank is waited for: a rank that is gone is noticed, and one whose
        disk is too full to leave a mark is not waited for.
        """
        self._part_done.wait()
        if self._ranks.any(bool(self.problem)):
            self._given_up.set()
        self._thread.join()
        return self.problem

    def _run(self) -> None:
        self.problem = problem_of(self._write_part)
        self._part_done.set()
        if self._ranks.is_main and not self.problem:
            self.problem = problem_of(self._finish)

    def _write_part(self) -> None:
        problem = problem_of(lambda: self._write_state(self._folder / STATE))
        if not self._ranks.is_main:  # whose commit brings the whole tree onto the disk
            problem = problem or problem_of(lambda: fsync_tree(self._folder / STATE))
            mark = self._mark(self._ranks.rank)
            begun = mark.with_name(mark.name + ".begun")  # else the main rank could read it before its words are in it
            begun.write_text(problem)
            begun.rename(mark)
        if problem:
            raise UserError(problem)

    def _finish(self) -> None:
        for rank in range(1, self._ranks.world):
            self._await(rank)
        self._commit()

    def _await(self, rank: int) -> None:
        mark, until = self._mark(rank), time.monotonic() + _PATIENCE
        while not mark.exists():
            if self._given_up.is_set():
                raise UserError("another process could not write its part and says why")
            if time.monotonic() > until:
                raise UserError(f"{mark}: rank {rank} has not written its part in {_PATIENCE:.0f} s; see its output")
            time.sleep(0.01)
        if said := mark.read_text():
            raise UserError(f"rank {rank}: {said}")
        mark.unlink()

    def _mark(self, rank: int) -> Path:
        return self._folder / f".rank_{rank:05d}"
