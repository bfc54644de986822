"""The whole chain on 2 CPU cores: clips -> latents -> stage 1 -> stage 2 -> stage 3 -> samples,
table, gallery.

    python recipes/demo.py --run runs/demo          (make demo)

Starts from the shipped teacher (assets/wan_doom, a miniature Wan 2.1 in diffusers layout) by the
same recipes and code paths that take Wan 2.1 itself. Everything lands under the run directory; the
same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scd_sf.config import HelpFormatter
from scd_sf.evaluation.table import ResultRow, read_rows, result_table, write_rows
from scd_sf.files import new_file, typed
from scd_sf.tools.demo_steps import (
    ONE_THREAD,
    clips_and_latents,
    distilling_step,
    evaluation,
    print_table,
    transplant_step,
    tuning_step,
)
from scd_sf.tools.steps import Group, Step, chain, run_steps
from scd_sf.types import UserError, exit_on_user_error, say

STUDENTS = ("scd", "causal")
SPEEDS = {4: 1.7, 50: 2.0}  # steps: least ratio of SCD's speed to the causal baseline's


def training_steps(run: Path, teacher: Path, seed: int) -> list[Group]:
    """Stages 1 and 2 of SCD and of the causal baseline side by side, one thread each; then stage 3
    through the deepspeed launcher beside the samples of stage 2 and the teacher. UserError: the
    launcher is not installed."""
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or shutil.which(
        "deepspeed"
    )
    if launcher is None:
        raise UserError(
            "the 'deepspeed' command is not installed; run 'make demo', or pip install deepspeed"
        )
    latents = run / "latents"
    first = [transplant_step(teacher, run / f"stage1-{name}", family=name) for name in STUDENTS]
    second = [
        tuning_step(run / f"stage1-{name}", latents, run / f"stage2-{name}", seed, family=name)
        for name in STUDENTS
    ]
    one_process = [launcher, "--num_accelerators", "1"]
    third = distilling_step(
        run / "stage2-scd", teacher, latents, run / "stage3-scd", seed, launcher=one_process
    )
    samples = scoring(run, teacher, "sample_stages=[teacher,'2']")
    return [
        first,
        second,
        [third, Step("samples", samples, 250, ONE_THREAD, [run / "results" / "samples"])],
    ]


def scoring(run: Path, teacher: Path, *options: str) -> list[str]:
    """The command that samples and scores everything trained."""
    return evaluation(
        teacher, run / "latents", run, run / "results", *options, config="demo_evaluate"
    )


@dataclass(frozen=True)
class Goal:
    """One goal of the chain, the measured value, and whether it is met (None: not measured;
    ``note`` says why)."""

    goal: str
    measured: str
    met: bool | None
    note: str = ""

    def line(self, name: str) -> str:
        """The line that is printed for the goal of this name."""
        verdict = "met   " if self.met else "MISSED"
        if self.met is None:
            verdict = self.measured
        return f"{verdict}  {name}: {self.note or self.measured} (goal {self.goal})"


@dataclass(frozen=True)
class Timing:
    """The timing fields of an evaluation's context; a context of an older version has none."""

    machine_busy: list[str] = field(
        default_factory=lambda: ["timed in one pass, by an older version"]
    )
    seconds_per_frame_by_round: dict[str, list[float]] = field(default_factory=dict)


def goals(rows: Sequence[ResultRow], timing: Timing) -> dict[str, Goal]:
    """The demo's goals by name, checked against an evaluation's rows. UserError: one of the demo's
    rows is missing or not scored."""

    def pick(family: str, stage: str, steps: int) -> list[ResultRow]:
        group = [
            row for row in rows if (row.family, row.stage, row.steps) == (family, stage, steps)
        ]
        if not group or any(
            None in (row.video_frechet, row.sharpness, row.adherence) for row in group
        ):
            raise UserError(
                f"results.json: no scored row of {family}, stage {stage}, {steps} steps; evaluate again"
            )
        return group

    def points(name: str) -> float:
        return 100 * float(vars(teacher.adherence)[name] - vars(student.adherence)[name])

    teacher, student = pick("bidirectional", "teacher", 50)[0], pick("scd", "3", 4)[0]
    baseline = min(row.video_frechet or 0.0 for row in pick("scd", "2", 4))
    gain = 1 - (student.video_frechet or 0.0) / baseline
    sharpness = student.sharpness or 0.0
    checks = {
        "distance below the better undistilled 4-step sampler": Goal(
            ">= 15 %", f"{100 * gain:.1f} %", gain >= 0.15
        ),
        "sharpness of the distilled student": Goal(
            "0.8 .. 1.2", f"{sharpness:.3f}", 0.8 <= sharpness <= 1.2
        ),
    }
    for name in ("place", "motion"):
        gap = points(name)
        checks[f"{name} adherence behind the teacher"] = Goal(
            "<= 10 points", f"{gap:.1f}", gap <= 10
        )
    for steps, minimum in SPEEDS.items():
        slow, fast = pick("causal", "2", steps)[0], pick("scd", "2", steps)[0]
        check = speed(slow, fast, minimum, timing)
        checks[f"SCD faster than causal per frame, {steps} steps"] = check
    return checks


def speed(slow: ResultRow, fast: ResultRow, minimum: float, timing: Timing) -> Goal:
    """The goal for the ratio of the rows' median seconds over the rounds; not measured on a busy
    machine."""
    goal, rounds = f">= {minimum:g}x", timing.seconds_per_frame_by_round
    reasons = timing.machine_busy or [
        f"no rounds of {row.name}" for row in (slow, fast) if not rounds.get(row.name)
    ]
    if reasons:
        return Goal(goal, "not measured: machine busy", None, "; ".join(reasons))
    ratio = statistics.median(rounds[slow.name]) / statistics.median(rounds[fast.name])
    return Goal(goal, f"{ratio:.2f}x", ratio >= minimum)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/demo"), help="run directory, resumable"
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        default=Path("assets/wan_doom"),
        help="pretrained Wan, diffusers layout",
    )
    parser.add_argument("--clips", type=int, default=48, help="training clips per place and motion")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of all trainings (the clips and the samples stay the same)",
    )
    args = parser.parse_args()
    with chain(args.run):
        make(args)


def make(args: argparse.Namespace) -> None:
    """Run the steps that are not done; write results and gallery; print the table and the goals."""
    started = time.time()
    folder = args.run / "results"
    results = [folder / "results.json", folder / "gallery.html"]
    groups = [
        *clips_and_latents(args.run, args.teacher, args.run / "latents", args.clips),
        *training_steps(args.run, args.teacher, args.seed),
        [Step("evaluate", scoring(args.run, args.teacher), 110, outputs=results)],
    ]
    seconds = run_steps(args.run, groups)
    rows, context = read_rows(folder / "results.json")
    checks = goals(
        rows,
        typed(context, Timing, folder / "results.json", "remove it and run the same command again"),
    )
    run_seconds = round(time.time() - started, 1)
    summary = {
        "goals": {name: asdict(check) for name, check in checks.items()},
        "training_seed": args.seed,
    }
    write_rows(
        args.run / "results.json",
        rows,
        context | summary | {"step_seconds": seconds, "this_run_seconds": run_seconds},
    )
    with new_file(args.run / "gallery.html") as part:
        shutil.copyfile(folder / "gallery.html", part)
    print_table(result_table(rows, "Held-out prompts"))
    for name, check in checks.items():
        say(check.line(name))
    if any(check.met is None for check in checks.values()):
        say(
            f"To measure speeds when the machine is quiet, remove {folder}/results.json and run the same command again."
        )
    say(f"{run_seconds:.0f} s in this run; all of it is in {args.run}")
    say(f"  trainings  scd runs ls {args.run}")
    say(f"  figures    {args.run}/results.json")
    say(
        f"  live       scd serve {args.run}/stage3-scd --fps 35: type a prompt, watch it being made"
    )
    say(f"  open       {args.run}/gallery.html: the videos side by side, the table below them")


if __name__ == "__main__":
    exit_on_user_error(main)
