"""Typed configuration: a dataclass is the schema, a YAML file and ``a.b=value`` arguments only override its defaults.

    cfg = load_config(MyConfig, Path("recipes/configs/tiny.yaml"), ["train.lr=1e-4", "data.root=data/toy"])

The schema is an ordinary (nested) dataclass with defaults; a field without a default is mandatory. Each dataclass may
check itself in ``__post_init__`` with ``ValueError``. Everything wrong comes out as one :class:`UserError` line that
names the file or the argument, the key, and the nearest valid key. This is the only module that imports omegaconf.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scd_sf.types import UserError

T = TypeVar("T")


def load_config(schema: type[T], path: Path | Sequence[Path] | None, overrides: Sequence[str] = ()) -> T:
    """Defaults of ``schema``, then the YAML file at ``path`` (or several in turn), then ``a.b=value`` overrides: an
    instance of ``schema``.

    Raises UserError: unreadable file, unknown key (with the nearest valid one), wrong type, missing mandatory field,
    or a ``ValueError`` of any section's ``__post_init__``.
    """
    paths = [] if path is None else [path] if isinstance(path, Path) else path
    layers = [(str(file), _read_yaml(file)) for file in paths]
    layers += [(f"override '{text}'", _parse_override(text)) for text in overrides]
    return _build(schema, layers)


def from_command_line(schema: type[T], description: str, argv: Sequence[str] | None = None) -> T:
    """``recipe.py [--config file.yaml ..] [a.b=value ..]`` -> an instance of ``schema``; later files win over earlier.

    ``--local_rank`` is accepted because the deepspeed launcher adds it; ranks are read from the environment.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        help="YAML file that overrides the recipe's defaults; may be given again, the later one wins",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="overrides of single fields")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    return load_config(schema, args.config, args.overrides)


def from_yaml(schema: type[T], source: Path | str) -> T:
    """The inverse of :func:`to_yaml`. A ``Path`` is read as a file, a ``str`` is YAML text."""
    if isinstance(source, Path):
        return load_config(schema, source)
    return _build(schema, [("yaml text", _parse_yaml(source, "yaml text"))])


def to_yaml(cfg: object) -> str:
    """Every field of a config dataclass instance, defaults included, as YAML that :func:`from_yaml` reads back."""
    if not dataclasses.is_dataclass(cfg) or isinstance(cfg, type):
        raise TypeError(f"to_yaml wants a dataclass instance, got {type(cfg).__name__}")
    return str(yaml.safe_dump(_plain(cfg), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True))


def differences(left: object, right: object) -> dict[str, tuple[object, object]]:
    """Dotted key -> (left value, right value) wherever two config instances, or their plain trees, disagree."""
    a, b = _flat(_plain(left)), _flat(_plain(right))
    absent = "<absent>"
    keys = list(dict.fromkeys([*a, *b]))
    return {key: (a.get(key, absent), b.get(key, absent)) for key in keys if a.get(key, absent) != b.get(key, absent)}


def plain_yaml(path: Path) -> dict[str, object]:
    """The raw tree of a YAML file, for code that compares configs without knowing their schema."""
    return _read_yaml(path)


# -------------------------------------------------------------------------------------------------------------- layers


def _build(schema: type[T], layers: Sequence[tuple[str, dict[str, object]]]) -> T:
    """Check each layer against the schema, merge with type conversion, then build the dataclasses bottom-up."""
    for source, tree in layers:
        _check_keys(schema, tree, source, ())
    try:
        merged: DictConfig = OmegaConf.structured(_schema_without_checks(schema))
    except OmegaConfBaseException as error:
        raise TypeError(f"{schema.__name__} is not a usable config schema: {_first_line(error)}") from error
    for source, tree in layers:
        try:
            merged = cast("DictConfig", OmegaConf.merge(merged, OmegaConf.create(tree)))
        except OmegaConfBaseException as error:
            key = error.full_key or "(top level)"
            raise UserError(f"{source}: {key}: {_first_line(error)}{_type_hint(schema, key)}") from error
    try:
        container = cast("dict[str, object]", OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{_sources(layers)}: {error.full_key}: {_first_line(error)}") from error
    _check_missing(merged, [source for source, _ in layers])
    return _instantiate(schema, container, "", _sources(layers))


def _instantiate(schema: type[T], values: Mapping[str, object], prefix: str, source: str) -> T:
    """A dataclass from a plain tree; a ValueError of ``__post_init__`` becomes a UserError naming the section."""
    hints = _hints(schema)
    built = {name: _coerce(hints[name], value, f"{prefix}{name}", source) for name, value in values.items()}
    try:
        return schema(**built)
    except ValueError as error:
        section = prefix.rstrip(".") or schema.__name__
        raise UserError(f"{source}: section '{section}': {error}") from error


def _coerce(hint: object, value: object, key: str, source: str) -> object:
    """What omegaconf gives back as plain containers becomes what the annotation says: dataclass, tuple, Literal."""
    nested = _dataclass_of(hint)
    if nested is not None and isinstance(value, Mapping):
        return _instantiate(nested, cast("Mapping[str, object]", value), f"{key}.", source)
    inner = _strip_optional(hint)
    origin, args = typing.get_origin(inner), typing.get_args(inner)
    if origin is Literal and value is not None:
        if value not in args:
            raise UserError(f"{source}: {key} is {value!r}; it must be one of {', '.join(map(repr, args))}")
        return value
    if origin in (tuple, list) and isinstance(value, list):
        item = args[0] if args else object
        if origin is tuple and args and args[-1] is not Ellipsis:
            if len(value) != len(args):
                raise UserError(f"{source}: {key} has {len(value)} values; it must have {len(args)}")
            return tuple(_coerce(a, v, f"{key}[{i}]", source) for i, (a, v) in enumerate(zip(args, value, strict=True)))
        items = [_coerce(item, v, f"{key}[{i}]", source) for i, v in enumerate(value)]
        return tuple(items) if origin is tuple else items
    return value


def _check_keys(schema: type[Any], tree: Mapping[str, object], source: str, prefix: tuple[str, ...]) -> None:
    hints = _hints(schema)
    for key, value in tree.items():
        path = ".".join((*prefix, str(key)))
        if key not in hints:
            raise UserError(f"{source}: unknown key '{path}'{_did_you_mean(str(key), schema, prefix)}")
        nested = _dataclass_of(hints[key])
        if nested is not None and isinstance(value, Mapping):
            _check_keys(nested, cast("Mapping[str, object]", value), source, (*prefix, str(key)))
        elif nested is not None and not (value is None and _is_optional(hints[key])):
            raise UserError(f"{source}: '{path}' is a section ({', '.join(_hints(nested))}), not the value {value!r}")


def _did_you_mean(key: str, schema: type[Any], prefix: tuple[str, ...]) -> str:
    names = list(_hints(schema))
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    where = f" in section '{'.'.join(prefix)}'" if prefix else ""
    if close:
        return f"{where}; did you mean '{'.'.join((*prefix, close[0]))}'?"
    return f"{where}; valid keys are {', '.join(names)}"


def _check_missing(merged: DictConfig, sources: Sequence[str]) -> None:
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        where = ", ".join(sources) or "no config file given"
        raise UserError(f"{where}: missing mandatory {', '.join(missing)}; set it in the file or as {missing[0]}=VALUE")


# -------------------------------------------------------------------------------------------------------------- schema


_TWINS: dict[type[Any], type[Any]] = {}


def _schema_without_checks(schema: type[Any]) -> type[Any]:
    """A twin dataclass for omegaconf: same fields, no ``__post_init__``, Literal -> its value type, no nested defaults.

    omegaconf builds dataclass instances while reading a schema, which would run checks on half-merged values.
    """
    if schema in _TWINS:
        return _TWINS[schema]
    hints = _hints(schema)
    fields = []
    for field in dataclasses.fields(schema):
        if field.init:
            fields.append((field.name, _plain_hint(hints[field.name]), _plain_default(field, hints[field.name])))
    _TWINS[schema] = dataclasses.make_dataclass(schema.__name__, cast("list[tuple[str, type, object]]", fields))
    return _TWINS[schema]


def _plain_default(field: dataclasses.Field[Any], hint: object) -> object:
    """The ``dataclasses.field`` of the twin; a section is never mandatory itself, only fields inside it may be."""
    nested = _dataclass_of(hint)
    if field.default is not dataclasses.MISSING:
        value: object = field.default
    elif nested is not None and (cast("object", field.default_factory) is nested or _is_mandatory(field)):
        return dataclasses.field(default_factory=_schema_without_checks(nested))
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = MISSING
    plain = _twin_value(value)
    return dataclasses.field(default_factory=lambda: plain)


def _is_mandatory(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _twin_value(value: object) -> object:
    """A default value as omegaconf wants it: sections as their check-free twins, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        twin = _schema_without_checks(type(value))
        return twin(**{f.name: _twin_value(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init})
    if isinstance(value, (tuple, list)):
        return [_twin_value(item) for item in value]
    return value


def _plain_hint(hint: object) -> object:
    """The annotation omegaconf understands: nested twin, Literal -> type of its values, tuple -> list."""
    nested = _dataclass_of(hint)
    inner = _strip_optional(hint)
    if nested is not None:
        plain: Any = _schema_without_checks(nested)
    elif typing.get_origin(inner) is Literal:
        plain = type(typing.get_args(inner)[0])
    elif typing.get_origin(inner) in (tuple, list):
        args = typing.get_args(inner)
        plain = list[_plain_hint(args[0])] if args else list[Any]  # type: ignore[misc]
    else:
        plain = inner
    return plain | None if _is_optional(hint) else plain


def _hints(schema: type[Any]) -> dict[str, object]:
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema) if field.init}


def _dataclass_of(hint: object) -> type[Any] | None:
    inner = _strip_optional(hint)
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None


def _is_optional(hint: object) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)


def _strip_optional(hint: object) -> object:
    if not _is_optional(hint):
        return hint
    rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return rest[0] if len(rest) == 1 else hint


# ---------------------------------------------------------------------------------------------------------------- yaml


def _read_yaml(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the config file ({error}); check the path") from error
    return _parse_yaml(text, str(path))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """SafeLoader that reads ``1e-4`` as a float, as people write it, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[typing.Hashable, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return cast("dict[typing.Hashable, object]", super().construct_mapping(node, deep=deep))


_FLOAT = r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?)$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


def _parse_yaml(text: str, source: str) -> dict[str, object]:
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{source}: expected 'key: value' lines, found {type(tree).__name__}")
    return {str(key): value for key, value in tree.items()}


def _parse_override(text: str) -> dict[str, object]:
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        raise UserError(f"override '{text}': write it as section.key=value")
    try:
        value: object = yaml.load(raw, Loader=_Loader) if raw.strip() else ""
    except yaml.YAMLError as error:
        raise UserError(f"override '{text}': the value is not valid YAML: {' '.join(str(error).split())}") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return cast("dict[str, object]", value)


# ------------------------------------------------------------------------------------------------------------- helpers


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix.rstrip("."): tree}
    return {k: v for name, item in tree.items() for k, v in _flat(item, f"{prefix}{name}.").items()}


def _sources(layers: Sequence[tuple[str, object]]) -> str:
    return ", ".join(source for source, _ in layers) or "config defaults"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _type_hint(schema: type[Any], key: str) -> str:
    """' (expected int)' for a dotted key, where the schema knows it."""
    current: type[Any] | None = schema
    hint: object = None
    for part in key.split("."):
        if current is None or part not in _hints(current):
            return ""
        hint = _hints(current)[part]
        current = _dataclass_of(hint)
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    return f" (expected {name})"
