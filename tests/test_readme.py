"""README.md: commands that their programs take, snippets that define what they use, no output that is named twice."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import click
import pytest
import recipe_runner
import typer

from scd_sf.cli import app
from scd_sf.config import load_config
from scd_sf.evaluation.bench import BenchConfig
from scd_sf.generation.sampling import SampleConfig
from scd_sf.models.scd.transplant import TransplantConfig
from scd_sf.probes.run import ProbeConfig

ROOT = recipe_runner.ROOT
TEXT = (ROOT / "README.md").read_text()
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SCD: dict[str, type[Any]] = {
    "sample": SampleConfig,
    "bench": BenchConfig,
    "probe": ProbeConfig,
    "transplant": TransplantConfig,
}
LAUNCHERS = ("python", "deepspeed", "torchrun")


def commands() -> list[list[str]]:
    """Words of every command in the code blocks and the tables: joined lines, without comments."""
    lines = [line for kind, text in FENCED if not kind for line in text.replace("\\\n", " ").splitlines()]
    lines += [line for line in re.findall(r"`([^`\n]+)`", TEXT) if line.startswith((*LAUNCHERS, "scd "))]
    return [words for line in lines if "..." not in line and (words := shlex.split(line, comments=True))]


def overrides_of(words: list[str]) -> tuple[list[Path], list[str]]:
    """Configuration files, which must exist, and ``a.b=value`` words."""
    files = [ROOT / words[i + 1] for i, word in enumerate(words) if word == "--config"]
    assert all(file.is_file() for file in files), files
    return files, [word for word in words if re.match(r"[a-z_0-9.]+=", word)]


def schema_of(script: str) -> type[Any] | None:
    """What the script hands to ``from_command_line``; None for one with an argument parser of its own."""
    found = re.search(r"from_command_line\((\w+),", (ROOT / script).read_text())
    return None if found is None else vars(recipe_runner.load_script(script))[found[1]]


def check_fields(schema: type[Any], words: list[str], where: str) -> None:
    """Every override names a field and has its type; what is mandatory is there."""
    files, overrides = overrides_of(words)
    try:
        load_config(schema, files, overrides)
    except ValueError as error:
        pytest.fail(f"{where}: {error}")


def test_commands_are_ones_that_their_programs_take() -> None:
    checked = Counter[str]()
    root = typer.main.get_command(app)
    for words in commands():
        line = " ".join(words)
        if words[0] in LAUNCHERS:
            script = next((word for word in words if word.endswith(".py")), None)
            if script is None:
                continue
            assert (ROOT / script).is_file(), line
            schema = schema_of(script)
            if schema is not None and "--help" not in words:
                check_fields(schema, words, line)
                checked["script"] += 1
        elif words[0] == "scd":
            command, rest = root, words[1:]
            while isinstance(command, click.Group):
                assert rest and rest[0] in command.commands, line
                command, rest = command.commands[rest[0]], rest[1:]
            if not rest:
                continue
            command.make_context("scd", list(rest))
            if words[1] in SCD and "checkpoint" in line:
                check_fields(SCD[words[1]], words, line)
            checked["scd"] += 1
    assert checked["script"] >= 4 and checked["scd"] >= 12, checked


def test_no_two_commands_write_to_one_place() -> None:
    """Nor into each other's folder."""
    places = []
    for words in commands():
        places += [word.split("=", 1)[1] for word in words if word.startswith(("out=", "run.dir="))]
        places += [words[i + 1] for i, word in enumerate(words) if word in ("--out", "--sheet")]
        places += words[3:4] if words[:2] == ["scd", "export"] else []
    assert len(places) >= 15
    assert [place for place, count in Counter(places).items() if count > 1] == []
    nested = {(a, b) for a in places for b in places if a != b and Path(b).is_relative_to(a)}
    assert nested == {("runs/scd", "runs/scd/score")}, nested  # a run keeps its own scores


def test_snippets_import_what_exists_and_define_what_they_use() -> None:
    snippets = [text for kind, text in FENCED if kind == "python"]
    assert snippets
    for text in snippets:
        tree = ast.parse(text)
        known = set(vars(builtins))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
                    known.add(alias.asname or alias.name.split(".")[0])
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
                known |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert used <= known, f"undefined in the snippet: {used - known}"


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []
