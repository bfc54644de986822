"""Processes and the engine's pure parts, without deepspeed."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from recipe_runner import ROOT
from torch import nn

from scd_sf.distributed import ensure_process_group, init_distributed
from scd_sf.train.base import EngineConfig, StepModule, accumulation
from scd_sf.types import UserError

VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "x")  # recorded, so that what the test sets is undone
        monkeypatch.delenv(name)


def test_plain_python_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ranks = init_distributed()
    assert (ranks.rank, ranks.world, ranks.local_rank, ranks.is_main) == (0, 1, 0, True)
    assert os.environ["WORLD_SIZE"] == "1" and torch.get_num_threads() == 1
    assert ranks.mean({"a": 2.0}) == {"a": 2.0} and ranks.any(True) and not ranks.any(False)
    ranks.barrier()


def test_a_group_of_one_process_needs_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else may listen on the one that was free when the process began."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
        ranks = init_distributed()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        ensure_process_group(ranks)
        try:
            total = torch.ones(1)
            dist.all_reduce(total)
            assert dist.get_world_size() == 1 and total.item() == 1
        finally:
            dist.destroy_process_group()


def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"):
        init_distributed()


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"), [(64, 1, 8, 8), (8, 4, 2, 1), (4, 4, 1, 1)]
)
def test_accumulation(batch: int, micro: int, world: int, expected: int) -> None:
    assert accumulation(batch, micro, world) == expected


def test_accumulation_must_divide() -> None:
    """With what would: with 3 processes no micro-batch does."""
    for arguments, remedy in (
        ((64, 2, 3), "use global_batch=66, or another number of processes"),
        ((24, 5, 4), "use global_batch=20, micro_batch=3, or another number of processes"),
    ):
        fault = f"is {arguments[0]}, not a multiple of {arguments[2]} processes x micro_batch"
        with pytest.raises(UserError, match=f"{fault} {arguments[1]}; {remedy}$"):
            accumulation(*arguments)
    with pytest.raises(UserError, match="must be at least 1"):
        accumulation(8, 0, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"zero_stage": 4},
        {"zero_stage": 0, "dtype": "bf16"},
        {"lr": -1.0},
        {"betas": (0.9, 1.0)},
        {"anneal_from": 2.0},
        {"bucket": 0},
    ],
)
def test_engine_config_is_checked(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change)).split("_")[0]):
        EngineConfig(**change)  # type: ignore[arg-type]


def test_step_module_owns_only_the_model() -> None:
    model = nn.Linear(2, 2)
    step = StepModule(model, lambda m, x: m(x).sum())
    assert [name for name, _ in step.named_parameters()] == ["model.weight", "model.bias"]
    assert step(torch.ones(1, 2)).ndim == 0
    with pytest.raises(TypeError, match="must be a function"):
        StepModule(model, nn.Linear(2, 2))


HEAP = """
from scd_sf.distributed import keep_freed_memory, release_freed_memory
from scd_sf.evaluation.roofline import peak_gib
keep_freed_memory()
release_freed_memory()
before = peak_gib(reset=True)
pieces = [b"1" * (8 << 20) for _ in range(24)]
del pieces
kept = peak_gib(reset=True)
release_freed_memory()
print(kept - before, kept - peak_gib(reset=True))
"""


def test_freed_memory_is_kept_and_given_back() -> None:
    """192 MiB in pieces that no mmap serves, in a process whose heap nothing else has used."""
    done = subprocess.run(
        [sys.executable, "-c", HEAP], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert all(float(gib) > 0.15 for gib in done.stdout.split()), done.stdout
