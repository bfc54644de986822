"""The pages: every path, make target, command, option, field and extra that they name exists;
README's snippets run."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import importlib
import re
import shlex
import tomllib
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recipe_runner
import typer
import yaml

from scd_sf import __version__
from scd_sf.cli import app
from scd_sf.config import load_config

ROOT = recipe_runner.ROOT
HISTORY = ("docs/log.md", "CHANGELOG.md")  # what was true then
WRITTEN = ("docs/results/gpu.json",)  # by a command, not by us
# their commands are complete: values are checked too
WHOLE = ("README.md", "docs/tutorials/")  # all commands of a page are run in one folder
COMPLETE = ("README.md", "CONTRIBUTING.md", "docs/tutorials/", "docs/how_to/")
TREES = ("scd_sf", "recipes", "tests", "docs", "data_prep", "vbench_eval", "benchmarks", "assets")
SCD: dict[str, type[Any]] = recipe_runner.load_script("docs/reference/generate.py").SCHEMAS
LAUNCHERS = ("python", "deepspeed", "torchrun")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages() -> list[str]:
    files = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
    files += (ROOT / "assets").rglob("*.md")
    return sorted(
        name for file in files if (name := file.relative_to(ROOT).as_posix()) not in HISTORY
    )


@functools.cache
def own_files() -> frozenset[str]:
    """Every file of ours, from the repository's root."""
    found = [file for tree in TREES for file in (ROOT / tree).rglob("*") if file.is_file()]
    return frozenset(
        file.relative_to(ROOT).as_posix() for file in found if "__pycache__" not in file.parts
    )


@functools.cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@functools.cache
def extras() -> frozenset[str]:
    return frozenset(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    )


@functools.cache
def schema_of(script: str) -> type[Any] | None:
    """What the script hands to ``from_command_line``; None for one with an argument parser of its
    own."""
    handed = re.search(r"from_command_line\((\w+),", (ROOT / script).read_text())
    return None if handed is None else vars(recipe_runner.load_script(script))[handed[1]]


@functools.cache
def options_of(script: str) -> frozenset[str]:
    """What its argparse parser names, or the parameters of its ``main`` (typer), which may be a
    function of another module."""
    source, name = (ROOT / script).read_text(), "main"
    if other := re.search(r"^from ([\w.]+) import (\w+) as main$", source, re.MULTILINE):
        source, name = (ROOT / f"{other[1].replace('.', '/')}.py").read_text(), other[2]
    mains = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    parameters = [
        arg.arg.replace("_", "-")
        for node in mains
        for arg in (*node.args.args, *node.args.kwonlyargs)
    ]
    return frozenset(
        [*re.findall(r'"(--[\w-]+)"', source), *(f"--{name}" for name in parameters), "--help"]
    )


def spans(text: str) -> list[str]:
    """What stands in single backticks, outside of code blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def lines_of_code(text: str) -> list[str]:
    """Lines of the code blocks without a language or of bash, continued ones joined."""
    blocks = [block for kind, block in FENCE.findall(text) if kind in ("", "bash")]
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands(text: str) -> Iterator[list[str]]:
    """Words of every command of ours in code blocks and backticks."""
    for line in [*lines_of_code(text), *spans(text)]:
        if line.partition(" ")[0] in (*LAUNCHERS, "scd", "make") and line.count("'") % 2 == 0:
            yield shlex.split(line, comments=True)


# ------------------------------------------------------------------------------------ what is wrong


def wrong_paths(text: str) -> Iterator[str]:
    """A path into our trees, from the root or from scd_sf/, that is not there and that no command
    of the page makes; a .py, .yaml or .md of no folder."""
    words = re.findall(r"[\w./-]+", "\n".join(lines_of_code(text)))
    made = {str(place) for word in words for place in (Path(word), *Path(word).parents)}
    below = {file.split("/")[1] for file in own_files() if file.startswith("scd_sf/")}
    names = {file.rsplit("/", 1)[-1] for file in own_files()} | {
        file.name for file in ROOT.iterdir()
    }
    for span in spans(text):
        for word in re.findall(r"[\w./*-]+", span.split("::")[0]):
            first, slash, rest = word.partition("/")
            path = word.rstrip("./")
            if path in made:
                continue
            if (
                slash
                and rest
                and first in (*TREES, *below)
                and ".." not in word
                and "=" not in span
            ):
                if not (path in WRITTEN or place_exists(path) or place_exists(f"scd_sf/{path}")):
                    yield f"`{span}`: no {word}"
            elif (
                word == span
                and re.fullmatch(r"[\w.-]+\.(py|yaml|sbatch|md)", word)
                and word not in names
            ):
                yield f"`{span}`: no file of this name"


def place_exists(place: str) -> bool:
    return bool(list(ROOT.glob(place))) if "*" in place else (ROOT / place).exists()


def wrong_make(words: list[str]) -> Iterator[str]:
    targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
    yield from (
        f"make has no target {target}" for target in targets if target not in make_targets()
    )
    tests = [word[2:] for word in words if word.startswith("T=")]
    yield from (f"{test} is no test" for test in tests if not (ROOT / test.split("::")[0]).exists())


def wrong_scd(words: list[str], complete: bool) -> Iterator[str]:
    """A command that `scd` does not have, an option that it does not take, a field that its config
    does not have."""
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while children := getattr(command, "commands", None):
        if not rest or not re.fullmatch(r"[a-z][a-z-]*", rest[0]):
            return
        if rest[0] not in children:
            yield f"{' '.join(words)}: scd has no command {rest[0]}"
            return
        command, rest = children[rest[0]], rest[1:]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    known |= {"--config", "--print-config"} if command.name in SCD else set()
    yield from (
        f"{' '.join(words)}: no option {word}"
        for word in rest
        if word[:2] == "--" and word not in known
    )
    if complete and rest and not {"...", "--help"} & set(rest):
        command.make_context("scd", list(rest))
    if words[1] in SCD:
        yield from wrong_fields(SCD[words[1]], words, complete and "checkpoint" in " ".join(words))


def wrong_script(words: list[str], complete: bool) -> Iterator[str]:
    """A script that is not there, an option that its parser does not have, a field that its config
    does not have."""
    script = next((word for word in words if word.endswith(".py")), None)
    if script is None:
        return
    if not (ROOT / script).is_file():
        if "/" in script:
            yield f"no script {script}"
        return
    schema = schema_of(script)
    if schema is None:
        options = {
            word.split("=")[0] for word in words[words.index(script) :] if word.startswith("--")
        }
        yield from (f"{script}: no option {option}" for option in options - options_of(script))
    elif "--help" not in words:
        yield from wrong_fields(schema, words[words.index(script) :], complete)


def wrong_fields(schema: type[Any], words: list[str], complete: bool) -> Iterator[str]:
    """Every ``a.b=value`` names a field; a complete command has values of the right types and all
    that is required."""
    files = [ROOT / words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config"]
    yield from (
        f"no file {file.name}" for file in files if not file.is_file() and ".." not in file.name
    )
    overrides = [word for word in words if re.match(r"[a-z_0-9.]+=", word)]
    for override in overrides:
        if not is_field(schema, override.split("=")[0].split(".")):
            yield f"{schema.__name__} has no field {override.split('=')[0]}"
    if complete and not any(word.endswith("..") for word in words):
        try:
            load_config(schema, files, overrides)
        except ValueError as error:
            yield f"{' '.join(words)}: {error}"


def is_field(schema: type[Any], names: list[str]) -> bool:
    """Whether the dotted name leads to a field, through sections, dicts and lists."""
    hints = typing.get_type_hints(schema)
    if names[0] not in {field.name for field in dataclasses.fields(schema)}:
        return False
    if len(names) == 1:
        return True
    inner = [
        kind
        for kind in (hints[names[0]], *typing.get_args(hints[names[0]]))
        if dataclasses.is_dataclass(kind)
    ]
    return any(is_field(typing.cast("type[Any]", kind), names[1:]) for kind in inner)


def wrong_extras(text: str) -> Iterator[str]:
    named = re.findall(r"extras? `(\w+)`", text) + re.findall(r"\.\[([\w,]+)\]", text)
    for line in re.findall(r"^Extras: .*$", text, re.MULTILINE):
        named += re.findall(r"`(\w+)` ?(?:\(|,|\.)", line)
    yield from (
        f"no extra {one}" for names in named for one in names.split(",") if one not in extras()
    )


def problems(text: str, page: str = "docs/a.md") -> list[str]:
    wrong = [*wrong_paths(text), *wrong_extras(text)]
    for words in commands(text):
        complete = (
            page.startswith(COMPLETE)
            and "..." not in words
            and not any(word.isupper() for word in words)
        )
        if words[0] == "make":
            wrong += wrong_make(words)
        elif words[0] == "scd":
            wrong += wrong_scd(words, complete)
        else:
            wrong += wrong_script(words, complete)
    return wrong


# ---------------------------------------------------------------------------------------- they hold


def test_what_the_pages_name_exists() -> None:
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in pages()}
    count = sum(1 for text in texts.values() for _ in commands(text))
    assert len(texts) >= 50 and count >= 300, "the walk found nothing"
    wrong = [f"{page}: {one}" for page, text in texts.items() for one in problems(text, page)]
    assert not wrong, "\n".join(wrong)


BAD = {
    "a path": "see `scd_sf/nn/mask.py`",
    "a path in the package": "see `nn/mask.py`",
    "a file of no folder": "see `mask.py`",
    "a folder": "`tests/none/`",
    "a target": "```\nmake dmeo\n```",
    "a test": "`make test T=tests/none`",
    "a command": "```\nscd smaple checkpoint=a\n```",
    "a command of a group": "`scd runs lst`",
    "an option": "`scd gallery a --outt b`",
    "a script": "```\npython recipes/stage4.py\n```",
    "a script's option": "`python recipes/demo.py --runn a`",
    "a field": "```\ndeepspeed recipes/stage2_flow_matching.py train.stepps=1\n```",
    "a field of a section": "`scd sample sampler.nme=euler`",
    "an extra": "the extra `live`",
    "an extra to install": "```\npip install -e '.[dve]'\n```",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_what_does_not_exist_is_noticed(text: str) -> None:
    assert problems(text)


def test_pages_that_the_code_names_exist() -> None:
    text = {
        file: (ROOT / file).read_text(encoding="utf-8")
        for file in own_files()
        if file.endswith((".py", ".yaml"))
    }
    named = {
        (page, file)
        for file, words in text.items()
        for page in re.findall(r"docs/[\w/-]+\.md", words)
    }
    assert len(named) >= 10, "the walk found nothing"
    invented = {"docs/a.md"}  # of this file
    assert [
        f"{file}: {page}"
        for page, file in sorted(named)
        if page not in invented and not (ROOT / page).is_file()
    ] == []


def test_the_reference_has_every_command_with_a_config() -> None:
    children: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    assert {
        name
        for name, child in children.items()
        if "ignore_unknown_options" in child.context_settings
    } == set(SCD)


def test_what_is_cited_is_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__ and cited["license"] == "Apache-2.0"


def test_everything_shipped_has_a_card() -> None:
    folders = [folder for folder in (ROOT / "assets").iterdir() if folder.is_dir()]
    assert (
        folders
        and [folder.name for folder in folders if not (folder / "README.md").is_file()] == []
    )


def test_the_tour_is_short() -> None:
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    files = re.findall(r"^### \d+\. `(.+)`$", text, re.MULTILINE)
    lines = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files}
    assert 10 <= len(files) <= 12, files
    assert sum(lines.values()) <= 2500, lines


# ------------------------------------------------------------------------------------------- README


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in pages() if page.startswith(WHOLE)])
def test_no_two_commands_write_to_one_place(page: str) -> None:
    """Nor into each other's folder."""
    places = []
    for words in commands((ROOT / page).read_text(encoding="utf-8")):
        words = [word for word in words if not word.endswith("=...")]
        places += [word.split("=", 1)[1] for word in words if word.startswith(("out=", "run.dir="))]
        places += [words[i + 1] for i, word in enumerate(words) if word in ("--out", "--sheet")]
        places += words[3:4] if words[:2] == ["scd", "export"] else []
    assert len(places) >= 4
    assert [place for place, count in Counter(places).items() if count > 1] == []
    nested = {(a, b) for a in places for b in places if a != b and Path(b).is_relative_to(a)}
    # a run keeps its own scores
    assert nested <= {("runs/scratch", "runs/scratch/score")}, nested


def test_snippets_import_what_exists_and_define_what_they_use() -> None:
    snippets = [text for kind, text in FENCE.findall(readme()) if kind == "python"]
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
        used = {
            n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
        }
        assert used <= known, f"undefined in the snippet: {used - known}"


def test_links_outside_the_site_lead_somewhere() -> None:
    """mkdocs checks those of docs/."""
    for page in (page for page in pages() if not page.startswith("docs/")):
        links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
        missing = [
            link
            for link in links
            if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()
        ]
        assert not missing, f"{page}: {missing}"
