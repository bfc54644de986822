"""What SCD-B costs at Minecraft's shapes: seconds per frame by length of history, and a training
step.

    python benchmarks/scratch_speed.py --out docs/results/scratch_speed.json

64 tokens a frame, random weights, batch 1, bf16, no tokenizer. A row has a number S of steps and a
number of frames of history: it measures the encoder's pass and the S decoder passes of the next
frame. The rows take turns, and each has the floor of its own matmuls and attention calls. Causal
DiT-B is measured at S = 4 and at the shortest training clip. Every training step runs in a process
of its own, so that its peak memory can be read. Finished rows in --out are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scd_sf.config import HelpFormatter
from scd_sf.diffusion.samplers import Euler
from scd_sf.distributed import keep_freed_memory
from scd_sf.evaluation.bench import in_rounds, random_weights
from scd_sf.evaluation.roofline import peak_gib
from scd_sf.files import write_json
from scd_sf.losses.flow_matching import FlowMatchingConfig, flow_matching_loss
from scd_sf.models.build import ModelConfig, Scd, Student, build_student, set_checkpointing
from scd_sf.models.dit import DitConfig
from scd_sf.models.interface import FrameStreamer
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.types import Conditioning, exit_on_user_error

CHANNELS, SIDE, ACTIONS = 32, 8, 3
HISTORIES, STEPS, SAMPLES = (16, 64, 300), (4, 50), (1, 4)
SCD = ScdConfig(
    tuple(range(8)), DecoderConfig((8, 9, 10, 11), "paper", "temporal", prefix_time="step")
)
CACHED = ScdConfig(
    tuple(range(8)), DecoderConfig((8, 9, 10, 11), "paper", "temporal", prefix="cached")
)


def model_of(family: str, scd: ScdConfig = SCD) -> Student:
    """A model of Minecraft's shapes with random bf16 weights."""
    with torch.device("meta"):
        model = build_student(
            ModelConfig(family, backbone="dit", dit=DitConfig(num_actions=ACTIONS), scd=scd)
        )
    random_weights(model, torch.bfloat16)
    return model


def random_actions(frames: int) -> Conditioning:
    """One random action for each frame of one clip."""
    actions = torch.randint(0, ACTIONS, (1, frames), generator=torch.Generator().manual_seed(0))
    return Conditioning.of_frames(1, actions)


class Rollout:
    """A stream whose history is noise; :meth:`frame` generates the frame after it, any number of
    times."""

    def __init__(self, model: FrameStreamer, history: int, steps: int) -> None:
        self.model = model
        self.sampler = Euler(steps, 1.0)
        rng = torch.Generator().manual_seed(1)
        frames = torch.randn(history, 1, 1, CHANNELS, SIDE, SIDE, generator=rng).bfloat16()
        self.like = frames[0]
        stream = model.start(
            random_actions(history + 1), (SIDE, SIDE), CacheConfig(preallocate=history + 1)
        )
        with torch.no_grad():
            previous: Tensor | None = None
            for frame in frames[:-1]:
                stream, previous = model.advance(stream, previous, self.like), frame
        self.stream = stream
        self.previous = previous
        self.cache = stream.cache
        self.fill = (self.cache.length, self.cache.num_tokens)

    @torch.no_grad()
    def frame(self) -> Tensor:
        """The frame after the history, (1, 1, C, H, W)."""
        self.cache.length, self.cache.num_tokens = self.fill
        stream = self.model.advance(self.stream, self.previous, self.like)

        def velocity(x: Tensor, t: float) -> Tensor:
            return self.model.denoise(stream, x, torch.full((1,), t)).to(x.dtype)

        return self.sampler(velocity, torch.randn_like(self.like), torch.randn_like)


def training(model: Student, frames: int, samples: int) -> Callable[[], None]:
    """The forward and backward pass of one clip without the optimizer; activations are recomputed
    as in training."""
    x_0 = torch.randn(1, frames, CHANNELS, SIDE, SIDE)
    cfg = FlowMatchingConfig(shift=1.0, noise_samples=samples)
    set_checkpointing(model.trunks(), True)
    model.requires_grad_(True)

    def run() -> None:
        loss, _ = flow_matching_loss(
            model,
            x_0,
            random_actions(frames),
            Conditioning.of_frames(1),
            cfg,
            torch.Generator().manual_seed(0),
        )
        loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def rollouts(rounds: int) -> dict[str, dict[str, float]]:
    """Costs of generating a frame, by case. The cases take turns, so that a slow minute of the
    machine hits them all."""
    kinds = (("SCD-B", "scd", SCD, STEPS), ("SCD-B with cached prefix", "scd", CACHED, STEPS[1:]))
    cases = {}
    for name, family, scd, steps in (*kinds, ("Causal DiT-B", "causal", SCD, STEPS[:1])):
        model = model_of(family, scd)
        for count in steps:
            for history in HISTORIES:
                cases[f"{name}, S = {count}, {history} frames of history"] = Rollout(
                    model, history, count
                ).frame
    return costs(cases, rounds)


def costs(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds, seconds of the floor and their ratio, by case."""
    columns = ("seconds", "floor_seconds", "floor_ratio")
    rows = in_rounds(cases, rounds, floor=True)
    return {str(row["name"]): {name: float(str(row[name])) for name in columns} for row in rows}


@dataclass(frozen=True)
class TrainingStep:
    """One row, measured in a process of its own."""

    family: str
    frames: int
    samples: int
    in_turn: bool = False

    @property
    def name(self) -> str:
        model = "SCD-B" if self.family == "scd" else "Causal DiT-B"
        order = " in turn" if self.in_turn else ""
        return f"{model}, training step of {self.frames} frames, K = {self.samples}{order}"

    def measured(self, threads: int) -> dict[str, float]:
        """Seconds, floor and peak GiB of the second run, in the calling process."""
        prepare(threads)
        model = model_of(self.family)
        if isinstance(model, Scd):
            model.samples_in_turn = self.in_turn
        run = training(model, self.frames, self.samples)
        run()
        peak_gib(reset=True)
        run()
        peak = peak_gib()
        return costs({self.name: run}, 1)[self.name] | {"peak_rss_gib": round(peak, 3)}


def training_steps(lengths: list[int]) -> list[TrainingStep]:
    """The rows of training steps, for clips of so many frames."""
    steps = []
    for frames in lengths:
        steps += [TrainingStep("scd", frames, samples) for samples in SAMPLES]
        steps += [TrainingStep("scd", frames, max(SAMPLES), in_turn=True)]
        if frames == min(lengths):
            steps += [TrainingStep("causal", frames, 1)]
    return steps


def prepare(threads: int) -> None:
    """Settings of a measuring process."""
    torch.set_num_threads(threads)
    keep_freed_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON with one entry per row")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of every row")
    parser.add_argument(
        "--frames", type=int, nargs="*", default=[64, 300], help="lengths of training clips"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    prepare(args.threads)
    document: dict[str, Any] = {
        "machine": f"{args.threads} threads, bf16",
        "torch": str(torch.__version__),
        "rows": {},
    }
    if args.out.is_file():
        document = json.loads(args.out.read_text())
    if not any("history" in name for name in document["rows"]):
        document["rows"] |= rollouts(args.rounds)
        document |= {"rounds": args.rounds, "rollout_peak_rss_gib": round(peak_gib(), 3)}
        write_json(args.out, document)
    for step in training_steps(args.frames):
        if step.name not in document["rows"]:
            with ProcessPoolExecutor(1, get_context("spawn")) as executor:
                document["rows"][step.name] = executor.submit(step.measured, args.threads).result()
            write_json(args.out, document)
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    exit_on_user_error(main)
