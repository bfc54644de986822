"""Kill -9 at write boundaries of a checkpoint and at random moments: the resumed run is the
unbroken one, bit for bit.

    make test T=tests/recipes/test_faults.py SLOW=1 \\
        ARGS="--kill-points 15 --tally docs/results/faults.json"

takes that many points per case, spread evenly over all boundaries of the case's run.
"""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
import torch
from recipe_runner import At
from tiny_run import BACKWARD, SCRIPTS, Chain

from scd_sf.checkpoint import find
from scd_sf.tensor_files import read_tensors

WRITES = "os:fsync|os:rename|os:replace|safetensors.torch:save_file"
CASES = [
    ("stage2", 1, ""),
    ("stage2", 2, ""),
    ("stage3", 1, ""),
    ("stage3", 2, ""),
    ("stage3", 2, "train.async_save=true"),
]


def arguments(chain: Chain, stage: str, world: int, more: str, run: Path) -> list[str]:
    given = chain.stage2(run) if stage == "stage2" else chain.stage3(run)
    # else the number of writes depends on how long the run takes
    steady = "run.heartbeat_seconds=3600"
    return [*given, "train.micro_batch=1", steady, *([more] if more else [])]


def outcome(run: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Every logged number, and every tensor of the last checkpoint: weights, averages,
    optimizers."""
    newest = find(run)
    tensors = {}
    for file in sorted(newest.rglob("*.safetensors")):
        for name, value in read_tensors(file).items():
            tensors[f"{newest.name}/{file.relative_to(newest)}/{name}"] = value
    return tiny_run.metrics(run), tensors


def same(left: Path, right: Path) -> bool:
    (rows, tensors), (others, other) = outcome(left), outcome(right)
    return (
        rows == others
        and tensors.keys() == other.keys()
        and all(torch.equal(tensors[n], other[n]) for n in tensors)
    )


def points(total: int, count: int) -> list[int]:
    """``count`` of the numbers 1..total, spread evenly, the first and the last among them."""
    return sorted(
        {1 + round(i * (total - 1) / max(1, count - 1)) for i in range(min(count, total))}
    )


def kill_and_resume(
    given: list[str], stage: str, world: int, run: Path, at: At, victim: int
) -> bool:
    killed = recipe_runner.run_ranks(SCRIPTS[stage], *given, world=world, at={victim: at})
    assert killed[victim].code == -signal.SIGKILL, f"{at}: {killed[victim].err}"
    resumed = recipe_runner.run_ranks(SCRIPTS[stage], *given, world=world)
    assert all(result.code == 0 for result in resumed), f"{at}: {resumed[0].err}"
    return same(run, run.parent / "whole")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("stage", "world", "more"), CASES)
def test_kill_points(
    chain: Chain, tmp_path: Path, pytestconfig: pytest.Config, stage: str, world: int, more: str
) -> None:
    count = int(pytestconfig.getoption("--kill-points"))
    whole: dict[str, int] = {}
    targets = {"writes": At(WRITES, 10**9), "moments": At(BACKWARD, 10**9)}
    runs = [list(targets)] if world == 2 else [[name] for name in targets]  # one count for a rank
    for names in runs:
        run = tmp_path / ("whole" if "writes" in names else "moments")
        counting = {rank: targets[names[rank % len(names)]] for rank in range(world)}
        results = recipe_runner.run_ranks(
            SCRIPTS[stage], *arguments(chain, stage, world, more, run), world=world, at=counting
        )
        assert all(result.code == 0 for result in results), results[0].err
        whole |= {name: result.calls for name, result in zip(names, results, strict=True)}
    assert min(whole.values()) > 5, "the places to kill at were not found"
    assert world == 2 or same(tmp_path / "whole", tmp_path / "moments")
    rng = random.Random(f"{stage} {world}")
    boundaries = points(whole["writes"], count - count // 3)
    moments = sorted(rng.sample(range(1, whole["moments"] + 1), min(count // 3, whole["moments"])))
    plan = [(At(WRITES, call), 0) for call in boundaries]
    plan += [(At(BACKWARD, call), rng.randrange(world)) for call in moments]
    exact = []
    for number, (at, victim) in enumerate(plan):
        run = tmp_path / f"run{number}"
        given = arguments(chain, stage, world, more, run)
        exact.append(kill_and_resume(given, stage, world, run, at, victim))
    write_tally(
        pytestconfig.getoption("--tally"), f"{stage}, {world} ranks {more}".strip(), plan, exact
    )
    assert all(exact), [plan[i] for i, ok in enumerate(exact) if not ok]


def write_tally(file: str | None, case: str, plan: list[tuple[At, int]], exact: list[bool]) -> None:
    if not file:
        return
    path = Path(file)
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    kinds = [at.target == WRITES for at, _ in plan]
    cases[case] = {"kill_points": len(plan), "at_writes": sum(kinds), "bit_exact": sum(exact)}
    total = {
        key: sum(entry[key] for entry in cases.values()) for key in ("kill_points", "bit_exact")
    }
    path.write_text(json.dumps({**total, "cases": cases}, indent=1) + "\n")
