"""The probes' figures: matrices over steps, measures over blocks, pictures (matplotlib, extra
``eval``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from scd_sf.evaluation.curves import pyplot, save


def matrices_figure(
    path: Path, rows: Mapping[str, Sequence[Tensor]], names: Sequence[str], axes_title: str
) -> Path:
    """A row of matrices per measure, a column per name; every row has one colour scale.
    ``axes_title``: the title of both axes."""
    plt = pyplot()
    size = (1.9 * len(names) + 1.2, 2.0 * len(rows))
    figure, panels = plt.subplots(
        len(rows), len(names), figsize=size, layout="constrained", squeeze=False
    )
    for line, (measure, matrices) in zip(panels, rows.items(), strict=True):
        low, high = min(float(m.min()) for m in matrices), max(float(m.max()) for m in matrices)
        for axes, matrix, name in zip(line, matrices, names, strict=True):
            image = axes.imshow(
                matrix.numpy(), vmin=low, vmax=high if high > low else low + 1e-9, cmap="viridis"
            )
            axes.set_title(name, fontsize=8)
            axes.tick_params(labelsize=6)
        line[0].set_ylabel(measure)
        figure.colorbar(image, ax=list(line), shrink=0.8)
    figure.supxlabel(axes_title, fontsize=9)
    return save(figure, path)


def panels_figure(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    x: str,
    baseline: Mapping[str, float] | None = None,
) -> Path:
    """A panel per title, in it a line per name over 0, 1, 2 ..; ``baseline``: title -> height
    of a dashed line."""
    plt = pyplot()
    size = (3.6 * len(panels), 3.2)
    figure, axes_grid = plt.subplots(
        1, len(panels), figsize=size, layout="constrained", squeeze=False
    )
    for axes, (title, lines) in zip(axes_grid[0], panels.items(), strict=True):
        for name, values in lines.items():
            axes.plot(range(len(values)), values, marker="o", markersize=3, label=name)
        if baseline and title in baseline:
            axes.axhline(baseline[title], color="gray", linestyle="--", label="uniform attention")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x)
        axes.grid(alpha=0.3)
        if len(lines) > 1 or (baseline and title in baseline):
            axes.legend(fontsize=7)
    return save(figure, path)


def map_figure(path: Path, maps: Mapping[str, tuple[Tensor, str]], y: str) -> Path:
    """Matrices side by side, each with its own colours and the name of its columns; rows along
    ``y``."""
    plt = pyplot()
    size = (4.0 * len(maps), 3.6)
    figure, panels = plt.subplots(1, len(maps), figsize=size, layout="constrained", squeeze=False)
    for axes, (title, (values, x)) in zip(panels[0], maps.items(), strict=True):
        image = axes.imshow(values.numpy(), aspect="auto", cmap="magma")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        figure.colorbar(image, ax=axes, shrink=0.8)
    return save(figure, path)


def pictures_figure(
    path: Path, pictures: Sequence[Sequence[Tensor]], rows: Sequence[str], columns: Sequence[str]
) -> Path:
    """A table of RGB pictures (H, W, 3) in [0, 1] with titles of its rows and columns."""
    plt = pyplot()
    size = (1.3 * len(columns) + 0.8, 1.3 * len(rows) + 0.3)
    figure, panels = plt.subplots(
        len(rows), len(columns), figsize=size, layout="constrained", squeeze=False
    )
    for line, name, row_pictures in zip(panels, rows, pictures, strict=True):
        for axes, picture in zip(line, row_pictures, strict=True):
            axes.imshow(picture.numpy())
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(name, fontsize=8)
    for axes, name in zip(panels[0], columns, strict=True):
        axes.set_title(name, fontsize=7)
    return save(figure, path)
