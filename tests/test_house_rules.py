"""Rules of the house that ruff, mypy and import-linter cannot say. Each reads syntax trees and
names what is wrong as ``path:line: what``; each is shown to fail on a snippet."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("recipes", "data_prep", "vbench_eval", "benchmarks")
CONFIG_NAMES = ("cfg", "config", "args")
TORCH_SETTINGS = ("torch.backends.", "torch._dynamo.config.", "torch._inductor.config.")
IN_THE_ROOT = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "NOTICE",
    "README.md",
    "SECURITY.md",
    "assets",
    "benchmarks",
    "data_prep",
    "docs",
    "mkdocs.yml",
    "pyproject.toml",
    "recipes",
    "scd_sf",
    "tests",
    "vbench_eval",
}


@dataclass(frozen=True)
class Source:
    """One Python file: its path inside the repository (posix) and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def top(self) -> str:
        return PurePosixPath(self.path).parts[0]

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"


def dotted(node: ast.AST) -> str:
    """``a.b.c`` for a chain of attributes on a name, else ''."""
    if isinstance(node, ast.Name):
        return node.id
    head = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{head}.{node.attr}" if head and isinstance(node, ast.Attribute) else ""


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call with its dotted name ('' where the callee is not a plain name)."""
    return ((node, dotted(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call))


def imported(source: Source) -> dict[str, str]:
    """Local name -> what it stands for: imported modules and names, and classes of this file
    (``path:Class``)."""
    names: dict[str, str] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
        elif isinstance(node, ast.ClassDef):
            names[node.name] = f"{source.path}:{node.name}"
    return names


# ---------------------------------------------------------------------------------------- the rules


def flat_inheritance(sources: list[Source]) -> Iterator[str]:
    """A class may derive from a Protocol, an exception or a flat dataclass of ours, and from
    nothing else of ours."""
    ours: dict[str, ast.ClassDef] = {}
    for source in sources:
        if source.top == "scd_sf":
            ours |= {
                node.name: node for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)
            }
    for source in sources:
        if source.top == "tests":
            continue
        origins = imported(source)
        for node in ast.walk(source.tree):
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                name = dotted(base.value if isinstance(base, ast.Subscript) else base)
                origin, parent = origins.get(name.split(".")[0], ""), ours.get(name.split(".")[-1])
                from_us = parent is not None and ("scd_sf" in origin or ":" in origin)
                if parent is not None and from_us and not may_be_a_parent(parent, ours):
                    yield source.at(
                        node,
                        f"{ast.unparse(node).splitlines()[-1]}: inherits {name}; compose instead",
                    )


def may_be_a_parent(node: ast.ClassDef, ours: dict[str, ast.ClassDef]) -> bool:
    bases = [
        dotted(base.value if isinstance(base, ast.Subscript) else base).split(".")[-1]
        for base in node.bases
    ]
    if "Protocol" in bases or any(base.endswith(("Error", "Exception")) for base in bases):
        return True
    decorators = [
        dotted(d.func if isinstance(d, ast.Call) else d).split(".")[-1] for d in node.decorator_list
    ]
    return "dataclass" in decorators and not any(base in ours for base in bases)


def no_config_defaults(sources: list[Source]) -> Iterator[str]:
    """No ``getattr(cfg, "key", default)`` and no ``hasattr(cfg, "key")``: the schema is typed, a
    typo must fail."""
    for source in sources:
        for call, name in calls(source.tree):
            if source.top == "tests" or name not in {"getattr", "hasattr"} or not call.args:
                continue
            last = dotted(call.args[0]).split(".")[-1]
            fixed = len(call.args) == 3 or (
                len(call.args) > 1 and isinstance(call.args[1], ast.Constant)
            )
            if last.endswith(CONFIG_NAMES) and (name == "hasattr" or fixed):
                yield source.at(call, f"{name} on a config; read the typed field")


def no_mode_switches(sources: list[Source]) -> Iterator[str]:
    """Algorithms are chosen by arguments, not by ``self.training``."""
    for source in sources:
        for node in ast.walk(source.tree):
            if source.top == "scd_sf" and isinstance(node, ast.If | ast.IfExp | ast.While):
                if any(dotted(inner) == "self.training" for inner in ast.walk(node.test)):
                    yield source.at(node, "self.training decides nothing here; pass an argument")


def no_loose_keywords(sources: list[Source]) -> Iterator[str]:
    """No public function of scd_sf takes ``**kwargs``."""
    for source in sources:
        for node in ast.walk(source.tree) if source.top == "scd_sf" else ():
            if (
                isinstance(node, ast.FunctionDef)
                and node.args.kwarg
                and not node.name.startswith("_")
            ):
                yield source.at(
                    node, f"{node.name} takes **{node.args.kwarg.arg}; name the arguments"
                )


def no_code_from_data(sources: list[Source]) -> Iterator[str]:
    """``torch.load`` says ``weights_only=True``; nobody asks for ``trust_remote_code`` or
    ``allow_pickle``."""
    for source in sources:
        for call, name in calls(source.tree):
            values = {
                k.arg: k.value.value if isinstance(k.value, ast.Constant) else None
                for k in call.keywords
            }
            if name == "torch.load" and values.get("weights_only") is not True:
                yield source.at(call, "torch.load needs weights_only=True, written out")
            for word in ("allow_pickle", "trust_remote_code"):
                if values.get(word, False) is not False:
                    yield source.at(call, f"{word} runs code from data")
        for node in ast.walk(source.tree):
            keys = node.keys if isinstance(node, ast.Dict) else ()
            if any(
                isinstance(key, ast.Constant) and key.value == "trust_remote_code" for key in keys
            ):
                yield source.at(node, "trust_remote_code runs code from data")


def no_monkeypatching(sources: list[Source]) -> Iterator[str]:
    """Nothing is assigned into an imported module or a class, and no module's ``forward`` is
    replaced."""
    for source in sources:
        if source.top != "scd_sf":
            continue
        names = imported(source)
        for node in ast.walk(source.tree):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
            targets = [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else targets
            for target in targets:
                name = dotted(target) if isinstance(target, ast.Attribute) else ""
                foreign = name.split(".")[0] in names and not name.startswith(TORCH_SETTINGS)
                if (name and foreign) or (
                    isinstance(target, ast.Attribute) and target.attr == "forward"
                ):
                    yield source.at(node, f"assigns {ast.unparse(target)}: monkeypatching")
        for call, name in calls(source.tree):
            into = name == "setattr" and call.args and dotted(call.args[0]).split(".")[0] in names
            if into or name in {"types.MethodType", "MethodType"}:
                yield source.at(call, f"{name}: monkeypatching")


def scripts_stay_scripts(sources: list[Source]) -> Iterator[str]:
    """A script ends through ``exit_on_user_error`` and does not import its neighbours (ruff bans
    the folders)."""
    for source in sources:
        if source.top not in SCRIPTS:
            continue
        if not any(name == "exit_on_user_error" for _, name in calls(source.tree)):
            yield source.at(
                source.tree, "end with exit_on_user_error(main): bad input and Ctrl-C are one line"
            )
        folder = PurePosixPath(source.path).parent
        beside = {
            PurePosixPath(s.path).stem for s in sources if PurePosixPath(s.path).parent == folder
        }
        for origin in imported(source).values():
            if origin.split(".")[0] in beside:
                yield source.at(
                    source.tree,
                    f"imports {origin}, which is a script; move shared code into scd_sf",
                )


def clean_lines(sources: list[Source]) -> Iterator[str]:
    """scd_sf prints lines with ``types.say``, which cleans them, and JSON documents with
    ``print(json.dumps(..))``."""
    for source in sources:
        if source.top != "scd_sf" or source.path in (
            "scd_sf/types.py",
            "scd_sf/evaluation/vbench/worker.py",
        ):
            continue
        for call, name in calls(source.tree):
            document = (
                call.args
                and isinstance(call.args[0], ast.Call)
                and dotted(call.args[0].func) == "json.dumps"
            )
            if name == "print" and not document:
                yield source.at(call, "print: use scd_sf.types.say")


def one_place_for_a_name(sources: list[Source]) -> Iterator[str]:
    """No public function or class of scd_sf has the name of another one elsewhere: a search finds
    one place."""
    places: dict[str, str] = {}
    for source in sources:
        for node in source.tree.body if source.top == "scd_sf" else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if node.name == "main":
                    continue
                if node.name in places:
                    yield source.at(
                        node,
                        f"{node.name} is defined in {places[node.name]} too; merge or rename one",
                    )
                places.setdefault(node.name, source.path)


COMMAND = re.compile(r" {4}(#|(\S*/)?(python|torchrun|deepspeed|make|scd|pip)\b)")
SECOND_COMMAND = re.compile(r"[^\s&] +(python \S+\.py|torchrun|deepspeed --)")


def commands_can_be_copied(sources: list[Source]) -> Iterator[str]:
    """In a module docstring every command begins on a line of its own; a second line of it comes
    after a backslash and is indented deeper."""
    for source in sources:
        for paragraph in (ast.get_docstring(source.tree, clean=False) or "").split("\n\n"):
            lines = paragraph.splitlines()
            if not lines or not COMMAND.match(lines[0]):
                continue
            for before, line in zip(["", *lines], lines, strict=False):
                begins = COMMAND.match(line) and not before.endswith("\\")
                goes_on = line.startswith(" " * 8) and before.endswith("\\")
                if not (begins or goes_on) or SECOND_COMMAND.search(line.split(" #")[0]):
                    yield source.at(source.tree, f"{line.strip()}: not a whole command")


# ------------------------------------------------------------------------- they hold, they can fail

Rule = Callable[[list[Source]], Iterator[str]]
# rule, path, text that must be caught, text that must pass
CASES: list[tuple[Rule, str, str, str]] = [
    (
        flat_inheritance,
        "scd_sf/a.py",
        "class A: ...\nclass B(A): ...",
        "class A(Protocol): ...\nclass B(A): ...\nclass E(ValueError): ...\nclass F(E): ...",
    ),
    (no_config_defaults, "scd_sf/a.py", "getattr(cfg, 'lr', 1e-4)", "getattr(self, name)"),
    (no_config_defaults, "recipes/a.py", "hasattr(self.config, 'lr')", "hasattr(self, 'lr')"),
    (no_mode_switches, "scd_sf/a.py", "if self.training: pass", "if stage.training_data: pass"),
    (
        no_loose_keywords,
        "scd_sf/a.py",
        "def f(**kwargs): ...",
        "def f(*args): ...\ndef _g(**kwargs): ...",
    ),
    (no_code_from_data, "scd_sf/a.py", "torch.load(path)", "torch.load(path, weights_only=True)"),
    (
        no_code_from_data,
        "tests/a.py",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=False)",
    ),
    (no_code_from_data, "scd_sf/a.py", "f(trust_remote_code=flag)", "f(trust_remote_code=False)"),
    (no_code_from_data, "scd_sf/a.py", "f(**{'trust_remote_code': True})", "f(**{'a': True})"),
    (no_monkeypatching, "scd_sf/a.py", "import torch\ntorch.load = f", "import torch\nx.load = f"),
    (
        no_monkeypatching,
        "scd_sf/a.py",
        "from diffusers import Wan\nWan.forward = f",
        "import torch\ntorch.backends.cuda.matmul.allow_tf32 = True",
    ),
    (no_monkeypatching, "scd_sf/a.py", "block.forward = g", "self.forward_count = 1"),
    (
        no_monkeypatching,
        "scd_sf/a.py",
        "import os\nsetattr(os, 'name', 1)",
        "setattr(self, 'name', 1)",
    ),
    (scripts_stay_scripts, "recipes/a.py", "main()", "exit_on_user_error(main)"),
    (
        scripts_stay_scripts,
        "recipes/a.py",
        "import a\nexit_on_user_error(a)",
        "import b\nexit_on_user_error(main)",
    ),
    (
        one_place_for_a_name,
        "scd_sf/a.py",
        "class A: ...\ndef A(): ...",
        "class A: ...\ndef _a(): ...\ndef b(): ...",
    ),
    (clean_lines, "scd_sf/a.py", "print(name)", "say(name)\nprint(json.dumps({}))"),
    (
        commands_can_be_copied,
        "recipes/a.py",
        '"""A.\n\n    python a.py --data b --out\n    c\n"""',
        r'"""A.' "\n\n" r"    python a.py --data b \\" '\n        --out c\n    make b    # c\n"""',
    ),
    (
        commands_can_be_copied,
        "recipes/a.py",
        '"""A.\n\n    python a.py b python a.py c\n"""',
        '"""A.\n\n    # as python a.py does\n    make b    # python a.py\n"""',
    ),
]


@functools.cache
def repository() -> list[Source]:
    """Every Python file of the repository, each read and parsed once for all rules."""
    files = [
        file
        for place in ("scd_sf", "tests", *SCRIPTS)
        for file in sorted((ROOT / place).rglob("*.py"))
    ]
    return [
        Source(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
        for file in files
    ]


@pytest.mark.parametrize(
    "rule", dict.fromkeys(case[0] for case in CASES), ids=lambda rule: rule.__name__
)
def test_rules_hold(rule: Rule) -> None:
    sources = repository()
    assert any(source.path == "scd_sf/types.py" for source in sources), "the walk found no files"
    wrong = list(rule(sources))
    assert not wrong, f"{rule.__doc__}\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("rule", "path", "bad", "good"), CASES, ids=lambda value: getattr(value, "__name__", "")
)
def test_rules_can_fail(rule: Rule, path: str, bad: str, good: str) -> None:
    assert list(rule([Source(path, bad)])), "the bad snippet was not caught"
    assert not list(rule([Source(path, good)])), "the good snippet was caught"


def test_the_root_holds_no_stray_files() -> None:
    """What a run or an attack left in the repository's root does not come in with 'git add'."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z"]
        listed = subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        names = {name.split("/")[0] for name in listed.split("\0") if name}
        assert "README.md" in names and names <= IN_THE_ROOT, sorted(names - IN_THE_ROOT)


def test_ruff_reads_every_file() -> None:
    """A pattern of .gitignore, which ruff follows, hides no package of ours from it."""
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "scd_sf", "tests", *SCRIPTS]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = {Path(line).relative_to(ROOT).as_posix() for line in listed.splitlines()}
    hidden = {source.path for source in repository()} - names
    assert not hidden, sorted(hidden)
