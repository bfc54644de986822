"""``scd plan``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from scd_sf.types import UserError, say

if TYPE_CHECKING:
    from scd_sf.tools.stage_configs import VideoConfig


def plan(
    configs: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG.yaml .. [a.b=value ..]",
            help="A configuration of stage 2 or 3 (more files and values override it), as the recipe takes it.",
        ),
    ],
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs (processes) in each.")] = 8,
    gpu_mem: Annotated[float, typer.Option(help="GiB of each.")] = 80.0,
    host_mem: Annotated[
        float, typer.Option(help="GiB of main memory of each machine; 0: not checked.")
    ] = 0.0,
    peak_tflops: Annotated[
        float, typer.Option(help="Dense bf16 peak of each; 989 is an H100's.")
    ] = 989.0,
    mfu: Annotated[float, typer.Option(help="Share of the peak that you expect to use.")] = 0.45,
    student: Annotated[
        Path | None, typer.Option(help="Configuration of stage 1, when there is no init= yet.")
    ] = None,
    clips: Annotated[
        str, typer.Option(help="Stage 2's clips, FRAMESxHEIGHTxWIDTH, when there is no data= yet.")
    ] = "81x480x832",
    text_tokens: Annotated[int, typer.Option(help="Length that prompts are padded to.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Will it fit, and how long will it take? Memory by role and phase, disk, FLOPs and hours of a
    stage on a cluster, and what to change. Nothing is allocated: the real training step runs on the
    meta device. Exit code 1: too big."""
    from scd_sf.tools.plan.advice import advice
    from scd_sf.tools.plan.budget import Cluster, budget
    from scd_sf.tools.plan.job import read_job
    from scd_sf.tools.plan.report import as_json as to_json
    from scd_sf.tools.plan.report import print_budget

    if text_tokens < 1:
        raise UserError(f"--text-tokens is {text_tokens}; at least 1 (512 for Wan)")
    files = [Path(text) for text in configs if "=" not in text]
    say(
        "counting a step on the meta device; a full-size stage takes about half a minute",
        sys.stderr,
    )
    cluster = Cluster(nodes, gpus_per_node, gpu_mem, peak_tflops, mfu, host_mem=host_mem)
    result = budget(
        read_job(
            files,
            [text for text in configs if "=" in text],
            student,
            text_tokens,
            clips=_size(clips),
        ),
        cluster,
    )
    changes = advice(result)
    if as_json:
        print(json.dumps(to_json(result, changes), indent=1))
    else:
        print_budget(Console(width=max(150, Console().width)), result, changes)
    raise typer.Exit(0 if result.fits else 1)


def _size(text: str) -> VideoConfig:
    """The clips that ``--clips`` says. UserError: it is no size."""
    from scd_sf.tools.stage_configs import VideoConfig

    numbers = text.split("x")
    if len(numbers) != 3 or not all(re.fullmatch("[0-9]{1,7}", number) for number in numbers):
        raise UserError(f"--clips is {text[:80]!r}; write FRAMESxHEIGHTxWIDTH, as 81x480x832")
    return VideoConfig(*map(int, numbers))
