"""The body that runs on both engine kinds, 1 or 2 ranks: checks that write their numbers as JSON
for the tests.

One spawn does many checks, because importing torch and deepspeed costs seconds per process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from recipe_runner import free_port
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from scd_sf import checkpoint
from scd_sf.checkpoint import Checkpoints
from scd_sf.distributed import Ranks, init_distributed
from scd_sf.files import sha256_file
from scd_sf.train.base import Engine, EngineConfig, StepModule
from scd_sf.train.ema import Ema, EmaConfig
from scd_sf.train.engine import build_engine, frozen_engine
from scd_sf.train.shards import share
from scd_sf.types import UserError

GLOBAL, STEPS = 8, 3
LINEAR = nn.functional.linear


class Tiny(nn.Module):
    """Two layers, a norm, a table, and a parameter that never gets a gradient; the same weights
    everywhere."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.norm, self.second = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 6)
        self.table, self.unused = nn.Parameter(torch.zeros(1, 16)), nn.Parameter(torch.ones(3, 3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x.to(self.first.weight.dtype)) + self.table))
        out: Tensor = self.second(hidden)
        return out.float()


def rollout_loss(model: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    """Two calls of the model in one engine forward, the second on the first's detached output."""
    y = model(x)
    z = model(y.detach())
    return ((y - torch.sin(x)) ** 2).mean() * scale + 0.5 * ((z - y.detach()) ** 2).mean()


def data(update: int) -> Tensor:
    return torch.randn(GLOBAL, 6, generator=torch.Generator().manual_seed(1000 + update))


def config(backend: Any, **changes: Any) -> EngineConfig:
    base: dict[str, Any] = {
        "backend": backend,
        "lr": 1e-2,
        "betas": (0.0, 0.99),
        "weight_decay": 0.1,
        "grad_clip": 0.5,
    }
    return EngineConfig(**{**base, **changes})


def kind_config(kind: str, dtype: str = "fp32") -> EngineConfig:
    """ "local", or "zero0" .. "zero3"."""
    stage = {} if kind == "local" else {"zero_stage": int(kind.removeprefix("zero"))}
    return config("torch" if kind == "local" else "deepspeed", dtype=dtype, **stage)


def make(cfg: EngineConfig, ranks: Ranks, micro_batch: int, seed: int = 0) -> Engine:
    module = StepModule(Tiny(seed), rollout_loss)
    return build_engine(
        module, cfg, ranks, global_batch=GLOBAL, micro_batch=micro_batch, total_updates=20
    )


def micro_batches(engine: Engine, ranks: Ranks, update: int) -> Iterator[Tensor]:
    """This rank's share of the global batch, cut into micro-batches: the same samples however it is
    cut."""
    mine = data(update).chunk(ranks.world)[ranks.rank]
    yield from mine.chunk(engine.micro_batches)


def update(
    engine: Engine,
    ranks: Ranks,
    number: int,
    bad: tuple[int, int] | None = None,
    value: float = 1.0,
) -> list[Any]:
    """One update; ``bad`` = (rank, micro-batch) whose loss is scaled by ``value``."""
    losses = []
    for index, x in enumerate(micro_batches(engine, ranks, number)):
        scale = torch.tensor(value if bad == (ranks.rank, index) else 1.0)
        loss = engine(x, scale)
        losses.append(float(loss.detach()))
        engine.backward(loss)
        if index + 1 < engine.micro_batches:
            assert not engine.step().stepped
    info = engine.step()
    logs = ranks.mean({"loss": sum(losses) / len(losses)})
    return [logs["loss"], info.grad_norm, info.stepped, info.finite, info.lr]


def flat(engine: Engine) -> list[float]:
    return [
        value for tensor in engine.fp32_masters().values() for value in tensor.reshape(-1).tolist()
    ]


def train(cfg: EngineConfig, ranks: Ranks, micro_batch: int, steps: int = STEPS) -> dict[str, Any]:
    engine = make(cfg, ranks, micro_batch)
    history = [update(engine, ranks, number) for number in range(steps)]
    return {
        "history": history,
        "masters": flat(engine),
        "names": list(engine.fp32_masters()),
        "updates": engine.updates,
    }


def average(cfg: EngineConfig, ranks: Ranks) -> dict[str, Any]:
    """The sharded average of a short training, with warm-up, beside one of the whole masters on
    every rank."""
    engine, alone = make(cfg, ranks, 2), replace(ranks, rank=0, world=1)
    sharded, whole = Ema(EmaConfig(decay=0.6), ranks), Ema(EmaConfig(decay=0.6), alone)
    for number in range(STEPS):
        update(engine, ranks, number)
        sharded.update(engine.owned())
        whole.update(share(name, tensor, alone) for name, tensor in engine.fp32_masters().items())
    copied = Tiny(9)
    sharded.copy_to(copied)
    expected = dict(whole.whole())
    return {
        "equal": [torch.equal(tensor, expected[name]) for name, tensor in sharded.whole()],
        "copied": all(torch.equal(p, expected[name]) for name, p in copied.named_parameters()),
        "moved": any(
            not torch.equal(tensor, expected[name])
            for name, tensor in engine.fp32_masters().items()
        ),
        "held": sum(shard.values.numel() for shard in sharded._average.values()),
        "names": list(expected),
    }


def save(engine: Engine, ranks: Ranks, path: Path) -> None:
    engine.state().write(path)
    ranks.barrier()


def resume(cfg: EngineConfig, ranks: Ranks, path: Path) -> dict[str, Any]:
    """Two engines side by side; save, two more updates; load into fresh engines, the same two
    updates."""
    pair = [make(cfg, ranks, 2), make(cfg, ranks, 2, seed=1)]
    for number in range(2):
        for engine in pair:
            update(engine, ranks, number)
    for index, engine in enumerate(pair):
        save(engine, ranks, path / str(index))
    went_on = [[update(e, ranks, n) for n in (2, 3)] + [flat(e)] for e in pair]
    fresh = [make(cfg, ranks, 2, seed=7), make(cfg, ranks, 2, seed=8)]
    for index, engine in enumerate(fresh):
        engine.load(path / str(index))
    resumed = [[update(e, ranks, n) for n in (2, 3)] + [flat(e)] for e in fresh]
    return {"went_on": went_on, "resumed": resumed, "updates": [e.updates for e in fresh]}


def migrate(kinds: Sequence[str], ranks: Ranks, path: Path) -> dict[str, Any]:
    """One update, saved; then each of ``kinds`` in turn loads what the one before it saved, and
    goes on."""
    path.mkdir(exist_ok=True)
    history, engine = [], make(config("torch"), ranks, 2)
    for number, kind in enumerate(kinds):
        engine = make(kind_config(kind), ranks, 2, seed=number)
        if (path / "latest").exists():
            engine.load(path / (path / "latest").read_text())
        history.append(update(engine, ranks, engine.updates))
        save(engine, ranks, path / f"{kind}-{ranks.world}-{number}")
        ranks.barrier()
        if ranks.is_main:
            (path / "latest").write_text(f"{kind}-{ranks.world}-{number}")
        ranks.barrier()
    return {"history": history, "masters": flat(engine), "updates": engine.updates}


def nan_batch(cfg: EngineConfig, ranks: Ranks) -> dict[str, Any]:
    """A bad loss on the last rank's first micro-batch, amid good updates, against a run without
    it."""
    clean, dirty = make(cfg, ranks, 2), make(cfg, ranks, 2)
    for engine in (clean, dirty):
        update(engine, ranks, 0)
    before = flat(dirty)
    bad = [
        update(dirty, ranks, 9, bad=(ranks.world - 1, 0), value=v)
        for v in (float("nan"), float("inf"))
    ]
    after = flat(dirty)
    same = [update(clean, ranks, n) for n in (1, 2)], [update(dirty, ranks, n) for n in (1, 2)]
    return {
        "bad": bad,
        "untouched": before == after,
        "same": same[0] == same[1] and flat(clean) == flat(dirty),
        "skipped": dirty.skipped,
        "updates": dirty.updates,
    }


def too_many_skips(cfg: EngineConfig, ranks: Ranks) -> str:
    engine = make(cfg, ranks, 2)
    for _ in range(cfg.max_skips - 1):
        update(engine, ranks, 0, bad=(0, 0), value=float("nan"))
    try:
        update(engine, ranks, 0, bad=(0, 0), value=float("nan"))
    except UserError as error:
        return str(error)
    return "no error"


def three_engines(cfg: EngineConfig, ranks: Ranks) -> dict[str, Any]:
    """Student and critic alternate with a frozen teacher in one process, as in distillation."""
    reads: list[str] = []

    def reader(name: str, value: Tensor) -> Callable[[], Tensor]:
        def read() -> Tensor:
            reads.append(name)
            return value

        return read

    weights = {name: reader(name, value) for name, value in Tiny(5).state_dict().items()}
    teacher = frozen_engine(lambda: Tiny(6), weights, cfg, ranks)
    held = sum(getattr(p, "ds_tensor", p).numel() for p in teacher.parameters())
    student, critic = make(cfg, ranks, 2), make(cfg, ranks, 2, seed=1)
    losses = []
    for number in range(2):
        with torch.no_grad():
            target = teacher(data(number))
        losses.append(
            [
                float(target.sum()),
                update(critic, ranks, number)[0],
                update(critic, ranks, number + 5)[0],
                update(student, ranks, number)[0],
            ]
        )
    trainable = [p.requires_grad for p in teacher.parameters()]
    return {
        "losses": losses,
        "masters": flat(student) + flat(critic),
        "trainable": any(trainable),
        "patched": nn.functional.linear is not LINEAR,
        "reads": sorted(reads),
        "held": held,
    }


def verified_once(ranks: Ranks, out: Path) -> dict[str, Any]:
    """What each rank hashes of a checkpoint that both read, then what each hears of a damaged one,
    and of a place that rank 0 cannot write."""
    hashed: list[str] = []

    def counting(file: Path) -> str:
        hashed.append(file.name)
        return sha256_file(file)

    root = out.parent / "verified"
    path = ranks.on_main(
        lambda: Checkpoints(root).write(1, {"model": {"x": torch.ones(2)}}, "{}", {"a": 1})
    )
    with patch.object(checkpoint, "sha256_file", counting):
        same = ranks.checkpoint(root, "ema") == path == checkpoint.find(root, "ema")
        ranks.barrier()
        read = sorted(hashed)
        ranks.on_main(lambda: (path / "config.yaml").write_text("[]"))
        words = ""
        try:
            ranks.checkpoint(root, "ema")
        except UserError as error:
            words = str(error)
        place = ""
        try:
            ranks.on_main((path / "config.yaml" / "below").mkdir)
        except UserError as error:
            place = str(error)
    return {"same": same, "hashed": read, "error": words, "place": place}


def run_checks(ranks: Ranks, out: Path, checks: Sequence[str]) -> dict[str, Any]:
    """Checks by name: <check>-<kind>, kind "local" or "zero0" .. "zero3", a "bf16_" prefix changes
    the dtype; and migrate-<kind>+<kind>.., whose files lie beside ``out``."""
    results: dict[str, Any] = {}
    for name in checks:
        check, kind = name.removeprefix("bf16_").split("-")
        if check == "migrate":
            results["migrate"] = migrate(kind.split("+"), ranks, out.parent / "migrated")
            continue
        cfg = kind_config(kind, "bf16" if name.startswith("bf16_") else "fp32")
        bodies: dict[str, Callable[[], Any]] = {
            "train": partial(train, cfg, ranks, 2),
            "ema": partial(average, cfg, ranks),
            "one_micro": partial(train, cfg, ranks, GLOBAL // ranks.world),
            "nan": partial(nan_batch, cfg, ranks),
            "resume": partial(resume, cfg, ranks, out / name),
            "skips": partial(too_many_skips, replace(cfg, max_skips=2), ranks),
            "three": partial(three_engines, cfg, ranks),
            "verified": partial(verified_once, ranks, out),
        }
        results[name] = bodies[check]()
        print(f"[{ranks.rank}] {name}", file=sys.stderr, flush=True)
    return results


Body = Callable[..., dict[str, Any]]


def spawn(world: int, out: Path, body: Body, *args: Any) -> list[dict[str, Any]]:
    """``body(ranks, out, *args)`` in ``world`` new processes; every rank's results, through
    JSON."""
    start_processes(
        main,
        args=(world, int(free_port()), out, body, args),
        nprocs=world,
        start_method="spawn",
    )
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(world)]


def main(rank: int, world: int, port: int, out: Path, body: Body, args: Sequence[Any]) -> None:
    """Entry point of a spawned process."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    ranks = init_distributed()
    results = body(ranks, out, *args)
    (out / f"rank{rank}.json").write_text(json.dumps(results))
    ranks.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo threads may abort at interpreter exit; success is the written result
