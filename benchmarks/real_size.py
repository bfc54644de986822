"""Wan 2.1 1.3B's geometry, random weights, 832x480: transplant, then 4-step generation by SCD and
by Self-Forcing.

    python benchmarks/real_size.py --out docs/results/real_size.json

All models live in one process, share the weights they have in common, and take turns: each makes
one chunk, then the next does, so that a slow minute of the machine hits them all. Right after each
turn comes its floor: every matmul, attention and convolution call that the turn made, timed alone.
Per row: seconds and block passes per latent frame, peak memory of the process during its turns, and
the ratio of its seconds to its floor.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.config import HelpFormatter
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.distributed import keep_freed_memory
from scd_sf.evaluation.bench import random_weights
from scd_sf.evaluation.roofline import HeavyCalls, peak_gib
from scd_sf.evaluation.table import BlockPassCounter
from scd_sf.files import write_json
from scd_sf.generation.generate import generate_latents
from scd_sf.models.build import Scd, Student
from scd_sf.models.causal import Causal
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.scd.transplant import transplant_scd, verify_transplant
from scd_sf.models.scd.wan import ScdWan
from scd_sf.models.wan.transformer import Wan, WanConfig
from scd_sf.nn.layers import WanBlock
from scd_sf.tensor_files import dtype_of
from scd_sf.types import Conditioning, exit_on_user_error

LATENT = (16, 60, 104)  # 832x480 through Wan's VAE
TEXT_TOKENS = 512


@dataclass(frozen=True)
class Variant:
    """One row: the causal baseline ("causal"), or SCD with a fusion."""

    name: str
    chunk: int = 1
    fusion: str = ""
    prefix: str = "full"

    def build(self, cfg: WanConfig, decoder: tuple[int, ...], encoder: tuple[int, ...]) -> Student:
        """The variant's model on the meta device."""
        with torch.device("meta"):
            if not self.fusion:
                return Causal(cfg, self.chunk)
            return ScdWan(
                cfg,
                ScdConfig(
                    encoder,
                    DecoderConfig(decoder, self.fusion, "identical", self.prefix),
                    self.chunk,
                ),
            )


BASELINE = "Self-Forcing frame-wise"
VARIANTS = (
    Variant("SCD delta (default)", fusion="delta"),
    Variant(BASELINE),
    Variant("SCD channel", fusion="channel"),
    Variant("SCD junction (prefix cached)", fusion="junction", prefix="cached"),
    Variant("SCD junction (prefix full)", fusion="junction"),
    Variant("SCD paper (prefix full)", fusion="paper"),
    Variant("SCD delta chunk-wise", chunk=3, fusion="delta"),
    Variant("Self-Forcing chunk-wise", chunk=3),
)


def random_wan(cfg: WanConfig, dtype: torch.dtype) -> Wan:
    """A Wan with random weights of ``dtype``."""
    with torch.device("meta"):
        model = Wan(cfg)
    random_weights(model, dtype)
    return model


class Row:
    """Generates one model's clips chunk by chunk (4 re-noise steps, batch 1), and adds up what the
    chunks cost."""

    def __init__(self, variant: Variant, model: Student, repeats: int) -> None:
        self.variant = variant
        self.model = model
        self.repeats = repeats
        self.forget()

    def forget(self) -> None:
        """Set all costs to zero, as after a warm-up."""
        self.seconds: list[float] = []
        self.floors: list[float] = []
        self.frames = 0
        self.passes = 0
        self.peak = 0.0

    def clip(self, frames: int) -> Iterator[None]:
        """Generate one clip of ``frames`` latent frames, and yield after every chunk. Every clip
        starts from the same noise."""
        rng = torch.Generator().manual_seed(1)
        cond = Conditioning(torch.randn(1, TEXT_TOKENS, self.model.cfg.text_dim, generator=rng))
        chunks = generate_latents(self.model, cond, [1], (frames, *LATENT), FewStepSampler())
        for _ in range(frames // self.variant.chunk):
            self._turn(chunks)
            yield

    @torch.no_grad()
    def _turn(self, chunks: Iterator[Tensor]) -> None:
        peak_gib(reset=True)
        with BlockPassCounter(self.model, WanBlock) as counter, HeavyCalls() as heavy:
            started = time.perf_counter()
            out = next(chunks)
            self.seconds.append(time.perf_counter() - started)
        assert out.isfinite().all(), self.variant.name
        self.peak = max(self.peak, peak_gib())
        self.passes += counter.calls
        self.frames += self.variant.chunk
        self.floors.append(heavy.floor(self.repeats))

    def result(self) -> dict[str, object]:
        """The row's entry of the output file: seconds, block passes and GiB."""
        seconds, floor = sum(self.seconds), sum(self.floors)
        return {
            "name": self.variant.name,
            "chunk": self.variant.chunk,
            "fusion": self.variant.fusion or None,
            "latent_frames": self.frames,
            "seconds_per_latent_frame": round(seconds / self.frames, 2),
            "block_passes_per_latent_frame": round(self.passes / self.frames, 2),
            "peak_rss_gib": round(self.peak, 2),
            "floor_seconds_per_latent_frame": round(floor / self.frames, 2),
            "floor_ratio": round(seconds / floor, 3),
            "turns": [round(value, 2) for value in self.seconds],
            "floors": [round(value, 2) for value in self.floors],
        }


def take_turns(rows: Sequence[Row], frames: int, rounds: int) -> Iterator[None]:
    """Generate ``rounds`` clips of every row, one chunk at a time, and yield after each chunk; every
    other pass goes through the rows backwards."""
    backwards = False
    for _ in range(rounds):
        clips = {row: row.clip(frames) for row in rows}
        while clips:
            order = list(clips)
            if backwards:
                order.reverse()
            for row in order:
                if next(clips[row], "done") == "done":
                    del clips[row]
                else:
                    yield
            backwards = not backwards


def transplanted(
    wan: Wan, decoder: tuple[int, ...], encoder: tuple[int, ...]
) -> tuple[Scd, dict[str, float]]:
    """Stage 1 on ``wan``, compared bit for bit: the student in Wan's dtype, and figures of the
    copy."""
    peak_gib(reset=True)
    started = time.perf_counter()
    scd, report = transplant_scd(wan, ScdConfig(encoder, DecoderConfig(decoder)))
    seconds = time.perf_counter() - started
    verify_transplant(scd, wan, report)
    figures = {
        "layer_instances": len(encoder) + len(decoder),
        "parameters": sum(p.numel() for p in scd.parameters()),
        "tensors_bit_equal": sum(line.source is not None for line in report),
        "seconds": round(seconds, 1),
        "peak_rss_gib": round(peak_gib(), 2),
    }
    return scd.to(next(wan.parameters()).dtype), figures  # a student is transplanted in fp32


def state_of(variant: Variant, wan: Wan, scd: Scd | None, model: Student) -> dict[str, Tensor]:
    """The state dict of a variant, its tensors shared with ``scd`` or ``wan``. An adapter, which Wan
    does not have, starts as identity matrices."""
    source: dict[str, Tensor] = dict(
        (scd if scd is not None and variant.fusion else wan).state_dict()
    )
    if isinstance(model, Scd) and model.decoder.adapter is not None:
        width = model.cfg.width
        inputs = width if variant.fusion == "paper" else 2 * width
        eye = torch.eye(width)
        dtype = next(iter(source.values())).dtype
        source["decoder.adapter.weight"] = (
            eye if inputs == width else torch.cat([eye, eye], 1)
        ).to(dtype)
        source["decoder.adapter.bias"] = torch.zeros(width, dtype=dtype)
    return source


def speed(rows: Sequence[Row]) -> dict[str, float]:
    """How many times faster each frame-wise SCD is than frame-wise Self-Forcing, by row name; empty
    without that row.

    Any statement about SCD's speed must name its fusion: fusions differ more from each other than
    some of them from the baseline."""
    frame_wise = {row.variant.name: sum(row.seconds) for row in rows if row.variant.chunk == 1}
    baseline = frame_wise.pop(BASELINE, None)
    if baseline is None:
        return {}
    return {name: round(baseline / seconds, 3) for name, seconds in frame_wise.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON, one entry per row")
    parser.add_argument("--frames", type=int, default=3, help="latent frames; a multiple of 3")
    parser.add_argument("--rounds", type=int, default=1, help="clips of every model")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="bf16 is slow without AVX-512 bf16",
    )
    parser.add_argument(
        "--only", default="", help="comma-separated beginnings of row names; empty: all"
    )
    parser.add_argument(
        "--repeats", type=int, default=2, help="times that each call of the floor is repeated"
    )
    args = parser.parse_args()
    keep_freed_memory()
    cfg, encoder, decoder = WanConfig(), tuple(range(25)), (*range(5), *range(25, 30))
    variants = [
        variant
        for variant in VARIANTS
        if not args.only or variant.name.startswith(tuple(args.only.split(",")))
    ]
    wan = random_wan(cfg, dtype_of(args.dtype))
    scd, transplant = transplanted(wan, decoder, encoder)
    print(json.dumps(transplant), flush=True)
    rows = []
    for variant in variants:
        model = variant.build(cfg, decoder, encoder)
        model.load_state_dict(state_of(variant, wan, scd, model), assign=True)
        rows.append(Row(variant, model, args.repeats))
    document: dict[str, object] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {args.dtype}",
        "torch": str(torch.__version__),
        "transplant": transplant,
    }
    next(rows[0].clip(args.frames))
    rows[0].forget()
    for _ in take_turns(rows, args.frames, args.rounds):
        results = [row.result() for row in rows if row.frames]
        print(json.dumps({row.variant.name: row.seconds for row in rows if row.frames}), flush=True)
        write_json(args.out, {**document, "finished": False, "rows": results})
    document["over_frame_wise_self_forcing"] = speed(rows)
    write_json(args.out, {**document, "finished": True, "rows": [row.result() for row in rows]})


if __name__ == "__main__":
    exit_on_user_error(main)
