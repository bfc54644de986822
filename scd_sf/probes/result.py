"""What a probe found: numbers as JSON, figures as PNG, a paragraph for people; each probe writes the three alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scd_sf.data.manifest import write_json, write_text


@dataclass(frozen=True)
class ProbeResult:
    """``name``: the stem of its files. ``text``: what was measured and what came out, plain sentences. ``data``: finite
    numbers, lists and objects of them. ``figures``: name -> draws a PNG at a path and returns it. ``files``: name ->
    text of another file, such as a configuration."""

    name: str
    title: str
    text: str
    data: dict[str, object]
    figures: Mapping[str, Callable[[Path], Path]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> list[Path]:
        """NAME.json, NAME-FIGURE.png for every figure, and NAME-FILE for every file; the PNG files."""
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [draw(folder / f"{self.name}-{figure}.png") for figure, draw in self.figures.items()]
        for file, text in self.files.items():
            write_text(folder / f"{self.name}-{file}", text)
        about = {"title": self.title, "text": self.text, "figures": [path.name for path in drawn]}
        write_json(folder / f"{self.name}.json", {**about, **self.data})
        return drawn
