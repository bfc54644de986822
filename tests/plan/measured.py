"""One process of a training step of stage 2 or 3, and the bytes that PyTorch's allocator really had alive at its peak.

    python measured.py OUT.json stage2|stage3 [a.b=value ..]

Prints nothing; rank 0 writes the peak after the first update, and the plan for the same job, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from scd_sf.config import load_config
from scd_sf.diffusion.noise import cpu_noise
from scd_sf.diffusion.solvers import Renoise
from scd_sf.losses.dmd import critic_loss, dmd_loss
from scd_sf.losses.flow_matching import flow_matching_loss
from scd_sf.models.build import ModelConfig, Student, build_model
from scd_sf.models.scd import ScdConfig
from scd_sf.models.scd_decoder import DecoderConfig
from scd_sf.models.trunk import WanConfig
from scd_sf.models.wan import Wan
from scd_sf.plan.budget import Cluster, budget
from scd_sf.plan.job import Job
from scd_sf.rollout import rollout
from scd_sf.stages import Stage2Config, Stage3Config
from scd_sf.train.ema import Ema
from scd_sf.train.engine import Engine, EngineConfig, StepModule, build_engine, frozen_engine, init_distributed
from scd_sf.train.ranks import Ranks
from scd_sf.types import Conditioning, VideoShape

WAN = WanConfig(4, 64, 8, 8, 16, 64, 1024, 6)
MODEL = ModelConfig(wan=WAN, scd=ScdConfig(tuple(range(5)), DecoderConfig((0, 5))))
SHAPE = VideoShape(frames=3, channels=8, height=16, width=16)
TOKENS, MARK = 16, 12_345_677  # text tokens; an allocation of this size marks the end of the first update


def settle_collectives() -> None:
    """Gloo's threads drop a buffer now and then after everybody else, and the profiler does not see what they free: it
    would count as alive for good. So whoever called keeps each a little longer."""

    def settled(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Any, async_op: bool = False, **given: Any) -> Any:
            work = collective(*tensors, async_op=True, **given)
            if not async_op:
                work.wait()
            time.sleep(0.005)
            return work if async_op else None

        return call

    for name in ("reduce_scatter_tensor", "all_gather_into_tensor", "all_reduce", "broadcast"):
        setattr(torch.distributed, name, settled(getattr(torch.distributed, name)))


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def prompts(batch: int) -> Conditioning:
    return Conditioning(torch.zeros(batch, TOKENS, WAN.text_dim))


def engine_for(module: torch.nn.Module, cfg: EngineConfig, ranks: Ranks, train: object) -> Engine:
    sizes = vars(train)
    return build_engine(
        module,
        cfg,
        ranks,
        global_batch=sizes["global_batch"],
        micro_batch=sizes["micro_batch"],
        total_updates=10,
    )


def stage2(cfg: Stage2Config, ranks: Ranks) -> None:
    student = build_model(MODEL)
    assert not isinstance(student, Wan)
    batch = cfg.train.micro_batch
    for trunk in student.trunks():
        trunk.checkpointing = cfg.checkpointing

    def loss_fn(model: Student, x_0: Tensor) -> Tensor:
        return flow_matching_loss(model, x_0, prompts(batch), prompts(1), cfg.loss, rng())[0]

    engine, ema = engine_for(StepModule(student, loss_fn), cfg.engine, ranks, cfg.train), Ema(cfg.train.ema, ranks)
    del student
    for _ in range(2):
        for _ in range(engine.micro_batches):
            engine.backward(engine(torch.randn(SHAPE.latent(batch))))
            engine.step()
        ema.update(engine.owned())
        torch.empty(MARK, dtype=torch.uint8)


def stage3(cfg: Stage3Config, ranks: Ranks) -> None:
    student, batch = build_model(MODEL), cfg.train.micro_batch
    assert not isinstance(student, Wan)
    for trunk in student.trunks():
        trunk.checkpointing = cfg.checkpointing

    def play(model: Student, noise: Tensor) -> Tensor:
        return rollout(model, noise, prompts(batch), Renoise(), cpu_noise(rng()), exit_step=3)

    engine, ema = engine_for(StepModule(student, play), cfg.student, ranks, cfg.train), Ema(cfg.train.ema, ranks)
    wan = Wan(WAN)
    wan.trunk.checkpointing = cfg.checkpointing
    critic = engine_for(wan, cfg.critic_engine, ranks, cfg.train)
    weights = {name: p.detach().clone for name, p in Wan(WAN).named_parameters()}
    teacher = frozen_engine(lambda: Wan(WAN), weights, cfg.teacher_engine, ranks)
    del student, wan, weights
    best = None
    for _ in range(2):
        for _ in range(critic.micro_batches):
            with torch.no_grad():
                x = engine(torch.randn(SHAPE.latent(batch)))
            critic.backward(critic_loss(critic, x, prompts(batch), cfg.loss, rng())[0])
            critic.step()
        for _ in range(engine.micro_batches):
            x = engine(torch.randn(SHAPE.latent(batch)))
            engine.backward(dmd_loss(x, teacher, critic, prompts(batch), prompts(1), cfg.loss, rng())[0])
            engine.step()
        ema.update(engine.owned())
        best = ema.copy()
        torch.empty(MARK, dtype=torch.uint8)
    assert best is not None


def peak(recorded: profile) -> int:
    """Most bytes alive at once after the first mark."""
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    alive = most = marks = 0
    for event in events:
        alive += event.nbytes()
        marks += event.nbytes() == MARK
        most = max(most, alive) if marks else 0
    assert marks == 2
    return most


def main() -> None:
    out, stage, *overrides = sys.argv[1:]
    settle_collectives()
    ranks = init_distributed()
    schema, run = (Stage2Config, stage2) if stage == "stage2" else (Stage3Config, stage3)
    open_ = ["init=", "run.dir=x", *(("data=", "val=") if stage == "stage2" else ("teacher=", "critic=", "prompts="))]
    cfg = load_config(schema, None, [*open_, *overrides])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run(cfg, ranks)  # type: ignore[arg-type]
    job = Job(cfg, MODEL, SHAPE, WAN, WAN, TOKENS)  # type: ignore[arg-type]
    found = budget(job, Cluster(1, ranks.world, on_gpu=False))
    if ranks.is_main:
        content = {
            "measured": peak(recorded),
            "planned": found.peak,
            "phases": {p.name: found.at(p) for p in found.phases},
        }
        Path(out).write_text(json.dumps(content | {"held": {r: h.as_json() for r, h in found.held.items()}}))


if __name__ == "__main__":
    main()
