"""The collapse monitors of stage 3, on made-up logs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import recipe_runner


def best_steps(distances: list[float], stds: list[float] | None = None) -> list[float]:
    stage3 = recipe_runner.load_script("recipes/stage3_self_forcing.py")
    cfg = SimpleNamespace(
        data_std=1.0,
        std_range=(0.75, 1.33),
        healthy_within=1.3,
        train=SimpleNamespace(steps=len(distances)),
    )
    record: dict[str, float] = {}
    found = []
    for step, distance in enumerate(distances, 1):
        std = 1.0 if stds is None else stds[step - 1]
        logs = stage3.watch(record, {"dmd/fake_real": distance, "rollout/std": std}, cfg, step)
        found.append(logs["monitor/best_step"])
    return found


def test_a_healthy_run_keeps_its_newest_average() -> None:
    wandering = [0.40, 0.30, 0.42, 0.33, 0.28, 0.41] * 10
    assert best_steps(wandering)[-1] == 60
    assert best_steps(wandering)[8] == 0, "not before the averages have settled"


def test_a_collapse_keeps_the_average_from_before_it() -> None:
    collapsing = [0.15 - 0.001 * i for i in range(50)] + [0.10 + 0.02 * i for i in range(50)]
    assert 50 <= best_steps(collapsing)[-1] <= 60


@pytest.mark.parametrize("std", [0.5, 1.6])
def test_a_spread_unlike_the_datas_is_not_healthy(std: float) -> None:
    assert best_steps([0.3] * 40, [1.0] * 20 + [std] * 20)[-1] == 20
