"""The same body on the plain-torch engine and on DeepSpeed ZeRO-0/1/2/3, on one and two ranks (see
workers.py).

The first DeepSpeed start on a machine compiles its CPU collectives (30 s idle, minutes when busy);
later ones do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train import workers

from scd_sf.distributed import Ranks
from scd_sf.train.base import Engine, EngineConfig
from scd_sf.train.engine import build_engine
from scd_sf.types import UserError

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
Results = dict[str, Any]
LOCAL = [
    "train",
    "ema",
    "one_micro",
    "nan",
    "resume",
    "skips",
    "three",
    "bf16_train",
    "bf16_nan",
    "bf16_resume",
]
# on 1, 2, 1 ranks
LEGS = [["local"], ["zero2", "zero3", "local", "zero1", "zero0"], ["zero2", "local"]]
ONE = ["train-zero2", "ema-zero2", "one_micro-zero2", "three-zero2", "bf16_train-zero2"]
TWO = [
    f"{check}-{kind}"
    for kind in ("local", "zero2", "zero3")
    for check in ("train", "nan", "resume")
]
TWO += [
    "ema-local",
    "ema-zero1",
    "ema-zero2",
    "ema-zero3",
    "bf16_ema-zero1",
    "bf16_ema-zero2",
    "bf16_ema-zero3",
]
TWO += ["train-zero0", "nan-zero0", "resume-zero0"]
TWO += [
    "train-zero1",
    "one_micro-zero2",
    "skips-zero2",
    "three-zero2",
    "bf16_nan-zero2",
    "bf16_resume-zero2",
    "verified-local",
]


def slow(test: Any) -> Any:
    """Several processes that wait for each other: seconds on an idle machine, many minutes on a
    crowded one."""
    return pytest.mark.slow(pytest.mark.timeout(1800)(test))


def migrate(leg: int) -> str:
    return f"migrate-{'+'.join(LEGS[leg])}"


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Results:
    checks = [*(f"{check}-local" for check in LOCAL), migrate(0)]
    return workers.run_checks(ALONE, tmp_path_factory.mktemp("local"), checks)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, local: Results) -> list[Results]:
    return workers.spawn(2, tmp_path_factory.mktemp("two"), workers.run_checks, [*TWO, migrate(1)])


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, pair: list[Results]) -> Results:
    return workers.spawn(1, tmp_path_factory.mktemp("one"), workers.run_checks, [*ONE, migrate(2)])[
        0
    ]


@slow
def test_rank_0_verifies_for_all(pair: list[Results]) -> None:
    """It hashes what is read, once; the others hash nothing, and all hear of a damaged file."""
    main, other = (result["verified-local"] for result in pair)
    assert main["same"] and other["same"]
    assert main["place"] == other["place"] and "Not a directory" in main["place"]
    assert (
        main["hashed"] == ["config.yaml", "model.safetensors", "provenance.json"]
        and other["hashed"] == []
    )
    assert "none of its 1 steps is intact" in main["error"] and other["error"] == main["error"]


def numbers(result: Results) -> list[float]:
    return [value for row in result["history"] for value in (row[0], row[1])] + result["masters"]


def assert_equal_training(result: Results, reference: Results, tolerance: float) -> None:
    assert result["names"] == reference["names"] and result["updates"] == workers.STEPS
    assert numbers(result) == pytest.approx(numbers(reference), rel=tolerance, abs=tolerance)


def assert_bad_batch_left_no_trace(result: Results) -> None:
    assert [row[2:4] for row in result["bad"]] == [[False, False]] * 2
    assert result["untouched"] and result["same"]
    assert (result["skipped"], result["updates"]) == (2, 3)


def assert_exact_resume(result: Results) -> None:
    assert result["went_on"] == result["resumed"] and result["updates"] == [4, 4]


# -------------------------------------------------------------------------------- one plain process


def test_local_trains_with_clean_names(local: Results) -> None:
    result = local["train-local"]
    assert result["names"] == [name for name, _ in workers.Tiny(0).named_parameters()]
    losses = [row[0] for row in result["history"]]
    assert losses[-1] < losses[0] and all(
        row[2] and row[3] and row[4] == 1e-2 for row in result["history"]
    )


def test_local_matches_adamw_written_by_hand(local: Results) -> None:
    """Clip to the global norm, then decoupled decay and bias-corrected moments, in float64."""
    model = workers.Tiny(0).double()
    moments = {
        name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()
    }
    for step in range(workers.STEPS):
        x = workers.data(step).double()
        y = model(x).double()
        loss = ((y - torch.sin(x)) ** 2).mean() + 0.5 * (
            (model(y.detach()).double() - y.detach()) ** 2
        ).mean()
        model.zero_grad()
        loss.backward()
        gradients = {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in model.named_parameters()
        }
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert float(norm.detach()) == pytest.approx(
            local["train-local"]["history"][step][1], rel=1e-4
        )
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = gradients[name] / max(1.0, float(norm) / 0.5)
                m, v = moments[name]
                m.copy_(g)
                v.mul_(0.99).add_(0.01 * g**2)
                decay = 0.1 if p.ndim >= 2 and "norm" not in name and "table" not in name else 0.0
                p.sub_(1e-2 * (decay * p + m / ((v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)))
    by_hand = [value for p in model.parameters() for value in p.detach().reshape(-1).tolist()]
    assert local["train-local"]["masters"] == pytest.approx(by_hand, abs=2e-4)


@pytest.mark.parametrize("dtype", ["", "bf16_"])
def test_local_bad_batch_and_resume(local: Results, dtype: str) -> None:
    assert_bad_batch_left_no_trace(local[f"{dtype}nan-local"])
    assert_exact_resume(local[f"{dtype}resume-local"])


def test_local_micro_batches_equal_one_batch(local: Results) -> None:
    assert_equal_training(local["one_micro-local"], local["train-local"], 1e-6)


def test_local_bf16_follows_fp32(local: Results) -> None:
    """Masters stay fp32: the small updates of every step survive."""
    fp32, bf16 = local["train-local"]["masters"], local["bf16_train-local"]["masters"]
    assert bf16 == pytest.approx(fp32, abs=0.03) and bf16 != fp32


def test_too_many_skips_say_what_to_do(local: Results) -> None:
    assert (
        "2 updates in a row had a non-finite loss or gradient (at update 0)" in local["skips-local"]
    )


def test_resume_keeps_the_memory_order(tmp_path: Path) -> None:
    """Channels-last weights go on exactly: the fused AdamW takes weights and moments in the order
    of memory."""

    def engine() -> Engine:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        cfg = EngineConfig(backend="torch", lr=1e-2)
        return build_engine(model, cfg, ALONE, global_batch=1, micro_batch=1, total_updates=4)

    x = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(1))

    def updates(one: Engine, count: int) -> None:
        for _ in range(count):
            one.backward(one(x).square().mean())
            one.step()

    whole, resumed = engine(), engine()
    updates(whole, 2)
    whole.state().write(tmp_path / "state")
    resumed.load(tmp_path / "state")
    for one in (whole, resumed):
        updates(one, 2)
    for name, value in whole.fp32_masters().items():
        assert torch.equal(value, resumed.fp32_masters()[name]), name


def test_world_size_must_divide_before_anything_is_built() -> None:
    cfg = workers.config("deepspeed")
    with pytest.raises(UserError, match="not a multiple of 1 processes x micro_batch 3"):
        build_engine(workers.Tiny(0), cfg, ALONE, global_batch=8, micro_batch=3, total_updates=1)


def test_misuse_is_an_error(tmp_path: Path) -> None:
    engine = workers.make(workers.config("torch"), ALONE, 8)
    x, scale = workers.data(0), torch.tensor(1.0)
    with pytest.raises(ValueError, match="scalar loss"):
        engine.backward(torch.ones(2, requires_grad=True))
    engine.backward(engine(x, scale))
    with pytest.raises(RuntimeError, match="between micro-batches"):
        engine.state()
    with pytest.raises(RuntimeError, match="more than micro_batches"):
        engine.backward(engine(x, scale))
    with pytest.raises(UserError, match="no engine state to resume from"):
        engine.load(tmp_path / "nothing")


# ---------------------------------------------------------------------------------------- DeepSpeed


@slow
def test_one_rank_deepspeed_equals_local(local: Results, alone: Results) -> None:
    for check in ("train", "one_micro"):
        assert_equal_training(alone[f"{check}-zero2"], local[f"{check}-local"], 1e-6)
    assert_equal_training(alone["bf16_train-zero2"], local["bf16_train-local"], 2e-2)


@slow
@pytest.mark.parametrize("kind", ["local", "zero0", "zero1", "zero2", "zero3"])
def test_two_ranks_equal_one(local: Results, pair: list[Results], kind: str) -> None:
    for results in pair:
        assert_equal_training(results[f"train-{kind}"], local["train-local"], 1e-6)
    assert pair[0][f"train-{kind}"]["masters"] == pair[1][f"train-{kind}"]["masters"]


@slow
def test_micro_batches_equal_one_batch_under_zero2(pair: list[Results]) -> None:
    """Accumulation by hand would silently drop gradients here."""
    assert_equal_training(pair[0]["one_micro-zero2"], pair[0]["train-zero2"], 1e-6)


@slow
@pytest.mark.parametrize("kind", ["local", "zero0", "zero2", "zero3"])
def test_bad_batch_on_one_rank_leaves_no_trace(pair: list[Results], kind: str) -> None:
    for results in pair:
        assert_bad_batch_left_no_trace(results[f"nan-{kind}"])


@slow
@pytest.mark.parametrize("kind", ["local", "zero0", "zero2", "zero3"])
def test_resume_is_exact(pair: list[Results], kind: str) -> None:
    for results in pair:
        assert_exact_resume(results[f"resume-{kind}"])


@slow
def test_state_moves_between_kinds_and_numbers_of_ranks(
    local: Results, pair: list[Results], alone: Results
) -> None:
    """1 rank, 2, 1: every update goes on from what another kind of engine saved, and the run is the
    unbroken one."""
    legs = [results["migrate"] for results in (local, pair[0], alone)]
    history = [row for leg in legs for row in leg["history"]]
    unbroken = workers.train(workers.config("torch"), ALONE, 2, steps=len(history))
    assert len(history) == sum(map(len, LEGS)) == legs[-1]["updates"]
    result = {"history": history, "masters": legs[-1]["masters"]}
    assert numbers(result) == pytest.approx(numbers(unbroken), rel=1e-6, abs=1e-6)


@slow
def test_bf16_on_two_ranks(pair: list[Results]) -> None:
    for results in pair:
        assert_bad_batch_left_no_trace(results["bf16_nan-zero2"])
        assert_exact_resume(results["bf16_resume-zero2"])


@slow
def test_sharded_average_is_the_unsharded_one(
    local: Results, alone: Results, pair: list[Results]
) -> None:
    """Bit for bit, and the ranks share the memory."""
    total = sum(parameter.numel() for parameter in workers.Tiny(0).parameters())
    for world, results in ((1, [local]), (1, [alone]), (2, pair)):
        for name in (name for name in results[0] if "ema-" in name):
            ranks = [rank[name] for rank in results]
            assert all(all(rank["equal"]) and rank["copied"] and rank["moved"] for rank in ranks), (
                name
            )
            assert (
                len(ranks[0]["equal"])
                == len(ranks[0]["names"])
                == len(dict(workers.Tiny(0).named_parameters()))
            )
            assert sum(rank["held"] for rank in ranks) == total, name
            assert all(abs(rank["held"] - total / world) <= 16 for rank in ranks), name


@slow
def test_student_critic_and_teacher_in_one_process(
    local: Results, alone: Results, pair: list[Results]
) -> None:
    for results in (alone, *pair):
        result = results["three-zero2"]
        assert not result["trainable"]
        assert not result["patched"], "a ZeRO-3 engine replaced F.linear for the whole process"
        assert result["masters"] == pytest.approx(local["three-local"]["masters"], abs=1e-5)
        flat = [value for row in result["losses"] for value in row]
        assert flat == pytest.approx(
            [v for row in local["three-local"]["losses"] for v in row], rel=1e-4
        )
    names, whole = alone["three-zero2"]["reads"], local["three-local"]["held"]
    assert len(names) == len(set(names)) > 1 and local["three-local"]["reads"] == names
    assert [results["three-zero2"]["reads"] for results in pair] == [names, []], (
        "rank 0 alone reads, every tensor once"
    )
    assert all(whole / 2 <= results["three-zero2"]["held"] < 0.6 * whole for results in pair), (
        "nobody holds the whole"
    )


@slow
def test_skips_stop_every_rank(pair: list[Results]) -> None:
    assert all("2 updates in a row" in results["skips-zero2"] for results in pair)
