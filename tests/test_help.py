"""``--help`` and ``--print-config``: every field of every command, in words."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import recipe_runner

from scd_sf import cli
from scd_sf.config import (
    RENAMED,
    commented_yaml,
    field_words,
    from_command_line,
    from_yaml,
    help_of,
)

ROOT = recipe_runner.ROOT
SCRIPTS = [
    path
    for name in ("recipes", "data_prep", "vbench_eval")
    for path in sorted((ROOT / name).glob("*.py"))
]
SOURCES = [
    *SCRIPTS,
    *sorted((ROOT / "scd_sf").rglob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]


@dataclass
class Inner:
    """A section."""

    rate: float = 1e-4
    """How fast."""
    pair: tuple[float, float] = (0.0, 0.5)
    """Two of
    them."""


@dataclass
class Toy:
    """A schema with one field of every kind."""

    root: str
    """Where it lies."""
    kind: Literal["off", "on"] = "on"
    """``on``: it runs."""
    inner: Inner = field(default_factory=lambda: Inner(rate=0.5))
    """What is inside."""
    other: Inner | None = None
    """Null: none."""
    rows: list[Inner] = field(default_factory=list)
    """Any number."""
    names: tuple[str, ...] = ("a", "off")
    """Names."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights by name."""
    steps: int | None = 3
    """A long sentence that does not fit into one line of forty columns."""
    fast: bool = False
    out: Path = Path("runs")
    """A folder."""


@dataclass
class Derived(Inner):
    """A config that has one field more, as CONTRIBUTING says."""

    rate: float = 1e-3
    """Faster."""
    more: int = 1
    """One more."""


TOY_HELP = """\
root  text; mandatory
      Where it lies.
kind  one of off, on; default 'on'
      on: it runs.
inner  section
      What is inside.
inner.rate  number; default 0.5
      How fast.
inner.pair  [number, number]; default
          [0.0, 0.5]
      Two of them.
other  section or null; default null
      Null: none.
other.rate  number; default 0.0001
      How fast.
other.pair  [number, number]; default
          [0.0, 0.5]
      Two of them.
rows  list of section; default []
      Any number.
rows[].rate  number; default 0.0001
      How fast.
rows[].pair  [number, number]; default
          [0.0, 0.5]
      Two of them.
names  list of text; default [a, 'off']
      Names.
weights  name: number pairs; default {}
      Weights by name.
steps  whole number or null; default 3
      A long sentence that does not fit
      into one line of forty columns.
fast  true or false; default false
out  path; default runs
      A folder.
"""

TOY_YAML = """\
# Where it lies.
root: '1'
# on: it runs.
kind: 'off'
# What is inside.
inner:
  # How fast.
  rate: 0.5
  # Two of them.
  pair: [0.0, 0.5]
# Null: none.
other:
  # How fast.
  rate: 0.0001
  # Two of them.
  pair: [0.0, 0.5]
# Any number.
rows:
- rate: 2.0
  pair: [0.0, 0.5]
# Names.
names: []
# Weights by name.
weights:
  a: 1.0
# A long sentence that does not fit into one line of forty columns.
steps: null
fast: false
# A folder.
out: runs
"""


def test_a_schema_of_every_kind_of_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert field_words(Inner) == {"rate": "How fast.", "pair": "Two of them."}
    assert field_words(Derived) == {"rate": "Faster.", "pair": "Two of them.", "more": "One more."}
    assert help_of(Toy, 40) == TOY_HELP
    cfg = Toy(
        "1", "off", other=Inner(), rows=[Inner(2.0)], names=(), weights={"a": 1.0}, steps=None
    )
    assert commented_yaml(cfg) == TOY_YAML
    assert from_yaml(Toy, TOY_YAML) == cfg
    arguments = [
        "root='1'",
        "kind=off",
        "other={}",
        "rows=[{rate: 2}]",
        "names=[]",
        "weights.a=1",
        "steps=null",
    ]
    with pytest.raises(SystemExit) as stop:
        from_command_line(Toy, "", [*arguments, "--print-config"])
    assert (stop.value.code, capsys.readouterr().out) == (0, TOY_YAML)
    with pytest.raises(SystemExit) as stop:
        from_command_line(Toy, "What it does.", ["--help"], "scd toy")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith("usage: scd toy") and "What it does." in out
    assert from_command_line(Toy, "", arguments) == cfg


def test_a_file_over_another_says_what_it_replaces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("root: x\nsteps: 1\ninner: {rate: 0.1, pair: [0, 1]}\n")
    second.write_text("fast: true\ninner: {rate: 0.2, pair: [0, 1]}\n")
    cfg = from_command_line(Toy, "", ["--config", str(first), "--config", str(second)])
    assert (cfg.inner.rate, cfg.steps, cfg.fast) == (0.2, 1, True)
    assert capsys.readouterr().err == f"{second}: replaces inner.rate of the files before it\n"


def schemas() -> Iterator[tuple[str, type[Any]]]:
    """(where, schema) of every command that is configured by ``a.b=value``."""
    for path in [*SCRIPTS, ROOT / "scd_sf" / "cli.py"]:
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = [
            call.args[0].id
            for call in calls
            if isinstance(call.func, ast.Name)
            and call.func.id in ("from_command_line", "_config_of")
            and isinstance(call.args[0], ast.Name)
        ]
        imports = {
            alias.name: node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        for name in names:
            if name == "schema":
                continue
            in_script = name not in imports
            module = (
                recipe_runner.load_script(str(path))
                if in_script
                else importlib.import_module(imports[name])
            )
            yield f"{path.name} {name}", vars(module)[name]


SCHEMAS = dict(schemas())


def reached(schema: object) -> Iterator[type[Any]]:
    """The dataclasses in a type: itself, its fields', those in lists and unions."""
    if isinstance(schema, type) and dataclasses.is_dataclass(schema):
        yield schema
        for hint in typing.get_type_hints(schema).values():
            yield from reached(hint)
    for part in typing.get_args(schema):
        yield from reached(part)


def test_every_field_of_every_command_has_words() -> None:
    assert len(SCHEMAS) >= 20, "the commands with a config were not found"
    for where, schema in SCHEMAS.items():
        for section in set(reached(schema)):
            silent = {item.name for item in dataclasses.fields(section) if item.init} - field_words(
                section
            ).keys()
            assert not silent, (
                f"{where}: {section.__name__} has fields without a docstring line: {sorted(silent)}"
            )
        assert max(map(len, help_of(schema, 80).splitlines())) <= 80


def test_renamed_fields_are_there() -> None:
    """Every entry of the table of old names is of a schema, and names a field of it."""
    sections = {
        section.__name__: section for schema in SCHEMAS.values() for section in reached(schema)
    }
    for section, entries in RENAMED.items():
        names = {item.name for item in dataclasses.fields(sections[section])}
        assert {entry.name for entry in entries.values()} <= names, section


def test_every_field_of_every_config_has_words() -> None:
    """Those that no command reads, too, such as a checkpoint's."""
    found = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                not isinstance(node, ast.ClassDef)
                or not node.name.endswith("Config")
                or not node.decorator_list
            ):
                continue
            found += 1
            for item, below in zip(node.body, [*node.body[1:], None], strict=True):
                has_words = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                if isinstance(item, ast.AnnAssign) and not has_words:
                    pytest.fail(
                        f"{path}:{item.lineno}: {node.name}.{ast.unparse(item.target)} has no docstring line"
                    )
    assert found > 50


def test_scripts_with_options_print_their_docstrings() -> None:
    """Layouts and commands are there, line by line."""
    for script in SCRIPTS:
        text = script.read_text()
        if "typer.Typer(" in text and " as main\n" not in text:
            assert "app.command(help=paragraphs(__doc__))(main)" in text, script
    shown = recipe_runner.succeed("data_prep/teco_minecraft.py", "--help").out
    assert "ROOT/train/ANY/NAME.mp4" in shown and "takes the two as" in shown
    lines = [line.strip() for line in shown.splitlines()]
    assert "--out data/mc/train" in lines
    own = recipe_runner.succeed("data_prep/encode_latents.py", "--help").out
    assert "OUT/train and OUT/val, one file per clip" in " ".join(own.split())


def test_every_option_has_words() -> None:
    """Of argparse and typer."""
    found = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("add_argument", "Option", "Argument")
            ):
                found += 1
                if "help" not in [keyword.arg for keyword in node.keywords]:
                    pytest.fail(f"{path}:{node.lineno}: {ast.unparse(node)[:60]} has no help")
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "argparse.ArgumentParser"
                and path.name not in ("config.py", "gpu.py")  # which show the defaults themselves
            ):
                assert "formatter_class=HelpFormatter" in ast.unparse(node), (
                    f"{path} does not show its defaults"
                )
    assert found > 100


@pytest.mark.parametrize(
    ("command", "schema"),
    [
        ("transplant", "TransplantConfig"),
        ("sample", "SampleConfig"),
        ("probe", "ProbeConfig"),
        ("bench", "BenchConfig"),
    ],
)
def test_commands_of_scd_show_their_fields(
    command: str, schema: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--help", "-h"):
        monkeypatch.setattr(sys, "argv", ["scd", command, option])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr().out
        assert stop.value.code == 0 and out.startswith(f"usage: scd {command}")
        for name in field_words(SCHEMAS[f"cli.py {schema}"]):
            assert f"\n{name}  " in out
    monkeypatch.setattr(sys, "argv", ["scd", command, "nothing=1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "unknown key 'nothing'" in capsys.readouterr().err
