"""Score checkpoints side by side: one table, results.json, and a gallery that opens from the disk.

    python recipes/evaluate.py --config recipes/configs/demo_evaluate.yaml base=assets/wan_doom \\
        train=runs/demo/latents/train val=runs/demo/latents/val root=runs/demo out=runs/demo/results

Reference: real held-out clips as the VAE reconstructs them. Every model is sampled with the
held-out paraphrase of each reference clip. Samples are kept in ``out/samples``, so an interrupted
evaluation goes on where it stopped; those of another checkpoint or other settings are drawn anew.
Timings come last, in rounds over all rows, so that a slow minute hits them all: the least of each
is shown; ``machine_busy`` in results.json says when they tell little.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from scd_sf.checkpoint import find, git_revision, versions, weights_sha256
from scd_sf.config import from_command_line
from scd_sf.data.latents import LatentClips
from scd_sf.diffusion.guidance import GuidanceConfig, guided
from scd_sf.distributed import keep_freed_memory
from scd_sf.evaluation.frames import sharpness_ratio, spread
from scd_sf.evaluation.fvd import VideoFrechet
from scd_sf.evaluation.judges import (
    Judges,
    adherence,
    fit_judges,
    load_judges,
    save_judges,
    shuffled_floor,
)
from scd_sf.evaluation.table import Adherence, ResultRow, result_table, split_reference, write_rows
from scd_sf.evaluation.timing import Cost, time_in_rounds, timings, unrest
from scd_sf.files import (
    foreign,
    locked,
    require_own_file,
    require_own_folder,
    sha256_folder,
    write_tensors,
)
from scd_sf.generation.bidirectional import sample_bidirectional
from scd_sf.generation.generate import as_uint8, clips_of, decode, generate_latents
from scd_sf.generation.request import choose_sampler
from scd_sf.generation.sampling import FPS
from scd_sf.models.blocks import BlocksConfig, set_blocks
from scd_sf.models.build import SamplerConfig, Scd, Student, describe_checkpoint, load_student
from scd_sf.models.wan.transformer import Wan
from scd_sf.models.wan.vae import Vae, load_vae
from scd_sf.models.wan.weights import load_wan, transformer_dir
from scd_sf.nn.layers import WanBlock
from scd_sf.tensor_files import read_metadata, read_tensors
from scd_sf.tools.gallery.gallery import PromptCard, build_gallery
from scd_sf.tools.gallery.page import MARK
from scd_sf.types import UserError, check_within, exit_on_user_error, say

LOG_WIDTH = 140  # columns of the table without a terminal


@dataclass
class RowConfig:
    """One model of the table and how it is sampled."""

    name: str
    """Name of the row in the table and the gallery."""
    checkpoint: str = ""
    """Checkpoint below ``root``; empty: the bidirectional base itself."""
    weights: str = "ema"
    """Which weights of the checkpoint: ema, model or best."""
    stage: str = ""
    """Label of the training stage in the table; empty: none."""
    sampler: str = "euler"
    """euler, unipc or renoise."""
    steps: int = 50
    """Denoising steps per frame."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Classifier-free guidance of this row."""
    seeds: tuple[int, ...] = ()
    """Sampling seeds of this row, for rows too slow for all of the table's; empty: those of the
    table."""
    blocks: BlocksConfig | None = None
    """Which of the model's blocks run and which see the past; null: as its checkpoint says."""


@dataclass
class EvaluateConfig:
    """What is compared with what, and how long each part may take."""

    base: str
    """Directory of the base model (Wan layout, with VAE and text encoder)."""
    train: str
    """Folder of encoded training clips, which the judges are fitted on."""
    val: str
    """Folder of encoded held-out clips: the reference and the control."""
    root: str
    """Folder that holds the rows' checkpoints."""
    out: str
    """Folder for samples, results.json and the gallery."""
    rows: list[RowConfig] = field(default_factory=list)
    """The models to score, one entry each."""
    clips: int = 48
    """Real clips of the reference; as many others are the control "other real clips"."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds that each row is sampled with anew."""
    shift: float = 5.0
    """Timestep shift of the samplers."""
    batch: int = 48
    """Clips generated together."""
    gallery_clips: int = 8
    """Clips shown in the gallery."""
    timing_repeats: int = 5
    """How often a row is timed."""
    timing_seconds: float = 8.0
    """Seconds of timing per row; it may take three times as long to have three runs."""
    fps: int = 35
    """Frames per second of the gallery's videos."""
    sample_stages: tuple[str, ...] = ()
    """Only draw the samples of the rows of these stages, for a later run; empty: everything."""

    def __post_init__(self) -> None:
        if (
            min(self.clips, self.batch, self.gallery_clips, self.timing_repeats) < 1
            or self.timing_seconds < 0
        ):
            raise UserError(
                "clips, batch, gallery_clips, timing_repeats must be at least 1, timing_seconds at least 0"
            )
        check_within(
            self,
            {
                "shift": (1e-3, 1e3),
                "clips": (1, 2**20),
                "batch": (1, 2**20),
                "timing_repeats": (1, 10**6),
            },
        )
        if not self.seeds or min(self.seeds) < 0 or not 1 <= self.fps <= FPS:
            raise UserError(
                f"seeds is {list(self.seeds)}, it needs one of 0 or more; fps is {self.fps} of 1 .. {FPS}"
            )


@dataclass
class Bench:
    """The reference clips, the judges and the distance that every row is measured with."""

    cfg: EvaluateConfig
    clips: LatentClips
    indices: list[int]
    vae: Vae
    judges: Judges
    reference: Tensor
    frechet: VideoFrechet

    @property
    def places(self) -> list[str]:
        """Of each reference clip."""
        return [self.clips.rows[i].tags["place"] for i in self.indices]

    @property
    def motions(self) -> list[str]:
        return [self.clips.rows[i].tags["motion"] for i in self.indices]

    @property
    def labels(self) -> list[str]:
        """Place and motion of each reference clip, as one text."""
        return [
            f"{place} {motion}" for place, motion in zip(self.places, self.motions, strict=True)
        ]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(F, C, H, W) of the latents."""
        shape = self.clips.shape
        return (shape.frames, shape.channels, shape.height, shape.width)


def fitted_judges(cfg: EvaluateConfig, out: Path) -> Judges:
    """The judges. They are fitted on real training clips once, and then read from
    ``out/judges.safetensors``."""
    path = out / "judges.safetensors"
    if not path.is_file():
        clips = LatentClips(cfg.train)
        require_tags(clips)
        tags = [row.tags for row in clips.rows]
        latents = clips.latents(range(len(clips)))
        judges = fit_judges(
            latents, [t["place"] for t in tags], [t["motion"] for t in tags], seed=0
        )
        save_judges(judges, path)
    return load_judges(path)


def require_tags(clips: LatentClips) -> None:
    """UserError for clips without the tags that the judges are fitted to."""
    for number, row in enumerate(clips.rows, 1):
        if missing_tags := {"place", "motion"} - row.tags.keys():
            place = f"{clips.root / 'clips.jsonl'}:{number}: tags"
            raise UserError(
                f"{place} lack {' and '.join(sorted(missing_tags))}; the judges need both of every clip"
            )


def sampler_of(row: RowConfig, cfg: EvaluateConfig) -> SamplerConfig:
    """How a row is sampled. A distilled checkpoint is sampled at its training times; UserError if
    the row names another sampler for it."""
    config_sampler = SamplerConfig(row.sampler, row.steps, cfg.shift)
    if not row.checkpoint:
        return config_sampler
    description, _ = describe_checkpoint(Path(cfg.root) / row.checkpoint, row.weights)
    return choose_sampler(description.sampler, config_sampler, row.name)


def seeds_of(row: RowConfig, cfg: EvaluateConfig) -> tuple[int, ...]:
    """The row's sampling seeds, or those of the table."""
    return row.seeds or cfg.seeds


def sample_key(row: RowConfig, bench: Bench) -> dict[str, str]:
    """Everything that a row's samples depend on: weights, data and settings."""
    cfg = bench.cfg
    path = Path(cfg.root) / row.checkpoint
    weights = (
        weights_sha256(find(path, row.weights), row.weights)
        if row.checkpoint
        else sha256_folder(transformer_dir(Path(cfg.base)))
    )
    settings = {
        **asdict(row),
        "sampler": asdict(sampler_of(row, cfg)),
        "seeds": seeds_of(row, cfg),
        "indices": bench.indices,
        "noise": "by seed and latent frame",
    }
    return {
        "weights": weights,
        "data": bench.clips.hash,
        "settings": json.dumps(settings, sort_keys=True),
    }


def draw(model: Student | Wan, row: RowConfig, bench: Bench) -> Tensor:
    """Latents (seeds, clips, F, C, H, W): one clip per seed and reference clip, from its held-out
    paraphrase. They are kept in ``out/samples``. UserError: samples that are not finite."""
    cfg = bench.cfg
    seeds, key = seeds_of(row, cfg), sample_key(row, bench)
    file = Path(cfg.out) / "samples" / f"{slug(row.name)}.safetensors"
    remedy = "remove it, and it is drawn again"
    if file.is_file() and read_metadata(file, remedy) == key:
        with foreign(file, remedy):
            return read_tensors(file, remedy)["latents"]
    sampler = sampler_of(row, cfg).build()
    parts: list[Tensor] = []
    jobs = [(seed, index) for seed in seeds for index in bench.indices]
    for start in range(0, len(jobs), cfg.batch):
        batch_jobs = jobs[start : start + cfg.batch]
        cond = bench.clips.batch([index for _, index in batch_jobs], held_out=True).text
        row_seeds = [1_000_003 * seed + index for seed, index in batch_jobs]
        if isinstance(model, Wan):
            denoiser = guided(model, bench.clips.null, row.guidance.w)
            parts.append(sample_bidirectional(denoiser, cond, bench.shape, sampler, row_seeds))
        else:
            parts.append(clips_of(generate_latents(model, cond, row_seeds, bench.shape, sampler)))
    latents = torch.cat(parts).unflatten(0, (len(seeds), -1))
    if not latents.isfinite().all():
        raise UserError(
            f"{row.name}: samples are not finite; the checkpoint is broken or sampled with a wrong sampler"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, {"latents": latents}, key)
    return latents


def slug(name: str) -> str:
    """The name in lower case with dashes, for a file."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def streams(model: Student | Wan, row: RowConfig, bench: Bench) -> Callable[[], Iterator[Tensor]]:
    """A function that generates one clip at batch 1 and yields its latents chunk by chunk (a
    bidirectional model: all at once)."""
    sampler = sampler_of(row, bench.cfg).build()
    cond = bench.clips.batch(bench.indices[:1], held_out=True).text

    def whole(wan: Wan) -> Iterator[Tensor]:
        yield sample_bidirectional(
            guided(wan, bench.clips.null, row.guidance.w), cond, bench.shape, sampler, [0]
        )

    if isinstance(model, Wan):
        return partial(whole, model)
    return partial(generate_latents, model, cond, [0], bench.shape, sampler)


def cost(row: RowConfig, bench: Bench) -> Cost:
    """The row's sampling, ready to be timed; without the VAE and the text encoder."""
    model = load_model(row, bench.cfg)
    return Cost(
        streams(model, row, bench),
        model,
        WanBlock,
        bench.shape[0] if isinstance(model, Wan) else model.chunk,
    )


def measure(row: RowConfig, bench: Bench) -> tuple[ResultRow, Tensor]:
    """The row's figures without its costs, as means over seeds, and the decoded videos of the first
    seed."""
    model = load_model(row, bench.cfg)
    distances: list[float] = []
    by_prompt: list[float] = []
    sharpness: list[float] = []
    scores: list[Adherence] = []
    first_videos: Tensor | None = None
    for latents in draw(model, row, bench):
        videos = decode(bench.vae, latents)
        features = bench.frechet.features(videos)
        distances.append(bench.frechet.distance_of(features))
        by_prompt.append(bench.frechet.distance_by_label(features, bench.labels, bench.labels))
        sharpness.append(sharpness_ratio(videos, bench.reference))
        scores.append(adherence(bench.judges, latents, bench.places, bench.motions))
        if first_videos is None:
            first_videos = videos
    assert first_videos is not None
    left_right = [s.left_right for s in scores if s.left_right is not None]
    mean = replace(
        scores[0],
        place=sum(s.place for s in scores) / len(scores),
        motion=sum(s.motion for s in scores) / len(scores),
        left_right=sum(left_right) / len(left_right) if left_right else None,
    )
    result = ResultRow(
        name=row.name,
        family=family_of(model),
        stage=row.stage,
        steps=row.steps,
        sampler=row.sampler,
        video_frechet=spread(distances).mean,
        video_frechet_by_prompt=spread(by_prompt).mean,
        sharpness=spread(sharpness).mean,
        adherence=mean,
        seed=seeds_of(row, bench.cfg)[0],
        clips=len(bench.indices),
        video_frechet_std=spread(distances).std if len(distances) > 1 else None,
        sharpness_std=spread(sharpness).std if len(sharpness) > 1 else None,
        spread_over=f"{len(distances)} seeds" if len(distances) > 1 else None,
    )
    return result, first_videos


def family_of(model: Student | Wan) -> str:
    """The model's family, as the table names it."""
    if isinstance(model, Wan):
        return "bidirectional"
    return "scd" if isinstance(model, Scd) else "causal"


def load_model(row: RowConfig, cfg: EvaluateConfig) -> Student | Wan:
    """The row's model; without a checkpoint the base model. It is loaded once."""
    if not row.checkpoint:
        return _base(Path(cfg.base), row.blocks or BlocksConfig())
    return _student(find(Path(cfg.root) / row.checkpoint, row.weights), row.weights, row.blocks)


@cache
def _base(path: Path, blocks: BlocksConfig) -> Wan:
    model = load_wan(path)
    set_blocks(model, blocks)
    return model


@cache
def _student(path: Path, weights: str, blocks: BlocksConfig | None) -> Student:
    return load_student(path, weights, blocks)[0]


def control(name: str, videos: Tensor, labels: list[str], bench: Bench, note: str) -> ResultRow:
    """A row without a model. ``labels``: the prompts that the videos are compared under."""
    features = bench.frechet.features(videos)
    return ResultRow(
        name=name,
        family="control",
        stage="",
        steps=0,
        sampler="",
        video_frechet=bench.frechet.distance_of(features),
        sharpness=sharpness_ratio(videos, bench.reference),
        adherence=None,
        clips=len(videos),
        video_frechet_by_prompt=bench.frechet.distance_by_label(features, labels, bench.labels),
        note=note,
    )


def controls(bench: Bench, other_indices: Sequence[int], model_latents: Tensor) -> list[ResultRow]:
    """Three rows without a model: a frozen real frame, other real clips (with the judges' ceiling)
    and shuffled prompts (with their floor, on ``model_latents`` of the last model)."""
    frozen = bench.reference[:, :1].expand_as(bench.reference)
    latents = bench.clips.latents(other_indices)
    videos = decode(bench.vae, latents)
    tags = [bench.clips.rows[i].tags for i in other_indices]
    places, motions = [t["place"] for t in tags], [t["motion"] for t in tags]
    labels = [f"{place} {motion}" for place, motion in zip(places, motions, strict=True)]
    shift = len(labels) // 2 + 1
    other_labels = labels[shift:] + labels[:shift]
    frozen_copy = control(
        "copy of the last frame", frozen, bench.labels, bench, "a clip's first frame, repeated"
    )
    real_clips = control(
        "other real clips",
        videos,
        labels,
        bench,
        "the floor of the distance; adherence: the judges' ceiling",
    )
    shuffled_prompts = control(
        "shuffled prompts",
        videos,
        other_labels,
        bench,
        "other real clips, and the last model, under wrong prompts",
    )
    floor = shuffled_floor(bench.judges, model_latents, bench.places, bench.motions, seed=0)
    return [
        frozen_copy,
        replace(real_clips, adherence=adherence(bench.judges, latents, places, motions)),
        replace(shuffled_prompts, adherence=floor),
    ]


def prepare(cfg: EvaluateConfig) -> tuple[Bench, list[int]]:
    """The bench, and the indices of the clips of the control "other real clips"."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    clips = LatentClips(cfg.val)
    require_tags(clips)
    indices, other_indices = split_reference(len(clips), cfg.clips, str(clips.root))
    clips.batch(indices, held_out=True)  # UserError for clips without a held-out prompt
    vae = load_vae(cfg.base)
    judges = fitted_judges(cfg, out)
    reference = decode(vae, clips.latents(indices))
    frechet = VideoFrechet.fit(reference)
    return Bench(cfg, clips, indices, vae, judges, reference, frechet), other_indices


def context(cfg: EvaluateConfig, started: float) -> dict[str, object]:
    """How and when it was evaluated, for results.json. ``started``: of ``time.monotonic``."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "git_revision": git_revision(),
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "clips": cfg.clips,
        "seeds": list(cfg.seeds),
        "evaluation_seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    cfg = from_command_line(EvaluateConfig, __doc__ or "")
    out = Path(cfg.out)
    require_own_folder(out, ["judges.safetensors"])
    for name, mark in (("results.json", '"schema": '), ("gallery.html", MARK)):
        require_own_file(out / name, mark, "use another out=")
    with locked(out, "this evaluation"):
        evaluate(cfg)


def evaluate(cfg: EvaluateConfig) -> None:
    """Samples, scores, timings, table and gallery; the same command goes on where it stopped."""
    started = time.monotonic()
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    keep_freed_memory()
    if not cfg.rows or len({slug(row.name) for row in cfg.rows}) < len(cfg.rows):
        raise UserError(
            "rows: name at least one model to score in the config's 'rows' list, and each in its own way"
        )
    row_configs = [
        row for row in cfg.rows if not cfg.sample_stages or row.stage in cfg.sample_stages
    ]
    if not row_configs:
        raise UserError(
            f"sample_stages {list(cfg.sample_stages)}: no row has such a stage; see the rows' 'stage'"
        )
    for row in row_configs:
        sampler_of(row, cfg).build()
    bench, other_indices = prepare(cfg)
    results: list[tuple[ResultRow, Tensor]] = []
    for number, row in enumerate(row_configs, 1):
        if cfg.sample_stages:
            draw(load_model(row, cfg), row, bench)
        else:
            results.append(measure(row, bench))
        seconds = time.monotonic() - started
        verb = "sampled" if cfg.sample_stages else "scored"
        seconds_left = seconds / number * (len(row_configs) - number)
        say(
            f"{verb} {number}/{len(row_configs)} {row.name}  {seconds:.0f} s, left {seconds_left:.0f} s"
        )
    if cfg.sample_stages:
        return
    costs = {row.name: cost(row, bench) for row in cfg.rows}
    time_in_rounds(list(costs.values()), cfg.timing_repeats, cfg.timing_seconds)
    results = [(costs[row.name].fill(row), video) for row, video in results]
    say(f"timed  {time.monotonic() - started:.0f} s")
    last_latents = draw(load_model(cfg.rows[-1], cfg), cfg.rows[-1], bench)[0]
    control_rows = controls(bench, other_indices, last_latents)
    rows = [*(row for row, _ in results), *control_rows]
    write_rows(Path(cfg.out) / "results.json", rows, context(cfg, started) | timings(costs))
    notes = [f"The machine was busy, times tell little: {sign}." for sign in unrest(costs)]
    console.print(
        result_table(
            rows, "Held-out prompts, real clips as the VAE reconstructs them as reference", notes
        )
    )
    write_gallery(cfg, bench, results, rows, notes)
    say(f"{cfg.out}/results.json and {cfg.out}/gallery.html")


def write_gallery(
    cfg: EvaluateConfig,
    bench: Bench,
    results: list[tuple[ResultRow, Tensor]],
    rows: list[ResultRow],
    notes: list[str],
) -> None:
    """Write the gallery: videos of all rows side by side for ``gallery_clips`` prompts."""
    stride = max(1, len(bench.indices) // cfg.gallery_clips)
    positions = list(range(0, len(bench.indices), stride))[: cfg.gallery_clips]
    cards, videos = [], {}
    for position in positions:
        row = bench.clips.rows[bench.indices[position]]
        assert row.held_out_prompt is not None
        text = bench.clips.prompts.rows[row.held_out_prompt].prompt
        cards.append(PromptCard(text, row.tags["place"], row.tags["motion"], held_out=True))
    real = ResultRow(
        "real clip", "control", "", 0, "", None, None, None, note="as the VAE reconstructs it"
    )
    columns = [(real.name, bench.reference), *((row.name, video) for row, video in results)]
    for name, video in columns:
        videos[name] = [(i, as_uint8(video[position])) for i, position in enumerate(positions)]
    build_gallery(
        Path(cfg.out) / "gallery.html", "SCD demo", [real, *rows], videos, cards, notes, fps=cfg.fps
    )


if __name__ == "__main__":
    exit_on_user_error(main)
