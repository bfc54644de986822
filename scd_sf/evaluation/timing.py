"""How long models take, side by side: rounds over all of them, and whether the machine was quiet
enough to tell.

Other work only ever adds to a time. So a model's seconds are the least of its rounds, two models
are compared by their medians over the same rounds, and :func:`unrest` says when neither means
anything.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import psutil
from torch import Tensor, nn

from scd_sf.evaluation.table import BlockPassCounter, ResultRow
from scd_sf.types import UserError

LEAST_ROUNDS = 3  # a median of fewer is any one of them
OTHERS_SHARE = 0.25  # of all cores, used by other processes
OWN_SHARE = 0.9  # of the wall time, that the process was computing
SPREAD = 1.25  # median over least


def machine_seconds() -> float:
    """CPU seconds that all processes of this machine, and its host in its place, have used since it
    started."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests are part of user and nice
    return float(sum(value for name, value in times.items() if name not in idle))


@dataclass(frozen=True)
class Machine:
    """Where seconds are read: of the wall clock, of this process on all its cores, of everything on
    this machine."""

    clock: Callable[[], float] = time.perf_counter
    own: Callable[[], float] = time.process_time
    everything: Callable[[], float] = machine_seconds
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)


@dataclass(frozen=True)
class TimedRun:
    """One clip of one model: wall seconds in all and until the first frame, CPU seconds of this
    process and of others meanwhile, and how many frames came."""

    seconds: float
    first: float
    own: float
    others: float
    frames: int

    @property
    def seconds_per_frame(self) -> float:
        return self.seconds / self.frames


def time_stream(
    stream: Callable[[], Iterable[Tensor]],
    machine: Machine,
    synchronize: Callable[[], None] | None = None,
) -> TimedRun:
    """Time a callable that yields chunks of frames (B, n, ...), from the call to its end.

    The clock starts before ``stream()`` is called, so the prompt's own cost counts when the
    callable includes it. ``synchronize`` (``torch.cuda.synchronize``) runs before every reading.
    """

    def clock() -> float:
        if synchronize is not None:
            synchronize()
        return machine.clock()

    frames, first_at = 0, 0.0
    own, everything, start = machine.own(), machine.everything(), clock()
    for chunk in stream():
        if frames == 0:
            first_at = clock() - start
        frames += chunk.shape[1]
    seconds = clock() - start
    own, everything = machine.own() - own, machine.everything() - everything
    if frames < 1:
        raise UserError("the model yielded no frame; nothing can be timed")
    return TimedRun(seconds, first_at, own, max(0.0, everything - own), frames)


@dataclass
class Cost:
    """Runs of one model at batch 1: ``stream`` yields frames (B, n, ...); a forward of a ``block``
    is one block pass and carries ``frames_per_pass`` frames."""

    stream: Callable[[], Iterable[Tensor]]
    model: nn.Module
    block: type[nn.Module]
    frames_per_pass: int
    runs: list[TimedRun] = field(default_factory=list)
    passes: float = 0.0

    def wants_more(self, rounds: int, seconds: float) -> bool:
        """One run, then up to ``rounds`` while another fits into ``seconds``; :data:`LEAST_ROUNDS`
        may take thrice as long."""
        spent = sum(run.seconds for run in self.runs)
        again = spent / max(1, len(self.runs))
        budget = 3 * seconds if len(self.runs) < LEAST_ROUNDS else seconds
        return not self.runs or (len(self.runs) < rounds and spent + again <= budget)

    def run_once(self, machine: Machine) -> None:
        with BlockPassCounter(self.model, self.block) as counter:
            run = time_stream(self.stream, machine)
        self.runs.append(run)
        self.passes = counter.per_frame(run.frames, frames_per_pass=self.frames_per_pass)

    @property
    def seconds_per_frame(self) -> float:
        """The least of the rounds."""
        return min(run.seconds_per_frame for run in self.runs)

    def fill(self, row: ResultRow) -> ResultRow:
        """``row`` with block passes per frame and the least of the timings."""
        return replace(
            row,
            block_passes_per_frame=self.passes,
            seconds_per_frame=self.seconds_per_frame,
            seconds_to_first_frame=min(run.first for run in self.runs),
        )


def time_in_rounds(
    costs: Sequence[Cost], rounds: int, seconds: float, machine: Machine | None = None
) -> None:
    """Run all models in turn until each has its rounds: a slow minute of the machine hits them
    all."""
    machine = machine or Machine()
    while waiting := [cost for cost in costs if cost.wants_more(rounds, seconds)]:
        for cost in waiting:
            cost.run_once(machine)


def unrest(costs: Mapping[str, Cost], machine: Machine | None = None) -> list[str]:
    """Why these seconds tell little, a line for each sign; empty when the machine was quiet. Costs
    by row name."""
    machine, signs = machine or Machine(), []
    runs = [run for cost in costs.values() for run in cost.runs]
    wall = sum(run.seconds for run in runs)
    others, own = (
        sum(used) / wall for used in ([run.others for run in runs], [run.own for run in runs])
    )
    if others > OTHERS_SHARE * machine.cores:
        signs.append(f"other processes used {others:.1f} of {machine.cores} cores")
    if own < OWN_SHARE:
        signs.append(f"the models waited {100 * (1 - own):.0f} % of their time for a core")
    for name, cost in costs.items():
        times = [run.seconds_per_frame for run in cost.runs]
        if len(times) < LEAST_ROUNDS:
            signs.append(f"{name}: time for {len(times)} of {LEAST_ROUNDS} rounds only")
        elif (spread := statistics.median(times) / min(times)) > SPREAD:
            signs.append(f"{name}: its rounds differ, the median is {spread:.2f}x the least")
    return signs


def timings(costs: Mapping[str, Cost], machine: Machine | None = None) -> dict[str, object]:
    """For the context of a table: how seconds were taken, seconds per frame of every round,
    :func:`unrest`."""
    return {
        "timing": "batch 1, per latent frame, without VAE and text encoder, the least of the rounds",
        "machine_busy": unrest(costs, machine),
        "seconds_per_frame_by_round": {
            name: [run.seconds_per_frame for run in cost.runs] for name, cost in costs.items()
        },
    }
