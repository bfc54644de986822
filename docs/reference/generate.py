"""mkdocs hook: puts every command's help and every config field, read from the code, where a page says
``<!-- commands -->`` or ``<!-- fields -->``."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("recipes", "data_prep", "vbench_eval")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page: the page with its marks replaced."""
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", "\n".join(commands()))
    if "<!-- fields -->" in markdown:
        markdown = markdown.replace("<!-- fields -->", "\n".join(all_fields()))
    return markdown


def commands() -> Iterator[str]:
    """The help of `scd` and of each command below it, as Markdown lines."""
    from scd_sf.cli import app

    yield from command_help(typer.main.get_command(app), "scd")


def command_help(command: Any, name: str) -> Iterator[str]:
    """Title, help text and one row a parameter; then the same for each command of a group."""
    yield from (f"## `{name}`", "", escaped(inspect.cleandoc(command.help or "")), "")
    rows = [row for parameter in command.params if (row := parameter_row(parameter))]
    if rows:
        yield from ("| parameter | default | meaning |", "|---|---|---|", *rows, "")
    # typer carries a click of its own: no isinstance with the installed one
    for child in getattr(command, "commands", {}).values():
        yield from command_help(child, f"{name} {child.name}")


def parameter_row(parameter: Any) -> str:
    """`| name | default | meaning |`; empty for click's own --help."""
    flags = [option for option in parameter.opts if option.startswith("-")]
    names = ", ".join(f"`{flag}`" for flag in flags) or f"`{parameter.name.upper()}`"
    default = "required" if parameter.required else f"`{parameter.default}`"
    default = "" if parameter.default in ("", False) else default
    meaning = getattr(parameter, "help", "") or ""
    return "" if parameter.name == "help" else f"| {names} | {default} | {cell(meaning)} |"


def all_fields() -> Iterator[str]:
    """Every script that reads its config with ``from_command_line``, with the fields of its schema."""
    for folder in FOLDERS:
        for script in sorted((ROOT / folder).glob("*.py")):
            called = re.search(r"from_command_line\((\w+),", script.read_text(encoding="utf-8"))
            if called is not None:
                yield from script_fields(script, called[1])


def script_fields(script: Path, schema_name: str) -> Iterator[str]:
    """A script's title, the first paragraph of its docstring, and its schema's sections."""
    module = load(script)
    first = (module.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    yield from (f"## `{script.relative_to(ROOT).as_posix()}`", "", escaped(first), "")
    yield from section(vars(module)[schema_name], "")


def load(script: Path) -> ModuleType:
    """The script's names, without running its ``main``."""
    spec = importlib.util.spec_from_file_location(f"script_{script.parent.name}_{script.stem}", script)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def section(schema: type[Any], prefix: str) -> Iterator[str]:
    """One table for the plain fields of a dataclass, then one for each section in it."""
    hints, meanings = typing.get_type_hints(schema), field_docstrings(schema)
    nested: list[tuple[str, type[Any]]] = []
    rows = []
    for field in dataclasses.fields(schema):
        if not field.init:
            continue
        inner = dataclass_in(hints[field.name])
        if inner is not None:
            nested.append((f"{prefix}{field.name}.", inner))
        meaning = meanings.get(field.name, "") or (f"section, see `{prefix}{field.name}`" if inner else "")
        default = "section" if inner and "None" not in str(hints[field.name]) else default_of(field)
        rows.append(f"| `{prefix}{field.name}` | {type_name(hints[field.name])} | {default} | {cell(meaning)} |")
    title = f"**`{prefix.rstrip('.')}`**: " if prefix else ""
    yield from (title + escaped(" ".join(inspect.getdoc(schema).split())) if inspect.getdoc(schema) else title, "")
    yield from ("| field | type | default | meaning |", "|---|---|---|---|", *rows, "")
    for name, inner in nested:
        yield from section(inner, name)


def field_docstrings(schema: type[Any]) -> dict[str, str]:
    """Field -> the string that follows it in the class's source."""
    meanings: dict[str, str] = {}
    for base in reversed([cls for cls in schema.__mro__ if dataclasses.is_dataclass(cls)]):
        node = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        body = node.body if isinstance(node, ast.ClassDef) else []
        for one, after in pairwise(body):
            named = isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
            if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                meanings[one.target.id] = " ".join(str(after.value.value).split())
    return meanings


def dataclass_in(hint: object) -> type[Any] | None:
    """The dataclass of a section, or of an optional one; None for a plain field."""
    for kind in (hint, *typing.get_args(hint)):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and typing.get_origin(hint) not in (list, tuple):
            return kind
    return None


def default_of(field: dataclasses.Field[Any]) -> str:
    """A field's default as YAML would have it; "required" where there is none."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return f"`{value}`" if isinstance(value, (list, dict, tuple)) else "section"
    if field.default is dataclasses.MISSING:
        return "required"
    return f"`{field.default!r}`".replace("|", "\\|")


def type_name(hint: object) -> str:
    """`int`, `list[str]`, `float | None`, without modules."""
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return "`" + re.sub(r"\b\w+\.(?=\w)", "", text).replace("|", "\\|") + "`"


def cell(text: str) -> str:
    """Text for a table's cell: one line, no column signs."""
    return escaped(" ".join(text.split())).replace("|", "\\|")


def escaped(text: str) -> str:
    """Text outside code with `<` and `[` as they are written, not as HTML and links."""
    parts = re.split(r"(``.*?``|`[^`]*`)", text, flags=re.DOTALL)
    clean = [re.sub(r"([<\[\]_*])", r"\\\1", part) if place % 2 == 0 else part for place, part in enumerate(parts)]
    return "".join(clean)
