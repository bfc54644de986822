"""Rounds, their least and medians, and when a machine counts as busy: on clocks that the tests turn
themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from scd_sf.evaluation.table import ResultRow
from scd_sf.evaluation.timing import (
    Cost,
    Machine,
    machine_seconds,
    time_in_rounds,
    time_stream,
    timings,
    unrest,
)
from scd_sf.types import UserError


class Fake:
    """A machine of two cores whose clocks move only by :meth:`work`."""

    def __init__(self) -> None:
        self.now = self.cpu = self.rest = 0.0
        self.order: list[str] = []
        self.machine = Machine(
            lambda: self.now, lambda: self.cpu, lambda: self.cpu + self.rest, cores=2
        )

    def work(self, wall: float, own: float, others: float) -> None:
        self.now, self.cpu, self.rest = self.now + wall, self.cpu + own, self.rest + others

    def cost(self, name: str, walls: list[float], own: float = 1.0, others: float = 0.0) -> Cost:
        """A model that makes two frames, the first in a quarter of the time; ``walls``: seconds of
        its runs in turn, of which it computes the share ``own``, while others use ``others``
        cores."""
        left, block = iter(walls), nn.Identity()

        def stream() -> Iterator[Tensor]:
            self.order.append(name)
            wall = next(left)
            for share in (0.25, 0.75):
                self.work(share * wall, share * wall * own, share * wall * others)
                yield block(torch.zeros(1, 1))

        return Cost(stream, nn.Sequential(block), nn.Identity, 1)


def test_rounds_take_turns_and_the_least_counts() -> None:
    fake = Fake()
    costs = {"a": fake.cost("a", [4.0, 2.0, 3.0]), "b": fake.cost("b", [1.0, 1.0, 9.0])}
    time_in_rounds(list(costs.values()), 3, 100.0, fake.machine)
    assert fake.order == ["a", "b"] * 3
    row = costs["a"].fill(ResultRow("a", "scd", "2", 4, "euler", 1.0, 1.0, None))
    assert (row.seconds_per_frame, row.seconds_to_first_frame, row.block_passes_per_frame) == (
        1.0,
        0.5,
        1.0,
    )
    told = timings(costs, fake.machine)
    assert told["seconds_per_frame_by_round"] == {"a": [2.0, 1.0, 1.5], "b": [0.5, 0.5, 4.5]}


@pytest.mark.parametrize(
    ("walls", "rounds", "seconds", "runs"),
    [
        ([1.0] * 9, 5, 100.0, 5),  # room for all
        ([1.0] * 9, 5, 4.0, 4),  # as many as fit
        ([2.0] * 9, 5, 3.0, 3),  # three may take thrice the time
        ([20.0] * 9, 5, 3.0, 1),  # but no more
        ([2.0] * 9, 2, 3.0, 2),
    ],
)
def test_how_often_a_model_is_run(
    walls: list[float], rounds: int, seconds: float, runs: int
) -> None:
    fake = Fake()
    cost = fake.cost("a", walls)
    time_in_rounds([cost], rounds, seconds, fake.machine)
    assert len(cost.runs) == runs


def test_a_quiet_machine_has_nothing_to_say() -> None:
    fake = Fake()
    costs = {name: fake.cost(name, [1.3, 1.0, 1.1, 1.2, 1.0], own=1.6, others=0.1) for name in "ab"}
    time_in_rounds(list(costs.values()), 5, 100.0, fake.machine)
    assert unrest(costs, fake.machine) == []


@pytest.mark.parametrize(
    ("make", "signs"),
    [
        (
            lambda fake: fake.cost("a", [1.0] * 3, others=0.8),
            ["other processes used 0.8 of 2 cores"],
        ),
        (
            lambda fake: fake.cost("a", [1.0] * 3, own=0.6),
            ["the models waited 40 % of their time for a core"],
        ),
        (
            lambda fake: fake.cost("a", [2.0, 1.0, 1.6]),
            ["a: its rounds differ, the median is 1.60x the least"],
        ),
        (lambda fake: fake.cost("a", [50.0]), ["a: time for 1 of 3 rounds only"]),
    ],
)
def test_each_sign_of_a_busy_machine(make: Callable[[Fake], Cost], signs: list[str]) -> None:
    """One at a time; a model that ran quietly beside it does not hide it."""
    fake = Fake()
    costs = {"a": make(fake), "b": fake.cost("b", [0.001] * 3)}
    time_in_rounds(list(costs.values()), 3, 4.0, fake.machine)
    assert unrest(costs, fake.machine) == signs == timings(costs, fake.machine)["machine_busy"]


def test_one_slow_round_is_forgiven() -> None:
    fake = Fake()
    cost = fake.cost("a", [1.0, 4.0, 1.05])
    time_in_rounds([cost], 3, 100.0, fake.machine)
    assert unrest({"a": cost}, fake.machine) == [] and cost.seconds_per_frame == 0.5


def test_a_real_machine_is_read() -> None:
    before, fake = machine_seconds(), Fake()
    sum(range(3_000_000))
    assert machine_seconds() > before, "this process alone used some"
    run = time_stream(lambda: iter([torch.zeros(1, 3), torch.zeros(1, 1)]), Machine())
    assert run.frames == 4 and 0 <= run.first_frame_seconds <= run.seconds
    assert min(run.own_cpu_seconds, run.other_cpu_seconds) >= 0
    with pytest.raises(UserError, match="no frame"):
        time_stream(lambda: iter(()), fake.machine)
