"""The pages: what they name exists, the tour is as short as it says."""

from __future__ import annotations

import re

import recipe_runner

ROOT = recipe_runner.ROOT


def test_the_tour_is_short() -> None:
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    files = re.findall(r"^### \d+\. `(.+)`$", text, re.MULTILINE)
    lines = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files}
    assert 10 <= len(files) <= 12, files
    assert sum(lines.values()) <= 2500, lines
