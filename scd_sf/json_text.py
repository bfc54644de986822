"""JSON of others within bounds: depth, finite numbers, 64 bits. :func:`scd_sf.files.parse_json` words the errors."""

from __future__ import annotations

import json
import math

JSON_DEPTH = 64
INTEGER_DIGITS = 20  # 64 bits


def loads(text: str | bytes) -> object:
    """The value. ValueError, RecursionError or MemoryError for everything else."""
    value: object = json.loads(text, parse_constant=_no_number, parse_int=_integer, parse_float=_finite)
    _check_tree(value)
    return value


def _no_number(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > INTEGER_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _check_tree(value: object) -> None:
    """ValueError for a tree that is nested too deeply or has text that UTF-8 cannot hold."""
    waiting: list[tuple[object, int]] = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, str):
            item.encode()
        elif isinstance(item, dict | list):
            if depth > JSON_DEPTH:
                raise ValueError(f"nested more than {JSON_DEPTH} deep")
            inner = item if isinstance(item, list) else [*item, *item.values()]
            waiting += [(each, depth + 1) for each in inner if isinstance(each, str | dict | list)]
