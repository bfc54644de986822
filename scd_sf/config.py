"""Typed configuration: a dataclass is the schema, a YAML file and ``a.b=value`` arguments only
override its defaults.

    cfg = load_config(MyConfig, Path("recipes/configs/tiny.yaml"), ["train.lr=1e-4",
    "data.root=data/toy"])

The schema is an ordinary (nested) dataclass with defaults; a field without a default is mandatory.
Each dataclass may check itself in ``__post_init__`` with ``ValueError``. Every fault is one
:class:`UserError` line that names the file or the argument, the key, and the nearest valid key.

Values are data: ``${..}`` and ``???`` are text. The type of the field says what a scalar means, so
``off`` is text for a text field and false for a truth value. Numbers are finite, integers fit into
64 bits.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, cast

from scd_sf.files import INTEGER_DIGITS, JSON_DEPTH
from scd_sf.types import UserError, say
from scd_sf.yaml_text import (
    INTEGER,
    NUMBER,
    NUMBER_LETTERS,
    Bare,
    Tree,
    dump,
    dump_inline,
    is_null,
    parse,
    parse_tree,
    read_tree,
    resolved,
)

T = TypeVar("T")


class Renamed(NamedTuple):
    """The present name of a field, and the present names of its renamed choices."""

    name: str
    values: Mapping[str, str] = {}


# Class -> old field -> its present name, for derived classes, too. Read in YAML, overrides and
# checkpoints; never written.
# A field of which only choices changed is listed under its own name.
RENAMED: dict[str, dict[str, Renamed]] = {
    "EngineConfig": {"kind": Renamed("backend", {"local": "torch"})},
    "FlowMatchingConfig": {
        "eta": Renamed("context_noise"),
        "samples": Renamed("noise_samples"),
        "targets": Renamed("target_chunks"),
    },
    "PredictionGuidance": {"eta": Renamed("context_noise")},
    "SampleGuidance": {"eta": Renamed("context_noise")},
    "Stage3Config": {"student": Renamed("student_engine")},
}
_printed_notes: set[tuple[str, str]] = set()  # (class, old field) that a note was printed for
_TRUTHS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
_UNSET = object()  # a mandatory field before its value


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help of scripts with a few flags, with their docstring as it is and each flag's default."""


def paragraphs(doc: str | None) -> str:
    """A docstring as typer's help: its paragraphs fit any terminal, its commands keep their
    lines."""
    parts = inspect.cleandoc(doc or "").split("\n\n")
    return "\n\n".join(
        f"\b\n{part}" if part.startswith("    ") else part.replace("\n", " ").replace("``", "")
        for part in parts
    )


def load_config(
    schema: type[T], path: Path | Sequence[Path] | None, overrides: Sequence[str] = ()
) -> T:
    """Defaults of ``schema``, then the YAML file at ``path`` (or several in turn), then
    ``a.b=value`` overrides: an instance of ``schema``.

    Raises UserError: unreadable file, unknown key (with the nearest valid one), wrong type, missing
    mandatory field, or a ``ValueError`` of any section's ``__post_init__``.
    """
    paths: Sequence[Path] = [path] if isinstance(path, Path) else path or []
    layers = [(str(file), read_tree(file)) for file in paths]
    layers += [_parse_override(text) for text in overrides]
    return _build(schema, layers)


def from_command_line(
    schema: type[T], description: str, argv: Sequence[str] | None = None, command: str | None = None
) -> T:
    """``recipe.py [--config file.yaml ..] [a.b=value ..]`` -> an instance of ``schema``; later
    files win over earlier. ``command``: its name in the help, where that is not the script's.

    ``--help`` lists every field, ``--print-config`` prints the resolved YAML; both end the process.
    ``--local_rank`` is accepted because the deepspeed launcher adds it; ranks are read from the
    environment.
    """
    parser = argparse.ArgumentParser(
        command,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("--help", "-h", action="store_true", help="print this and stop")
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        help="YAML file over the defaults; may be given again, the later one wins",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved YAML and stop"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="values of single fields")
    args, unknown_arguments = parser.parse_known_intermixed_args(
        sys.argv[1:] if argv is None else argv
    )
    if args.help:
        width = shutil.get_terminal_size().columns
        _print_and_stop(f"{parser.format_help()}\nfields:\n{help_of(schema, width)}")
    if unknown_arguments:
        raise UserError(_unknown_argument(schema, unknown_arguments[0]))
    cfg = load_config(schema, args.config, args.overrides)
    if os.environ.get("RANK", "0") == "0":
        _note_replacements(args.config)
    if args.print_config:
        _print_and_stop(commented_yaml(cfg))
    return cfg


def _unknown_argument(schema: type[Any], argument: str) -> str:
    """What to type instead of ``--field value``."""
    name = argument.partition("=")[0].lstrip("-").replace("-", "_")
    matches = difflib.get_close_matches(name[:100], list(_hints(schema)), n=1, cutoff=0.6)
    example = f"{matches[0]}=VALUE" if matches else "name=VALUE, --help lists the names"
    return f"unknown option '{_shorten(argument)}'; fields are set without dashes: {example}"


def _note_replacements(files: Sequence[Path]) -> None:
    """Print which values a file replaces of the files before it. Shipped files are complete, so one
    over another replaces more than its name says."""
    earlier_values: Tree = {}
    for file in files:
        values = _flat(plain_yaml(file))
        if replaced_keys := [
            key for key in values if key in earlier_values and earlier_values[key] != values[key]
        ]:
            more = f" and {len(replaced_keys) - 8} more" if len(replaced_keys) > 8 else ""
            names = ", ".join(replaced_keys[:8]) + more
            say(f"{file}: replaces {names} of the files before it", sys.stderr)
        earlier_values |= values


def _print_and_stop(text: str) -> NoReturn:
    for line in text.removesuffix("\n").split("\n"):
        say(line)
    sys.exit(0)


def from_yaml(schema: type[T], source: Path | str) -> T:
    """The inverse of :func:`to_yaml`. A ``Path`` is read as a file, a ``str`` is YAML text."""
    if isinstance(source, Path):
        return load_config(schema, source)
    return _build(schema, [("yaml text", parse_tree(source, "yaml text"))])


def to_yaml(cfg: object) -> str:
    """Every field of a config dataclass instance, defaults included, as YAML that :func:`from_yaml`
    reads back."""
    if not dataclasses.is_dataclass(cfg) or isinstance(cfg, type):
        raise TypeError(f"to_yaml wants a dataclass instance, got {type(cfg).__name__}")
    return dump(_plain(cfg))


def differences(left: object, right: object) -> dict[str, tuple[object, object]]:
    """Dotted key -> (left value, right value) wherever two config instances, or their plain trees,
    disagree."""
    a, b = _flat(_plain(left)), _flat(_plain(right))
    absent = "<absent>"
    keys = list(dict.fromkeys([*a, *b]))
    return {
        key: (a.get(key, absent), b.get(key, absent))
        for key in keys
        if a.get(key, absent) != b.get(key, absent)
    }


def plain_yaml(path: Path) -> Tree:
    """The raw tree of a YAML file."""
    return cast("Tree", resolved(read_tree(path)))


def stored_settings(schema: type[Any], stored: Path | Mapping[str, object], source: str) -> Tree:
    """Settings that an earlier version may have stored, as ``schema`` has them at present: old names
    of fields replaced (:data:`RENAMED`), absent fields at their defaults. So a field that was added
    since is no difference, in sections and lists of sections too.

    ``stored``: a YAML file, or a tree of plain values. ``source``: its name for notes. Mandatory
    fields that are absent stay so, and so do unknown fields: both are differences.
    """
    tree = read_tree(stored) if isinstance(stored, Path) else stored
    present = present_names(schema, tree, source)
    if isinstance(stored, Path):
        present = cast("Tree", resolved(present))
    return _with_defaults(schema, present, _defaults(schema))


def _with_defaults(schema: type[Any], tree: Mapping[str, object], defaults: Tree) -> Tree:
    """``tree`` and the plain ``defaults`` of the fields that it lacks."""
    hints = _hints(schema)
    values: Tree = {}
    for name, default in defaults.items():
        section = default if isinstance(default, dict) else {}
        is_mandatory = default is _UNSET or bool(_missing_names(section, ""))
        if name not in tree and not is_mandatory:
            values[name] = _plain(default)
    for name, value in tree.items():
        nested, item = _dataclass_of(hints.get(name)), _item_schema(hints.get(name))
        if nested is not None and isinstance(value, Mapping):
            default = defaults[name]
            section = cast("Tree", default) if isinstance(default, dict) else _defaults(nested)
            values[name] = _with_defaults(nested, value, section)
        elif item is not None and isinstance(value, list):
            values[name] = [
                _with_defaults(item, part, _defaults(item)) if isinstance(part, Mapping) else part
                for part in value
            ]
        else:
            values[name] = value
    return values


# --------------------------------------------------------------------------------------------- help


def field_words(schema: type[Any]) -> dict[str, str]:
    """Field -> the docstring below it, on one line; fields without one are left out. Those of the
    dataclasses that it is derived from count."""
    words: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        for field, statement in itertools.pairwise(cast("ast.ClassDef", tree.body[0]).body):
            match field, statement:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                    words[name] = " ".join(text.split()).replace("``", "")
    return words


def help_of(schema: type[Any], width: int = 100) -> str:
    """Every field of a schema with its type, default and meaning, wrapped to ``width`` columns."""
    return "\n".join(_field_lines(schema, _defaults(schema), "", max(40, min(width, 120)))) + "\n"


def _field_lines(schema: type[Any], values: Tree, prefix: str, width: int) -> list[str]:
    lines: list[str] = []
    words = field_words(schema)
    for name, hint in _hints(schema).items():
        kind, value = _dataclass_of(hint), values[name]
        if kind is not None and value is not None:
            head = "section"
        elif value is _UNSET:
            head = f"{_plain_type(hint)}; mandatory"
        else:
            head = f"{_plain_type(hint)}; default {dump_inline(_plain(value))}"
        lines += textwrap.wrap(f"{prefix}{name}  {head}", width, subsequent_indent=" " * 10)
        indent = " " * 6
        text = words.get(name, "")
        lines += textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
        if kind is not None:
            section_values = _defaults(kind) if value is None else cast("Tree", value)
            lines += _field_lines(kind, section_values, f"{prefix}{name}.", width)
        elif (item := _item_schema(hint)) is not None:
            lines += _field_lines(item, _defaults(item), f"{prefix}{name}[].", width)
    return lines


def _item_schema(hint: object) -> type[Any] | None:
    """The dataclass that a list holds."""
    args = typing.get_args(_strip_optional(hint))
    return _dataclass_of(args[0]) if args else None


def _plain_type(hint: object) -> str:
    """A type for people: number, list of text, one of a, b."""
    inner = _strip_optional(hint)
    origin, args = typing.get_origin(inner), typing.get_args(inner)
    if inner != hint:
        return f"{_plain_type(inner)} or null"
    if origin is Literal:
        return f"one of {', '.join(str(choice) or dump_inline(choice) for choice in args)}"
    if origin is dict:
        return f"name: {_plain_type(args[1])} pairs"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"[{', '.join(map(_plain_type, args))}]"
    if origin in (tuple, list):
        return f"list of {_plain_type(args[0])}"
    names = {str: "text", Path: "path", bool: "true or false", int: "whole number", float: "number"}
    return names.get(cast("type[Any]", inner), "section")


def commented_yaml(cfg: object) -> str:
    """A config as block-style YAML, each field below its meaning; :func:`from_yaml` reads it."""
    lines: list[str] = []
    words = field_words(type(cfg))
    for name in _hints(type(cfg)):
        value = getattr(cfg, name)
        text = words.get(name, "")
        lines += textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="# ")
        if dataclasses.is_dataclass(value):
            lines.append(f"{name}:")
            lines.append(textwrap.indent(commented_yaml(value), "  ").rstrip("\n"))
        else:
            lines.append(dump({name: _plain(value)}).rstrip("\n"))
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------- layers


def _build(schema: type[T], layers: Sequence[tuple[str, Tree]]) -> T:
    """The schema's defaults under all layers, later ones over earlier, then the dataclasses
    bottom-up."""
    values = _defaults(schema)
    for source, tree in layers:
        _merge(values, schema, present_names(schema, tree, source), source, "")
    sources = ", ".join(source for source, _ in layers)
    return _instantiate(
        schema, values, "", sources or "config defaults", sources or "no config file given"
    )


def present_names(
    schema: type[Any], tree: Mapping[str, object], source: str, prefix: str = ""
) -> Tree:
    """A tree with the present names of renamed fields; unknown fields stay. A note is printed for
    each old name."""
    hints = _hints(schema)
    present: Tree = {}
    for old_name, old_value in tree.items():
        entry = _new_name(schema, old_name, old_value)
        name, value = entry.name, old_value
        if isinstance(value, str) and value in entry.values:
            value = type(value)(entry.values[value])
        if name in present:
            raise UserError(
                f"{source}: {prefix}{name} is given twice, once by its old name; keep one"
            )
        if (name, value) != (old_name, old_value):
            _note(
                schema,
                old_name,
                f"{source}: '{prefix}{old_name}={old_value}' is '{prefix}{name}={value}' now",
            )
        present[name] = _present_value(hints.get(name), value, source, f"{prefix}{name}")
    return present


def _new_name(schema: type[Any], name: str, value: object) -> Renamed:
    """The present name of a field and its choices. Where another field has taken over the old name
    and is a section, ``name`` is the old field only if ``value`` is no section."""
    tables = [RENAMED.get(base.__name__, {}) for base in schema.__mro__]
    entry = next((table[name] for table in tables if name in table), Renamed(name))
    hints = _hints(schema)
    if entry.name == name or name not in hints:
        return entry
    is_old = _dataclass_of(hints[name]) is not None and not isinstance(value, Mapping)
    return entry if is_old else Renamed(name)


def _note(schema: type[Any], name: str, text: str) -> None:
    """Print ``text`` once for each old name in a process."""
    if (schema.__name__, name) not in _printed_notes:
        _printed_notes.add((schema.__name__, name))
        say(_shorten(text, 300), sys.stderr)


def _present_value(hint: object, value: object, source: str, key: str) -> object:
    """A field's value, where it is a section or a list of sections, with present names."""
    nested, item = _dataclass_of(hint), _item_schema(hint)
    if nested is not None and isinstance(value, Mapping):
        return present_names(nested, value, source, f"{key}.")
    if item is not None and isinstance(value, list):
        return [
            _present_value(item, part, source, f"{key}[{place}]")
            for place, part in enumerate(value)
        ]
    return value


def _defaults(schema: type[Any]) -> Tree:
    """Field -> its default, sections as trees of their own; ``_UNSET`` for what is mandatory."""
    values: Tree = {}
    for field in dataclasses.fields(schema):
        if not field.init:
            continue
        nested = _dataclass_of(_hints(schema)[field.name])
        if field.default_factory is not dataclasses.MISSING:
            values[field.name] = _section(field.default_factory(), nested)
        elif field.default is not dataclasses.MISSING:
            values[field.name] = _section(field.default, nested)
        else:
            values[field.name] = _UNSET if nested is None else _defaults(nested)
    return values


def _section(value: object, schema: type[Any] | None) -> object:
    """A default section as a tree; any other default as it is."""
    if schema is None or value is None:
        return value
    hints = _hints(schema)
    return {
        name: _section(getattr(value, name), _dataclass_of(hint)) for name, hint in hints.items()
    }


def _merge(
    values: Tree, schema: type[Any], tree: Mapping[str, object], source: str, prefix: str
) -> None:
    """Put a layer over ``values``; every value gets the type of its field."""
    hints = _hints(schema)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise UserError(f"{source}: unknown key '{key}'{_did_you_mean(name, schema, prefix)}")
        nested = _dataclass_of(hints[name])
        if nested is None:
            new_value = _convert(value, hints[name], key, source, _file_field(name, hints, prefix))
            old_value = values[name]
            is_update = isinstance(old_value, dict) and isinstance(new_value, dict) and new_value
            values[name] = (
                cast("Tree", old_value) | cast("Tree", new_value) if is_update else new_value
            )
        elif isinstance(value, Mapping):
            old_value = values[name]
            section_values = (
                cast("Tree", old_value) if isinstance(old_value, dict) else _defaults(nested)
            )
            _merge(section_values, nested, value, source, f"{key}.")
            values[name] = section_values
        elif is_null(value) and _is_optional(hints[name]):
            values[name] = None
        else:
            raise UserError(
                f"{source}: '{key}' is a section ({', '.join(_hints(nested))}), not the value {_show(value)}"
            )


def _instantiate(schema: type[T], values: Tree, prefix: str, source: str, label: str) -> T:
    """The dataclass. An error of ``__post_init__`` names the section, a missing value the
    fields."""
    if names := _missing_names(values, prefix):
        raise UserError(
            f"{label}: missing mandatory {', '.join(names)}; set it in the file or as {names[0]}=VALUE"
        )
    hints = _hints(schema)
    arguments: Tree = {}
    for name, value in values.items():
        nested = _dataclass_of(hints[name])
        tree = cast("Tree", value)
        arguments[name] = (
            value
            if nested is None or value is None
            else _instantiate(nested, tree, f"{prefix}{name}.", source, label)
        )
    try:
        return schema(**arguments)
    except (ValueError, ArithmeticError) as error:
        section = prefix.rstrip(".") or schema.__name__
        raise UserError(f"{source}: section '{section}': {error}") from error


def _missing_names(values: Tree, prefix: str) -> list[str]:
    """Dotted names of the mandatory fields without a value."""
    names: list[str] = []
    for name, value in values.items():
        if value is _UNSET:
            names.append(f"{prefix}{name}")
        elif isinstance(value, dict):
            names += _missing_names(value, f"{prefix}{name}.")
    return sorted(names)


def _did_you_mean(key: str, schema: type[Any], prefix: str) -> str:
    names = list(_hints(schema))
    matches = difflib.get_close_matches(key[:100], names, n=1, cutoff=0.6)
    place = f" in section '{prefix.rstrip('.')}'" if prefix else ""
    if matches:
        return f"{place}; did you mean '{prefix}{matches[0]}'?"
    return f"{place}; valid keys are {', '.join(names)}"


# -------------------------------------------------------------------------------------------- types


def _file_field(name: str, hints: Tree, prefix: str) -> str:
    """The field that takes a file in the place of the list ``name`` (prompts, prompt_file), or
    empty."""
    field = f"{name.removesuffix('s')}_file"
    return f"{prefix}{field}" if field in hints else ""


def _convert(value: object, hint: object, key: str, source: str, file_field: str = "") -> object:
    """A value of a YAML tree as a field's type. ``file_field``: the field for a file in the place
    of this list. Raises UserError that names the key and the expected type."""
    inner = _strip_optional(hint)
    origin, args = typing.get_origin(inner), typing.get_args(inner)
    if is_null(value) and _is_optional(hint):
        return None
    if origin is Literal:
        return _choice(value, args, key, source)
    if dataclasses.is_dataclass(inner) and isinstance(inner, type) and isinstance(value, Mapping):
        values = _defaults(inner)
        _merge(values, inner, value, source, f"{key}.")
        return _instantiate(inner, values, f"{key}.", source, source)
    if origin is dict and isinstance(value, Mapping):
        return {
            name: _convert(item, args[1], f"{key}.{name}", source) for name, item in value.items()
        }
    if origin in (tuple, list) and isinstance(value, list):
        kinds = args if origin is tuple and args[-1] is not Ellipsis else args[:1] * len(value)
        if len(value) != len(kinds):
            raise UserError(f"{source}: {key} has {len(value)} values; it must have {len(kinds)}")
        pairs = enumerate(zip(value, kinds, strict=True))
        items = [_convert(item, kind, f"{key}[{place}]", source) for place, (item, kind) in pairs]
        return tuple(items) if origin is tuple else items
    if isinstance(value, str) and isinstance(inner, type):
        return _scalar(value, inner, f"{source}: {key}")
    error = _type_error(value, hint, f"{source}: {key}")
    if origin in (tuple, list) and isinstance(value, str):
        example = '["FIRST", "SECOND"]' if args[0] is str else "[FIRST, SECOND]"
        file_remedy = f", a file {file_field}=FILE" if file_field else ""
        raise UserError(f"{error}; a list is written {key}='{example}'{file_remedy}")
    raise error


def _choice(value: object, choices: Sequence[object], key: str, source: str) -> object:
    for choice in choices:
        if isinstance(value, str) and value == str(choice):
            return choice
    raise UserError(
        f"{source}: {key} is {_show(value)}; it must be one of {', '.join(map(repr, choices))}"
    )


def _scalar(text: str, kind: type[Any], label: str) -> object:
    """A scalar as ``str``, ``Path``, ``bool``, ``int`` or ``float``."""
    if kind in (str, Path) and (not is_null(text) or not isinstance(text, Bare)):
        return Path(text) if kind is Path else str(text)
    if kind is bool and text.lower() in _TRUTHS:
        return _TRUTHS[text.lower()]
    digits = text.strip().replace("_", "")
    if kind is int and INTEGER.fullmatch(digits):
        if len(digits) > INTEGER_DIGITS or not -(2**63) <= int(digits) < 2**63:
            raise UserError(f"{label} is {_show(text)}; it must fit into 64 bits")
        return int(digits)
    if kind is float and digits.lstrip("+-.").lower() in ("nan", "inf", "infinity"):
        raise UserError(f"{label} is {_show(text)}; it must be a finite number")
    if kind is float and len(digits) <= NUMBER_LETTERS and NUMBER.fullmatch(digits):
        if not math.isfinite(number := float(digits)):
            raise UserError(f"{label} is {_show(text)}; it must be a finite number")
        return number
    raise _type_error(text, kind, label)


def _type_error(value: object, hint: object, label: str) -> UserError:
    return UserError(f"{label} is {_show(value)} (expected {_name(hint)})")


def _name(hint: object) -> str:
    """A type as people write it: ``int``, ``list[str]``, ``float | None``."""
    if typing.get_args(hint) or not isinstance(hint, type):
        return re.sub(r"\b\w+\.(?=\w)", "", str(hint))
    return hint.__name__


def _show(value: object) -> str:
    """A value of a YAML tree, shortened for an error line."""
    return _shorten(repr(value))


def _hints(schema: type[Any]) -> Tree:
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema) if field.init}


def _dataclass_of(hint: object) -> type[Any] | None:
    inner = _strip_optional(hint)
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None


def _is_optional(hint: object) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and type(
        None
    ) in typing.get_args(hint)


def _strip_optional(hint: object) -> object:
    if not _is_optional(hint):
        return hint
    alternatives = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return alternatives[0] if len(alternatives) == 1 else hint


# ------------------------------------------------------------------------------------------ helpers


def _parse_override(text: str) -> tuple[str, Tree]:
    """(name for messages, tree) of an argument ``a.b=value``."""
    source = f"override '{_shorten(text)}'"
    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > JSON_DEPTH:
        raise UserError(
            f"{source}: write it as name=value or section.name=value, in quotes where it has spaces"
        )
    value = parse(raw, source) if raw.strip() else ""
    for part in reversed(parts):
        value = {part: value}
    return source, cast("Tree", value)


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else f"{text[: limit - 2]}.."


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _flat(tree: object, prefix: str = "") -> Tree:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix.rstrip("."): tree}
    return {k: v for name, item in tree.items() for k, v in _flat(item, f"{prefix}{name}.").items()}
