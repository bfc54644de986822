"""Rows of a results table, how they are stored and printed, and a counter of block passes.

Seconds are measured in timing.py. All costs are per *latent* frame at batch 1: one latent frame is
what a causal model generates at a time (the Wan VAE makes four pixel frames of each, one of the
first).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.table import Table
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scd_sf.files import finite_json, read_json, typed, write_text
from scd_sf.types import UserError, as_cell

SCHEMA = 1


@dataclass(frozen=True)
class Adherence:
    """Share of videos that show the place and the motion of their prompt according to the judges,
    in [0, 1]. ``left_right``: None without such motions."""

    place: float
    motion: float
    left_right: float | None = None


@dataclass(frozen=True)
class ResultRow:
    """One model, sampler and step count, measured. None = does not apply (a control has no block
    passes).

    ``*_std`` is a standard deviation over seeds or resampled videos; ``spread_over`` says which and
    how many ("3 seeds", "20 resamples"). ``seed`` is the sampling seed of the quoted figures,
    ``clips`` how many were scored.
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
    """A column: heading, unit ('' = a pure number), explanation in plain words, and the text of a
    row's cell."""

    title: str
    unit: str
    explanation: str
    text: Callable[[ResultRow], str]


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
    Column(
        "family", "", "The architecture, or a control that is no model.", lambda row: row.family
    ),
    Column("stage", "", "How far along the chain the weights are.", lambda row: row.stage),
    Column(
        "steps", "", "Denoising steps per frame.", lambda row: str(row.steps) if row.steps else "-"
    ),
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
        "Wall time per latent frame on the machine of this run, one video at a time: the least of several rounds.",
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


@dataclass(frozen=True)
class Results:
    """The file of a table."""

    schema: int
    context: dict[str, object]
    rows: list[ResultRow]


def write_rows(path: Path, rows: Sequence[ResultRow], context: Mapping[str, object]) -> None:
    """Write ``{"schema", "context", "rows"}`` as JSON, whole or not at all. ``context``: machine,
    date, seeds, goals.

    NaN and infinity are refused (they are not JSON, and a table should not hide them).
    """
    document = asdict(Results(SCHEMA, dict(context), list(rows)))
    write_text(path, finite_json(document, path, "leave it None or find out why"))


def read_rows(path: Path) -> tuple[list[ResultRow], dict[str, object]]:
    """Rows and context of a file that :func:`write_rows` wrote; UserError names file and field."""
    remedy = "run the evaluation again"
    document = read_json(path, remedy)
    if document.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: field 'schema' is not {SCHEMA}; run the evaluation again with this version"
        )
    results = typed(document, Results, path, remedy)
    return results.rows, results.context


def result_table(rows: Sequence[ResultRow], title: str, notes: Sequence[str] = ()) -> Table:
    """The rows as a table for ``rich.console.Console``, without the columns that a row's name
    repeats; ``notes`` stand below it."""
    columns = [column for column in COLUMNS if column.title not in IN_THE_NAME]
    table = Table(
        title=title,
        title_justify="left",
        caption=as_cell("\n".join(notes)) if notes else None,
        caption_justify="left",
    )
    for column in columns:
        heading = f"{column.title}\n({column.unit})" if column.unit else column.title
        is_text = column.title in LEFT_ALIGNED
        table.add_column(
            heading, justify="left" if is_text else "right", overflow="fold", no_wrap=is_text
        )
    for row in rows:
        table.add_row(*(as_cell(column.text(row)) for column in columns))
    return table


class BlockPassCounter:
    """Counts the forward passes of chosen submodules while the ``with`` body runs, through forward
    hooks.

    ``calls`` counts invocations; ``samples`` adds up the leading (batch) dimension of what the
    blocks return, so that a prompted and an unprompted branch in one batch of two count as two.
    """

    def __init__(
        self,
        module: nn.Module,
        is_block: type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, nn.Module], bool],
    ) -> None:
        """``is_block``: a class or several (subclasses count too), or a predicate on (qualified
        name, submodule)."""
        self.calls = 0
        self.samples = 0
        self._handles: list[RemovableHandle] = []
        self._blocks: list[nn.Module]
        if isinstance(is_block, type | tuple):
            self._blocks = [child for child in module.modules() if isinstance(child, is_block)]
        else:
            self._blocks = [
                child for name, child in module.named_modules() if is_block(name, child)
            ]
        if not self._blocks:
            raise UserError(
                "block passes: no submodule matches; give the class of the transformer blocks"
            )

    def __enter__(self) -> Self:
        self._handles = [block.register_forward_hook(self._count) for block in self._blocks]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _count(self, block: nn.Module, inputs: object, output: object) -> None:
        self.calls += 1
        block_output = output[0] if isinstance(output, tuple) else output
        if not isinstance(block_output, Tensor) or block_output.ndim == 0:
            raise TypeError(
                f"block passes: {type(block).__name__} returned {type(block_output).__name__}, not a batch"
            )
        self.samples += block_output.shape[0]

    def per_frame(self, frames: int, *, batch: int = 1, frames_per_pass: int = 1) -> float:
        """Passes per generated frame, where a pass over several frames counts once for each of
        them. ``frames_per_pass``: all frames of the clip for a bidirectional model, those of a
        chunk for a causal one."""
        return self.samples * frames_per_pass / (batch * frames)


def split_reference(total: int, count: int, where: str) -> tuple[list[int], list[int]]:
    """Two disjoint sets of ``count`` of ``total`` clips with the same places and motions, reference
    and control, as indices.

    Neighbours are clips of one place and motion, so the even and the odd indices are the halves.
    UserError: too few clips.
    """
    half = total // 2
    if count > half:
        raise UserError(f"clips is {count}, but {where} has only {total}: use at most {half}")
    order = [*range(0, total, 2), *range(1, total, 2)]
    places = [int(i * half / count) for i in range(count)]
    return [order[place] for place in places], [order[half + place] for place in places]
