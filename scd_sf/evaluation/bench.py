"""`scd bench`: how fast students make video, with all that a reader needs to dispute it, baselines
in the same run.

Every model makes the same clip at batch 1, in turn, round by round: a slow minute of the machine
hits them all. The clock is read, with the device synchronised, after every chunk of the student
("dit") and after its decoding ("vae"), which never overlap. Frames are emitted
pixel frames: one for the first latent frame, then four each.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scd_sf.checkpoint import git_revision, versions
from scd_sf.diffusion.samplers import Sampler
from scd_sf.evaluation.roofline import HeavyCalls, Peak, synchronize
from scd_sf.evaluation.table import BlockPassCounter
from scd_sf.generation.compile import CompileConfig, compile_steps
from scd_sf.generation.generate import generate_latents
from scd_sf.generation.request import SIZES_ASKED, choose_sampler, choose_shape
from scd_sf.models.build import (
    ModelConfig,
    SamplerConfig,
    Student,
    base_of,
    build_model,
    describe_checkpoint,
    family_of,
    load_student,
)
from scd_sf.models.wan.text import TextEncoder, load_text_encoder
from scd_sf.models.wan.tiny_vae import load_decoder
from scd_sf.models.wan.transformer import Wan
from scd_sf.models.wan.vae import PixelDecoder, Vae, load_vae
from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.nn.layers import WanBlock, channels_last
from scd_sf.tensor_files import dtype_of
from scd_sf.types import (
    Conditioning,
    UserError,
    VideoShape,
    as_cell,
    check_within,
    device_of,
    on_device,
    say,
)

SCHEMA = 1


@dataclass(frozen=True)
class BenchModel:
    """One row: a checkpoint, or a geometry with random weights (speed does not depend on them)."""

    name: str
    """Name of the row."""
    checkpoint: str = ""
    """A run directory, a step_N or an exported file; empty: ``model``."""
    model: ModelConfig | None = None
    """Geometry that gets random weights; null: ``checkpoint``."""
    sampler: SamplerConfig | None = None
    """Sampler of this row; null: the common one."""

    def __post_init__(self) -> None:
        if bool(self.checkpoint) == (self.model is not None):
            raise UserError(f"models: '{self.name}' needs either checkpoint or model")


@dataclass
class BenchConfig:
    """Which models are timed, and on what."""

    checkpoints: list[str] = field(default_factory=list)
    """Short for ``models`` with these checkpoints, named by their folders."""
    models: list[BenchModel] = field(default_factory=list)
    """The models, one row each."""
    base: str = ""
    """Directory with VAE and text encoder; empty: the first checkpoint's, or else Wan 2.1's VAE
    with random weights and no text encoder."""
    weights: str = "ema"
    """Which weights of the checkpoints: ema, model or best."""
    sampler: SamplerConfig | None = None
    """Sampler of every model without its own; null: the checkpoint's, 4 re-noising steps for random
    weights."""
    prompt: str = "a red car drives through the rain"
    """The prompt of the videos."""
    frames: int = 0
    """Frames of the video; 0: as trained."""
    height: int = 0
    """Pixels; 0: as trained."""
    width: int = 0
    """Pixels; 0: as trained."""
    window: int = 0
    """Latent frames of history that are kept; 0: all."""
    sink: int = 0
    """Latent frames at the beginning that stay, too, beside the window's."""
    rounds: int = 3
    """Measured videos per model, the models in turn; the figures are medians over them."""
    warmup: int = 1
    """Rounds before that, which do not count."""
    device: str = ""
    """cuda, cuda:1, cpu; empty: a GPU where there is one."""
    dtype: str = "fp32"
    """Type that the student computes in: fp32, bf16 or fp16."""
    vae_dtype: str = "fp32"
    """Type that the VAE, or ``decoder``, computes in."""
    decoder: str = ""
    """A tiny decoder's file or folder, timed in place of the VAE's own; empty: the VAE's."""
    compile: CompileConfig = field(default_factory=CompileConfig)
    """What is compiled or replayed."""
    text_tokens: int = 512
    """Tokens of the random text where there is no text encoder."""
    floor: bool = False
    """Also time every matmul and attention call of the student alone
    (scd_sf/evaluation/roofline.py)."""
    out: str = ""
    """JSON file for the results; empty: only the table."""

    def __post_init__(self) -> None:
        self.models = [
            *self.models,
            *(BenchModel(Path(path).name, path) for path in self.checkpoints),
        ]
        if not self.models:
            raise UserError("set checkpoints= or models=: nothing to measure")
        if self.rounds < 1 or self.warmup < 0:
            raise UserError(f"rounds is {self.rounds} and warmup {self.warmup}; at least 1 and 0")
        check_within(
            self,
            {**SIZES_ASKED, "rounds": (1, 10**6), "warmup": (0, 10**6), "text_tokens": (1, 2**16)},
        )
        CacheConfig.sampling(self.window, self.sink, 1)  # checks window and sink


@dataclass(frozen=True)
class ClipSeconds:
    """Seconds of one clip, for the prompt (``text``) and per chunk for the student (``dit``) and
    the VAE. ``pixels``: pixel frames emitted with each chunk."""

    text: float
    dit: tuple[float, ...]
    vae: tuple[float, ...]
    pixels: tuple[int, ...]

    def fps(self, *, vae: bool, first: int = 0) -> float:
        """Emitted frames per second, from chunk ``first`` on."""
        seconds = sum(self.dit[first:]) + (sum(self.vae[first:]) if vae else 0.0)
        return sum(self.pixels[first:]) / seconds


class AttentionKernels(TorchDispatchMode):
    """Names of the attention operators that ran: PyTorch's choice of backend."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in (name := func.overloadpacket.__name__):
            self.names.add(name.strip("_"))
        return func(*args, **(kwargs or {}))


@dataclass
class MeasuredModel:
    """A model ready to run, with its measurements.

    ``retained_bytes``: memory that its clips left allocated (histories and recordings of CUDA
    graphs). ``peak_bytes``: the most allocated at once. ``peak_alone_bytes``: the same without the
    memory that other models' clips left.
    """

    config: BenchModel
    student: Student
    sampler: Sampler
    compile: CompileConfig
    block_passes: float = 0.0
    attention: tuple[str, ...] = ()
    floor: float | None = None
    peak_bytes: int = 0
    peak_alone_bytes: int = 0
    retained_bytes: int = 0
    clips: list[ClipSeconds] = field(default_factory=list)


@dataclass
class Bench:
    """What all models share: settings, device, video size, VAE and text encoder."""

    cfg: BenchConfig
    device: torch.device
    shape: VideoShape
    vae: Vae
    text: TextEncoder | None
    decoder: PixelDecoder
    initial_bytes: int = 0  # allocated before the first clip

    def clock(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def prompt(self, student: Student) -> tuple[Conditioning, float]:
        """The prompt's states (1, tokens, text_dim) and the seconds of encoding; random states and
        0 seconds without a text encoder."""
        start = self.clock()
        if self.text is not None:
            return self.text.encode([self.cfg.prompt]).to(self.device), self.clock() - start
        rng = torch.Generator().manual_seed(0)
        states = torch.randn(1, self.cfg.text_tokens, student.cfg.text_dim, generator=rng)
        return Conditioning(on_device(states, self.device)), 0.0

    def clip(self, entry: MeasuredModel, heavy: HeavyCalls | None = None) -> ClipSeconds:
        """Make one clip and time it, with its memory; ``heavy`` counts the student's calls."""
        peak = Peak(self.device)
        bytes_before = peak.now()
        peak.reset()
        clip_seconds = self._clip(entry, heavy)
        peak_bytes = peak.bytes()
        entry.peak_bytes = max(entry.peak_bytes, peak_bytes)
        retained_by_others = bytes_before - self.initial_bytes - entry.retained_bytes
        entry.peak_alone_bytes = max(entry.peak_alone_bytes, peak_bytes - retained_by_others)
        entry.retained_bytes += peak.now() - bytes_before
        return clip_seconds

    @torch.no_grad()
    def _clip(self, entry: MeasuredModel, heavy: HeavyCalls | None) -> ClipSeconds:
        shape, student = self.shape, entry.student
        cond, text = self.prompt(student)
        dit: list[float] = []
        vae: list[float] = []
        pixels: list[int] = []
        decoder, cfg = self.decoder.stream(), self.cfg
        size = shape.latent(1)[1:]
        chunks = generate_latents(
            student, cond, [0], size, entry.sampler, window=cfg.window, sink=cfg.sink
        )
        start = self.clock()
        while True:
            with heavy or nullcontext():
                latents = next(chunks, None)
            if latents is None:
                break
            latents_time = self.clock()
            pixels.append(decoder.push(latents).shape[1])
            decode_time = self.clock()
            dit.append(latents_time - start)
            vae.append(decode_time - latents_time)
            start = decode_time
        return ClipSeconds(text, tuple(dit), tuple(vae), tuple(pixels))

    def observe(self, entry: MeasuredModel) -> None:
        """Make one clip before the model is compiled, to record block passes, attention kernels and
        the floor."""
        heavy = HeavyCalls() if self.cfg.floor else None
        with BlockPassCounter(entry.student, WanBlock) as counter, AttentionKernels() as kernels:
            self.clip(entry, heavy)
        entry.floor = None if heavy is None else heavy.floor()
        entry.block_passes = counter.per_frame(
            self.shape.frames, frames_per_pass=entry.student.chunk
        )
        entry.attention = tuple(sorted(kernels.names))

    def full_from(self, chunk: int) -> int:
        """The first chunk of the steady state, in which the window is full. Without a window, the
        first of the clip's last quarter. ``chunk``: latent frames per chunk."""
        chunks = self.shape.frames // chunk
        if not self.cfg.window:
            return chunks - max(1, chunks // 4)
        return min(chunks - 1, math.ceil((self.cfg.window + self.cfg.sink) / chunk) + 1)

    def row(self, entry: MeasuredModel, first_entry: MeasuredModel) -> dict[str, object]:
        """The figures of one model as a row of the document; medians over rounds where the name
        does not say otherwise. ``first_entry``: the model of the first row."""
        clips, chunk = entry.clips, entry.student.chunk
        steady_chunk = self.full_from(chunk)
        later_ms = [
            1000 * (d + v)
            for clip in clips
            for d, v in zip(clip.dit[1:], clip.vae[1:], strict=True)
        ]

        def median(figure: Callable[[ClipSeconds], float]) -> float:
            return round(statistics.median(figure(clip) for clip in clips), 4)

        round_seconds = [sum(clip.dit) + sum(clip.vae) for clip in clips]
        first_seconds = [sum(clip.dit) + sum(clip.vae) for clip in first_entry.clips]
        ratios = [own / first for own, first in zip(round_seconds, first_seconds, strict=True)]
        config = entry.config.model
        scd = getattr(entry.student, "scd", None)
        return {
            "name": entry.config.name,
            "weights": "random" if config is not None else entry.config.checkpoint,
            "family": family_of(entry.student),
            "latent_frames_per_chunk": chunk,
            "fusion": scd.decoder.fusion if scd is not None else None,
            "parameters": sum(p.numel() for p in entry.student.parameters()),
            "sampler": entry.sampler.name,
            "steps": entry.sampler.steps,
            "block_passes_per_latent_frame": entry.block_passes,
            "attention": list(entry.attention),
            "compile": asdict(entry.compile),
            "peak_memory_gib": round(entry.peak_bytes / 2**30, 2),
            "floor_seconds": None if entry.floor is None else round(entry.floor, 4),
            "dit_over_floor": None
            if entry.floor is None
            else round(median(lambda clip: sum(clip.dit)) / entry.floor, 3),
            "fps_dit": median(lambda clip: clip.fps(vae=False)),
            "fps_dit_vae": median(lambda clip: clip.fps(vae=True)),
            "steady_from_latent_frame": steady_chunk * chunk,
            "steady_fps_dit": median(lambda clip: clip.fps(vae=False, first=steady_chunk)),
            "steady_fps_dit_vae": median(lambda clip: clip.fps(vae=True, first=steady_chunk)),
            "first_frame_seconds": {
                "dit": median(lambda clip: clip.dit[0]),
                "dit_vae": median(lambda clip: clip.dit[0] + clip.vae[0]),
                "text_dit": None
                if self.text is None
                else median(lambda clip: clip.text + clip.dit[0]),
                "text_dit_vae": None
                if self.text is None
                else median(lambda clip: clip.text + clip.dit[0] + clip.vae[0]),
            },
            "chunk_ms_p50": round(float(np.percentile(later_ms, 50)), 3) if later_ms else None,
            "chunk_ms_p95": round(float(np.percentile(later_ms, 95)), 3) if later_ms else None,
            "seconds_per_round": [round(seconds, 4) for seconds in round_seconds],
            "time_over_first_row": round(statistics.median(ratios), 4),
        }


def in_rounds(
    cases: Mapping[str, Callable[[], object]], rounds: int, *, floor: bool = False
) -> list[dict[str, object]]:
    """Time all cases in turn, round by round, after one run of each to warm up. One row per case:
    median seconds of the wall clock and of the process's CPU time, and the medians over rounds of
    their ratios to the first case. ``floor``: time the case's matmul, convolution and attention
    calls alone in every round, too."""
    heavy = {name: HeavyCalls() for name in cases}
    for name, case in cases.items():
        with heavy[name] if floor else nullcontext():
            case()
    wall, cpu, floors = ({name: list[float]() for name in cases} for _ in range(3))
    for number in range(rounds):
        for name, case in cases.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            case()
            wall[name].append(time.perf_counter() - wall_start)
            cpu[name].append(time.process_time() - cpu_start)
            say(f"round {number + 1}/{rounds}  {name}: {wall[name][-1]:.3g} s")
            if floor:
                floors[name].append(heavy[name].floor())

    def row(name: str) -> dict[str, object]:
        figures: dict[str, object] = {"name": name, "rounds": rounds}
        for kind, seconds in (("", wall), ("cpu_", cpu)):
            pairs = zip(seconds[name], seconds[next(iter(cases))], strict=True)
            figures[f"{kind}seconds"] = round(statistics.median(seconds[name]), 4)
            figures[f"{kind}ratio_to_first"] = round(
                statistics.median(
                    case_seconds / max(first_seconds, 1e-9) for case_seconds, first_seconds in pairs
                ),
                3,
            )
        if floor:
            figures["floor_seconds"] = round(statistics.median(floors[name]), 4)
            figures["floor_ratio"] = round(sum(wall[name]) / sum(floors[name]), 3)
        return figures

    return [row(name) for name in cases]


def random_weights(
    model: nn.Module, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """Give a model of the meta device weights of a plausible scale, in place, drawn quickly."""
    rng = torch.Generator(device).manual_seed(0)
    state = {}
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.ndim == 1 and name.endswith("weight"):
            value.fill_(1.0)
        else:
            value.uniform_(-0.03, 0.03, generator=rng)
        state[name] = value
    model.load_state_dict(state, assign=True)


def open_entry(
    cfg: BenchConfig, row: BenchModel, device: torch.device
) -> tuple[MeasuredModel, dict[str, object], str]:
    """The model on its device, the provenance in its checkpoint, and its base directory. UserError:
    a bidirectional model, or a checkpoint that does not load."""
    dtype = dtype_of(cfg.dtype)
    if row.model is not None:
        with torch.device("meta"):
            model = build_model(row.model)
        if isinstance(model, Wan):
            raise UserError(f"models: '{row.name}' is bidirectional; use family scd or causal")
        random_weights(model, dtype, device)
        default_sampler, origin, base = SamplerConfig("renoise", 4), dict[str, object](), ""
    else:
        path = Path(row.checkpoint)
        description, origin = describe_checkpoint(path)
        model, _ = load_student(path, cfg.weights)
        default_sampler, base = description.sampler, description.base
        model = model.to(device, dtype)
    sampler = choose_sampler(
        default_sampler, row.sampler or cfg.sampler, row.name, force=True
    ).build()
    return MeasuredModel(row, model.requires_grad_(False), sampler, cfg.compile), origin, base


def open_bench(cfg: BenchConfig, vae: Vae | None = None) -> tuple[Bench, list[MeasuredModel]]:
    """Load and check all models, the VAE and the text encoder. ``vae``: used in place of a random
    one of Wan 2.1's size where no base is given. UserError: a size that is neither set nor in a
    checkpoint, or a model that does not fit the VAE or the text encoder."""
    device = device_of(cfg.device)
    loaded_models = [open_entry(cfg, row, device) for row in cfg.models]
    base = cfg.base or next((base for _, _, base in loaded_models if base), "")
    if base:
        base = str(base_of(base, cfg.base, "models"))
        vae = load_vae(base, device=device, dtype=dtype_of(cfg.vae_dtype))
        text: TextEncoder | None = load_text_encoder(base, device=device, dtype=dtype_of(cfg.dtype))
    else:
        if vae is None:
            vae = Vae(channels_last(AutoencoderKLWan().to(device, dtype_of(cfg.vae_dtype))))
        text = None
    requested_sizes = {"frames": cfg.frames, "height": cfg.height, "width": cfg.width}
    trained_sizes = next((origin for _, origin, _ in loaded_models if origin.get("video")), {})
    entries = [entry for entry, _, _ in loaded_models]
    for entry in entries:
        width, name = entry.student.cfg.text_dim, entry.config.name
        shape = choose_shape(requested_sizes, trained_sizes, entry.student, vae.geometry, name)
        if text is not None and text.width != width:
            raise UserError(
                f"models: '{name}' takes text states {width} wide, {base} gives {text.width}; set base="
            )
    decoder: PixelDecoder = vae
    if cfg.decoder:
        decoder = load_decoder(cfg.decoder, device=device, dtype=dtype_of(cfg.vae_dtype), vae=vae)
    return Bench(cfg, device, shape, vae, text, decoder, Peak(device).now()), entries


def run_bench(
    cfg: BenchConfig, progress: Callable[[str], None] = print, vae: Vae | None = None
) -> dict[str, object]:
    """Measure every model in interleaved rounds and return the JSON document. ``vae``: as of
    :func:`open_bench`."""
    bench, entries = open_bench(cfg, vae)
    for entry in entries:
        bench.observe(entry)
        compile_steps(entry.student, entry.compile, bench.device)
        for _ in range(cfg.warmup):
            bench.clip(entry)
        progress(f"{entry.config.name}: warm")
    for number in range(cfg.rounds):
        for entry in entries:
            entry.clips.append(bench.clip(entry))
        progress(f"round {number + 1}/{cfg.rounds}")
    rows = [
        bench.row(entry, entries[0]) | {"peak_memory_alone_gib": alone(entry, entries)}
        for entry in entries
    ]
    return {
        "schema": SCHEMA,
        "setup": setup(bench, max(entry.peak_bytes for entry in entries)),
        "rows": rows,
    }


def alone(entry: MeasuredModel, entries: list[MeasuredModel]) -> float:
    """Peak GiB while a model ran, less the others' weights and what their clips left in memory."""
    other_parameters = [
        p for other in entries if other is not entry for p in other.student.parameters()
    ]
    other_bytes = sum(p.numel() * p.element_size() for p in other_parameters)
    return round((entry.peak_alone_bytes - other_bytes) / 2**30, 2)


def setup(bench: Bench, peak: int) -> dict[str, object]:
    """The settings that decide the figures and are the same for all rows. ``peak``: the largest
    peak of all models, in bytes."""
    cfg, shape, cuda = bench.cfg, bench.shape, bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(bench.device)
        if cuda
        else f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "dtype": cfg.dtype,
        "vae_dtype": cfg.vae_dtype,
        "video": [shape.pixel_frames, shape.pixel_height, shape.pixel_width],
        "latent": [shape.frames, shape.channels, shape.height, shape.width],
        "batch": 1,
        "history": [cfg.window, cfg.sink] if cfg.window else "everything",
        "text_tokens": bench.text.max_length if bench.text is not None else cfg.text_tokens,
        "vae": cfg.base or "the first checkpoint's base"
        if bench.text is not None
        else "Wan 2.1's, random weights",
        "decoder": cfg.decoder or "the VAE's own",
        "rounds": cfg.rounds,
        "warmup_clips": cfg.warmup + 1,
        "peak_memory_gib": round(peak / 2**30, 2),
        "all_models_in_memory": True,
        "versions": versions(),
        "revision": git_revision(),
    }


def bench_table(document: dict[str, Any]) -> Table:
    """The JSON document of :func:`run_bench` as a table for ``rich``."""
    fields = document["setup"]
    mode = "compiled" if document["rows"][0]["compile"]["enabled"] else "eager"
    title = f"{fields['video']} on {fields['device']}, {fields['dtype']}, {mode}, batch 1"
    columns = (
        "FPS dit",
        "dit+vae",
        "steady dit+vae",
        "first frame s",
        "with text",
        "chunk p50 / p95 ms",
        "time ratio",
    )
    table = Table(
        "model", "steps", "block passes", *columns, title=as_cell(title), box=None, pad_edge=False
    )
    for row in document["rows"]:
        first_frame_seconds = row["first_frame_seconds"]
        seconds_with_text = first_frame_seconds["text_dit_vae"]
        with_text = "-" if seconds_with_text is None else f"{seconds_with_text:.3f}"
        table.add_row(
            as_cell(row["name"]),
            f"{row['steps']} {row['sampler']}",
            f"{row['block_passes_per_latent_frame']:g}",
            f"{row['fps_dit']:.2f}",
            f"{row['fps_dit_vae']:.2f}",
            f"{row['steady_fps_dit_vae']:.2f}",
            f"{first_frame_seconds['dit_vae']:.3f}",
            with_text,
            f"{row['chunk_ms_p50']} / {row['chunk_ms_p95']}",
            f"{row['time_over_first_row']:.2f}",
        )
    return table
