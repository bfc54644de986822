"""One page of all probes in a folder: text and figures inside the file, so that it can be sent around."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from scd_sf.files import write_text
from scd_sf.types import UserError

PAGE = "report.html"


def write_report(folder: Path, title: str, facts: Mapping[str, object]) -> Path:
    """``folder``/report.html from the probes' JSON and PNG files beside it. UserError: a file is damaged."""
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); run the probe again") from error
        if not isinstance(document, dict) or "figures" not in document:
            continue
        pictures = []
        for name in document["figures"]:
            picture = folder / Path(str(name)).name
            if not picture.is_file():
                raise UserError(f"{picture}: missing; run the probe again")
            pictures.append((picture.stem, base64.b64encode(picture.read_bytes()).decode()))
        results.append({"title": document["title"], "text": document["text"], "file": path.name, "pictures": pictures})
    results.sort(key=lambda result: str(result["title"]).partition("(P")[2])  # P1 first
    environment = Environment(
        loader=PackageLoader("scd_sf.probes", package_path=""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html.j2").render(title=title, facts=facts, results=results)
    write_text(folder / PAGE, page)
    return folder / PAGE
