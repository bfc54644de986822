"""The table of docs/how_to/hardware.md: what each stage takes on four machines, counted by ``scd
plan``.

    python benchmarks/hardware.py

Prints Markdown. Where a configuration does not fit, the changes that ``scd plan`` advises are
applied and shown. All of it is an estimate: memory is counted on the meta device, hours are FLOPs
over 45 % of the peak.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from scd_sf.config import HelpFormatter
from scd_sf.models.wan.transformer import WAN_14B, Wan
from scd_sf.tools.plan.advice import advice, command_line
from scd_sf.tools.plan.budget import GIB, Budget, Cluster, budget
from scd_sf.tools.plan.job import PlanJob, read_job
from scd_sf.tools.plan.meter import Meter
from scd_sf.tools.plan.phases import Phase
from scd_sf.types import Conditioning, VideoShape, exit_on_user_error, say

CONFIGS = Path(__file__).resolve().parents[1] / "recipes" / "configs"
CLIPS, STEPS, GUIDED = 70_000, 50, 2  # the paper's clips of Wan 14B, each with its negative prompt
H100, RTX_4090 = 989.0, 165.0  # TFLOP/s, dense bf16 with fp32 sums, as their makers state them


@dataclass(frozen=True)
class Machine:
    """``config``: the ending of the configurations that it runs."""

    name: str
    cluster: Cluster
    config: str


MACHINES = (
    Machine("8 x 8 H100, 80 GB", Cluster(8, 8, peak_tflops=H100), "wan_1.3b"),
    Machine("8 H100, 80 GB", Cluster(1, 8, peak_tflops=H100), "wan_1.3b"),
    Machine("1 H100, 80 GB", Cluster(1, 1, peak_tflops=H100), "1gpu"),
    Machine("1 RTX 4090, 24 GB", Cluster(1, 1, 24.0, RTX_4090), "1gpu"),
)
HEAD = (
    "| stage | machine | configuration | GiB per GPU | GiB of host memory per node | hours | GB of checkpoints | "
    "GB of data |\n|---|---|---|---|---|---|---|---|"
)


def job_of(stage: int, machine: Machine) -> PlanJob:
    """The stage as its shipped configuration says it, from the shipped stage 1."""
    file = CONFIGS / f"stage{stage}_{machine.config}.yaml"
    return read_job([file], [], CONFIGS / "stage1_wan_1.3b.yaml", 512)


def row(stage: int, machine: Machine, plan: Budget) -> str:
    """A stage on a machine, with the changes that make it fit."""
    steps = [] if plan.fits else advice(plan)
    best = steps[-1].plan if steps else plan
    settings = f"`stage{stage}_{machine.config}.yaml`"
    if steps:
        settings += f" `{command_line(steps)}`"
    gib = f"{best.needed_gib:.0f}" if best.fits else f"{best.needed_gib:.0f}: does not fit"
    host = best.host * machine.cluster.gpus_per_node / GIB
    hours = best.seconds * best.job.cfg.train.steps / 3600
    data = CLIPS * best.clip_bytes()[0] / 1e9 if stage == 2 else 0
    cells = (stage, machine.name, settings, gib, f"{host:.0f}", f"{hours:,.0f}")
    disk = (f"{best.disk / 1e9:.0f}", f"{data:.0f}" if data else "prompts")
    return "| " + " | ".join(map(str, (*cells, *disk))) + " |"


def clips_row(machine: Machine, flops: float) -> str:
    """The 14B teacher's clips for stage 2 on a machine. ``flops``: of one pass of one clip."""
    cluster = machine.cluster
    rate = cluster.world * cluster.peak_tflops * 1e12 * cluster.mfu
    hours = CLIPS * STEPS * GUIDED * flops / rate / 3600
    return f"| clips of 14B | {machine.name} | `generate_clips.py` | - | - | {hours:,.0f} | - | - |"


def teacher_flops() -> float:
    """FLOPs of one pass of Wan 14B over a clip of 81 frames at 832x480."""
    clip = VideoShape.from_pixels(81, 480, 832)
    with torch.device("meta"):
        wan = Wan(WAN_14B).to(torch.bfloat16)
        x, cond = torch.empty(clip.latent(1)), Conditioning(torch.empty(1, 512, WAN_14B.text_dim))
        with Meter() as meter, torch.no_grad():
            wan(x, torch.empty(1), cond)
    return meter.flops


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter).parse_args()
    for line in HEAD.splitlines():
        say(line)
    flops = teacher_flops()
    for machine in MACHINES:
        say(clips_row(machine, flops))
    for stage in (2, 3):
        phases: list[Phase] | None = None  # the configurations differ in offload alone
        for machine in MACHINES:
            plan = budget(job_of(stage, machine), machine.cluster, phases)
            phases = plan.phases
            say(row(stage, machine, plan))


if __name__ == "__main__":
    exit_on_user_error(main)
