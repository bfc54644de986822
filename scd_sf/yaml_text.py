"""Foreign YAML as nested mappings and lists with text at the leaves. The reader of a field decides
what its text means.

YAML 1.1 makes ``off`` a truth value, ``1:30`` a 90 and ``2026-01-01`` a date. Here a scalar without
quotes stays text (:class:`Bare`). Anchors, aliases and tags are refused: no value can grow, refer
or construct. :func:`resolved` is for code that knows no fields, :func:`dump` writes text that both
read back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import yaml

from scd_sf.files import INTEGER_DIGITS, JSON_DEPTH, foreign, read_text
from scd_sf.types import UserError, printable

Tree = dict[str, object]

YAML_BYTES = 2**20  # largest config that is read; the shipped ones take 4 kB
NUMBER_LETTERS = 400  # the longest number: a float's 309 digits, its fraction and its exponent
INTEGER = re.compile(r"[-+]?[0-9]+")
NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_NULLS = ("", "~", "null", "Null", "NULL")
_TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class Bare(str):
    """A scalar without quotes: text, a number, a truth value or nothing."""

    __slots__ = ()


def is_null(value: object) -> bool:
    """Whether a value of a tree is YAML's null."""
    return isinstance(value, Bare) and value in _NULLS


def read_tree(path: Path) -> Tree:
    """A YAML file that holds a mapping. Raises UserError that names it."""
    return parse_tree(read_text(path, "check the path of the config file", YAML_BYTES), str(path))


def parse_tree(text: str, source: str) -> Tree:
    """YAML text that holds a mapping; empty text is an empty one. Raises UserError that names
    ``source``."""
    tree = parse(text, source)
    if is_null(tree):
        return {}
    if not isinstance(tree, dict):
        kind = "list" if isinstance(tree, list) else "text"
        raise UserError(f"{source}: expected 'key: value' lines, found {kind}")
    return tree


def parse(text: str, source: str) -> object:
    """One value: mapping, list or text. Raises UserError that names ``source`` and the line."""
    if len(text) > YAML_BYTES:
        raise UserError(
            f"{source}: {len(text):,} characters, more than the {YAML_BYTES:,} of a config; shorten it"
        )
    with foreign(source, "correct the YAML"):
        try:
            return _document(yaml.parse(text, Loader=yaml.SafeLoader))
        except yaml.YAMLError as error:
            raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error


def resolved(value: object) -> object:
    """A tree whose bare scalars became numbers, truth values and nulls, as YAML 1.2 has them."""
    if isinstance(value, dict):
        return {key: resolved(item) for key, item in value.items()}
    if isinstance(value, list):
        return [resolved(item) for item in value]
    if not isinstance(value, Bare):
        return value
    if is_null(value):
        return None
    if value in _TRUTHS:
        return _TRUTHS[value]
    if len(value) <= INTEGER_DIGITS and INTEGER.fullmatch(value):
        return int(value)
    return float(value) if len(value) <= NUMBER_LETTERS and NUMBER.fullmatch(value) else str(value)


def dump(tree: object) -> str:
    """Plain values as block-style YAML, lists of scalars on one line; text that could be read as
    anything else is quoted."""
    return _yaml(tree, default_flow_style=False, width=120)


def dump_inline(value: object) -> str:
    """A plain value as YAML on one line."""
    return _yaml(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def _yaml(value: object, **style: object) -> str:
    """YAML; letters that a terminal does not show, or takes for the end of a line, are escaped."""
    text = cast(
        "str", yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)
    )
    if printable(text) != text:
        text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False, **style)
    return text


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """SafeDumper that quotes every text that :func:`resolved` would read as a number."""


def _list(dumper: yaml.SafeDumper, items: list[object]) -> yaml.SequenceNode:
    scalars = not any(isinstance(item, list | dict) for item in items)
    node = dumper.represent_sequence("tag:yaml.org,2002:seq", items)
    node.flow_style = scalars or node.flow_style
    return node


_Dumper.add_representer(list, _list)
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^{NUMBER.pattern}$"), list("-+0123456789.")
)


def _document(events: Iterator[yaml.Event]) -> object:
    """The value of a stream's one document; an empty :class:`Bare` where there is none."""
    tree: object = None
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            if tree is not None:
                raise _refusal(event, "a second document")
            tree = _node(next(events), events, 1)
    return Bare() if tree is None else tree


def _node(event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> object:
    """The value that starts at ``event``."""
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise _refusal(event, "anchors and aliases are not read: write the value out")
    if event.tag is not None:
        raise _refusal(event, f"tags are not read: remove {event.tag}")
    if depth > JSON_DEPTH:
        raise _refusal(event, f"nested more than {JSON_DEPTH} deep")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event)
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            items.append(_node(item, events, depth + 1))
        return items
    mapping: Tree = {}
    while not isinstance(item := next(events), yaml.MappingEndEvent):
        key = _node(item, events, depth + 1)
        if not isinstance(key, str):
            raise _refusal(item, "a key must be text")
        if key in mapping:
            raise _refusal(item, f"key '{key}' is given twice")
        mapping[str(key)] = _node(next(events), events, depth + 1)
    return mapping


def _scalar(event: yaml.ScalarEvent) -> str:
    value: str = event.value
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise _refusal(event, "a NUL or half a surrogate pair in the text")
    return value if event.style else Bare(value)


def _refusal(event: yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
