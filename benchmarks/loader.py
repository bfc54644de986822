"""How fast clips come from the disk: cold (their pages dropped from the cache) and warm, with and
without threads.

    python benchmarks/loader.py --scratch /a/folder/on/the/disk --out docs/results/data.json

Writes ``--clips`` random files of Wan's size (latents 21x16x60x104 bf16, 4.19 MB, and ``--tokens``
text states of 4096), reads all of them once in a random order per round, in batches of ``--batch``
as stage 2 does (:class:`LatentClips` behind :class:`Prefetch`), and prints medians over
``--rounds``. ``--profile`` lists where the time of one warm round goes. Figures are added to the
file ``--out``.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from scd_sf.config import paragraphs
from scd_sf.data.clip_files import About, clip_paths, write_clip
from scd_sf.data.clip_index import Common, open_job
from scd_sf.data.latents import LatentClips, epoch_order
from scd_sf.data.prefetch import Prefetch
from scd_sf.data.prompts import index_clips, write_fixed_prompts
from scd_sf.distributed import keep_freed_memory
from scd_sf.files import read_json, write_json
from scd_sf.types import UserError, VideoShape, exit_on_user_error

SHAPE = VideoShape(21, 16, 60, 104)
WIDTH, LENGTH = 4096, 512
THREADS = (0, 1, 2, 4, 8)  # 0: clips are not read ahead


def make_clips(root: Path, count: int, tokens: int) -> LatentClips:
    """The clips of a folder of random ones; those that exist already are used again."""
    open_job(root, Common(SHAPE, "bfloat16", WIDTH, LENGTH, {"benchmark": tokens}))
    rng = torch.Generator().manual_seed(0)
    clip_ids = {path.stem for path in clip_paths(root)}
    start = time.perf_counter()
    new_clips = 0
    for number in range(count):
        clip = f"{number * 2654435761 % 2**32:08x}".ljust(32, "0")
        if clip not in clip_ids:
            latents = torch.randn(SHAPE.latent(1)[1:], generator=rng).bfloat16()
            text = torch.randn(tokens, WIDTH, generator=rng).bfloat16()
            write_clip(root, latents, text, About(clip, f"prompt {number}", source="benchmark"))
            new_clips += 1
    if new_clips:
        print(
            f"wrote {new_clips} clips, {new_clips / (time.perf_counter() - start):.3g} /s (drawing numbers included)"
        )
    write_fixed_prompts(
        root, lambda prompts: [torch.ones(1, WIDTH) for _ in prompts], "", torch.bfloat16
    )
    index_clips(root)
    return LatentClips(root)


def drop_from_cache(root: Path) -> None:
    """Have the kernel forget the files' pages, so that the next read is from the disk."""
    for path in clip_paths(root):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def batches(count: int, batch: int, seed: int) -> list[list[int]]:
    """All indices below ``count`` in random order, ``batch`` at a time."""
    order = epoch_order(seed, 0, count, count)
    return [order[first : first + batch] for first in range(0, count, batch)]


def read_all(clips: LatentClips, threads: int, batch: int, seed: int) -> tuple[float, float]:
    """Read every clip once; returns clips per second, and CPU milliseconds per clip (all
    threads)."""
    queue = batches(len(clips), batch, seed)
    reads = Prefetch(clips.stored, depth=2 * threads, threads=threads)
    start = time.perf_counter()
    cpu_start = time.process_time()
    for number, indices in enumerate(queue):
        reads.expect(queue[number : number + 1 + 2 * threads])
        reads.batch(indices)
    seconds = time.perf_counter() - start
    cpu = time.process_time() - cpu_start
    reads.close()
    return len(clips) / seconds, 1000 * cpu / len(clips)


def measure(
    clips: LatentClips, batch: int, rounds: int
) -> Iterator[tuple[int, float, float, float]]:
    """Yields (threads, cold and warm clips per second, warm CPU milliseconds per clip), medians over
    ``rounds``."""
    for threads in THREADS:
        cold, warm, cpu = [], [], []
        for number in range(rounds):
            drop_from_cache(clips.root)
            cold.append(read_all(clips, threads, batch, number)[0])
            rate, milliseconds = read_all(clips, threads, batch, number + rounds)
            warm.append(rate)
            cpu.append(milliseconds)
        yield threads, median(cold), median(warm), median(cpu)


def profile(clips: LatentClips, batch: int) -> None:
    """Print where one warm pass without threads spends its time."""
    read_all(clips, 0, batch, 0)
    profiler = cProfile.Profile()
    profiler.runcall(read_all, clips, 0, batch, 1)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(12)


def main(
    scratch: Annotated[
        Path, typer.Option(help="A folder for the clips, on the disk to be measured.")
    ],
    clips: Annotated[int, typer.Option(help="Clips to write.")] = 300,
    tokens: Annotated[int, typer.Option(help="Text states per clip.")] = 120,
    batch: Annotated[int, typer.Option(help="Clips per batch.")] = 4,
    rounds: Annotated[int, typer.Option(help="Passes per case.")] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON file to update.")] = None,
    with_profile: Annotated[
        bool, typer.Option("--profile", help="Also profile a warm pass.")
    ] = False,
    keep: Annotated[bool, typer.Option(help="Keep the clips.")] = False,
) -> None:
    """Clips per second, cold and warm."""
    if min(clips, tokens, batch, rounds) < 1 or tokens > LENGTH:
        raise UserError(
            f"--clips, --tokens, --batch and --rounds must be at least 1, --tokens {LENGTH} at most"
        )
    torch.set_num_threads(1)
    keep_freed_memory()  # as the recipes do
    root = scratch / "loader-clips"
    data = make_clips(root, clips, tokens)
    size = clip_paths(root)[0].stat().st_size
    title = f"{clips} clips of {size / 1e6:.3g} MB"
    table = Table(
        "threads", "cold /s", "cold GB/s", "warm /s", "warm GB/s", "warm CPU ms/clip", title=title
    )
    rates = []
    for threads, cold, warm, cpu in measure(data, batch, rounds):
        cells = (threads, cold, cold * size / 1e9, warm, warm * size / 1e9, cpu)
        table.add_row(*(f"{cell:.3g}" for cell in cells))
        rates.append((cold, warm, threads))
    Console(width=100).print(table)
    print(f"load average {os.getloadavg()[0]:.2g} of {os.cpu_count()} cores")
    if with_profile:
        profile(data, batch)
    if out is not None:
        best_cold, best_warm = max(row[0] for row in rates), max(row[1] for row in rates)
        figures = {
            "loader_cold_clips_per_s": round(best_cold, 1),
            "loader_warm_clips_per_s": round(best_warm, 1),
        }
        write_json(out, (read_json(out, "correct it") if out.is_file() else {}) | figures)
        print(json.dumps(figures))
    if not keep:
        shutil.rmtree(root)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=paragraphs(__doc__))(main)
    exit_on_user_error(app)
