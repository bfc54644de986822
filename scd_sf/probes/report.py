"""One HTML page of all probes in a folder, with text and figures inside the file."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from scd_sf.files import read_bytes, read_json, safe_path, typed, write_text
from scd_sf.types import printable

PAGE = "report.html"
PICTURE_BYTES = 2**26


@dataclass(frozen=True)
class _Result:
    """The fields of a probe's JSON that the page shows."""

    title: str
    text: str
    figures: list[str]


def write_probe_report(folder: Path, title: str, facts: Mapping[str, object]) -> Path:
    """``folder``/report.html from the probes' JSON and PNG files beside it; returns its path.
    UserError: a file is damaged."""
    results = []
    for path in sorted(folder.glob("*.json")):
        remedy = "run the probe again"
        document = read_json(path, remedy)
        if "figures" not in document:
            continue
        result = typed(document, _Result, path, remedy)
        pictures = []
        for name in result.figures:
            picture = safe_path(folder, name, f"{path}: a figure")
            pictures.append(
                (
                    picture.stem,
                    base64.b64encode(read_bytes(picture, remedy, PICTURE_BYTES)).decode(),
                )
            )
        texts = {
            "title": printable(result.title),
            "text": printable(result.text),
            "file": path.name,
        }
        results.append({**texts, "pictures": pictures})
    results.sort(key=lambda result: str(result["title"]).partition("(P")[2])  # P1 first
    environment = Environment(
        loader=PackageLoader("scd_sf.probes", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=title, facts=facts, results=results
    )
    write_text(folder / PAGE, page)
    return folder / PAGE
