"""mkdocs hook: puts every command's help and every config field, read from the code, where a page
says ``<!-- commands -->`` or ``<!-- fields -->``."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

from scd_sf.cli import app
from scd_sf.config import help_of
from scd_sf.evaluation.bench import BenchConfig
from scd_sf.generation.sampling import SampleConfig
from scd_sf.models.scd.transplant import TransplantConfig
from scd_sf.probes.run import ProbeConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("recipes", "data_prep", "vbench_eval")
# The commands of `scd` that take a config.
SCHEMAS: dict[str, type[Any]] = {
    "transplant": TransplantConfig,
    "sample": SampleConfig,
    "probe": ProbeConfig,
    "bench": BenchConfig,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page: the page with its marks replaced."""
    if "<!-- commands -->" in markdown:
        lines = command_help(typer.main.get_command(app), "scd")
        markdown = markdown.replace("<!-- commands -->", "\n".join(lines))
    if "<!-- fields -->" in markdown:
        markdown = markdown.replace("<!-- fields -->", "\n".join(all_fields()))
    return markdown


def command_help(command: Any, name: str) -> Iterator[str]:
    """Title, help text and one row a parameter; then the same for each command of a group."""
    yield from (f"## `{name}`", "", escaped(inspect.cleandoc(command.help or "")), "")
    rows = [row for parameter in command.params if (row := parameter_row(parameter))]
    if command.name in SCHEMAS:
        yield from (
            f"Takes `--config`, `--print-config` and [these fields](config.md#scd-{command.name}).",
            "",
        )
    elif rows:
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
    meaning = escaped(" ".join((getattr(parameter, "help", "") or "").split())).replace("|", "\\|")
    return "" if parameter.name == "help" else f"| {names} | {default} | {meaning} |"


def all_fields() -> Iterator[str]:
    """The fields of every `scd` command with a config, then of every script that has one."""
    for name, schema in SCHEMAS.items():
        yield from (f"## `scd {name}`", "", "```text", help_of(schema), "```", "")
    for folder in FOLDERS:
        for script in sorted((ROOT / folder).glob("*.py")):
            called = re.search(r"from_command_line\((\w+),", script.read_text(encoding="utf-8"))
            if called is not None:
                module = load(script)
                first = (module.__doc__ or "").split("\n\n")[0].replace("\n", " ")
                fields = help_of(vars(module)[called[1]])
                title = f"## `{script.relative_to(ROOT).as_posix()}`"
                yield from (title, "", escaped(first), "", "```text", fields, "```", "")


def load(script: Path) -> ModuleType:
    """The script's names, without running its ``main``."""
    spec = importlib.util.spec_from_file_location(
        f"script_{script.parent.name}_{script.stem}", script
    )
    if spec is None or spec.loader is None:
        raise FileNotFoundError(script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def escaped(text: str) -> str:
    """Text outside code with `<` and `[` as they are written, not as HTML and links."""
    parts = re.split(r"(``.*?``|`[^`]*`)", text, flags=re.DOTALL)
    clean = [
        re.sub(r"([<\[\]_*])", r"\\\1", part) if place % 2 == 0 else part
        for place, part in enumerate(parts)
    ]
    return "".join(clean)
