"""One process of a training step of stage 2 or 3, and the bytes that PyTorch's allocator really had
alive at its peak.

    python measured.py OUT.json stage2|stage3 [a.b=value ..]

Prints nothing; rank 0 writes the peak after the first update, and the plan for the same job, as
JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scd_sf.config import load_config
from scd_sf.distributed import Ranks, init_distributed
from scd_sf.models.build import ModelConfig
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.wan.transformer import WanConfig
from scd_sf.tools.gpu import trial
from scd_sf.tools.plan.budget import Cluster, budget
from scd_sf.tools.plan.job import PlanJob
from scd_sf.tools.stage_configs import Stage2Config, Stage3Config
from scd_sf.types import VideoShape

WAN = WanConfig(4, 64, 8, 8, 16, 64, 1024, 6)
MODEL = ModelConfig(wan=WAN, scd=ScdConfig(tuple(range(5)), DecoderConfig((0, 5))))
SHAPE = VideoShape(frames=3, channels=8, height=16, width=16)
# text tokens; an allocation of this size marks the end of the first update
TOKENS, MARK = 16, 12_345_677


def settle_collectives() -> None:
    """Gloo's threads drop a buffer now and then after everybody else, and the profiler does not see
    what they free: it would count as alive for good. So whoever called keeps each a little
    longer."""

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


def stage2(job: PlanJob, ranks: Ranks) -> None:
    update = trial.stage2_update(job, ranks)
    for _ in range(2):
        update()
        torch.empty(MARK, dtype=torch.uint8)


def stage3(job: PlanJob, ranks: Ranks) -> None:
    cycle = trial.stage3_update(job, ranks)
    for _ in range(2):
        cycle(1)
        torch.empty(MARK, dtype=torch.uint8)


def peak(recorded: profile) -> int:
    """Most bytes alive at once after the first mark."""
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events: list[Any] = [
        e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
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
    open_ = [
        "init=",
        "run.dir=x",
        *(("data=", "val=") if stage == "stage2" else ("teacher=", "critic=", "prompts=")),
    ]
    cfg: Any = load_config(schema, None, [*open_, *overrides])
    job = PlanJob(cfg, MODEL, SHAPE, WAN, WAN, TOKENS)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run(job, ranks)
    found = budget(job, Cluster(1, ranks.world, on_gpu=False))
    if ranks.is_main:
        content = {
            "measured": peak(recorded),
            "planned": found.peak,
            "phases": {p.name: found.at(p) for p in found.phases},
        }
        Path(out).write_text(
            json.dumps(content | {"held": {r: h.as_json() for r, h in found.memory.items()}})
        )


if __name__ == "__main__":
    main()
