"""Times models side by side, in rounds over all of them, and checks whether the machine was quiet
enough.

Other work only ever adds to a time. So a model's seconds are the least of its rounds, two models
are compared by their medians over the same rounds, and :func:`unrest` says when neither is
reliable.
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
    """CPU seconds that all processes of this machine have used since it started; of a virtual
    machine the time that its host took, too."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests are part of user and nice
    return float(sum(value for name, value in times.items() if name not in idle))


@dataclass(frozen=True)
class Machine:
    """The clocks of a machine, in seconds: wall clock, CPU time of this process over all cores, and
    CPU time of all processes. ``cores``: how many it has."""

    clock: Callable[[], float] = time.perf_counter
    process_cpu: Callable[[], float] = time.process_time
    machine_cpu: Callable[[], float] = machine_seconds
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)


@dataclass(frozen=True)
class TimedRun:
    """One clip of one model: wall seconds of all frames and of the first, CPU seconds of this
    process and of the others meanwhile, and the number of frames."""

    seconds: float
    first_frame_seconds: float
    own_cpu_seconds: float
    other_cpu_seconds: float
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

    frames, first_frame_seconds = 0, 0.0
    process_start, machine_start, start = machine.process_cpu(), machine.machine_cpu(), clock()
    for chunk in stream():
        if frames == 0:
            first_frame_seconds = clock() - start
        frames += chunk.shape[1]
    seconds = clock() - start
    own_cpu = machine.process_cpu() - process_start
    other_cpu = max(0.0, machine.machine_cpu() - machine_start - own_cpu)
    if frames < 1:
        raise UserError("the model yielded no frame; nothing can be timed")
    return TimedRun(seconds, first_frame_seconds, own_cpu, other_cpu, frames)


@dataclass
class Cost:
    """Runs of one model at batch 1. ``stream`` yields frames (B, n, ...). A forward of a module of
    the class ``block`` is one block pass, which covers ``frames_per_pass`` frames."""

    stream: Callable[[], Iterable[Tensor]]
    model: nn.Module
    block: type[nn.Module]
    frames_per_pass: int
    runs: list[TimedRun] = field(default_factory=list)
    passes: float = 0.0

    def wants_more(self, rounds: int, seconds: float) -> bool:
        """Whether another run is due: one in any case, then up to ``rounds`` while another fits
        into ``seconds``, or into three times that for the first :data:`LEAST_ROUNDS`."""
        total_seconds = sum(run.seconds for run in self.runs)
        mean_seconds = total_seconds / max(1, len(self.runs))
        budget = 3 * seconds if len(self.runs) < LEAST_ROUNDS else seconds
        return not self.runs or (len(self.runs) < rounds and total_seconds + mean_seconds <= budget)

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
            seconds_to_first_frame=min(run.first_frame_seconds for run in self.runs),
        )


def time_in_rounds(
    costs: Sequence[Cost], rounds: int, seconds: float, machine: Machine | None = None
) -> None:
    """Run all models in turn until each has its rounds: a slow minute of the machine hits them
    all."""
    machine = machine or Machine()
    while unfinished_costs := [cost for cost in costs if cost.wants_more(rounds, seconds)]:
        for cost in unfinished_costs:
            cost.run_once(machine)


def unrest(costs: Mapping[str, Cost], machine: Machine | None = None) -> list[str]:
    """Why the seconds of these costs (by row name) are unreliable, a line for each reason; empty
    when the machine was quiet."""
    machine = machine or Machine()
    signs: list[str] = []
    runs = [run for cost in costs.values() for run in cost.runs]
    wall = sum(run.seconds for run in runs)
    other_share = sum(run.other_cpu_seconds for run in runs) / wall
    own_share = sum(run.own_cpu_seconds for run in runs) / wall
    if other_share > OTHERS_SHARE * machine.cores:
        signs.append(f"other processes used {other_share:.1f} of {machine.cores} cores")
    if own_share < OWN_SHARE:
        signs.append(f"the models waited {100 * (1 - own_share):.0f} % of their time for a core")
    for name, cost in costs.items():
        seconds = [run.seconds_per_frame for run in cost.runs]
        if len(seconds) < LEAST_ROUNDS:
            signs.append(f"{name}: time for {len(seconds)} of {LEAST_ROUNDS} rounds only")
        elif (spread := statistics.median(seconds) / min(seconds)) > SPREAD:
            signs.append(f"{name}: its rounds differ, the median is {spread:.2f}x the least")
    return signs


def timings(costs: Mapping[str, Cost], machine: Machine | None = None) -> dict[str, object]:
    """The timing part of a table's context: how seconds were measured, seconds per frame of every
    round, and :func:`unrest`."""
    return {
        "timing": "batch 1, per latent frame, without VAE and text encoder, the least of the rounds",
        "machine_busy": unrest(costs, machine),
        "seconds_per_frame_by_round": {
            name: [run.seconds_per_frame for run in cost.runs] for name, cost in costs.items()
        },
    }
