"""VBench's list, extended prompts, and names that are files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recipe_runner

from scd_sf.evaluation.vbench.prompts import (
    FLICKERING,
    check_collisions,
    chosen_dimensions,
    dimensions,
    is_case_blind,
    load_entries,
    prompts_hash,
    read_extended,
    select,
    video_name,
)
from scd_sf.types import UserError


def test_the_list() -> None:
    """946 entries, 944 prompts, the counts of the constants; a rewritten full_info gives the same
    hash."""
    entries = load_entries()
    everything = [d.name for d in dimensions()]
    assert len(entries) == 946 and len(select(entries, everything)) == 944 and len(everything) == 16
    for d in dimensions():
        assert sum(d.name in entry.dimensions for entry in entries) == d.prompts
    assert sum(d.weight for d in dimensions() if d.group == "quality") == 6.5
    rest = select(entries, [name for name in everything if name != FLICKERING])
    assert len(rest) * 5 + 75 * 25 == 6220
    assert max(len(video_name(entry.prompt, 4).encode()) for entry in entries) == 216
    check_collisions(
        [entry.prompt for entry in select(entries, everything)], Path("x"), case_blind=False
    )


def test_a_file_like_vbenchs(tmp_path: Path) -> None:
    path, entries = tmp_path / "full.json", load_entries()
    path.write_text(
        json.dumps([{"prompt_en": e.prompt, "dimension": e.dimensions} for e in entries])
    )
    assert prompts_hash(load_entries(str(path))) == prompts_hash(entries)
    for text, words in (
        ("[]", "no entry"),
        ("{", "not JSON"),
        ('[{"prompt_en": "a", "dimension": [[]]}]', "entry 0 has"),
        ("[3]", "entry 0 has"),
        ('[{"prompt_en": "a"}]', "entry 0 has no prompt_en"),
        ('[{"prompt_en": "a", "dimension": ["beauty"]}]', "entry 0"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            load_entries(str(path))
    assert chosen_dimensions(["scene", "object class"]) == ["object_class", "scene"]
    with pytest.raises(UserError, match="'beauty' is none of VBench's"):
        chosen_dimensions(["beauty"])


def test_extended_prompts_by_line(tmp_path: Path) -> None:
    """Line k belongs to entry k; U+2028 inside a prompt ends no line; missing and empty lines are
    named."""
    entries, path = load_entries(), tmp_path / "extended.txt"
    lines = [f"long {entry.line}\u2028 words" for entry in entries]
    path.write_text("\r\n".join(lines) + "\n", encoding="utf-8", newline="")
    assert read_extended(path, entries) == lines
    path.write_text("\n".join(lines[:944]))
    with pytest.raises(UserError, match="944 lines for 946 prompts"):
        read_extended(path, entries)
    path.write_text("\n".join([*lines[:3], "", *lines[4:]]) + "\n")
    with pytest.raises(UserError, match="line 4 is empty"):
        read_extended(path, entries)
    shown = recipe_runner.run("vbench_eval/prompts.py", f"extended={path}")
    assert shown.code == 2 and "line 4 is empty" in shown.err
    shown = recipe_runner.succeed("vbench_eval/prompts.py", "dimensions=[scene]", "lines=true")
    assert (
        shown.out.splitlines()[0] == "776\tscene,background_consistency\talley"
        and shown.out.count("\n") == 86
    )


def test_names() -> None:
    assert video_name("a dog. A cat..", 3) == "a dog. A cat..-3.mp4"
    for prompt in (
        "a/b",
        "../x",
        "..",
        ".hidden",
        "",
        " ",
        "a\0b",
        "a\nb",
        "a\\b",
        "\ud800",
        "x" * 241,
        "ü" * 121,
    ):
        with pytest.raises(UserError, match=r"cannot be a file's name|its file name has"):
            video_name(prompt, 0)


def test_disks_that_do_not_tell_case_apart(tmp_path: Path) -> None:
    """VBench has "a fantasy landscape" and "A fantasy landscape"."""
    assert not is_case_blind(tmp_path / "not" / "there") and not list(tmp_path.iterdir())
    every = [video_name(e.prompt, 0) for e in select(load_entries(), chosen_dimensions([]))]
    check_collisions(every, tmp_path, case_blind=False)
    with pytest.raises(
        UserError, match=r"'[aA] fantasy landscape-0.mp4' and .* case-sensitive disk"
    ):
        check_collisions(every, tmp_path, case_blind=True)
    with pytest.raises(UserError, match="would be one file"):
        check_collisions(["caf\u00e9.mp4", "cafe\u0301.mp4"], tmp_path, case_blind=False)
