"""The result of a probe: numbers as JSON, figures as PNG and a paragraph for people, in the same
form for every probe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.files import finite_json, write_text

NUMBERS = re.compile(r"\[\n\s+([-+.,\de\s]+?)\s+\]")  # a list of numbers that is spread over lines


@dataclass(frozen=True)
class ProbeResult:
    """``name``: the stem of its files. ``text``: the measurement and its result in plain
    sentences. ``data``: finite numbers, lists and objects of them. ``figures``: name -> draws a PNG
    at a path and returns it. ``files``: name -> text of another file, such as a configuration."""

    name: str
    title: str
    text: str
    data: dict[str, object]
    figures: Mapping[str, Callable[[Path], Path]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> list[Path]:
        """Write NAME.json, NAME-FIGURE.png for every figure and NAME-FILE for every file; returns
        the PNG files. UserError: a number is not finite."""
        folder.mkdir(parents=True, exist_ok=True)
        figure_paths = [
            draw(folder / f"{self.name}-{figure}.png") for figure, draw in self.figures.items()
        ]
        for file, text in self.files.items():
            write_text(folder / f"{self.name}-{file}", text)
        header = {
            "title": self.title,
            "text": self.text,
            "figures": [path.name for path in figure_paths],
        }
        document = finite_json({**header, **self.data}, self.name, "check the model's weights")
        compact_document = NUMBERS.sub(lambda row: f"[{' '.join(row[1].split())}]", document)
        write_text(folder / f"{self.name}.json", compact_document)
        return figure_paths


def rounded(numbers: Tensor, digits: int = 6) -> list[object]:
    """The numbers, rounded to ``digits`` significant digits, as nested lists of the tensor's
    shape."""
    flat = [float(f"{value:.{digits}g}") for value in numbers.double().flatten().tolist()]
    nested: list[object] = torch.tensor(flat, dtype=torch.float64).reshape(numbers.shape).tolist()
    return nested
