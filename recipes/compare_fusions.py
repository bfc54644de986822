"""How the context enters the decoder: every fusion through the whole demo, several training seeds
(ADR 0003).

    python recipes/compare_fusions.py --run runs/fusions
    python recipes/compare_fusions.py --latents runs/demo/latents    # those of 'make demo'

Each fusion goes through stages 1, 2 and 3 with the demo's configs and budgets, one training at a
time on one core. Then all are scored together: stage 2 with 50 and 4 Euler steps, stage 3 with its
own 4 re-noising steps. Writes ``RUN/fusions.json`` and ``RUN/scores``. The same command goes on
where it stopped. ``--part train`` stops before the scores, ``--part score`` only makes them. About
11 minutes of an idle core for each fusion and seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from scd_sf.config import HelpFormatter
from scd_sf.evaluation.table import ResultRow, read_rows
from scd_sf.files import write_json
from scd_sf.tools.demo_steps import (
    clips_and_latents,
    distilling_step,
    evaluation,
    last_validation_loss,
    print_table,
    say_if_busy,
    transplant_step,
    tuning_step,
)
from scd_sf.tools.steps import Group, Step, chain, run_steps
from scd_sf.types import UserError, exit_on_user_error, say

FUSIONS = {
    "delta": "fusion: delta",
    "channel": "fusion: channel",
    "paper": "fusion: paper, prefix_rope: temporal, prefix: full",
    "junction": "fusion: junction",
}
# the layers of demo_stage1_scd.yaml
LAYERS = "encoder_layers: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], decoder: {layers: [0, 1, 10, 11]"


@dataclass(frozen=True)
class Sampling:
    """How the weights of one stage are sampled."""

    stage: int
    sampler: str
    steps: int

    @property
    def name(self) -> str:
        return f"stage {self.stage}, {self.steps} {self.sampler}"


SAMPLINGS = (Sampling(2, "euler", 50), Sampling(2, "euler", 4), Sampling(3, "renoise", 4))


@dataclass(frozen=True)
class Plan:
    """The command line's values. ``updates``: of stages 2 and 3 (None: as many as the demo's)."""

    run: Path
    teacher: Path
    latents: Path
    fusions: tuple[str, ...]
    seeds: tuple[int, ...]
    clips: int
    updates: int | None = None

    def place(self, stage: int, fusion: str, seed: int = 0) -> Path:
        """The folder of a checkpoint. Stage 1 has no random numbers, so that all seeds share it."""
        return self.run / (f"stage1-{fusion}" if stage == 1 else f"stage{stage}-{fusion}-s{seed}")

    def training(self) -> list[Group]:
        """One step at a time: stage 1 of all, then stages 2 and 3 of each, seed by seed."""
        intervals = {
            "steps": self.updates,
            "save_every": self.updates,
            "validate_every": self.updates,
        }
        overrides = (
            []
            if self.updates is None
            else [f"train.{name}={value}" for name, value in intervals.items()]
        )
        steps = [
            transplant_step(
                self.teacher, self.place(1, fusion), f"scd={{{LAYERS}, {FUSIONS[fusion]}}}}}"
            )
            for fusion in self.fusions
        ]
        for seed in self.seeds:
            for fusion in self.fusions:
                stage1, stage2, stage3 = (self.place(stage, fusion, seed) for stage in (1, 2, 3))
                steps.append(tuning_step(stage1, self.latents, stage2, seed, *overrides))
                steps.append(
                    distilling_step(stage2, self.teacher, self.latents, stage3, seed, *overrides)
                )
        return [[step] for step in steps]

    def rows(self) -> list[dict[str, object]]:
        """Rows of the evaluation's config: every training with every sampler."""
        return [
            {
                "name": row_name(fusion, seed, sampling),
                "checkpoint": self.place(sampling.stage, fusion, seed).name,
                "weights": "best" if sampling.stage == 3 else "ema",
                "stage": str(sampling.stage),
                "sampler": sampling.sampler,
                "steps": sampling.steps,
            }
            for fusion in self.fusions
            for seed in self.seeds
            for sampling in SAMPLINGS
        ]

    def scoring(self) -> Step:
        rows, out = self.rows(), self.run / "scores"
        options = [f"clips={self.clips}", f"rows={json.dumps(rows)}"]
        command = evaluation(self.teacher, self.latents, self.run, out, *options)
        return Step("evaluate", command, 60 + 25 * len(rows), outputs=[out / "results.json"])

    def losses(self, fusion: str) -> list[float]:
        """Last validation losses of stage 2, one per seed. UserError: a seed is not trained."""
        remedy = "run --part train first"
        return [
            last_validation_loss(self.place(2, fusion, seed), remedy=remedy) for seed in self.seeds
        ]


def row_name(fusion: str, seed: int, sampling: Sampling) -> str:
    return f"{fusion}, seed {seed}, {sampling.name}"


def collect(plan: Plan) -> dict[str, Any]:
    """Figures by fusion, as they go into fusions.json."""
    rows = {row.name: row for row in read_rows(plan.run / "scores" / "results.json")[0]}
    return {
        fusion: {
            "decoder": FUSIONS[fusion],
            "loss": plan.losses(fusion),
            "samplings": {
                sampling.name: figures(
                    [rows[row_name(fusion, seed, sampling)] for seed in plan.seeds]
                )
                for sampling in SAMPLINGS
            },
        }
        for fusion in plan.fusions
    }


def figures(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Figures of the trainings of one fusion with one sampler: each seed's quality, and the median
    costs."""
    adherence = [row.adherence for row in rows if row.adherence is not None]

    def median(name: str) -> float:
        return float(statistics.median(vars(row)[name] for row in rows))

    return {
        "video_frechet": [row.video_frechet for row in rows],
        "video_frechet_by_prompt": [row.video_frechet_by_prompt for row in rows],
        "video_frechet_std_over_sampling_seeds": [row.video_frechet_std for row in rows],
        "sharpness": [row.sharpness for row in rows],
        "place": [scores.place for scores in adherence],
        "motion": [scores.motion for scores in adherence],
        "block_passes_per_frame": median("block_passes_per_frame"),
        "seconds_per_frame": median("seconds_per_frame"),
    }


def show(results: dict[str, Any]) -> None:
    """Print the table: each quality as a mean over training seeds, and each seed's value."""

    def mean_and_values(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
        listing = " ".join(f"{scale * value:.{digits}f}" for value in values)
        return f"{scale * statistics.mean(values):.{digits}f} ({listing})"

    table = Table(
        title="Fusions under the demo's budget: mean (each training seed)", title_justify="left"
    )
    for heading in (
        "fusion",
        "sampling",
        "loss",
        "video Frechet",
        "sharpness",
        "place %",
        "motion %",
        "passes",
        "ms",
    ):
        table.add_column(
            heading, justify="left" if heading in ("fusion", "sampling") else "right", no_wrap=True
        )
    for fusion, row in results.items():
        for name, sampling in row["samplings"].items():
            quality = (
                mean_and_values(sampling["video_frechet"], 1),
                mean_and_values(sampling["sharpness"], 2),
            )
            adherence = (
                mean_and_values(sampling["place"], 0, 100),
                mean_and_values(sampling["motion"], 0, 100),
            )
            costs = (
                f"{sampling['block_passes_per_frame']:.0f}",
                f"{1000 * sampling['seconds_per_frame']:.1f}",
            )
            table.add_row(
                fusion, name, mean_and_values(row["loss"], 4), *quality, *adherence, *costs
            )
    print_table(table, 160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/fusions"), help="run directory, resumable"
    )
    parser.add_argument(
        "--teacher", type=Path, default=Path("assets/wan_doom"), help="pretrained Wan to start from"
    )
    parser.add_argument(
        "--latents", type=Path, help="encoded clips (train/, val/) to use; none: they are made"
    )
    parser.add_argument(
        "--fusions",
        nargs="+",
        choices=tuple(FUSIONS),
        default=list(FUSIONS),
        help="fusions to compare",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1], help="seeds of the trainings"
    )
    parser.add_argument("--clips", type=int, default=24, help="held-out clips that are scored")
    parser.add_argument(
        "--updates", type=int, help="updates of stages 2 and 3 (none: as many as the demo's)"
    )
    parser.add_argument(
        "--part", choices=("all", "train", "score"), default="all", help="part of the work"
    )
    args = parser.parse_args()
    if args.clips < 1 or (args.updates is not None and args.updates < 1):
        raise UserError("--clips and --updates must be at least 1")
    fusions, seeds = tuple(dict.fromkeys(args.fusions)), tuple(dict.fromkeys(args.seeds))
    latents = args.latents or args.run / "latents"
    plan = Plan(args.run, args.teacher, latents, fusions, seeds, args.clips, args.updates)
    with chain(plan.run):
        if args.part != "score":
            data = [] if args.latents else clips_and_latents(plan.run, plan.teacher, latents, 48)
            run_steps(plan.run, [*data, *plan.training()])
        if args.part != "train":
            score(plan)


def score(plan: Plan) -> None:
    """Score all trainings; write fusions.json and print the table."""
    for fusion in plan.fusions:
        plan.losses(fusion)  # UserError before the scoring if a training is missing
    run_steps(plan.run, [[plan.scoring()]])
    results = collect(plan)
    context = read_rows(plan.run / "scores" / "results.json")[1]
    description = {"training_seeds": list(plan.seeds), "teacher": str(plan.teacher), **context}
    write_json(plan.run / "fusions.json", {"schema": 1, "context": description, "fusions": results})
    show(results)
    say_if_busy(context)
    say(f"{plan.run}/fusions.json")


if __name__ == "__main__":
    exit_on_user_error(main)
