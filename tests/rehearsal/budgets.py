"""How often the host waits for the device: the table of docs/gpu.md, which the rehearsal holds the
code to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
ROW = re.compile(r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \|$", re.MULTILINE)


class Budget(NamedTuple):
    """``reads`` of the device by the host, ``copies`` from host to device, and ``blocking`` ones
    among these."""

    reads: int
    copies: int
    blocking: int = 0


_SECTION = PAGE.read_text(encoding="utf-8").split("## Rehearsed without a GPU")[1]
BUDGETS = {name: Budget(*map(int, numbers)) for name, *numbers in ROW.findall(_SECTION)}
