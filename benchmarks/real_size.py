"""Wan 2.1 1.3B's geometry, random weights, 832x480: transplant, then 4-step generation by SCD and by Self-Forcing.

    python benchmarks/real_size.py --out docs/results/real_size.json

Per row: seconds and block passes per latent frame, peak memory, and the ratio to the floor: the sum of every matmul and
attention call actually made, each timed alone in the same process. Finished rows in the output are not run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scd_sf.bench import random_weights
from scd_sf.data.manifest import write_json
from scd_sf.diffusion.solvers import Renoise
from scd_sf.metrics.protocols import BlockPassCounter
from scd_sf.models.build import Student
from scd_sf.models.causal import CausalWan
from scd_sf.models.generator import CacheConfig
from scd_sf.models.scd import Scd, ScdConfig
from scd_sf.models.scd_decoder import DecoderConfig
from scd_sf.models.transplant import transplant_scd, verify_transplant
from scd_sf.models.trunk import WanConfig
from scd_sf.models.wan import Wan
from scd_sf.nn.layers import WanBlock
from scd_sf.rollout import cpu_noise, rollout
from scd_sf.types import Conditioning

LATENT = (16, 60, 104)  # 832x480 through Wan's VAE
TEXT_TOKENS = 512
HEAVY = ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu", "convolution")


@dataclass(frozen=True)
class Variant:
    """One row: the causal baseline ("causal"), or SCD with a fusion."""

    name: str
    chunk: int = 1
    fusion: str = ""
    prefix: str = "full"

    def build(self, cfg: WanConfig, decoder: tuple[int, ...], encoder: tuple[int, ...]) -> Student:
        """On the meta device."""
        with torch.device("meta"):
            if not self.fusion:
                return CausalWan(cfg, self.chunk)
            return Scd(
                cfg, ScdConfig(encoder, DecoderConfig(decoder, self.fusion, "identical", self.prefix), self.chunk)
            )


VARIANTS = (
    Variant("SCD delta (default)", fusion="delta"),
    Variant("Self-Forcing frame-wise"),
    Variant("SCD channel", fusion="channel"),
    Variant("SCD junction (prefix cached)", fusion="junction", prefix="cached"),
    Variant("SCD junction (prefix full)", fusion="junction"),
    Variant("SCD paper (prefix full)", fusion="paper"),
    Variant("SCD delta chunk-wise", chunk=3, fusion="delta"),
    Variant("Self-Forcing chunk-wise", chunk=3),
)


@dataclass(frozen=True)
class Spec:
    """A tensor argument of a recorded call."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).normal_()


Call = tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]  # operator, arguments, keyword arguments


class Recorder(TorchDispatchMode):
    """Counts the heavy calls by their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in HEAVY:
            specs = tuple(Spec(tuple(a.shape), a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args)
            self.calls[(func, specs, tuple(sorted((kwargs or {}).items())))] += 1
        return func(*args, **(kwargs or {}))


def alone(call: Call, repeats: int) -> float:
    """Best seconds of one recorded call by itself."""
    func, specs, keywords = call
    given = [spec.tensor() if isinstance(spec, Spec) else spec for spec in specs]
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        func(*given, **dict(keywords))
        best = min(best, time.perf_counter() - started)
    return best


def peak_gib(reset: bool = False) -> float:
    """Peak resident memory of this process since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def random_wan(cfg: WanConfig, dtype: torch.dtype) -> Wan:
    with torch.device("meta"):
        model = Wan(cfg)
    random_weights(model, dtype)
    return model


def generate(model: Student, frames: int) -> Callable[[], Tensor]:
    """4-step re-noising of ``frames`` latent frames at batch 1, as sampling does it."""
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(1, frames, *LATENT, generator=rng)
    cond = Conditioning(torch.randn(1, TEXT_TOKENS, model.cfg.text_dim, generator=rng))

    def run() -> Tensor:
        with torch.no_grad():
            return rollout(model, noise, cond, Renoise(), cpu_noise(rng), cache=CacheConfig(preallocate=frames))

    return run


def measure(variant: Variant, model: Student, frames: int, repeats: int) -> dict[str, object]:
    peak_gib(reset=True)
    run, recorder = generate(model, frames), Recorder()
    with BlockPassCounter(model, WanBlock) as counter, recorder:
        started = time.perf_counter()
        out = run()
        seconds = time.perf_counter() - started
    assert out.isfinite().all(), variant.name
    memory = peak_gib()
    floor = sum(count * alone(key, repeats) for key, count in recorder.calls.items())
    return {
        "name": variant.name,
        "chunk": variant.chunk,
        "fusion": variant.fusion or None,
        "latent_frames": frames,
        "seconds_per_latent_frame": round(seconds / frames, 2),
        "block_passes_per_latent_frame": counter.calls / frames,
        "peak_rss_gib": round(memory, 2),
        "floor_seconds_per_latent_frame": round(floor / frames, 2),
        "floor_ratio": round(seconds / floor, 3),
    }


def transplanted(wan: Wan, decoder: tuple[int, ...], encoder: tuple[int, ...]) -> tuple[Scd, dict[str, object]]:
    """The real stage 1 at size, compared bit for bit."""
    peak_gib(reset=True)
    started = time.perf_counter()
    scd, report = transplant_scd(wan, ScdConfig(encoder, DecoderConfig(decoder)))
    copied = time.perf_counter() - started
    verify_transplant(scd, wan, report)
    about = {
        "layer_instances": len(encoder) + len(decoder),
        "parameters": sum(p.numel() for p in scd.parameters()),
        "tensors_bit_equal": sum(line.source is not None for line in report),
        "seconds": round(copied, 1),
        "peak_rss_gib": round(peak_gib(), 2),
    }
    return scd, about


def state_of(variant: Variant, wan: Wan, scd: Scd | None, model: Student) -> dict[str, Tensor]:
    """Tensors for a variant, shared with the source; adapters, which Wan does not have, start as they always do."""
    source: dict[str, Tensor] = dict((scd if scd is not None and variant.fusion else wan).state_dict())
    if isinstance(model, Scd) and model.decoder.adapter is not None:
        width = model.cfg.width
        inputs = width if variant.fusion == "paper" else 2 * width
        eye = torch.eye(width)
        dtype = next(iter(source.values())).dtype
        source["decoder.adapter.weight"] = (eye if inputs == width else torch.cat([eye, eye], 1)).to(dtype)
        source["decoder.adapter.bias"] = torch.zeros(width, dtype=dtype)
    return source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON, one entry per row")
    parser.add_argument("--frames", type=int, default=3, help="latent frames; a multiple of 3")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 is slow without AVX-512 bf16")
    parser.add_argument("--only", default="", help="comma-separated beginnings of row names; empty: all")
    parser.add_argument("--repeats", type=int, default=2, help="of every call that makes the floor")
    args = parser.parse_args()
    cfg, encoder, decoder = WanConfig(), tuple(range(25)), (*range(5), *range(25, 30))
    done: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": []}
    wanted = [v for v in VARIANTS if not args.only or v.name.startswith(tuple(args.only.split(",")))]
    wan = random_wan(cfg, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype])
    scd, about = transplanted(wan, decoder, encoder)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {args.dtype}"
    done |= {"machine": machine, "torch": str(torch.__version__), "transplant": about}
    print(json.dumps(about), flush=True)
    for variant in wanted:
        if any(row["name"] == variant.name for row in done["rows"]):
            continue
        model = variant.build(cfg, decoder, encoder)
        model.load_state_dict(state_of(variant, wan, scd, model), assign=True)
        done["rows"].append(measure(variant, model, args.frames, args.repeats))
        print(json.dumps(done["rows"][-1]), flush=True)
        write_json(args.out, done)
        del model
        gc.collect()
    rows = {row["name"]: row["seconds_per_latent_frame"] for row in done["rows"]}
    if {VARIANTS[0].name, VARIANTS[1].name} <= rows.keys():
        done["scd_over_frame_wise_self_forcing"] = round(rows[VARIANTS[1].name] / rows[VARIANTS[0].name], 3)
    write_json(args.out, done)


if __name__ == "__main__":
    main()
