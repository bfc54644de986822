"""The result of scoring a video prediction model: figures with their spread, drift curves, protocol
and weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from scd_sf.evaluation.prediction_protocols import PredictionProtocol
from scd_sf.files import finite_json, parse_json, read_text, typed, write_text
from scd_sf.types import UserError, as_cell

SCHEMA = 2
MEASURES = {  # unit, and whether higher is better
    "psnr": ("dB", True),
    "ssim": ("", True),
    "lpips": ("", False),
    "mse": ("", False),
    "fvd": ("", False),
}
FAR_COMPATIBLE = (
    "FAR-compatible: both sides through H.264, LPIPS fed [0, 1], SSIM with padded borders; "
    "not comparable with tensors"
)


@dataclass(frozen=True)
class PredictionFigure:
    """One figure; ``std``: its standard deviation over ``spread_over`` ("4 seeds", "20
    resamples of ..")."""

    value: float
    std: float
    spread_over: str


@dataclass(frozen=True)
class PredictionResult:
    """Figures (psnr, ssim, lpips, mse, fvd; those that were measured) of one model under one
    protocol.

    ``clips`` were scored (fewer than the protocol's: not comparable). ``warnings``: sentences on
    what limits a comparison of the figures. ``curves``: per generated frame, the mean over clips of
    the trajectories that the figure is of; their mean is the figure. ``weights``: sha256 of each
    network's file. ``equal_frames``: generated frames without any error, which count as 100 dB.
    Seconds are sums over clips and trajectories: of waiting for the generator, and of measuring.
    """

    protocol: PredictionProtocol
    clips: int
    far_compat: bool
    warnings: tuple[str, ...]
    weights: dict[str, str]
    figures: dict[str, PredictionFigure]
    curves: dict[str, tuple[float, ...]]
    equal_frames: int
    generation_seconds: float
    metric_seconds: float

    @property
    def title(self) -> str:
        """The protocol's title, and why these figures do not compare with published ones."""
        notes = [FAR_COMPATIBLE] if self.far_compat else []
        if self.clips != self.protocol.clips:
            notes.append(f"only {self.clips} of {self.protocol.clips} clips: not comparable")
        return "; ".join([self.protocol.title, *notes])

    @property
    def seconds_per_frame(self) -> float:
        """Generation seconds per generated frame (the papers' Sec/F, when the generator was
        lazy)."""
        return self.generation_seconds / (
            self.clips * len(self.protocol.seeds) * self.protocol.generated
        )

    def to_json(self) -> str:
        """Indented JSON. Raises UserError when a figure is NaN or infinite."""
        return finite_json(
            {"schema": SCHEMA, **asdict(self)}, "prediction result", "look at the videos first"
        )

    def write(self, path: Path) -> None:
        """:meth:`to_json` into a file, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def from_json(cls, text: str, where: str = "prediction result") -> PredictionResult:
        """The result in a text of :meth:`to_json`. UserError names ``where`` and the field."""
        remedy = "score again"
        row = typed(parse_json(text, where, remedy), dict[str, object], where, remedy)
        if row.pop("schema", None) != SCHEMA:
            raise UserError(f"{where}: 'schema' differs from {SCHEMA}; score again")
        return typed(row, cls, where, remedy, exact=True)

    @classmethod
    def read(cls, path: Path) -> PredictionResult:
        """The result of a file. UserError names it."""
        return cls.from_json(read_text(path, "score again"), str(path))


def prediction_table(results: Mapping[str, PredictionResult]) -> Table:
    """Models side by side (name -> result), for ``rich``. UserError when they are not of one
    protocol and setting.

    Titles differ when clips are missing or the codec of FAR was used, so such results never share
    a table either.
    """
    titles = sorted({result.title for result in results.values()})
    if (
        len(titles) != 1
        or len({json.dumps(asdict(result.protocol)) for result in results.values()}) != 1
    ):
        raise UserError(
            f"results of different protocols do not share a table: {' | '.join(titles) or 'none given'}"
        )
    if len({json.dumps(result.weights, sort_keys=True) for result in results.values()}) != 1:
        raise UserError(
            "results by different metric networks do not share a table; score all with the same weights"
        )
    warnings = dict.fromkeys(warning for result in results.values() for warning in result.warnings)
    notes = "\n".join(f"Note: {warning}." for warning in warnings)
    table = Table(
        title=as_cell(titles[0]),
        title_justify="left",
        caption=as_cell(notes) if notes else None,
        caption_justify="left",
    )
    table.add_column("model")
    measures = [
        name for name in MEASURES if any(name in result.figures for result in results.values())
    ]
    for name in measures:
        unit, higher_is_better = MEASURES[name]
        better = "higher" if higher_is_better else "lower"
        table.add_column(f"{name}\n({f'{unit}, ' if unit else ''}{better} is better)")
    for model, result in results.items():
        table.add_row(as_cell(model), *(_cell(result.figures.get(name)) for name in measures))
    return table


def _cell(figure: PredictionFigure | None) -> str:
    return "-" if figure is None else f"{figure.value:.4g} ± {figure.std:.2g}"
