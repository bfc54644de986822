"""Figures of experiments as PNG files (matplotlib, extra ``eval``): lines over a number, and bars
of groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scd_sf.files import new_file
from scd_sf.types import UserError

MARKED_POINTS = 20  # the points of a line are marked when it has fewer than this
Line = (
    tuple[Sequence[float], Sequence[float]]
    | tuple[Sequence[float], Sequence[float], Sequence[float]]
)


def curve_figure(path: Path, lines: Mapping[str, Line], x: str, y: str) -> Path:
    """One line per name, ``(xs, ys)`` or with error bars ``(xs, ys, errors)``, as a PNG. ``x`` and
    ``y``: the axes' titles with their units."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, (xs, ys, *errors) in lines.items():
        marker = "o" if len(xs) < MARKED_POINTS else None
        axes.errorbar(
            xs, ys, *errors, label=name, marker=marker, markersize=4, linewidth=1.5, capsize=2
        )
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, path)


def tradeoff_figure(
    path: Path, points: Mapping[str, Mapping[str, tuple[float, float, float]]], x: str, y: str
) -> Path:
    """Points with error bars as a PNG, a colour per name and a marker per kind, x on a logarithmic
    axis. ``points``: name -> kind -> (x, y, error of y)."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    kinds = list(dict.fromkeys(kind for row in points.values() for kind in row))
    markers = {kind: "osD^v"[number % 5] for number, kind in enumerate(kinds)}
    for number, (name, row) in enumerate(points.items()):
        colour = f"C{number % 10}"
        for kind, (x_value, y_value, error) in row.items():
            axes.errorbar(x_value, y_value, yerr=error, fmt=markers[kind], color=colour, capsize=2)
        axes.plot([], [], linewidth=5, color=colour, label=name)
    for kind, marker in markers.items():
        axes.plot([], [], marker, color="0.4", label=kind)
    axes.set_xscale("log", subs=[2, 5])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", length=4, pad=4)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return save(figure, path)


def group_figure(path: Path, values: Mapping[str, Mapping[str, Sequence[float]]]) -> Path:
    """A panel per measure with a bar per name (the mean) and a dot per seed, as a PNG.
    ``values``: name -> measure -> values over seeds."""
    plt = pyplot()
    measures = list(next(iter(values.values())))
    size = (4.5 * len(measures), 3.6)
    figure, panels = plt.subplots(
        1, len(measures), figsize=size, layout="constrained", squeeze=False
    )
    for axes, measure in zip(panels[0], measures, strict=True):
        for position, row in enumerate(values.values()):
            axes.bar(position, sum(row[measure]) / len(row[measure]), width=0.7, color="#7a9cc6")
            axes.plot([position] * len(row[measure]), row[measure], "k.", markersize=5)
        axes.set_xticks(range(len(values)), list(values), rotation=40, ha="right")
        axes.set_title(f"{measure} (lower is better)")
        axes.grid(alpha=0.3, axis="y")
    return save(figure, path)


def pyplot() -> Any:
    """matplotlib's drawing interface, without a screen. UserError: it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'scd-sf[eval]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: Path) -> Path:
    """Write a matplotlib figure as PNG, close it and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot().close(figure)
    return path
