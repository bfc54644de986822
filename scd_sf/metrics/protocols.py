"""What one row of a results table is, how it is stored and printed, and how passes and seconds are measured.

All costs are per *latent* frame at batch 1: one latent frame is what a causal model generates at a time
(the Wan VAE makes four pixel frames of each, one of the first).
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from rich.table import Table
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scd_sf.types import UserError

SCHEMA = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Adherence:
    """Share of videos that the judges find to obey their prompt, in [0, 1]; ``left_right`` None = no such motions."""

    place: float
    motion: float
    left_right: float | None = None


@dataclass(frozen=True)
class Row:
    """One model, sampler and step count, measured. None = does not apply (a control has no block passes).

    ``*_std`` is a standard deviation over seeds or resampled videos; ``spread_over`` says which and how many
    ("3 seeds", "20 resamples"). ``seed`` is the sampling seed of the quoted figures, ``clips`` how many were scored.
    """

    name: str
    family: str
    stage: str
    steps: int
    sampler: str
    video_frechet: float | None
    sharpness: float | None
    adherence: Adherence | None
    block_passes_per_frame: float | None = None
    seconds_per_frame: float | None = None
    seconds_to_first_frame: float | None = None
    seed: int | None = None
    clips: int | None = None
    video_frechet_std: float | None = None
    video_frechet_by_prompt: float | None = None
    sharpness_std: float | None = None
    spread_over: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A column for people: heading, unit ('' = a pure number), what it says in plain words, and the cell's text."""

    title: str
    unit: str
    explanation: str
    text: Callable[[Row], str]


def _number(value: float | None, digits: int, std: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if std is None else f"{value:.{digits}f} ± {std:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.1f}"


COLUMNS: tuple[Column, ...] = (
    Column("model", "", "What made the videos.", lambda row: row.name),
    Column("family", "", "The architecture, or a control that is no model.", lambda row: row.family),
    Column("stage", "", "How far along the chain the weights are.", lambda row: row.stage),
    Column("steps", "", "Denoising steps per frame.", lambda row: str(row.steps) if row.steps else "-"),
    Column("sampler", "", "How a step goes from noisier to cleaner.", lambda row: row.sampler),
    Column(
        "video Frechet",
        "lower is better",
        "How far the look and the motion of the videos, as a whole set, are from real clips (fixed features of frames "
        "and of frame differences). Only comparable inside this table.",
        lambda row: _number(row.video_frechet, 1, row.video_frechet_std),
    ),
    Column(
        "by prompt",
        "lower is better",
        "The same distance within each place and motion, averaged: real clips under the wrong prompts do badly here.",
        lambda row: _number(row.video_frechet_by_prompt, 1),
    ),
    Column(
        "sharpness",
        "1 is right",
        "Edge strength against the VAE's own reconstructions of real clips: below 1 is blurred, above 1 is noisy.",
        lambda row: _number(row.sharpness, 2, row.sharpness_std),
    ),
    Column(
        "place",
        "% right",
        "Videos that show the place the prompt names, as judged by a net fitted on real clips.",
        lambda row: _percent(row.adherence.place if row.adherence else None),
    ),
    Column(
        "motion",
        "% right",
        "Videos that move the way the prompt says, as judged by a net fitted on real clips.",
        lambda row: _percent(row.adherence.motion if row.adherence else None),
    ),
    Column(
        "left/right",
        "% right",
        "Of the turning prompts: videos that turn to the right side. A coin gives 50.",
        lambda row: _percent(row.adherence.left_right if row.adherence else None),
    ),
    Column(
        "block passes",
        "per latent frame",
        "How often a transformer block runs to make one latent frame.",
        lambda row: _number(row.block_passes_per_frame, 1),
    ),
    Column(
        "time",
        "ms per latent frame",
        "Wall time per latent frame on the machine of this run, one video at a time.",
        lambda row: _milliseconds(row.seconds_per_frame),
    ),
    Column(
        "first frame",
        "ms",
        "Wall time from the prompt until the first frame exists.",
        lambda row: _milliseconds(row.seconds_to_first_frame),
    ),
)
LEFT_ALIGNED = {"model", "family", "stage", "sampler"}
IN_THE_NAME = {"family", "stage", "steps", "sampler"}


def write_rows(path: Path, rows: Sequence[Row], context: Mapping[str, object]) -> None:
    """Write ``{"schema", "context", "rows"}`` as JSON, whole or not at all. ``context``: machine, date, seeds, goals.

    NaN and infinity are refused (they are not JSON, and a table should not hide them).
    """
    document = {"schema": SCHEMA, "context": dict(context), "rows": [asdict(row) for row in rows]}
    try:
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{path}: a figure is NaN or infinite ({error}); leave it None or find out why") from error
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_rows(path: Path) -> tuple[list[Row], dict[str, object]]:
    """Rows and context of a file that :func:`write_rows` wrote; UserError names file and field."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as results JSON ({error}); run the evaluation again") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise UserError(f"{path}: field 'schema' is not {SCHEMA}; run the evaluation again with this version")
    rows, context = document.get("rows"), document.get("context")
    if not isinstance(rows, list) or not isinstance(context, dict):
        raise UserError(f"{path}: fields 'rows' and 'context' must be a list and an object; run the evaluation again")
    return [_row(path, index, item) for index, item in enumerate(rows)], context


def _row(path: Path, index: int, item: object) -> Row:
    names = {item.name for item in fields(Row)}
    if not isinstance(item, dict) or set(item) != names:
        wrong = sorted(names ^ set(item)) if isinstance(item, dict) else ["not an object"]
        raise UserError(f"{path}: rows[{index}] has missing or unknown fields ({', '.join(wrong)}); evaluate again")
    values = dict(item)
    if values["adherence"] is not None:
        try:
            values["adherence"] = Adherence(**values["adherence"])
        except TypeError as error:
            raise UserError(f"{path}: rows[{index}].adherence: {error}; run the evaluation again") from error
    return Row(**values)


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows as a rich table without what a row's name already says; print it with ``rich.console.Console``."""
    columns = [column for column in COLUMNS if column.title not in IN_THE_NAME]
    result = Table(title=title, title_justify="left")
    for column in columns:
        heading = f"{column.title}\n({column.unit})" if column.unit else column.title
        name = column.title in LEFT_ALIGNED
        result.add_column(heading, justify="left" if name else "right", overflow="fold", no_wrap=name)
    for row in rows:
        result.add_row(*(column.text(row) for column in columns))
    return result


class BlockPassCounter:
    """Counts the forward passes of chosen submodules while the ``with`` body runs, through forward hooks.

    ``calls`` counts invocations; ``samples`` adds up the leading (batch) dimension of what the blocks return, so that
    a prompted and an unprompted branch in one batch of two count as two.
    """

    def __init__(
        self,
        module: nn.Module,
        is_block: type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, nn.Module], bool],
    ) -> None:
        """``is_block``: a class or several (subclasses count too), or a predicate on (qualified name, submodule)."""
        self.calls = 0
        self.samples = 0
        self._handles: list[RemovableHandle] = []
        self._blocks: list[nn.Module] = []
        for name, child in module.named_modules():
            if isinstance(child, is_block) if isinstance(is_block, type | tuple) else is_block(name, child):
                self._blocks.append(child)
        if not self._blocks:
            raise UserError("block passes: no submodule matches; give the class of the transformer blocks")

    def __enter__(self) -> Self:
        self._handles = [block.register_forward_hook(self._count) for block in self._blocks]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _count(self, block: nn.Module, inputs: object, output: object) -> None:
        self.calls += 1
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor) or first.ndim == 0:
            raise TypeError(f"block passes: {type(block).__name__} returned {type(first).__name__}, not a batch")
        self.samples += first.shape[0]

    def per_frame(self, frames: int, *, batch: int = 1, frames_per_pass: int = 1) -> float:
        """Passes per generated frame. ``frames_per_pass``: a bidirectional pass carries every frame of the clip, so
        its passes count once for each of them; a causal chunk of 3 frames counts as 3."""
        return self.samples * frames_per_pass / (batch * frames)


@dataclass(frozen=True)
class StreamTiming:
    """Medians over repeats in seconds, and every repeat's own figures."""

    seconds_per_frame: float
    seconds_to_first_frame: float
    frames: int
    all_seconds_per_frame: tuple[float, ...]
    all_seconds_to_first_frame: tuple[float, ...]


def time_stream(
    stream: Callable[[], Iterable[T]],
    *,
    frames_in: Callable[[T], int],
    repeats: int = 3,
    warmup: int = 1,
    synchronize: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> StreamTiming:
    """Time a callable that yields frames or chunks: from the call to the first item, and to the end per frame.

    ``frames_in(item)`` frames arrive with an item. The clock starts before ``stream()`` is called, so the prompt's own
    cost counts when the callable includes it. ``synchronize`` (``torch.cuda.synchronize``) runs before every reading.
    """
    if repeats < 1:
        raise UserError(f"time_stream: repeats is {repeats}; it must be at least 1")

    def read() -> float:
        if synchronize is not None:
            synchronize()
        return clock()

    per_frame: list[float] = []
    first: list[float] = []
    frames = 0
    for repeat in range(warmup + repeats):
        frames, first_at = 0, 0.0
        start = read()
        for item in stream():
            if frames == 0:
                first_at = read() - start
            frames += frames_in(item)
        total = read() - start
        if frames < 1:
            raise UserError("time_stream: the stream yielded no frame; nothing can be timed")
        if repeat >= warmup:
            per_frame.append(total / frames)
            first.append(first_at)
    return StreamTiming(statistics.median(per_frame), statistics.median(first), frames, tuple(per_frame), tuple(first))


@dataclass
class Cost:
    """Runs of one model at batch 1: ``stream`` yields frames (B, n, ...); a forward of a ``block`` is one block pass
    and carries ``frames_per_pass`` frames."""

    stream: Callable[[], Iterable[Tensor]]
    model: nn.Module
    block: type[nn.Module]
    frames_per_pass: int
    runs: list[StreamTiming] = field(default_factory=list)
    passes: float = 0.0

    def wants_more(self, repeats: int, seconds: float) -> bool:
        """At least one run, then up to ``repeats`` while another fits into ``seconds``."""
        spent = sum(run.seconds_per_frame * run.frames for run in self.runs)
        again = spent / max(1, len(self.runs))
        return not self.runs or (len(self.runs) < repeats and spent + again <= seconds)

    def run_once(self) -> None:
        with BlockPassCounter(self.model, self.block) as counter:
            run = time_stream(self.stream, frames_in=lambda x: x.shape[1], repeats=1, warmup=0)
        self.runs.append(run)
        self.passes = counter.per_frame(run.frames, frames_per_pass=self.frames_per_pass)

    def fill(self, row: Row) -> Row:
        """``row`` with block passes per frame and the medians of the timings."""
        return replace(
            row,
            block_passes_per_frame=self.passes,
            seconds_per_frame=statistics.median(run.seconds_per_frame for run in self.runs),
            seconds_to_first_frame=statistics.median(run.seconds_to_first_frame for run in self.runs),
        )


def time_in_rounds(costs: Sequence[Cost], repeats: int, seconds: float) -> None:
    """Run all models in turn until each has its repeats: a slow minute of the machine hits them all."""
    while waiting := [cost for cost in costs if cost.wants_more(repeats, seconds)]:
        for cost in waiting:
            cost.run_once()


def split_reference(total: int, count: int, where: str) -> tuple[list[int], list[int]]:
    """Two disjoint sets of ``count`` of ``total`` clips, the same places and motions in turn: reference and control.

    Neighbours are clips of one place and motion, so even and odd ones make the halves. UserError: too few clips.
    """
    order = sorted(range(total), key=lambda i: (i % 2, i))
    half = total // 2
    if count > half:
        raise UserError(f"clips is {count}, but {where} has only {total}: use at most {half}")
    first, second = ([part[int(i * half / count)] for i in range(count)] for part in (order[:half], order[half:]))
    return first, second
