"""The whole chain on 2 CPU cores: clips -> latents -> stage 1 -> stage 2 -> stage 3 -> samples, table, gallery.

    python recipes/demo.py --run runs/demo          (make demo)

Starts from the shipped teacher (assets/wan_doom, a miniature Wan 2.1 in diffusers layout) by the same recipes and code
paths that take Wan 2.1 itself. Everything lands under the run directory; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from scd_sf.files import write_json
from scd_sf.steps import Step, python, run_steps
from scd_sf.types import UserError, exit_on_user_error

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
STUDENTS = ("scd", "causal")


def latents(run: Path) -> list[str]:
    return [f"data={run}/latents/train", f"val={run}/latents/val"]


def data_steps(run: Path, teacher: Path, clips: int) -> list[list[Step]]:
    render = python("data_prep/make_doom_clips.py", f"{run}/clips", "--seed", "1", "--train", str(clips), "--val", "4")
    encode = python("data_prep/encode_latents.py", "--clips", f"{run}/clips", "--model", str(teacher))
    return [
        [Step("clips", render, 27, outputs=[run / "clips"])],
        [Step("latents", [*encode, "--out", f"{run}/latents"], 50, outputs=[run / "latents"])],
    ]


def student_steps(run: Path, teacher: Path, seed: int) -> list[list[Step]]:
    """Stage 1 and 2 for SCD and for the causal baseline, one thread each, side by side."""
    first, second = [], []
    for family in STUDENTS:
        transplant = python("recipes/stage1_transplant.py", "--config", f"recipes/configs/demo_stage1_{family}.yaml")
        start, tuned = run / f"stage1-{family}", run / f"stage2-{family}"
        weights = [start / "step_00000000"]
        first.append(Step(start.name, [*transplant, f"base={teacher}", f"out={start}"], 12, ONE_THREAD, weights))
        tune = python("recipes/stage2_flow_matching.py", "--config", f"recipes/configs/demo_stage2_{family}.yaml")
        arguments = [f"init={start}", *latents(run), f"run.dir={tuned}", f"run.seed={seed}"]
        second.append(Step(tuned.name, [*tune, *arguments], 190, ONE_THREAD, [tuned / "checkpoints"]))
    return [first, second]


def distil_step(run: Path, teacher: Path, seed: int) -> list[Step]:
    """Stage 3 through the deepspeed launcher; on the other core, the samples of everything trained before."""
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or shutil.which("deepspeed")
    if launcher is None:
        raise UserError("the 'deepspeed' command is not installed; run 'make demo', or pip install deepspeed")
    command = [launcher, "--num_accelerators", "1", "recipes/stage3_self_forcing.py"]
    arguments = [f"init={run}/stage2-scd", f"teacher={teacher}", f"critic={teacher}", f"prompts={run}/latents/train"]
    weights, samples = [run / "stage3-scd" / "checkpoints"], [run / "results" / "samples"]
    config, place = ["--config", "recipes/configs/demo_stage3.yaml"], [f"run.dir={run}/stage3-scd", f"run.seed={seed}"]
    return [
        Step("stage3-scd", [*command, *config, *arguments, *place], 470, ONE_THREAD, weights),
        Step("samples", [*evaluation(run, teacher), "sample_stages=[teacher,'2']"], 250, ONE_THREAD, samples),
    ]


def evaluation(run: Path, teacher: Path) -> list[str]:
    script = python("recipes/evaluate.py", "--config", "recipes/configs/demo_evaluate.yaml", f"base={teacher}")
    return [*script, f"train={run}/latents/train", f"val={run}/latents/val", f"root={run}", f"out={run}/results"]


def evaluate_step(run: Path, teacher: Path) -> list[Step]:
    """The distilled student's samples, everybody's scores and timings, table and gallery."""
    results = [run / "results" / name for name in ("results.json", "gallery.html")]
    return [Step("evaluate", evaluation(run, teacher), 110, outputs=results)]


def goals(rows: list[dict[str, Any]]) -> dict[str, dict[str, object]]:
    """What the chain should show, each with the measured value and whether it was met."""

    def pick(family: str, stage: str, steps: int) -> list[dict[str, Any]]:
        return [r for r in rows if (r["family"], r["stage"], r["steps"]) == (family, stage, steps)]

    teacher, student = pick("bidirectional", "teacher", 50)[0], pick("scd", "3", 4)[0]
    undistilled = min(pick("scd", "2", 4), key=lambda r: float(r["video_frechet"]))
    gain = 1 - student["video_frechet"] / undistilled["video_frechet"]
    place = 100 * (teacher["adherence"]["place"] - student["adherence"]["place"])
    motion = 100 * (teacher["adherence"]["motion"] - student["adherence"]["motion"])
    speed = {
        n: pick("causal", "2", n)[0]["seconds_per_frame"] / pick("scd", "2", n)[0]["seconds_per_frame"] for n in (4, 50)
    }
    return {
        "distance below the better undistilled 4-step sampler": {
            "goal": ">= 15 %",
            "measured": f"{100 * gain:.1f} %",
            "met": gain >= 0.15,
        },
        "sharpness of the distilled student": {
            "goal": "0.8 .. 1.2",
            "measured": round(student["sharpness"], 3),
            "met": 0.8 <= student["sharpness"] <= 1.2,
        },
        "place adherence behind the teacher": {"goal": "<= 10 points", "measured": f"{place:.1f}", "met": place <= 10},
        "motion adherence behind the teacher": {
            "goal": "<= 10 points",
            "measured": f"{motion:.1f}",
            "met": motion <= 10,
        },
        "SCD faster than causal per frame, 4 steps": {
            "goal": ">= 1.7x",
            "measured": f"{speed[4]:.2f}x",
            "met": speed[4] >= 1.7,
        },
        "SCD faster than causal per frame, 50 steps": {
            "goal": ">= 2x",
            "measured": f"{speed[50]:.2f}x",
            "met": speed[50] >= 2.0,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run directory, resumable")
    parser.add_argument(
        "--teacher", type=Path, default=Path("assets/wan_doom"), help="pretrained Wan, diffusers layout"
    )
    parser.add_argument("--clips", type=int, default=48, help="training clips per place and motion")
    parser.add_argument(
        "--seed", type=int, default=0, help="of all trainings (the clips and the samples stay the same)"
    )
    args = parser.parse_args()
    started = time.time()
    groups = [
        *data_steps(args.run, args.teacher, args.clips),
        *student_steps(args.run, args.teacher, args.seed),
        distil_step(args.run, args.teacher, args.seed),
        evaluate_step(args.run, args.teacher),
    ]
    seconds = run_steps(args.run, groups)
    file = args.run / "results" / "results.json"
    results = json.loads(file.read_text())
    checks = goals(results["rows"])
    results["context"] |= {
        "goals": checks,
        "training_seed": args.seed,
        "step_seconds": seconds,
        "this_run_seconds": round(time.time() - started, 1),
    }
    write_json(args.run / "results.json", results)
    shutil.copyfile(args.run / "results" / "gallery.html", args.run / "gallery.html")
    print((args.run / "logs" / "evaluate.log").read_text()[-6000:])
    for name, check in checks.items():
        print(f"{'met   ' if check['met'] else 'MISSED'}  {name}: {check['measured']} (goal {check['goal']})")
    spent = results["context"]["this_run_seconds"]
    print(f"{spent:.0f} s in this run; open {args.run}/gallery.html, figures in {args.run}/results.json")


if __name__ == "__main__":
    exit_on_user_error(main)
