"""Typed configuration: conversion, merging, and an error line a person can act on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from scd_sf.config import (
    Renamed,
    commented_yaml,
    differences,
    from_command_line,
    from_yaml,
    load_config,
    plain_yaml,
    stored_settings,
    to_yaml,
)
from scd_sf.types import UserError, printable


@dataclass(frozen=True)
class Optimiser:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 0
    kind: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; it must be positive")


@dataclass
class Model:
    depth: int
    fast: bool = False
    widths: list[int] = field(default_factory=lambda: [8, 16])
    rope: str | None = None
    optim: Optimiser = field(default_factory=lambda: Optimiser(lr=3e-4))


@dataclass
class Sized:
    size: float = 1.0

    def __post_init__(self) -> None:
        self.size = self.size**2


@dataclass
class Recipe:
    root: str
    model: Model
    teacher: Optimiser | None = None
    steps: int = 10
    names: tuple[str, ...] = ()
    log: Literal["off", "on"] = "on"
    scales: dict[str, float] = field(default_factory=dict)
    out: Path = Path("runs/x")


def load(*overrides: str, path: Path | None = None) -> Recipe:
    return load_config(Recipe, path, ["root=data", "model.depth=3", *overrides])


def test_defaults_file_and_overrides_merge_in_that_order(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("root: data\nsteps: 20\nmodel: {depth: 4, optim: {betas: [0.0, 0.99]}}\n")
    cfg = load_config(
        Recipe, path, ["steps=30", "model.optim.lr=1e-5", "names=[a, b]", "out=runs/y"]
    )
    assert (cfg.steps, cfg.model.depth, cfg.names, cfg.out) == (30, 4, ("a", "b"), Path("runs/y"))
    assert cfg.model.optim == Optimiser(lr=1e-5, betas=(0.0, 0.99))
    assert cfg.model.widths == [8, 16] and cfg.teacher is None


def test_later_files_win_over_earlier_ones(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("root: data\nsteps: 20\nmodel: {depth: 4, optim: {lr: 0.1, warmup: 3}}\n")
    second.write_text("model: {optim: {lr: 0.2}}\n")
    cfg = load_config(Recipe, [first, second], ["steps=30"])
    assert (cfg.steps, cfg.model.depth, cfg.model.optim) == (30, 4, Optimiser(lr=0.2, warmup=3))
    second.write_text("modle: {}\n")
    with pytest.raises(UserError, match=r"b\.yaml: unknown key 'modle'"):
        load_config(Recipe, [first, second])


def test_a_default_section_keeps_its_own_defaults() -> None:
    assert load().model.optim.lr == 3e-4
    assert load("model.optim.warmup=5").model.optim == Optimiser(lr=3e-4, warmup=5)


def test_optional_section_and_optional_value() -> None:
    cfg = load("teacher.lr=0.5", "model.rope=null")
    assert cfg.teacher == Optimiser(lr=0.5) and cfg.model.rope is None
    assert load("teacher={lr: 0.5}", "teacher=null").teacher is None


def test_yaml_round_trip() -> None:
    cfg = load("teacher.lr=0.5", "names=[a]", "model.rope='3d'")
    assert from_yaml(Recipe, to_yaml(cfg)) == cfg
    assert differences(cfg, load("teacher.lr=0.5", "names=[a]", "steps=11")) == {
        "model.rope": ("3d", None),
        "steps": (10, 11),
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stpes=3", ["override 'stpes=3'", "unknown key 'stpes'", "did you mean 'steps'?"]),
        ("model.optim.lrr=3", ["unknown key 'model.optim.lrr'", "did you mean 'model.optim.lr'?"]),
        ("model.zzzz=3", ["section 'model'", "valid keys are depth, fast, widths, rope, optim"]),
        ("teacher.wrmup=1", ["did you mean 'teacher.warmup'?"]),
        ("steps=many", ["steps", "expected int"]),
        ("steps=1.5", ["steps", "expected int"]),
        ("steps=null", ["steps", "expected int"]),
        ("model.widths=[1, x]", ["model.widths", "override"]),
        ("model.optim.lr=-1", ["section 'model.optim'", "lr is -1.0; it must be positive"]),
        ("model.optim.betas=[0.1]", ["model.optim.betas has 1 values; it must have 2"]),
        ("model.optim.kind=lion", ["model.optim.kind is 'lion'", "'adamw', 'sgd'"]),
        ("model=3", ["'model' is a section (depth, fast, widths, rope, optim)"]),
        ("steps", ["write it as name=value or section.name=value, in quotes"]),
        ("steps={", ["not valid YAML"]),
        ("model.optim.lr=${nowhere}", ["model.optim.lr", "expected float"]),
        ("steps=1e3", ["steps is '1e3'", "expected int"]),
        ("steps=99999999999999999999", ["steps", "64 bits"]),
        ("steps=" + "9" * 5000, ["steps", "64 bits"]),
        ("steps=true", ["steps", "expected int"]),
        ("model.optim.lr=.nan", ["model.optim.lr is '.nan'", "finite"]),
        ("model.optim.betas=[0.9, -.inf]", ["model.optim.betas[1] is '-.inf'", "finite"]),
        ("model.optim.lr=1e999", ["model.optim.lr", "finite"]),
        ("model.optim.lr=[1, 2]", ["model.optim.lr", "expected float"]),
        ("scales={a: nan}", ["scales.a is 'nan'", "finite"]),
        ("scales.a.b=1", ["scales.a", "expected float"]),
        ("names='a cat'", ["names is 'a cat'", "expected tuple[str, ...]"]),
        ("root={a: b}", ["root is {'a': 'b'}", "expected str"]),
        ("root=null", ["root", "expected str"]),
        ("model.fast=perhaps", ["model.fast is 'perhaps'", "expected bool"]),
        ('root="a\\0b"', ["root", "NUL"]),
        ('root="\\ud800"', ["root", "surrogate"]),
        ('root="\\UFFFFFFFF"', ["correct the YAML"]),
        ("root=!!str 5", ["tags are not read"]),
        ("root=&a 5", ["anchors and aliases are not read"]),
        ("root=" + "[" * 100000, ["root=[[[", "nested more than"]),
        ("a." * 20000 + "b=1", ["write it as name=value or section.name=value, in quotes"]),
        ("x" * 100000 + "=1", ["unknown key"]),
    ],
)
def test_bad_override_is_one_clear_line(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("root: d\nmodel: {dpeth: 3}\n", ["a.yaml", "model.dpeth", "did you mean 'model.depth'?"]),
        ("root: d\n", ["a.yaml", "missing mandatory model.depth", "model.depth=VALUE"]),
        ("- 1\n", ["a.yaml", "found list"]),
        ("root: [\n", ["a.yaml", "not valid YAML"]),
        ("root: a\nroot: b\n", ["a.yaml", "'root' is given twice"]),
        ("root: &a [1, 2]\nnames: *a\n", ["a.yaml", "anchors and aliases"]),
        ("root: a\n---\nroot: b\n", ["a.yaml", "a second document"]),
        ("root: d\n? [a, b]\n: c\n", ["a.yaml", "a key must be text"]),
        ("root: " + "{a: " * 90 + "1" + "}" * 90 + "\n", ["a.yaml", "nested more than"]),
        ("root: " + "[" * 100000, ["a.yaml", "nested more than"]),
        ("root: a\x00b\n", ["a.yaml", "not valid YAML"]),
        ("#" * (2**20 + 1), ["a.yaml", "more than the 1,048,576"]),
        ("root: !!python/object/apply:os.system ['true']\n", ["a.yaml", "not valid YAML"]),
    ],
)
def test_bad_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(Recipe, path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"none\.yaml: cannot be read .*; check the path of the config file"
    ):
        load_config(Recipe, tmp_path / "none.yaml")


def test_yaml_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("root: '1e-4'\nmodel: {depth: 1, optim: {lr: 2e-6}}\n")
    cfg = load_config(Recipe, path)
    assert cfg.model.optim.lr == 2e-6 and cfg.root == "1e-4"


@pytest.mark.parametrize(
    "word", ["${oc.env:HOME}", "${root}", "???", "off", "no", "1e-4", "007", "1:30", "2026-01-01"]
)
def test_text_is_text_and_never_an_order(word: str, tmp_path: Path) -> None:
    """Interpolation would read the environment; YAML 1.1 would make truth values, dates and numbers
    of the rest."""
    path = tmp_path / "a.yaml"
    path.write_text(f"root: {word}\nmodel: {{depth: 1, rope: '{word}'}}\nnames: ['a {word}']\n")
    cfg = load_config(Recipe, path, [f"out={word}"])
    assert (cfg.root, cfg.model.rope, cfg.names, cfg.out) == (
        word,
        word,
        (f"a {word}",),
        Path(word),
    )
    assert from_yaml(Recipe, to_yaml(cfg)) == cfg
    path.write_text(to_yaml(cfg))
    assert differences(plain_yaml(path), cfg) == {}


@pytest.mark.parametrize(
    "text",
    ["c\x85d\u2028", "a\u200fb", "a\tb", "x\n\n  y: # z\n", " a ", "中文" * 90, "long " * 60],
)
def test_any_text_is_saved_as_it_is(text: str) -> None:
    """Line ends of other alphabets and marks that a terminal hides are escaped."""
    cfg = dataclasses.replace(load("teacher={}"), root=text, names=(text, "b"))
    cfg.model.rope = text
    for saved in (to_yaml(cfg), commented_yaml(cfg)):
        assert from_yaml(Recipe, saved) == cfg
        assert printable(saved) == saved


def test_the_field_says_whether_off_is_text_or_a_truth_value() -> None:
    cfg = load("root=off", "log=off", "model.fast=on", "names=[yes, no, on]")
    assert (cfg.root, cfg.log, cfg.model.fast, cfg.names) == (
        "off",
        "off",
        True,
        ("yes", "no", "on"),
    )
    for word, truth in (
        ("off", False),
        ("No", False),
        ("false", False),
        ("YES", True),
        ("true", True),
    ):
        assert load("model.fast=true", f"model.fast={word}").model.fast is truth


def test_mappings_of_numbers_merge() -> None:
    assert load("scales={a: 1, b: 2}", "scales.b=3e-1").scales == {"a": 1.0, "b": 0.3}
    assert load("scales={a: 1, b: 2}", "scales={}").scales == {}, "empty empties"


def test_an_overflow_in_a_check_is_one_line() -> None:
    with pytest.raises(UserError, match=r"section 'Sized'"):
        load_config(Sized, None, ["size=1e300"])


@dataclass
class Inner:
    backend: Literal["torch", "deepspeed"] = "torch"
    noise: float = 0.0


@dataclass
class Outer:
    teacher: Inner = field(default_factory=Inner)
    teacher_model: str = ""
    sampler: Literal["euler", "few_step"] = "euler"
    rows: list[Inner] = field(default_factory=list)
    maybe: Inner | None = None


@dataclass
class Derived(Outer):
    more: int = 0


def test_old_names_of_fields_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In files, lists, overrides and saved configs; a name that means something else now, too."""
    inner = {"kind": Renamed("backend", {"local": "torch"}), "eta": Renamed("noise")}
    outer = {
        "teacher": Renamed("teacher_model"),
        "teacher_engine": Renamed("teacher"),
        "sampler": Renamed("sampler", {"renoise": "few_step"}),
    }
    monkeypatch.setattr("scd_sf.config.RENAMED", {"Inner": inner, "Outer": outer})
    monkeypatch.setattr("scd_sf.config._printed_notes", set())
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(
        "teacher: wan/14B\nteacher_engine: {kind: local, eta: 0.1}\nsampler: renoise\n"
        "rows: [{eta: 2}, {noise: 3}]\nmaybe: {kind: deepspeed}\n"
    )
    cfg = load_config(Outer, old)
    expected = Outer(
        Inner("torch", 0.1),
        "wan/14B",
        "few_step",
        [Inner(noise=2.0), Inner(noise=3.0)],
        Inner("deepspeed"),
    )
    assert cfg == expected
    notes = capsys.readouterr().err.splitlines()
    assert notes[0] == f"{old}: 'teacher=wan/14B' is 'teacher_model=wan/14B' now"
    assert f"{old}: 'teacher.kind=local' is 'teacher.backend=torch' now" in notes
    assert len(notes) == 5, "one note for each old name"
    assert load_config(Derived, old) == Derived(**vars(cfg)), "in a derived config, too"
    capsys.readouterr()
    new.write_text(to_yaml(cfg))
    assert load_config(Outer, new) == cfg and from_yaml(Outer, old.read_text()) == cfg
    assert load_config(
        Outer, new, ["teacher=other", "teacher_engine.eta=0.2", "maybe.kind=local"]
    ) == Outer(Inner("torch", 0.2), "other", "few_step", cfg.rows, Inner("torch"))
    assert capsys.readouterr().err == ""
    assert differences(stored_settings(Outer, old, str(old)), cfg) == {}
    with pytest.raises(UserError, match=r"teacher\.noise is given twice, once by its old name"):
        load_config(Outer, None, ["teacher={noise: 1, eta: 2}"])
    with pytest.raises(
        UserError, match=r"unknown key 'teacher\.etta' in section 'teacher'; valid keys are backend"
    ):
        load_config(Outer, None, ["teacher.etta=1"])
    with pytest.raises(UserError, match=r"teacher\.noise is 'x' \(expected float\)"):
        load_config(Outer, None, ["teacher_engine.eta=x"])


@dataclass
class Lists:
    prompts: list[str] = field(default_factory=list)
    prompt_file: str = ""
    times: tuple[float, ...] = ()


def test_what_people_type_first_is_refused_with_what_to_type() -> None:
    def line(*arguments: str) -> str:
        with pytest.raises(UserError) as refusal:
            from_command_line(Lists, "words", arguments)
        return str(refusal.value)

    assert line("prompts=p.txt").endswith(
        """a list is written prompts='["FIRST", "SECOND"]', a file prompt_file=FILE"""
    )
    assert line("times=0.5").endswith("a list is written times='[FIRST, SECOND]'")
    assert line("--prompt-file", "p.txt") == (
        "unknown option '--prompt-file'; fields are set without dashes: prompt_file=VALUE"
    )
    assert line("times=[1]", "--zzz=3").endswith(
        "without dashes: name=VALUE, --help lists the names"
    )


def test_values_before_and_behind_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("prompts: [a]\n")
    cfg = from_command_line(Lists, "words", ["prompt_file=x", "--config", str(file), "times=[0.5]"])
    assert cfg == Lists(["a"], "x", (0.5,))


@dataclass
class LaterInner:
    backend: Literal["torch", "deepspeed"] = "torch"
    noise: float = 0.0
    extra: tuple[int, ...] = (1, 2)


@dataclass
class LaterOuter:
    folder: str
    teacher: LaterInner = field(default_factory=lambda: LaterInner(extra=(3,)))
    teacher_model: str = ""
    sampler: Literal["euler", "few_step"] = "euler"
    rows: list[LaterInner] = field(default_factory=list)
    maybe: LaterInner | None = None
    place: Path = Path("runs")
    more: Optimiser = field(default_factory=Optimiser)


def test_fields_that_came_later_are_at_their_defaults(tmp_path: Path) -> None:
    """In sections (with the default of their owner), lists of sections, optional sections and whole
    sections; a changed value, an absent mandatory field and an unknown one stay differences."""
    file = tmp_path / "config.yaml"
    before = Outer(Inner(noise=0.5), rows=[Inner(), Inner("deepspeed")], maybe=Inner())
    file.write_text("folder: here\n" + to_yaml(before))

    def later(**changes: object) -> LaterOuter:
        rows = [LaterInner(), LaterInner("deepspeed")]
        teacher = LaterInner(noise=0.5, extra=(3,))
        whole = LaterOuter("here", teacher, rows=rows, maybe=LaterInner())
        return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]

    def changed(cfg: LaterOuter) -> set[str]:
        return set(differences(stored_settings(LaterOuter, file, str(file)), cfg))

    assert changed(later()) == set()
    assert changed(later(maybe=LaterInner(extra=(9,)))) == {"maybe.extra"}
    assert changed(later(more=Optimiser(lr=1.0))) == {"more.lr"}
    assert changed(later(rows=[LaterInner()])) == {"rows"}
    assert changed(later(sampler="few_step")) == {"sampler"}
    file.write_text(to_yaml(before) + "gone: 1\n")
    assert changed(later()) == {"folder", "gone"}
