"""One line of the report."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "fail"
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """``status`` is ok, warn or fail; ``remedy`` is one line, empty when there is nothing to do."""

    name: str
    status: str
    found: str
    remedy: str = ""
