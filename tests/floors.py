"""The house rules as functions over source text: each takes files and returns lines ``path:line: what is wrong``.

Nothing is imported or run; every rule reads the syntax tree. ``tests/test_floors.py`` applies them to the repository
and shows, on a snippet each, that they can fail.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

FLOORS = {
    "types": 0, "config": 0, "files": 0, "ownership": 0, "json_text": 0, "yaml_text": 0, "tensor_files": 0,
    "checkpoint": 1, "provenance": 1, "nn": 1, "diffusion": 1, "data": 1, "prompt_filter": 1,
    "models": 2,
    "generation": 3, "rollout": 3, "preview": 3, "pipeline": 3, "losses": 3, "probes": 3, "metrics": 3,
    "train": 4,
    "gallery": 5, "serve": 5, "doctor": 5, "steps": 5, "sampling": 5, "sample_folder": 5, "bench": 5,
    "monitor": 5, "plan": 5, "stages": 5, "validation": 5, "vbench": 5, "generate": 5, "data_tools": 5,
    "prompt_extend": 5, "prediction": 5, "probing": 5, "gpu": 5,
    "cli": 5,
}  # fmt: skip
# Imports between neighbours of one floor, each way named once; everything else goes strictly down.
SIDEWAYS = {
    ("provenance", "checkpoint"), ("prompt_filter", "data"),
    ("config", "types"), ("files", "types"), ("ownership", "types"), ("yaml_text", "types"),
    ("files", "ownership"), ("files", "json_text"), ("yaml_text", "files"), ("yaml_text", "json_text"),
    ("config", "yaml_text"), ("config", "json_text"), ("config", "files"),
    ("tensor_files", "types"), ("tensor_files", "files"),
    ("probes", "rollout"), ("metrics", "rollout"), ("generation", "rollout"),
    ("preview", "generation"), ("pipeline", "generation"), ("probes", "generation"), ("metrics", "generation"),
    ("probes", "metrics"),
    ("preview", "metrics"), ("vbench", "sampling"), ("vbench", "sample_folder"),
    ("cli", "gallery"), ("cli", "serve"), ("cli", "doctor"), ("sample_folder", "sampling"),
    ("cli", "sampling"), ("cli", "sample_folder"), ("cli", "bench"), ("cli", "monitor"),
    ("gpu", "bench"), ("gpu", "plan"), ("gpu", "stages"),
    ("cli", "plan"), ("cli", "probing"), ("plan", "stages"), ("cli", "data_tools"),
}  # fmt: skip
HIDDEN = {"train": {"models", "rollout", "losses", "probes", "metrics"}}  # lower floors that train must not know
ONLY = {"yaml": "scd_sf/yaml_text.py", "deepspeed": "scd_sf/train/engine.py", "wandb": "scd_sf/train/run.py"}
SCRIPTS = ("recipes", "data_prep", "vbench_eval", "benchmarks")
FILE_CEILING, FUNCTION_CEILING = 700, 60
GEOMETRY = {21, 30, 480, 832, 1560, 32760}
NOT_GEOMETRY = re.compile(r"time|second|minute|interval|every|patience|retr|delay|width_|port|bytes|columns", re.I)
CONFIG_NAME = re.compile(r"^(.*_)?(cfg|config|args)$")
# Evaluation mode of third-party networks (dropout off) is set where they are loaded, and nowhere else.
LOADS_FOREIGN_NETWORKS = (
    "scd_sf/models/wan/text.py", "scd_sf/models/wan/vae.py", "scd_sf/models/tokenizers/tokenizer.py", "scd_sf/metrics/",
)  # fmt: skip
RUNS_CODE = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load", "dill.load"}
UNSAFE_YAML = {"", "yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader"}
TORCH_SETTINGS = ("torch.backends.", "torch._dynamo.config.", "torch._inductor.config.")


@dataclass(frozen=True)
class Source:
    """One Python file: its path inside the repository (posix) and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree; an empty one where the text is not Python (``valid_python`` reports that once)."""
        return ast.parse(self.text, self.path) if not self.error else ast.Module([], [])

    @cached_property
    def error(self) -> str:
        try:
            ast.parse(self.text, self.path)
        except SyntaxError as error:
            return f"{self.path}:{error.lineno}: {error.msg}"
        return ""

    @property
    def top(self) -> str:
        return PurePosixPath(self.path).parts[0]

    @property
    def part(self) -> str:
        """The part of scd_sf the file belongs to: ``scd_sf/nn/rope.py`` -> ``nn``; '' for ``__init__`` and scripts."""
        if self.top != "scd_sf":
            return ""
        stem = PurePosixPath(self.path).parts[1].removesuffix(".py")
        return "" if stem == "__init__" else stem

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"


Rule = Callable[[list[Source]], list[str]]


def package(sources: Iterable[Source]) -> Iterator[Source]:
    """The files of scd_sf."""
    return (source for source in sources if source.top == "scd_sf")


def shipped(sources: Iterable[Source]) -> Iterator[Source]:
    """Everything but the tests."""
    return (source for source in sources if source.top != "tests")


def dotted(node: ast.AST) -> str:
    """``a.b.c`` for a chain of attributes on a name, else ''."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def constant(node: ast.AST | None) -> object:
    """The value of a constant, else None."""
    return node.value if isinstance(node, ast.Constant) else None


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call with its dotted name ('' where the callee is not a plain name)."""
    return ((node, dotted(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call))


def imports(source: Source) -> list[tuple[ast.AST, str]]:
    """Every imported module (``from a import b`` gives ``a.b``); relative imports and import_module("x") included."""
    found: list[tuple[ast.AST, str]] = []
    folder = PurePosixPath(source.path).parts[:-1]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node, f"{module}.{alias.name}") for alias in node.names]
    for call, name in calls(source.tree):
        if name in {"importlib.import_module", "import_module", "__import__"} and call.args:
            target = constant(call.args[0])
            found += [(call, target)] if isinstance(target, str) else []
    return found


def valid_python(sources: list[Source]) -> list[str]:
    """Every file parses with the Python that runs the tests."""
    return [source.error for source in sources if source.error]


# ---------------------------------------------------------------------------------------------- who imports whom


def imports_go_down(sources: list[Source]) -> list[str]:
    """A part of scd_sf imports lower floors only, or itself, or a neighbour named in SIDEWAYS."""
    wrong = []
    for source in package(sources):
        if source.part and source.part not in FLOORS:
            wrong.append(f"{source.path}:1: {source.part} has no floor; add it to FLOORS and to docs/map.md")
            continue
        for node, name in imports(source):
            parts = name.split(".")
            if parts[0] != "scd_sf" or len(parts) < 2 or parts[1] not in FLOORS or not source.part:
                continue
            here, there = source.part, parts[1]
            allowed = here == there or FLOORS[there] < FLOORS[here] or (here, there) in SIDEWAYS
            if not allowed or there in HIDDEN.get(here, ()):
                wrong.append(source.at(node, f"{here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})"))
    return wrong


def confined_imports(sources: list[Source]) -> list[str]:
    """yaml, deepspeed and wandb are each imported by one file."""
    return [
        source.at(node, f"{name.split('.')[0]} may only be imported by {ONLY[name.split('.')[0]]}")
        for source in shipped(sources)
        for node, name in imports(source)
        if name.split(".")[0] in ONLY and source.path != ONLY[name.split(".")[0]]
    ]


def scripts_stay_scripts(sources: list[Source]) -> list[str]:
    """Recipes, data_prep, vbench_eval and benchmarks are run, never imported: by nobody, and not by each other."""
    siblings: dict[str, set[str]] = {}
    for source in sources:
        path = PurePosixPath(source.path)
        if source.top in SCRIPTS:
            siblings.setdefault(str(path.parent), set()).add(path.stem)
    wrong = []
    for source in sources:
        beside = siblings.get(str(PurePosixPath(source.path).parent), set()) if source.top in SCRIPTS else set()
        for node, name in imports(source):
            head = name.split(".")[0]
            if head in SCRIPTS or head in beside:
                wrong.append(source.at(node, f"imports {name}, which is a script; move the shared code into scd_sf"))
    return wrong


# ---------------------------------------------------------------------------------------------- size and shape


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def short_files(sources: list[Source]) -> list[str]:
    """No file over the ceiling (tests are free)."""
    return [
        f"{source.path}:1: {count} lines (ceiling {FILE_CEILING})"
        for source in shipped(sources)
        if (count := len(source.text.splitlines())) > FILE_CEILING
    ]


def short_functions(sources: list[Source]) -> list[str]:
    """No function over the ceiling, tests included."""
    return [
        source.at(node, f"{node.name} has {lines_of(node)} lines (ceiling {FUNCTION_CEILING})")
        for source in sources
        for node in functions(source.tree)
        if lines_of(node) > FUNCTION_CEILING
    ]


def bindings(source: Source) -> dict[str, str]:
    """Local name -> what it stands for: imported modules and names, and classes of this file (``path:Class``)."""
    names: dict[str, str] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names}
        elif isinstance(node, ast.ClassDef):
            names[node.name] = f"{source.path}:{node.name}"
    return names


def flat_inheritance(sources: list[Source]) -> list[str]:
    """A class may derive from a Protocol, an exception or a flat dataclass of ours, and from nothing else of ours."""
    ours: dict[str, ast.ClassDef] = {}
    for source in package(sources):
        ours |= {node.name: node for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)}
    wrong = []
    for source in shipped(sources):
        known = bindings(source)
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ClassDef):
                continue
            for base in node.bases:
                name = dotted(base.value if isinstance(base, ast.Subscript) else base)
                origin, parent = known.get(name.split(".")[0], ""), ours.get(name.split(".")[-1])
                if parent is None or not ("scd_sf" in origin or ":" in origin or origin.startswith(".")):
                    continue
                if not _may_be_a_parent(parent, ours):
                    wrong.append(source.at(node, f"{node.name} inherits {name}: compose instead (depth 1)"))
    return wrong


def _may_be_a_parent(node: ast.ClassDef, ours: dict[str, ast.ClassDef]) -> bool:
    bases = [dotted(b.value if isinstance(b, ast.Subscript) else b).split(".")[-1] for b in node.bases]
    if "Protocol" in bases or any(base.endswith(("Error", "Exception")) for base in bases):
        return True
    decorators = [dotted(d.func if isinstance(d, ast.Call) else d).split(".")[-1] for d in node.decorator_list]
    return "dataclass" in decorators and not any(base in ours for base in bases)


def documented(sources: list[Source]) -> list[str]:
    """Modules, public functions, public classes and public methods over 8 lines say what they do.

    ``forward`` may lean on its class's docstring, a method on the Protocol that documents it.
    """
    classes = [node for source in package(sources) for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)]
    protocols = [node for node in classes if "Protocol" in [dotted(base).split(".")[-1] for base in node.bases]]
    promised = {method.name for node in protocols for method in functions(node) if ast.get_docstring(method)}
    wrong = []
    for source in package(sources):
        if not source.error and not ast.get_docstring(source.tree):
            wrong.append(f"{source.path}:1: the module has no docstring")
        for node in source.tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                wrong.append(source.at(node, f"{node.name} has no docstring"))
            for method in node.body if isinstance(node, ast.ClassDef) else []:
                named = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
                if not named or method.name in promised | {"forward"}:
                    continue
                if lines_of(method) > 8 and not ast.get_docstring(method):
                    wrong.append(source.at(method, f"{node.name}.{method.name} has no docstring"))
    return wrong


def no_loose_keywords(sources: list[Source]) -> list[str]:
    """No public function of scd_sf takes ``**kwargs``."""
    return [
        source.at(node, f"{node.name} takes **{node.args.kwarg.arg}; name the arguments")
        for source in package(sources)
        for node in functions(source.tree)
        if node.args.kwarg and not node.name.startswith("_")
    ]


# ---------------------------------------------------------------------------------------------- what must not appear


def no_config_defaults(sources: list[Source]) -> list[str]:
    """No ``getattr(cfg, "key", default)`` or ``hasattr(cfg, "key")``: the schema is typed, a typo must fail."""
    wrong = []
    for source in shipped(sources):
        for call, name in calls(source.tree):
            if name not in {"getattr", "hasattr"} or not call.args:
                continue
            about_config = CONFIG_NAME.match(dotted(call.args[0]).split(".")[-1])
            fixed_key = len(call.args) > 1 and isinstance(call.args[1], ast.Constant)
            if about_config and (name == "hasattr" or len(call.args) == 3 or fixed_key):
                wrong.append(source.at(call, f"{name} on a config; read the typed field"))
    return wrong


def no_mode_switches(sources: list[Source]) -> list[str]:
    """No ``.training`` and no ``.eval()``/``.train()``: algorithms are chosen by arguments, not by a module's mode."""
    wrong = []
    for source in package(sources):
        if source.path.startswith(LOADS_FOREIGN_NETWORKS):
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and node.attr == "training":
                wrong.append(source.at(node, ".training decides nothing here; pass an argument"))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in {"eval", "train"} and len(node.args) + len(node.keywords) <= 1:
                    wrong.append(source.at(node, f".{node.func.attr}() switches modes; pass an argument"))
    return wrong


def no_unsafe_loading(sources: list[Source]) -> list[str]:
    """No code from data: eval, exec, pickle, unsafe yaml, trust_remote_code, torch.load without weights_only=True."""
    wrong = []
    for source in sources:
        for call, name in calls(source.tree):
            given = {
                k.arg: k.value.value if isinstance(k.value, ast.Constant) else dotted(k.value) for k in call.keywords
            }
            if name in RUNS_CODE:
                wrong.append(source.at(call, f"{name} runs code from data"))
            if name == "yaml.load" and given.get("Loader", "") in UNSAFE_YAML:
                wrong.append(source.at(call, "yaml.load needs a loader derived from SafeLoader"))
            if name == "torch.load" and given.get("weights_only") is not True:
                wrong.append(source.at(call, "torch.load needs weights_only=True, written out"))
            if given.get("allow_pickle", False) is not False:
                wrong.append(source.at(call, "allow_pickle runs code from data"))
            if given.get("trust_remote_code", False) is not False:
                wrong.append(source.at(call, "trust_remote_code has no place here"))
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Dict) and any(constant(key) == "trust_remote_code" for key in node.keys):
                wrong.append(source.at(node, "trust_remote_code has no place here"))
    return wrong


def no_hidden_failures(sources: list[Source]) -> list[str]:
    """No nan_to_num; no ``except Exception`` that ends in silence."""
    wrong = []
    for source in shipped(sources):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute | ast.Name):
                if (node.attr if isinstance(node, ast.Attribute) else node.id) in {"nan_to_num", "nan_to_num_"}:
                    wrong.append(source.at(node, "nan_to_num hides a failure; skip the step together and count it"))
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or dotted(node.type) in {"Exception", "BaseException"}
                acts = any(isinstance(inner, ast.Raise | ast.Call) for stmt in node.body for inner in ast.walk(stmt))
                if broad and not acts:
                    wrong.append(source.at(node, "a broad except that says nothing"))
    return wrong


def no_geometry_literals(sources: list[Source]) -> list[str]:
    """Frames, tokens, layers and sizes of Wan (21, 30, 480, 832, 1560, 32760) come from the config."""
    wrong: list[str] = []

    def visit(source: Source, node: ast.AST, owner: str) -> None:
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in GEOMETRY:
            if not NOT_GEOMETRY.search(owner):
                wrong.append(source.at(node, f"literal {node.value}; take it from the config"))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            return  # the defaults of a config are where such numbers belong
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
            return visit(source, node.left, owner)  # 2**30 is a size in bytes
        if isinstance(node, ast.arguments):
            named = [*node.posonlyargs, *node.args]
            named = [*named[len(named) - len(node.defaults) :], *node.kwonlyargs]
            for arg, default in zip(named, [*node.defaults, *node.kw_defaults], strict=True):
                if default is not None:
                    visit(source, default, arg.arg)
            return
        if isinstance(node, ast.keyword):
            owner = node.arg or ""
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            owner = dotted(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        for child in ast.iter_child_nodes(node):
            visit(source, child, owner)

    for source in package(sources):
        visit(source, source.tree, "")
    return wrong


def no_monkeypatching(sources: list[Source]) -> list[str]:
    """Nothing is assigned into an imported module or into a class, and no module's ``forward`` is replaced."""
    wrong = []
    for source in package(sources):
        known = bindings(source)
        for node in ast.walk(source.tree):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
            targets = [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else targets
            for target in targets:
                name = dotted(target) if isinstance(target, ast.Attribute) else ""
                foreign = name and name.split(".")[0] in known and not name.startswith(TORCH_SETTINGS)
                if foreign or (isinstance(target, ast.Attribute) and target.attr == "forward"):
                    wrong.append(source.at(node, f"assigns {ast.unparse(target)}: monkeypatching"))
        for call, name in calls(source.tree):
            patched = name == "setattr" and call.args and dotted(call.args[0]).split(".")[0] in known
            if patched or name in {"types.MethodType", "MethodType"}:
                wrong.append(source.at(call, f"{name}: monkeypatching"))
    return wrong


def no_skips(sources: list[Source]) -> list[str]:
    """No test is skipped or expected to fail."""
    banned = {"pytest.skip", "pytest.xfail", "pytest.importorskip", "pytest.mark.skip", "pytest.mark.skipif"}
    return [
        source.at(node, f"{dotted(node)}: make it run or delete it")
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and dotted(node) in banned | {"pytest.mark.xfail"}
    ]


def ends_in_words(sources: list[Source]) -> list[str]:
    """Every script ends through ``exit_on_user_error``: bad input, a full disk and Ctrl-C are one line."""
    wrong = []
    for source in sources:
        if source.top in SCRIPTS and not any(name == "exit_on_user_error" for _, name in calls(source.tree)):
            wrong.append(f"{source.path}:1: end with exit_on_user_error(main)")
    return wrong


def says_cleanly(sources: list[Source]) -> list[str]:
    """scd_sf prints lines with ``types.say``, which cleans them, and JSON documents with ``print(json.dumps(..))``."""
    wrong = []
    for source in package(sources):
        if source.path in ("scd_sf/types.py", "scd_sf/evaluation/vbench/worker.py"):
            continue
        for call, name in calls(source.tree):
            document = call.args and isinstance(call.args[0], ast.Call) and dotted(call.args[0].func) == "json.dumps"
            if name == "print" and not document:
                wrong.append(source.at(call, "print: use scd_sf.types.say"))
    return wrong


RULES: tuple[Rule, ...] = (
    valid_python, imports_go_down, confined_imports, scripts_stay_scripts, short_files, short_functions,
    flat_inheritance, documented, no_loose_keywords, no_config_defaults, no_mode_switches, no_unsafe_loading,
    no_hidden_failures, no_geometry_literals, no_monkeypatching, no_skips, ends_in_words,
    says_cleanly,
)  # fmt: skip
