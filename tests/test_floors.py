"""The house rules hold in this repository, and every rule can fail."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import floors
import pytest
from floors import Rule, Source

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {
    ".ci", ".gitignore", "CHANGELOG.md", "LICENSE", "Makefile", "NOTICE", "README.md", "SECURITY.md", "assets",
    "benchmarks", "data_prep", "docs", "pyproject.toml", "recipes", "scd_sf", "tests", "vbench_eval",
}  # fmt: skip
PLACES = ("scd_sf", "tests", *floors.SCRIPTS)


@functools.cache
def repository() -> list[Source]:
    """Every Python file of the repository, each read and parsed once for all rules."""
    files = [file for place in PLACES for file in sorted((ROOT / place).rglob("*.py"))]
    return [Source(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]


@pytest.mark.parametrize("rule", floors.RULES, ids=lambda rule: rule.__name__)
def test_repository(rule: Rule) -> None:
    sources = repository()
    assert any(source.path == "scd_sf/types.py" for source in sources), "the walk found no files"
    wrong = rule(sources)
    assert not wrong, f"{rule.__doc__}\n" + "\n".join(wrong)


def test_the_root_holds_no_stray_files() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = {name.split("/")[0] for name in listed.split("\0") if name}
    strays = found - KNOWN
    assert "README.md" in found and not strays, f"committed by accident, or name it in KNOWN: {sorted(strays)}"


LONG = "def f() -> None:\n" + "    x = 1\n" * 60
DOC = '"""Doc."""\n'
# rule, path, text that must be caught, text that must pass
CASES: list[tuple[Rule, str, str, str]] = [
    (floors.valid_python, "scd_sf/a.py", "def f(:", "def f(): ..."),
    (floors.imports_go_down, "scd_sf/nn/a.py", "from scd_sf.models.wan.transformer import Wan", "from scd_sf.types import Logs"),
    (floors.imports_go_down, "scd_sf/nn/a.py", "from ..models import wan", "from .rope import table"),
    (floors.imports_go_down, "scd_sf/nn/a.py", "import scd_sf.generation.rollout", "import scd_sf.nn.masks"),
    (floors.imports_go_down, "scd_sf/nn/a.py", "def f():\n    from scd_sf import losses", "from scd_sf import types"),
    (floors.imports_go_down, "scd_sf/losses/dmd.py", "from scd_sf.generation.rollout import rollout", "import scd_sf.nn.rope"),
    (floors.imports_go_down, "scd_sf/train/ema.py", "from scd_sf.models import scd", "from scd_sf import checkpoint"),
    (floors.imports_go_down, "scd_sf/utils/a.py", "x = 1", ""),
    (floors.confined_imports, "scd_sf/types.py", "import yaml", "import torch"),
    (floors.confined_imports, "scd_sf/train/optim.py", "import deepspeed.ops", "import deepspeed_notes"),
    (floors.confined_imports, "recipes/sample.py", "def f():\n    import wandb", "from importlib import metadata"),
    (floors.confined_imports, "scd_sf/cli.py", "import_module('deepspeed')", "import typer"),
    (floors.ends_in_words, "recipes/a.py", "main()", "exit_on_user_error(main)"),
    (floors.says_cleanly, "scd_sf/a.py", "print(name)", "say(name)\nprint(json.dumps({}))"),
    (floors.scripts_stay_scripts, "scd_sf/cli.py", "import recipes.sample", "import runpy"),
    (floors.scripts_stay_scripts, "tests/test_a.py", "from data_prep import make_clips", "from scd_sf import data"),
    (floors.scripts_stay_scripts, "recipes/a.py", "from a import main", "import av"),
    (floors.short_files, "scd_sf/a.py", "x = 1\n" * 701, "x = 1\n" * 700),
    (floors.short_functions, "tests/test_a.py", LONG, LONG.removesuffix("    x = 1\n")),
    (
        floors.flat_inheritance,
        "scd_sf/a.py",
        "class A: ...\nclass B(A): ...",
        "class A(Protocol): ...\nclass B(A): ...",
    ),
    (
        floors.flat_inheritance,
        "scd_sf/a.py",
        "class A(nn.Module): ...\nclass B(A): ...",
        "class A(ValueError): ...\nclass B(A): ...",
    ),
    (
        floors.flat_inheritance,
        "scd_sf/a.py",
        "@dataclass\nclass A: ...\n@dataclass\nclass B(A): ...\nclass C(B): ...",
        "from torch.nn import Linear\n@dataclass(frozen=True)\nclass A: ...\n@dataclass\nclass B(A): ...\n"
        "class C(Linear): ...",
    ),
    (floors.documented, "scd_sf/a.py", DOC + "def f(): ...", DOC + "def _f(): ...\ndef g():\n    'Doc.'"),
    (floors.documented, "scd_sf/a.py", "x = 1", DOC + "x = 1"),
    (
        floors.documented,
        "scd_sf/a.py",
        DOC + "class A:\n    'Doc.'\n    def f(self):\n" + "        x = 1\n" * 9,
        DOC + "class A:\n    'Doc.'\n    def forward(self):\n" + "        x = 1\n" * 9,
    ),
    (floors.no_loose_keywords, "scd_sf/a.py", "def f(**kwargs): ...", "def f(*args): ..."),
    (floors.no_config_defaults, "scd_sf/a.py", "getattr(cfg, 'lr', 1e-4)", "getattr(self, name)"),
    (floors.no_config_defaults, "recipes/a.py", "hasattr(self.train_config, 'lr')", "cfg.lr"),
    (floors.no_mode_switches, "scd_sf/a.py", "if self.training: pass", "if stage.training_data: pass"),
    (floors.no_mode_switches, "scd_sf/a.py", "model.eval()", "evaluate(model)"),
    (floors.no_unsafe_loading, "scd_sf/a.py", "torch.load(path)", "torch.load(path, weights_only=True)"),
    (floors.no_unsafe_loading, "recipes/a.py", "torch.load(p, weights_only=False)", "load_file(p)"),
    (floors.no_unsafe_loading, "scd_sf/a.py", "f(trust_remote_code=flag)", "f(trust_remote_code=False)"),
    (floors.no_unsafe_loading, "scd_sf/a.py", "f(**{'trust_remote_code': True})", "f(**{'a': True})"),
    (floors.no_unsafe_loading, "tests/test_a.py", "np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=False)"),
    (floors.no_unsafe_loading, "scd_sf/a.py", "yaml.load(text)", "yaml.load(text, Loader=_StrictLoader)"),
    (floors.no_unsafe_loading, "scd_sf/a.py", "yaml.load(text, Loader=yaml.Loader)", "yaml.safe_load(text)"),
    (floors.no_unsafe_loading, "scd_sf/a.py", "eval(text)", "ast.literal_eval(text)"),
    (floors.no_hidden_failures, "scd_sf/a.py", "torch.nan_to_num(x)", "torch.isfinite(x)"),
    (
        floors.no_hidden_failures,
        "scd_sf/a.py",
        "try: f()\nexcept Exception: pass",
        "try: f()\nexcept Exception as e: raise UserError('x') from e",
    ),
    (floors.no_geometry_literals, "scd_sf/a.py", "tokens = frames * 1560", "tokens = frames * shape.tokens"),
    (floors.no_geometry_literals, "scd_sf/a.py", "def f(frames=21): ...", "def f(timeout=30): ..."),
    (floors.no_geometry_literals, "scd_sf/a.py", "for layer in range(30): ...", "wait(seconds=30)\nGIB = 2**30"),
    (floors.no_geometry_literals, "scd_sf/a.py", "size: tuple[int, int] = (480, 832)", "log_every: int = 30"),
    (floors.no_geometry_literals, "scd_sf/a.py", "def f(*, a, b=480): ...", "def f(*, a, b=48): ..."),
    (floors.no_monkeypatching, "scd_sf/a.py", "import torch\ntorch.load = f", "import torch\nx.load = f"),
    (
        floors.no_monkeypatching,
        "scd_sf/a.py",
        "from diffusers import Wan\nWan.forward = f",
        "import torch\ntorch.backends.cuda.matmul.allow_tf32 = True",
    ),
    (floors.no_monkeypatching, "scd_sf/a.py", "block.forward = g", "self.forward_count = 1"),
    (floors.no_monkeypatching, "scd_sf/a.py", "import os\nsetattr(os, 'name', 1)", "setattr(self, 'name', 1)"),
    (floors.no_monkeypatching, "scd_sf/a.py", "class A: ...\nA.x = 1", "class A:\n    x = 1"),
    (floors.no_skips, "tests/test_a.py", "@pytest.mark.skipif(True)\ndef f(): ...", "@pytest.mark.slow\ndef f(): ..."),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "path", "bad", "good"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_rule_can_fail(rule: Rule, path: str, bad: str, good: str) -> None:
    assert rule([Source(path, bad)]), "the bad snippet was not caught"
    if good:
        assert not rule([Source(path, good)]), "the good snippet was caught"


def test_every_rule_has_a_case() -> None:
    assert {rule for rule, *_ in CASES} == set(floors.RULES)


def test_scripts_in_one_folder_do_not_import_each_other() -> None:
    first, second = Source("recipes/stage2.py", "x = 1"), Source("recipes/stage3.py", "from stage2 import x")
    assert floors.scripts_stay_scripts([first, second])


def test_every_part_of_the_package_has_a_floor() -> None:
    parts = {source.part for source in repository() if source.top == "scd_sf"} - {""}
    assert parts <= set(floors.FLOORS)


TOP = {
    ".ci", ".gitignore", "CHANGELOG.md", "LICENSE", "Makefile", "NOTICE", "README.md", "SECURITY.md", "assets",
    "benchmarks", "data_prep", "docs", "pyproject.toml", "recipes", "scd_sf", "tests", "vbench_eval",
}  # fmt: skip


def test_nothing_stray_is_committed() -> None:
    """What a run or an attack left in the repository's root does not come in with 'git add'."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert {name.split("/")[0] for name in listed.stdout.split("\0") if name} <= TOP
