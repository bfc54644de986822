"""Where to cut: several encoder / decoder splits of one teacher under the same short budget
(supplement E.3).

    python recipes/sweep_split.py --run runs/sweep
    python recipes/sweep_split.py --latents runs/demo/latents    # those of 'make demo'

Splits: both ends (the paper's), encoder-heavier, decoder-heavier, the naive cut into early and late
layers, and what leaving single blocks out proposes (probe P7). Each goes through stages 1 and 2 and
is sampled with 4 and 50 steps. Writes ``RUN/sweep.json`` (loss, video Frechet distance, adherence,
block passes and seconds per latent frame), ``RUN/figures/sweep_split.png`` and the probe's result
under ``RUN/probe``. The same command goes on where it stopped. About 15 minutes on two idle cores;
``--seeds 0 1 2`` for spreads takes twice the trainings more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from scd_sf.config import HelpFormatter, load_config
from scd_sf.data.latents import LatentClips
from scd_sf.diffusion.samplers import Euler
from scd_sf.evaluation.curves import tradeoff_figure
from scd_sf.evaluation.table import ResultRow, read_rows
from scd_sf.files import read_json, sha256_folder, write_json
from scd_sf.models.scd.transplant import TransplantConfig
from scd_sf.models.wan.weights import load_wan, read_wan_config, transformer_dir
from scd_sf.probes.leave_one_out import LeaveOneOut, leave_one_out
from scd_sf.probes.paired import LossConfig
from scd_sf.probes.subject import Subject
from scd_sf.tools.demo_steps import (
    clips_and_latents,
    evaluation,
    last_validation_loss,
    print_table,
    say_if_busy,
    transplant_step,
    tuning_step,
)
from scd_sf.tools.steps import Group, Step, chain, run_steps
from scd_sf.types import UserError, as_cell, exit_on_user_error, say

LEAVE_ONE_OUT = "leave-one-out"
# seconds of an update and block passes of the demo's own split (10 and 4 of 12 layers), on one idle
# core
UPDATE_SECONDS, DEMO_WORK = 0.8, 30


@dataclass(frozen=True)
class Cut:
    """Layers of encoder and decoder."""

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]

    @property
    def overrides(self) -> list[str]:
        """Overrides for stage 1."""
        decoder = f"decoder: {{layers: {list(self.decoder)}, fusion: delta}}"
        return [f"scd={{encoder_layers: {list(self.encoder)}, {decoder}}}"]

    @property
    def work(self) -> float:
        """Block passes of one training update in units of those of the demo's own split: two frames
        in the encoder, two noisy samples in the decoder, and the query in its early blocks."""
        early_layers = sum(layer in self.encoder for layer in self.decoder)
        return (2 * len(self.encoder) + 2 * len(self.decoder) + early_layers) / DEMO_WORK


def both_ends(depth: int, decoder: int) -> Cut:
    """A split whose decoder has ``decoder`` layers: copies of the first layers, and as many or one
    more of the last layers."""
    first_copies = decoder // 2
    last_start = depth - (decoder - first_copies)
    return Cut(tuple(range(last_start)), (*range(first_copies), *range(last_start, depth)))


def cuts(depth: int, probe_cut: Cut) -> dict[str, Cut]:
    """The splits of the sweep. UserError: too few layers to tell them apart."""
    size = depth // 3
    if size < 2:
        raise UserError(f"the teacher has {depth} layers; a sweep needs at least 6")
    return {
        "both ends": both_ends(depth, size),
        "encoder-heavier": both_ends(depth, max(1, size // 2)),
        "decoder-heavier": both_ends(depth, 2 * size),
        "early / late": Cut(tuple(range(depth - size)), tuple(range(depth - size, depth))),
        LEAVE_ONE_OUT: probe_cut,
    }


@dataclass(frozen=True)
class Plan:
    """The command line's values."""

    run: Path
    teacher: Path
    latents: Path
    updates: int
    seeds: tuple[int, ...]
    clips: int
    probe_clips: int
    steps: tuple[int, ...] = (4, 50)

    def place(self, stage: int, cut: Cut, seed: int = 0) -> Path:
        """The folder of a checkpoint, named by its layers: a split with two names is trained
        once."""
        layers = "-".join(["e", *map(str, cut.encoder), "d", *map(str, cut.decoder)])
        return self.run / f"stage{stage}" / (layers if stage == 1 else f"{layers}-s{seed}")

    def training(self, splits: dict[str, Cut]) -> list[Group]:
        """Stages 1 and 2 of every split and seed, two at a time, the longest first."""
        stage1: list[Step] = []
        stage2: list[Step] = []
        schedule = (
            f"train={{steps: {self.updates}, validate_every: {self.updates}, save_every: 100}}"
        )
        for cut, name in sorted(first_names(splits).items(), key=lambda item: -item[0].work):
            out = self.place(1, cut)
            label = name.replace(" / ", "-").replace(" ", "-")
            stage1.append(
                transplant_step(
                    self.teacher, out, *cut.overrides, name=f"stage1-{label}", seconds=8
                )
            )
            seconds = UPDATE_SECONDS * self.updates * cut.work
            for seed in self.seeds:
                name, checkpoint = f"stage2-{label}-{seed}", self.place(2, cut, seed)
                stage2.append(
                    tuning_step(
                        out, self.latents, checkpoint, seed, schedule, name=name, seconds=seconds
                    )
                )
        return [*in_pairs(stage1), *in_pairs(stage2)]

    def rows(self, splits: dict[str, Cut]) -> list[dict[str, object]]:
        """Rows of the evaluation's config: every training with every number of steps."""
        return [
            {
                "name": row_name(name, seed, steps),
                "checkpoint": str(self.place(2, cut, seed).relative_to(self.run)),
                "steps": steps,
            }
            for cut, name in first_names(splits).items()
            for seed in self.seeds
            for steps in self.steps
        ]

    def scoring(self, splits: dict[str, Cut]) -> Step:
        rows, out = self.rows(splits), self.run / "scores"
        options = [f"clips={self.clips}", f"rows={json.dumps(rows)}"]
        command = evaluation(self.teacher, self.latents, self.run, out, *options)
        return Step("evaluate", command, 60 + 25 * len(rows), outputs=[out / "results.json"])


def first_names(splits: dict[str, Cut]) -> dict[Cut, str]:
    """The first name of every distinct split."""
    names: dict[Cut, str] = {}
    for name, cut in splits.items():
        names.setdefault(cut, name)
    return names


def row_name(name: str, seed: int, steps: int) -> str:
    return f"{name}, seed {seed}, {steps} steps"


def in_pairs(steps: Sequence[Step]) -> list[Group]:
    """The steps in groups of two, for one core each."""
    return [list(steps[start : start + 2]) for start in range(0, len(steps), 2)]


def proposal(plan: Plan) -> Cut:
    """The split that probe P7 proposes for the teacher. It is measured once and kept in
    ``RUN/probe``, with a key of weights, data and settings."""
    folder = plan.run / "probe"
    config, key_file = folder / "leave_one_out-stage1.yaml", folder / "measured.json"
    val, cfg = LatentClips(plan.latents / "val"), LeaveOneOut(LossConfig(clips=plan.probe_clips))
    weights = sha256_folder(transformer_dir(plan.teacher), "*.safetensors")
    key = {"weights": weights, "data": val.hash, "settings": asdict(cfg.loss)}
    is_current = (
        key_file.is_file()
        and read_json(key_file, f"remove {folder}") == json.loads(json.dumps(key))
        and config.is_file()
    )
    if not is_current:
        wan = load_wan(plan.teacher)
        say(f"leaving out each of {wan.cfg.num_layers} blocks in turn, {plan.probe_clips} clips")
        cond = val.prompts.conditioning([0])
        result = leave_one_out(
            Subject(str(plan.teacher), wan, val.shape, cond, Euler(), (0,), val), cfg
        )
        result.write(folder)
        write_json(key_file, key)
        say(result.text)
    scd = load_config(TransplantConfig, config, ["base=", "out="]).scd
    return Cut(scd.encoder_layers, scd.decoder.layers)


def collect(plan: Plan, splits: dict[str, Cut]) -> dict[str, Any]:
    """Figures by split, as they go into sweep.json."""
    rows_by_name = {row.name: row for row in read_rows(plan.run / "scores" / "results.json")[0]}
    names = first_names(splits)
    results: dict[str, Any] = {}
    for name, cut in splits.items():
        losses = [
            last_validation_loss(plan.place(2, cut, seed), plan.updates) for seed in plan.seeds
        ]
        figures_by_steps: dict[str, Any] = {}
        for steps in plan.steps:
            rows = [rows_by_name[row_name(names[cut], seed, steps)] for seed in plan.seeds]
            figures_by_steps[str(steps)] = figures(rows)
        results[name] = {
            "encoder_layers": list(cut.encoder),
            "decoder_layers": list(cut.decoder),
            "same_as": None if names[cut] == name else names[cut],
            "loss": losses,
            "steps": figures_by_steps,
        }
    return results


def figures(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Figures of the trainings of one split at one number of steps: means over the training seeds,
    and each seed's video Frechet distance."""

    def values_of(name: str) -> list[float]:
        return [float(vars(row)[name]) for row in rows if vars(row)[name] is not None]

    def mean(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    adherence = [row.adherence for row in rows if row.adherence is not None]
    columns = (
        "video_frechet",
        "video_frechet_by_prompt",
        "sharpness",
        "block_passes_per_frame",
        "seconds_per_frame",
    )
    return {
        **{name: mean(values_of(name)) for name in (*columns, "seconds_to_first_frame")},
        "video_frechet_std_over_sampling_seeds": mean(values_of("video_frechet_std")),
        "video_frechet_by_training_seed": values_of("video_frechet"),
        "place": mean([scores.place for scores in adherence]),
        "motion": mean([scores.motion for scores in adherence]),
    }


def draw(plan: Plan, results: dict[str, Any]) -> Path:
    """Draw quality against latency, one point for all names of a split; returns the file."""
    points = {}
    for name, split in results.items():
        if split["same_as"] is None:
            other_names = [
                other_name for other_name, row in results.items() if row["same_as"] == name
            ]
            points[" = ".join([name, *other_names])] = {
                f"{steps} steps": (
                    1000 * row["seconds_per_frame"],
                    row["video_frechet"],
                    row["video_frechet_std_over_sampling_seeds"] or 0.0,
                )
                for steps, row in split["steps"].items()
            }
    file = plan.run / "figures" / "sweep_split.png"
    return tradeoff_figure(
        file, points, "ms per latent frame", "video Frechet distance (lower is better)"
    )


def show(results: dict[str, Any], updates: int) -> None:
    """Print the table of all splits."""
    table = Table(title=f"Encoder / decoder splits after {updates} updates", title_justify="left")
    headings = (
        "split",
        "encoder",
        "decoder",
        "loss",
        "steps",
        "video Frechet",
        "place %",
        "motion %",
        "passes",
        "ms",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "split" else "right", no_wrap=True)
    for name, split in results.items():
        for steps, row in split["steps"].items():
            cells = [
                f"{row['video_frechet']:.1f}",
                f"{100 * row['place']:.0f}",
                f"{100 * row['motion']:.0f}",
            ]
            costs = [
                f"{row['block_passes_per_frame']:.0f}",
                f"{1000 * row['seconds_per_frame']:.1f}",
            ]
            layers = [str(len(split[f"{part}_layers"])) for part in ("encoder", "decoder")]
            loss = sum(split["loss"]) / len(split["loss"])
            table.add_row(as_cell(name), *layers, f"{loss:.4f}", steps, *cells, *costs)
    print_table(table, 120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/sweep"), help="run directory, resumable"
    )
    parser.add_argument(
        "--teacher", type=Path, default=Path("assets/wan_doom"), help="pretrained Wan to be cut"
    )
    parser.add_argument(
        "--latents", type=Path, help="encoded clips (train/, val/) to use; none: they are made"
    )
    parser.add_argument("--updates", type=int, default=500, help="updates of every split's stage 2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the trainings")
    parser.add_argument("--clips", type=int, default=24, help="held-out clips that are scored")
    parser.add_argument(
        "--probe-clips",
        type=int,
        default=24,
        help="clips of the probe that leaves out single blocks",
    )
    parser.add_argument(
        "--train", type=int, default=48, help="rendered training clips per place and motion"
    )
    args = parser.parse_args()
    if min(args.updates, args.clips) < 1 or args.probe_clips < 2:
        raise UserError("--updates and --clips must be at least 1, --probe-clips at least 2")
    latents = args.latents or args.run / "latents"
    plan = Plan(
        args.run,
        args.teacher,
        latents,
        args.updates,
        tuple(dict.fromkeys(args.seeds)),
        args.clips,
        args.probe_clips,
    )
    depth = read_wan_config(plan.teacher).num_layers
    cuts(depth, both_ends(depth, 1))  # UserError for a small teacher before anything is made
    with chain(plan.run):
        if args.latents is None:
            run_steps(plan.run, clips_and_latents(plan.run, plan.teacher, latents, args.train))
        sweep(plan, depth)


def sweep(plan: Plan, depth: int) -> None:
    """Train and score all splits; write sweep.json and the figure; print the table."""
    splits = cuts(depth, proposal(plan))
    run_steps(plan.run, [*plan.training(splits), [plan.scoring(splits)]])
    results = collect(plan, splits)
    context = read_rows(plan.run / "scores" / "results.json")[1]
    description = {
        "updates": plan.updates,
        "training_seeds": list(plan.seeds),
        "teacher": str(plan.teacher),
        **context,
    }
    write_json(plan.run / "sweep.json", {"schema": 1, "context": description, "splits": results})
    figure = draw(plan, results)
    show(results, plan.updates)
    say_if_busy(context)
    say(f"{plan.run}/sweep.json, {figure}")


if __name__ == "__main__":
    exit_on_user_error(main)
