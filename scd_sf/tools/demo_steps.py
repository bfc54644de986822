"""The steps of the demo's chain: ``make demo`` runs them as they are; comparisons and ``make gpu``
change one thing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scd_sf.files import read_jsonl
from scd_sf.tools.steps import Group, Step, python_command
from scd_sf.types import UserError, say

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CONFIGS = "recipes/configs"


def clips_and_latents(run: Path, teacher: Path, latents: Path, train: int) -> list[Group]:
    """The data: ``train`` clips per place and motion rendered to ``run/clips`` and encoded to
    ``latents``."""
    clips = run / "clips"
    render = python_command(
        "data_prep/make_doom_clips.py",
        str(clips),
        "--seed",
        "1",
        "--train",
        str(train),
        "--val",
        "4",
    )
    encode = python_command(
        "data_prep/encode_latents.py", "--clips", str(clips), "--model", str(teacher)
    )
    # the toy teacher knows the empty prompt as its null
    encode += ["--negative-prompt", "", "--out", str(latents)]
    return [
        [Step("clips", render, 27, outputs=[clips])],
        [Step("latents", encode, 55, outputs=[latents])],
    ]


def transplant_step(
    base: Path, out: Path, *overrides: str, name: str = "", family: str = "scd", seconds: float = 12
) -> Step:
    """Stage 1. ``name``: of the step, else that of ``out``; ``seconds``: when last measured."""
    command = _recipe(
        "stage1_transplant", f"demo_stage1_{family}", f"base={base}", f"out={out}", *overrides
    )
    return Step(name or out.name, command, seconds, ONE_THREAD, [out / "step_00000000"])


def tuning_step(
    init: Path,
    latents: Path,
    run: Path,
    seed: int,
    *overrides: str,
    name: str = "",
    family: str = "scd",
    seconds: float = 190,
) -> Step:
    """Stage 2. ``name``: of the step, else that of ``run``; ``seconds``: when last measured."""
    data = [f"init={init}", f"data={latents}/train", f"val={latents}/val"]
    command = _recipe(
        "stage2_flow_matching",
        f"demo_stage2_{family}",
        *data,
        *_run_arguments(run, seed),
        *overrides,
    )
    return Step(name or run.name, command, seconds, ONE_THREAD, _run_outputs(run))


def distilling_step(
    init: Path,
    teacher: Path,
    latents: Path,
    run: Path,
    seed: int,
    *overrides: str,
    launcher: Sequence[str] = (sys.executable,),
) -> Step:
    """Stage 3. ``launcher``: the command that runs the script, for several ranks."""
    models = [f"init={init}", f"teacher={teacher}", f"critic={teacher}", f"prompts={latents}/train"]
    _, *command = _recipe(
        "stage3_self_forcing", "demo_stage3", *models, *_run_arguments(run, seed), *overrides
    )
    return Step(run.name, [*launcher, *command], 470, ONE_THREAD, _run_outputs(run))


def evaluation(
    base: Path, latents: Path, root: Path, out: Path, *options: str, config: str = ""
) -> list[str]:
    """The command that scores the models trained under ``root``."""
    config_arguments = ["--config", f"{CONFIGS}/{config}.yaml"] if config else []
    data = [
        f"base={base}",
        f"train={latents}/train",
        f"val={latents}/val",
        f"root={root}",
        f"out={out}",
    ]
    return python_command("recipes/evaluate.py", *config_arguments, *data, *options)


def last_validation_loss(
    run: Path, step: int | None = None, remedy: str = "train it again"
) -> float:
    """The last validation loss that stage 2 logged (of ``step`` if given), of its averaged weights
    on held-out clips at fixed noise. UserError where there is none."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{file}: does not exist; {remedy}")
    rows = [row for row in read_jsonl(file, remedy) if "val/loss" in row]
    losses = [row["val/loss"] for row in rows if step is None or row.get("step") == step]
    if not losses:
        update = "" if step is None else f" of update {step}"
        raise UserError(f"{file}: no validation loss{update}; remove {run} and train it again")
    return float(str(losses[-1]))


def print_table(table: Table, width: int = 140) -> None:
    """Print a table on a terminal, or ``width`` characters wide elsewhere. Where the terminal is too
    narrow for it, each row becomes lines of its own: nothing is cut."""
    console = Console(width=None if Console().is_terminal else width, highlight=False)
    headings = [str(column.header).split() for column in table.columns]
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    widths = [
        max(map(len, heading + cells)) for heading, cells in zip(headings, columns, strict=True)
    ]
    if sum(widths) + 3 * len(widths) + 1 <= console.width:
        console.print(table)
        return
    console.print(str(table.title or ""), markup=False)
    for name, *cells in zip(*columns, strict=True):
        values = zip(headings[1:], cells, strict=True)
        parts = [f"{' '.join(heading)} {cell}" for heading, cell in values if cell != "-"]
        console.print(f"{name}: {', '.join(parts)}", markup=False)


def say_if_busy(context: dict[str, object]) -> None:
    """Say that an evaluation's times mean little where the machine was busy."""
    if context["machine_busy"]:
        say(f"The machine was busy, times tell little: {context['machine_busy']}.")


def _recipe(script: str, config: str, *arguments: str) -> list[str]:
    return python_command(
        f"recipes/{script}.py", "--config", f"{CONFIGS}/{config}.yaml", *arguments
    )


def _run_arguments(run: Path, seed: int) -> list[str]:
    return [f"run.dir={run}", f"run.seed={seed}"]


def _run_outputs(run: Path) -> list[Path]:
    return [run / "checkpoints", run / "metrics.jsonl"]
