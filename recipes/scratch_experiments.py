"""The paper's tables at a small size: SCD and Causal DiT from scratch on Doom walks with actions,
with real metrics.

    # interfaces, amortisation, corruption, long or all in place of models
    python recipes/scratch_experiments.py models --run runs/scratch
    # params and lpips [--pictures] train nothing and take seconds
    python recipes/scratch_experiments.py params

Needs ``scd weights metrics`` once. Makes the data set (data_prep/make_doom_actions.py), encodes it
with assets/tokenizer_doom, trains every trial of the experiment (recipes/pretrain.py), scores it
(recipes/evaluate_prediction.py: 4 true frames, 12 generated), and writes ``RUN/scratch.json`` and
figures. Everything is resumable: what is finished is not run again. ``--steps`` and ``--test`` make
it smaller, ``--seeds 0 1`` gives spreads.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scd_sf.config import HelpFormatter, load_config
from scd_sf.diffusion.samplers import Euler
from scd_sf.evaluation.curves import curve_figure, group_figure
from scd_sf.evaluation.lpips import Lpips, Trunk
from scd_sf.evaluation.prediction_result import PredictionResult
from scd_sf.evaluation.table import BlockPassCounter
from scd_sf.files import read_json, read_jsonl, write_json
from scd_sf.generation.rollout import rollout
from scd_sf.models.build import ModelConfig, Student, build_student
from scd_sf.nn.layers import DitBlock
from scd_sf.tools.steps import Group, Step, chain, python_command, run_steps
from scd_sf.train.base import EngineConfig
from scd_sf.types import Conditioning, UserError, exit_on_user_error, say

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TOKENIZER, CONFIG = "assets/tokenizer_doom", "recipes/configs/pretrain_doom.yaml"
SCD = "model.scd={{encoder_layers: {}, decoder: {{layers: {}, fusion: {}, prefix_rope: {}, prefix_time: step}}}}"
SIZES = {  # the paper's Table 2: millions of parameters, block passes per frame at 50 steps
    "causal_b": (131, 600),
    "scd_b": (132, 208),
    "scd_b_e": (174, 212),
    "scd_b_d": (217, 608),
    "causal_m": (230, 600),
    "scd_m": (230, 208),
    "scd_m_e": (306, 212),
    "scd_m_d": (383, 608),
}
# What lpips.LPIPS(net="vgg") printed on ten pairs of numpy.random.RandomState(123).rand(10, 3, 100,
# 100).
LPIPS_VGG = (0.3497, 0.3494, 0.3473, 0.3558, 0.3437, 0.3366, 0.3716, 0.3516, 0.3472, 0.3413)
# What lpips prints for imgs/ex_p0.png and ex_p1.png of its repository, each against ex_ref.png.
LPIPS_PICTURES = {"alex": (0.7219, 0.1376), "vgg": (0.5686, 0.4217)}
EXPERIMENTS = ("models", "interfaces", "amortisation", "corruption", "long")
OTHERS = ("causal", "scd_e", "scd_d")
CONTROLS = ("reconstruction", "repeat")  # the same for every seed
# the name of "scd" in an experiment's figure
OWN = {"interfaces": "temporal", "amortisation": "k2", "corruption": "eta0.05"}
GUIDANCE = (0.0, 1.5, 2.0)  # s of Table 5; 1 is the prediction without guidance


def scd(
    encoder: int, decoder: int, fusion: str = "paper", rope: str = "temporal"
) -> tuple[str, ...]:
    """Overrides for an SCD with ``encoder`` and ``decoder`` layers (half of the paper's); the decoder
    has twice the learning rate, as in the released code."""
    layers = list(range(encoder)), list(range(encoder, encoder + decoder))
    return (
        "model.family=scd",
        f"model.dit.num_layers={encoder + decoder}",
        SCD.format(*layers, fusion, rope),
        "engine.lr_scale={decoder: 2.0}",
    )


@dataclass(frozen=True)
class Trial:
    """One training: overrides of pretrain_doom.yaml, which differ from those of "scd" in one thing.
    ``seconds``: measured for 480 updates on one core. ``eighths``: of ``--steps``, its updates."""

    name: str
    overrides: tuple[str, ...]
    seconds: float = 540.0
    eighths: int = 8


TRIALS = {
    trial.name: trial
    for trial in (
        Trial("scd", scd(4, 2)),
        Trial("causal", (), 1500.0),
        Trial("scd_e", scd(6, 2), 700.0),
        Trial("scd_d", scd(4, 6), 1000.0),
        Trial("channel", scd(4, 2, "channel")),
        Trial("identical", scd(4, 2, "paper", "identical")),
        Trial("k1", (*scd(4, 2), "loss.noise_samples=1"), 360.0, 18),  # as many seconds as K = 4
        Trial("k4", (*scd(4, 2), "loss.noise_samples=4"), 900.0),
        *(
            Trial(f"eta{noise}", (*scd(4, 2), f"loss.context_noise={noise}"))
            for noise in (0.0, 0.2, 0.5)
        ),
    )
}
TABLES = {
    "models": ("causal", "scd", "scd_e", "scd_d"),
    "interfaces": ("channel", "scd", "identical"),
    "amortisation": ("k1", "scd", "k4"),
    "corruption": ("eta0.0", "scd", "eta0.2", "eta0.5"),
    "long": ("causal", "scd"),
}


@dataclass(frozen=True)
class Plan:
    """The command line's values."""

    run: Path
    steps: int
    seeds: tuple[int, ...]
    train: int
    test: int

    @property
    def data(self) -> Path:
        return self.run / "doom"

    def quarters(self, trial: str) -> list[int]:
        """The updates after each quarter of --steps, to the trial's last one."""
        return [self.steps * eighths // 8 for eighths in range(2, TRIALS[trial].eighths + 1, 2)]

    def data_steps(self) -> list[Group]:
        render = python_command(
            "data_prep/make_doom_actions.py", str(self.data), "--workers", "2", "--seed", "1"
        )
        count = ["--train", str(self.train), "--test", str(self.test)]
        clips = Step("clips", [*render, *count], 300, outputs=[self.data])
        encode = python_command(
            "data_prep/teco_minecraft.py", "--root", str(self.data), "--tokenizer", TOKENIZER
        )

        def encode_step(split: str) -> Step:
            out = self.run / "latents" / split
            return Step(
                f"encode-{split}",
                [*encode, "--split", split, "--out", str(out)],
                400,
                ONE_THREAD,
                [out],
            )

        return [[clips], [encode_step("train"), encode_step("test")]]

    def document(self) -> dict[str, Any]:
        """The contents of scratch.json, or of a new one."""
        file = self.run / "scratch.json"
        content = (
            read_json(file, "remove it")
            if file.is_file()
            else {"steps": self.steps, "test_clips": self.test}
        )
        return dict[str, Any](content)

    def folder(self, trial: str, seed: int) -> Path:
        return self.run / "trials" / f"{trial}-{seed}"

    def training(self, trial: Trial, seed: int) -> Step:
        latents = [f"data={self.run / 'latents' / 'train'}", f"val={self.run / 'latents' / 'test'}"]
        steps = self.steps * trial.eighths // 8
        run_fields = [
            f"run.dir={self.folder(trial.name, seed)}",
            f"run.seed={seed}",
            f"train.steps={steps}",
        ]
        intervals = [f"train.keep_every={self.steps // 8}", f"train.save_every={self.steps // 8}"]
        command = python_command(
            "recipes/pretrain.py",
            "--config",
            CONFIG,
            *latents,
            *run_fields,
            *intervals,
            *trial.overrides,
        )
        seconds, folder = trial.seconds * steps / 480, self.folder(trial.name, seed)
        outputs = [folder / "checkpoints", folder / "metrics.jsonl"]
        return Step(f"train-{trial.name}-{seed}", command, seconds, ONE_THREAD, outputs)

    def scoring(self, trial: str, seed: int, name: str, *extra_fields: str, step: int = 0) -> Step:
        """Predict 12 frames after 4 on every test clip, into ``scores/NAME-SEED``, with the newest
        checkpoint or that of ``step``."""
        checkpoint, out = self.folder(trial, seed), self.run / "scores" / f"{name}-{seed}"
        fields = [
            f"checkpoint={checkpoint / 'checkpoints' / f'step_{step:08d}' if step else checkpoint}",
            f"tokenizer={TOKENIZER}",
            f"pixels={{kind: teco, root: {self.data}, split: test}}",
            f"custom={{context: 4, generated: 12, clips: {self.test}, resolution: 128}}",
            f"out={out}",
            f"real={self.run / 'real'}",
            "batch=16",
            "videos=4",
        ]
        command = python_command("recipes/evaluate_prediction.py", *fields, *extra_fields)
        return Step(
            f"score-{name}-{seed}",
            command,
            240,
            ONE_THREAD,
            [out / "result.json", out / "cost.json"],
        )

    def result(self, name: str, seed: int) -> dict[str, Any]:
        """Figures and costs of a finished scoring."""
        folder = self.run / "scores" / f"{name}-{seed}"
        result = PredictionResult.read(folder / "result.json")
        cost: dict[str, Any] = read_json(folder / "cost.json", "remove it and run again")
        figures = {figure: round(value.value, 4) for figure, value in result.figures.items()}
        columns = (
            "parameters",
            "block_passes_per_frame",
            "seconds_per_frame",
            "seconds_to_first_frame",
        )
        timing = {key: round(cost[key], 4) for key in columns if key in cost}
        if name.endswith("-long"):
            timing["by_frame"] = cost["by_frame"]
        curves = {
            name: [round(value, 4) for value in curve] for name, curve in result.curves.items()
        }
        return figures | timing | {"curves": curves}

    def log(self, trial: str, seed: int) -> list[dict[str, Any]]:
        """The lines of the training's metrics.jsonl."""
        return read_jsonl(self.folder(trial, seed) / "metrics.jsonl", "train it again")

    def seconds_per_update(self, trial: str, seed: int) -> float:
        """The least logged seconds of an update, as other processes only add to it. UserError: no
        time is logged."""
        times = [row["perf/seconds"] for row in self.log(trial, seed) if "perf/seconds" in row]
        if not times:
            raise UserError(f"{self.folder(trial, seed)}: no times in metrics.jsonl; train again")
        return min(times)


def train_and_score(plan: Plan, experiment: str) -> list[Group]:
    """Train every trial of a table, the longest first, and score it after equal steps."""
    jobs = [(TRIALS[name], seed) for seed in plan.seeds for name in TABLES[experiment]]
    trainings = [plan.training(trial, seed) for trial, seed in jobs]
    return [
        sorted(trainings, key=lambda step: -step.seconds),
        [plan.scoring(trial.name, seed, trial.name, step=plan.steps) for trial, seed in jobs],
    ]


def equal_time(plan: Plan) -> list[Group]:
    """Score the other models at the checkpoint nearest to the training seconds that all of SCD's
    updates took."""
    steps: list[Step] = []
    eighth = plan.steps // 8
    for seed in plan.seeds:
        budget = plan.steps * plan.seconds_per_update("scd", seed)
        for name in OTHERS:
            eighths = round(budget / plan.seconds_per_update(name, seed) / eighth)
            step = eighth * min(8, max(1, eighths))
            steps.append(plan.scoring(name, seed, f"{name}-time", step=step))
    return [steps]


def extra(plan: Plan, experiment: str) -> list[Group]:
    """Scorings of an experiment besides those of its trials at equal steps."""
    steps: list[Step] = []
    for seed in plan.seeds:
        if experiment == "corruption":
            steps += [
                plan.scoring(
                    "scd", seed, f"guided{s}", f"rollout.guidance.corruption={s}", step=plan.steps
                )
                for s in GUIDANCE
            ]
        if experiment == "amortisation":
            small_protocol = [f"custom.clips={min(24, plan.test)}", "fvd=false"]
            steps += [
                plan.scoring(name, seed, f"{name}-{step}", *small_protocol, step=step)
                for name in TABLES[experiment]
                for step in plan.quarters(name)
            ]
            steps.append(plan.scoring("k1", seed, "k1-time", step=plan.quarters("k1")[-1]))
        if experiment == "long":
            protocol = "custom={context: 36, generated: 264, clips: 8, resolution: 128}"
            long_protocol = [protocol, "fvd=false", "rollout.window=15", "timed=264", "batch=8"]
            steps += [
                plan.scoring(name, seed, f"{name}-long", *long_protocol, step=plan.steps)
                for name in TABLES[experiment]
            ]
    if experiment == "models":
        steps += [
            plan.scoring("scd", plan.seeds[0], name, f"checkpoint={name}") for name in CONTROLS
        ]
    return [steps] if steps else []


def collect(plan: Plan, experiment: str) -> dict[str, Any]:
    """Figures by trial and seed, as they go into scratch.json."""
    names = list(TABLES[experiment])
    if experiment == "models":
        names += [f"{name}-time" for name in OTHERS] + list(CONTROLS)
    names += {"amortisation": ["k1-time"], "corruption": [f"guided{s}" for s in GUIDANCE]}.get(
        experiment, []
    )
    if experiment == "long":
        names = [f"{name}-long" for name in TABLES[experiment]]
    results: dict[str, Any] = {}
    for name in names:
        seeds = plan.seeds[:1] if name in CONTROLS else plan.seeds
        results[name] = {str(seed): plan.result(name, seed) for seed in seeds}
    if experiment in ("amortisation", "models"):
        for name in TABLES[experiment]:
            for seed in plan.seeds:
                row = results[name][str(seed)]
                row["seconds_per_update"] = round(plan.seconds_per_update(name, seed), 4)
                if experiment == "amortisation":
                    row["by_time"] = by_time(plan, name, seed)
    return results


def by_time(plan: Plan, name: str, seed: int) -> dict[str, list[float]]:
    """LPIPS and validation loss against training seconds (Figure 1)."""
    second = plan.seconds_per_update(name, seed)
    steps = plan.quarters(name)
    lpips = [plan.result(f"{name}-{step}", seed)["lpips"] for step in steps]
    rows = [row for row in plan.log(name, seed) if "val/loss" in row and row["step"] <= steps[-1]]
    return {
        "seconds": [round(second * step, 1) for step in steps],
        "lpips": lpips,
        "loss_seconds": [round(second * row["step"], 1) for row in rows],
        "loss": [round(row["val/loss"], 5) for row in rows],
    }


@dataclass
class Sized:
    """The fields of a model's configuration file that :func:`params` reads."""

    model: ModelConfig
    engine: EngineConfig = field(default_factory=EngineConfig)


def params() -> dict[str, Any]:
    """Table 2's sizes, counted on the meta device, with Minecraft's three actions; block passes of
    a frame at 50 steps (Causal DiT's clean pass of the frame before it included)."""
    results = {}
    for name, (millions, passes) in SIZES.items():
        file = Path(CONFIG).with_name(f"pretrain_{name}.yaml")
        config = load_config(Sized, file, ["model.dit.num_actions=3"]).model
        with torch.device("meta"):
            model = build_student(config)
        # The passes of the second frame, with one step and with two.
        passes_1, passes_2 = (
            block_passes(model, 2, steps) - block_passes(model, 1, steps) for steps in (1, 2)
        )
        parameter_count = sum(parameter.numel() for parameter in model.parameters())
        passes_50 = passes_1 + 49 * (passes_2 - passes_1)
        results[name] = {
            "parameters": parameter_count,
            "paper_millions": millions,
            "block_passes": passes_50,
            "paper_passes": passes,
        }
        say(
            f"{name}: {parameter_count / 1e6:.1f} M (paper {millions}), {passes_50} block passes (paper {passes})"
        )
    return results


def block_passes(model: Student, frames: int, steps: int) -> int:
    """Block passes of generating ``frames`` frames in ``steps`` steps, counted on the meta device."""
    cond = Conditioning.of_frames(1, torch.zeros(1, frames, dtype=torch.long)).to("meta")
    noise = torch.empty(1, frames, model.cfg.in_channels, 8, 8, device="meta")
    with torch.no_grad(), BlockPassCounter(model, DitBlock) as counter:
        rollout(model, noise, cond, Euler(steps, 1.0), lambda x: x)
    return counter.samples


def lpips(pictures: Path | None) -> dict[str, Any]:
    """LPIPS with the real weights on seeded noise, VGG's beside published values. ``pictures``: the
    folder imgs/ of the lpips repository, to measure its pictures beside their documented values."""
    rng = np.random.RandomState(123)
    first_pictures, second_pictures = (
        torch.from_numpy(rng.rand(10, 3, 100, 100)).float()[None] for _ in range(2)
    )
    results: dict[str, Any] = {"vgg_published": list(LPIPS_VGG)}
    trunks: tuple[Trunk, ...] = ("alex", "vgg")
    for trunk in trunks:
        network = Lpips.load(trunk)
        results[trunk] = [
            round(value, 5) for value in network(first_pictures, second_pictures)[0].tolist()
        ]
        if pictures is not None:
            reference, *distorted_images = (
                picture(pictures / f"ex_{name}.png") for name in ("ref", "p0", "p1")
            )
            results[f"{trunk}_pictures"] = values = [
                round(float(network(image, reference)), 4) for image in distorted_images
            ]
            say(
                f"LPIPS {trunk} of ex_p0, ex_p1: {values} (documented {list(LPIPS_PICTURES[trunk])})"
            )
    results["vgg_largest_error"] = max(
        abs(a - b) for a, b in zip(results["vgg"], LPIPS_VGG, strict=True)
    )
    say(f"LPIPS VGG: largest difference to the published values {results['vgg_largest_error']:.2g}")
    return results


def picture(file: Path) -> Tensor:
    """A PNG as (1, 1, 3, H, W) in [0, 1]. UserError: it cannot be read."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
    except OSError as error:
        raise UserError(
            f"{file}: not a readable PNG ({error}); --pictures is imgs/ of the lpips repository"
        ) from error
    return pixels.permute(2, 0, 1)[None, None].float() / 255


QUICK = ("params", "lpips")


def draw(plan: Plan, experiment: str, results: dict[str, Any]) -> list[Path]:
    """Draw an experiment's figures; returns their files. Curves of "long" are of the first seed."""
    folder, seed = plan.run / "figures", str(plan.seeds[0])
    results = {
        OWN.get(experiment, name) if name == "scd" else name: rows for name, rows in results.items()
    }
    if experiment == "long":
        files = []
        measures = {
            "psnr": "PSNR, dB",
            "lpips": "LPIPS",
            "seconds": "seconds of the frame",
            "memory_gib": "GiB held",
        }
        for measure, unit in measures.items():
            part = "curves" if measure in ("psnr", "lpips") else "by_frame"
            curves = {
                name.removesuffix("-long"): rows[seed][part][measure]
                for name, rows in results.items()
            }
            lines = {
                name: (list(range(1, len(curve) + 1)), curve) for name, curve in curves.items()
            }
            files.append(
                curve_figure(folder / f"long_{measure}.png", lines, "generated frame", unit)
            )
        return files
    if experiment == "amortisation":
        runs = [
            (f"{name}, seed {number}", row)
            for name, rows in results.items()
            for number, row in rows.items()
        ]
        lines = {
            name: (row["by_time"]["seconds"], row["by_time"]["lpips"])
            for name, row in runs
            if "by_time" in row
        }
        return [curve_figure(folder / "amortisation.png", lines, "training seconds", "LPIPS")]
    values = {
        name: {measure: [row[measure] for row in rows.values()] for measure in ("fvd", "lpips")}
        for name, rows in results.items()
    }
    return [group_figure(folder / f"{experiment}.png", values)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "experiment", choices=(*EXPERIMENTS, *QUICK, "all", "data"), help="what to run"
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs/scratch"), help="run directory, resumable"
    )
    parser.add_argument(
        "--steps", type=int, default=480, help="updates of every training; a multiple of 8"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the trainings")
    parser.add_argument("--train", type=int, default=240, help="training clips of 300 frames")
    parser.add_argument("--test", type=int, default=64, help="test clips")
    parser.add_argument("--pictures", type=Path, help="for lpips: imgs/ of the lpips repository")
    args = parser.parse_args()
    if args.steps < 8 or args.steps % 8 or args.test < 2:
        raise UserError(
            f"--steps {args.steps} must be a multiple of 8 and --test {args.test} at least 2"
        )
    with chain(args.run):
        make(Plan(args.run, args.steps, tuple(args.seeds), args.train, args.test), args)


def make(plan: Plan, args: argparse.Namespace) -> None:
    """Run the experiments of the command line; each is written into scratch.json when it is done."""
    file = plan.run / "scratch.json"
    if args.experiment in ("params", "all"):
        write_json(file, plan.document() | {"params": params()})
    if args.experiment in ("lpips", "all"):
        write_json(file, plan.document() | {"lpips": lpips(args.pictures)})
    if args.experiment in QUICK:
        return
    run_steps(plan.run, plan.data_steps(), 2)
    groups: dict[str, tuple[str, ...]] = {"all": EXPERIMENTS, "data": ()}
    for experiment in groups.get(args.experiment, (args.experiment,)):
        run_steps(plan.run, train_and_score(plan, experiment), 2)
        if experiment == "models":
            run_steps(plan.run, equal_time(plan), 2)
        run_steps(plan.run, extra(plan, experiment), 2)
        document = plan.document() | {experiment: collect(plan, experiment)}
        write_json(file, document)
        say(
            f"{experiment}: {file}; "
            + ", ".join(str(path) for path in draw(plan, experiment, document[experiment]))
        )


if __name__ == "__main__":
    exit_on_user_error(main)
