"""From clips of pixels, or of foreign latents, to a directory of encoded frames
(``scd_sf.data.frames.FrameClips``).

Threads decode a few clips ahead (decoders leave Python's lock), the tokenizer takes some frames at
a time. Malformed clips are left out and listed in ``report.json`` with the reason; more than a
share of them is an error. An interrupted run goes on after the last complete shard. The input is
only read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from scd_sf.data.frames import FrameSetInfo, FrameWriter
from scd_sf.data.shards import check_place
from scd_sf.data.sources.far import FarLatentClip
from scd_sf.data.sources.pixels import PixelClip, SourceClips
from scd_sf.data.sources.raw_files import Refused
from scd_sf.files import Json, hash_json, locked, read_json, sha256_folder, write_json
from scd_sf.tools.data.progress import progress_of
from scd_sf.types import Tokenizer, UserError, device_of, printable, say

REPORT = "report.json"
KEEP = "nothing of others is overwritten: give another name"
SHOWN = 20
Shape = tuple[int, int, int]  # channels, height, width of a latent frame


class AnyClip(Protocol):
    """The common attributes of clips of pixels and of latents."""

    @property
    def id(self) -> str: ...

    @property
    def actions_F(self) -> Tensor | None: ...

    @property
    def label(self) -> int | None: ...

    @property
    def frames(self) -> int: ...


ClipType = TypeVar("ClipType", bound=AnyClip)
Clip_co = TypeVar("Clip_co", bound=AnyClip, covariant=True)


class AnySource(Protocol[Clip_co]):
    """A list of such clips; see ``scd_sf.data.sources.pixels.SourceClips``."""

    @property
    def ids(self) -> list[str]: ...

    @property
    def num_actions(self) -> int: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def fps(self) -> float: ...

    @property
    def refused(self) -> list[Refused]: ...

    def read(self, index: int) -> Clip_co:
        """A clip. UserError when it is malformed."""
        ...


@dataclass(frozen=True)
class EncodeConfig:
    """Batches, threads and limits of an encoding."""

    batch: int = 64
    """Frames per call of the tokenizer."""
    workers: int = 2
    """Threads that decode; each holds one clip, and one more waits."""
    max_bad: float = 0.01
    """Share of malformed clips above which the data is refused."""
    frames_per_shard: int = 10_000
    """Frames in a file."""
    device: str = "cpu"
    """cuda, cuda:1 or cpu."""

    def __post_init__(self) -> None:
        if min(self.batch, self.workers, self.frames_per_shard) < 1:
            raise UserError("batch, workers and frames_per_shard must be at least 1")
        if not 0 <= self.max_bad <= 1:
            raise UserError(f"max_bad is {self.max_bad}; it is a share from 0 to 1")
        device_of(self.device)


@dataclass
class EncodeReport:
    """Result for a source. ``clips``: how many it lists. ``before``: clips of earlier runs.
    ``good``, ``frames``, ``seconds``: of this run. ``bad``: the clips that are left out, with
    reasons."""

    clips: int
    before: int = 0
    good: int = 0
    frames: int = 0
    seconds: float = 0.0
    bad: list[Refused] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the report as JSON. UserError where another file has this name."""
        check_report(path)
        bad = [
            {"name": printable(part.name), "reason": printable(part.reason)} for part in self.bad
        ]
        rate = round(self.frames / max(self.seconds, 1e-9), 2)
        write_json(path, {**asdict(self), "bad": bad, "frames_per_second": rate})

    def __str__(self) -> str:
        rate = self.frames / max(self.seconds, 1e-9)
        earlier = f"{self.before} clips before, " if self.before else ""
        return f"{earlier}{self.good} clips, {self.frames} frames, {len(self.bad)} bad; {rate:.0f} frames/s"


def check_report(path: Path) -> None:
    """UserError where ``path`` is a file that is no report."""
    if path.exists() and not {"clips", "good", "bad"} <= set(read_json(path, KEEP)):
        raise UserError(f"{path}: is no report of this command; {KEEP}")


def check_clips(source: AnySource[ClipType], config: EncodeConfig) -> EncodeReport:
    """Read every clip and keep none. Malformed ones are listed in the report that is returned."""
    report = EncodeReport(len(source.ids) + len(source.refused), bad=list(source.refused))
    _read_all(source, range(len(source.ids)), config, report, lambda clip: None)
    return report


def encode_pixels(
    source: SourceClips, tokenizer: Tokenizer, out: Path, inputs: Json, config: EncodeConfig
) -> EncodeReport:
    """Encode every clip of a source. ``inputs``: what the directory depends on besides (the
    tokenizer's hash).

    UserError for too many malformed clips, sizes that the tokenizer cannot divide, or a directory
    of other data."""

    def shape_of(clip: PixelClip) -> Shape:
        height, width = clip.frames_F3HW.shape[2:]
        if height % tokenizer.spatial or width % tokenizer.spatial:
            raise UserError(
                f"{clip.id}: {width}x{height} does not divide by {tokenizer.spatial}; choose another size"
            )
        return tokenizer.channels, height // tokenizer.spatial, width // tokenizer.spatial

    def latents_of(clip: PixelClip) -> Tensor:
        parts = clip.frames_F3HW.split(config.batch)
        with torch.inference_mode():
            pixels = (part.to(config.device).float().div(127.5).sub(1)[None] for part in parts)
            return torch.cat([tokenizer.encode(part)[0].cpu() for part in pixels])

    return _write(source, shape_of, latents_of, tokenizer.spatial, out, inputs, config)


def import_latents(
    source: AnySource[FarLatentClip], spatial: int, out: Path, inputs: Json, config: EncodeConfig
) -> EncodeReport:
    """Copy foreign latents. ``spatial``: pixels per latent along a side. Errors as in
    :func:`encode_pixels`."""

    def shape_of(clip: FarLatentClip) -> Shape:
        _, channels, height, width = clip.latents_FCHW.shape
        return channels, height, width

    return _write(source, shape_of, lambda clip: clip.latents_FCHW, spatial, out, inputs, config)


def _write(
    source: AnySource[ClipType],
    shape_of: Callable[[ClipType], Shape],
    latents_of: Callable[[ClipType], Tensor],
    spatial: int,
    out: Path,
    inputs: Json,
    config: EncodeConfig,
) -> EncodeReport:
    check_place(out)
    report = EncodeReport(len(source.ids) + len(source.refused), bad=list(source.refused))
    _check_faults(report, config, None)
    shape = shape_of(_first_clip(source))
    info = FrameSetInfo(*shape, spatial, source.num_actions, source.labels, source.fps)
    inputs = {**inputs, "clips": len(source.ids), "ids_sha256": hash_json(source.ids)}
    with locked(out, "the encoding of frames"):
        writer = FrameWriter(out, inputs, info, frames_per_shard=config.frames_per_shard)
        report.before = len(writer.done)
        if writer.finished:
            return report

        def append(clip: ClipType) -> None:
            if shape_of(clip) != shape:
                raise UserError(
                    f"latents would be {shape_of(clip)}, those of the first clip are {shape}"
                )
            writer.append(clip.id, latents_of(clip), clip.actions_F, clip.label)

        finished_ids = set(writer.done)
        todo = [index for index, clip_id in enumerate(source.ids) if clip_id not in finished_ids]
        _read_all(source, todo, config, report, append, out)
        report.write(out / REPORT)  # before the manifest, after which nothing is done again
        writer.finish()
    return report


def _read_all(
    source: AnySource[ClipType],
    indices: Sequence[int],
    config: EncodeConfig,
    report: EncodeReport,
    keep: Callable[[ClipType], None],
    out: Path | None = None,
) -> None:
    """Call ``keep`` with every clip, and count it in ``report``; where ``keep`` raises UserError,
    as a malformed one.

    ``out``: folder of the report that is written when too many are malformed. Without it there is
    no limit."""
    start = time.monotonic()
    with progress_of("clips", len(source.ids), report.before) as progress:
        for number, (index, clip) in enumerate(_read_ahead(source, indices, config.workers), 1):
            try:
                if isinstance(clip, UserError):
                    raise clip
                keep(clip)
                report.good += 1
                report.frames += clip.frames
            except UserError as error:
                report.bad.append(Refused(source.ids[index], str(error)))
                if out is not None:
                    _check_faults(report, config, out)
            progress(report.before + number)
    report.seconds = round(time.monotonic() - start, 3)


def _read_ahead(
    source: AnySource[ClipType], indices: Sequence[int], workers: int
) -> Iterator[tuple[int, ClipType | UserError]]:
    """(index, clip or the UserError that it raised), in order. At most ``workers`` + 1 clips are
    read or held at a time."""

    def read(index: int) -> tuple[int, ClipType | UserError]:
        try:
            return index, source.read(index)
        except UserError as error:
            return index, error

    futures: deque[Future[tuple[int, ClipType | UserError]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for index in indices:
            futures.append(pool.submit(read, index))
            if len(futures) > workers:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _first_clip(source: AnySource[ClipType]) -> ClipType:
    """The first clip that can be read; all others must have its shape. UserError where there is
    none."""
    problem = "it lists none"
    for index in range(len(source.ids)):
        try:
            return source.read(index)
        except UserError as error:
            problem = str(error)
    raise UserError(f"no clip of the source can be read; the last: {problem}")


def _check_faults(report: EncodeReport, config: EncodeConfig, out: Path | None) -> None:
    """UserError, after the report is written, where more than the allowed share is malformed."""
    if len(report.bad) <= config.max_bad * report.clips:
        return
    hint = ""
    if out is not None and out.is_dir():
        report.write(out / REPORT)
        hint = f"; all are in {out / REPORT}"
    last_fault = report.bad[-1]
    raise UserError(
        f"{len(report.bad)} of {report.clips} clips are malformed, more than max_bad {config.max_bad:g}"
        f" (the last is {last_fault.name}: {last_fault.reason}){hint}; repair the source, or raise max_bad"
    )


@dataclass(frozen=True)
class Task:
    """A script's options. ``tokenizer``: a directory of an image tokenizer; ``check``:
    only read and report, to ``report`` too where it is given."""

    out: Path | None
    tokenizer: Path | None
    check: bool
    report: Path | None
    config: EncodeConfig


def run_pixels(source: SourceClips, about: Json, task: Task) -> None:
    """The whole of a script for pixels: check or encode, and print the result. UserError as in
    :func:`encode_pixels`, or for a missing option."""
    if not _check_only(source, task):
        if task.tokenizer is None:
            raise UserError(
                "--tokenizer: is missing; give the directory of one, or --check to only read"
            )
        from scd_sf.models.tokenizers.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(task.tokenizer, task.config.device)
        inputs = {**about, "tokenizer_sha256": sha256_folder(task.tokenizer)}
        report = encode_pixels(source, tokenizer, _out(task), inputs, task.config)
        say(f"{task.out}: {report}")


def run_latents(source: AnySource[FarLatentClip], spatial: int, about: Json, task: Task) -> None:
    """The whole of a script for latents: check or import, and print the result."""
    if not _check_only(source, task):
        say(f"{task.out}: {import_latents(source, spatial, _out(task), about, task.config)}")


def _check_only(source: AnySource[ClipType], task: Task) -> bool:
    """With ``task.check`` read every clip and report. Returns whether that was all to do."""
    if not task.check:
        return False
    if task.report is not None:
        check_report(task.report)  # before everything is read
    report = check_clips(source, task.config)
    if task.report is not None:
        report.write(task.report)
    for bad in report.bad[:SHOWN]:
        say(f"{bad.name}: {bad.reason}")
    if len(report.bad) > SHOWN:
        say(f"... and {len(report.bad) - SHOWN} more")
    say(str(report))
    _check_faults(report, task.config, None)
    return True


def _out(task: Task) -> Path:
    if task.out is None:
        raise UserError(
            "--out: is missing; give the directory for the encoded frames, or --check to only read"
        )
    return task.out
