"""Names of tensors in other layouts: tables of modules, and the one function that applies them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

Table = Mapping[str, str]
"""Module of one layout -> module of the other. ``N`` stands for a number, which is the same on both
sides."""


def renamed(name: str, table: Table) -> str | None:
    """A tensor's name by ``table``; its ending (``.weight``, ``.bias`` or none) stays. None if no
    module fits."""
    for module, new_name in table.items():
        if (match := _pattern(module).fullmatch(name)) is not None:
            *numbers, ending = match.groups("")
            return new_name.replace("N", "{}").format(*numbers) + ending
    return None


@cache
def _pattern(module: str) -> re.Pattern[str]:
    return re.compile(re.escape(module).replace("N", r"(\d+)") + r"(\.weight|\.bias)?")
