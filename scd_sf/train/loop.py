"""What the training loops of all recipes share: progress, requests, errors and end.

The loop with its update is in each recipe's ``main``:

start = checkpointer.resume()
with Loop(run, checkpointer, start) as loop:
    for step in loop:
        ...  # one update, on the data of loop.position(step)
        last, request = step == cfg.train.steps, loop.request()
        if last or request or step % cfg.train.save_every == 0:
            checkpointer.save(step, required=last or request is Request.STOP)
        if request is Request.STOP and not last:
            loop.leave(step)
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn, Self

from scd_sf.train.base import Diverged
from scd_sf.train.checkpointing import Checkpointer
from scd_sf.train.run import Run, rank_zero_print
from scd_sf.train.skipped import (
    ROLLBACKS,
    Rollback,
    left_out_ranges,
    position,
    read_rollbacks,
    write_rollback,
)
from scd_sf.train.stop import EXIT_AGAIN, Control, Request, leave
from scd_sf.types import UserError


class Loop:
    """The steps ``start`` + 1 .. ``train.steps`` of a run, with progress and heartbeat, and how
    they end.

    It listens to signals and to ``RUN/save`` and ``RUN/stop`` (``train/stop.py``). ``status.json``
    says how the loop ended. An error because another rank is gone becomes one that names it. A run
    that diverged notes what it leaves out and ends with exit code 75.
    """

    def __init__(self, run: Run, checkpointer: Checkpointer, start: int) -> None:
        self.run = run
        self.ranks = run.ranks
        self.start = start
        self.train = checkpointer.train
        self._checkpointer, self._step = checkpointer, start
        self._control = Control(run.dir, run.ranks, run.cfg.heartbeat_seconds)
        rows = run.ranks.on_main(
            lambda: [(row.at_step, row.back_to, row.left_out) for row in read_rollbacks(run.dir)]
        )
        self._rollbacks = [Rollback(*row) for row in rows]
        self._left_out = left_out_ranges(self._rollbacks)
        if self.position(start) - start != checkpointer.record.get("left_out", 0.0):
            raise UserError(
                f"{run.dir / ROLLBACKS}: is not the one of the checkpoint of step {start}, which left out other data; "
                "copy it from the run that made the checkpoint"
            )

    def __enter__(self) -> Self:
        self._control.start(self.start, self.train.steps)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._control.say("finished")
            elif isinstance(error, Diverged):
                self._leave_out(error)
            elif isinstance(error, Exception):
                rank_error = self._control.blame(error) if isinstance(error, RuntimeError) else None
                self._control.say("failed", str(rank_error or error))
                if rank_error is not None:
                    raise rank_error from error
        finally:
            self._control.close()

    def __iter__(self) -> Iterator[int]:
        for step in self.run.progress(self.train.steps, self.start):
            self._step = step
            if shift := self.position(step) - step:
                self._checkpointer.record["left_out"] = float(shift)
            self._control.beat(step)
            yield step
            self._control.fulfilled()

    def position(self, step: int) -> int:
        """Position of ``step`` in the order of data and random numbers. It is larger than ``step``
        after a rollback, which leaves data out."""
        return position(step, self._left_out)

    def request(self) -> Request:
        """The largest request to any rank since the previous step, the same on all ranks. All ranks
        call it."""
        return self._control.request()

    def leave(self, step: int) -> NoReturn:
        """End all ranks with exit code 75 ("run me again") after ``step`` was saved."""
        self._end(f"stopped after step {step}, saved", self._control.reason)

    def _leave_out(self, error: Diverged) -> None:
        """Note that the data since the last checkpoint is left out, and end. All ranks together.

        UserError: there is no checkpoint, or ``max_rollbacks`` are used up.
        """
        self._checkpointer.wait()
        path = self.ranks.on_main(self.run.checkpoints.newest)
        if path is None or len(self._rollbacks) >= self.train.max_rollbacks:
            too_many = f"{self.train.max_rollbacks} rollbacks did not help"
            cause = "no checkpoint to go back to" if path is None else too_many
            self._control.say("failed", f"{error}; {cause}")
            raise UserError(
                f"{error}; {cause}; the batches are listed in {self.run.dir / 'skipped.jsonl'}: "
                "look at them, and start a new run.dir with a lower lr"
            ) from error
        newest = int(path.name.removeprefix("step_"))
        rollback = Rollback(self._step, newest, self.position(self._step) - newest)
        self.ranks.on_main(lambda: write_rollback(self.run.dir, rollback))
        message = f"{error}: back to step {newest}, leaving out the data of the {self._step - newest} steps since"
        self._end(message, message)

    def _end(self, text: str, reason: str) -> NoReturn:
        self._control.fulfilled()
        self._control.say("interrupted", reason)
        rank_zero_print(self.ranks, f"{text}; run the same command again to go on")
        self.run.finish()
        self.ranks.barrier()
        leave(EXIT_AGAIN)
