"""The whole chain on a small list of its own making: what goes where, the same on any number of
processes, stable when rows are added, readable by what comes after it, whole after a kill."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import random
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import recipe_runner
from recipe_runner import At

from scd_sf.data.prompt_files import SCORES, read_prompt_file
from scd_sf.files import locked, read_json, read_jsonl
from scd_sf.tools.prompts.filter.chain import FilterConfig, rank
from scd_sf.tools.prompts.filter.report import run_filter
from scd_sf.types import UserError

SCRIPT = "data_prep/filter_vidprom.py"
LONG = "an old lighthouse keeper climbs the narrow stairs while the storm outside throws waves against the white tower"
ROWS = [  # prompt, largest score, the step that drops it
    (LONG, 0.01, ""),
    ("a cat, sleeping on the warm roof -gs 16 -motion 2", 0.049, ""),
    ("something not for everybody in a room", 0.05, "nsfw"),
    ("two words", 0.0, "length"),
    ("word " * 121, 0.0, "length"),
    ("12 345 67 89 ab", 0.0, "letters"),
    ("a cat runnnnnnning over the street", 0.0, "letters"),
    ("una mujer caminando por la calle bajo la lluvia", 0.0, "language"),
    ('A CAT "sleeping"\non the   warm roof!', 0.0, "exact duplicates"),
    (LONG.replace("white", "bright"), 0.0, "near-duplicates"),
    ("a horse gallops\u2028through shallow water\u0085at dawn", 0.0, ""),
    ("", 0.0, "length"),
    ("very violent scene in the old street", 0.6, "nsfw"),
]


def write_csv(path: Path, rows: list[tuple[str, float, str]], first: int = 0) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uuid", "prompt", "time", *SCORES])
        for number, (prompt, score, _) in enumerate(rows, first):
            scores = [f"{score / 2:.8f}"] * 5
            scores.insert(number % 6, f"{score:.8f}")
            writer.writerow([f"id-{number:06d}", prompt, "Sun Sep  3 12:27:44 2023", *scores])
    return path


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "modelled_rows", recipe_runner.ROOT / "benchmarks" / "vidprom.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept(out: Path) -> list[str]:
    return [str(row["uuid"]) for row in read_jsonl(out / "prompts.jsonl", "")]


def test_every_step_drops_what_it_should(tmp_path: Path) -> None:
    cfg = FilterConfig(
        (str(write_csv(tmp_path / "a.csv", ROWS)),), str(tmp_path / "out"), workers=1
    )
    report: Any = read_json(run_filter(cfg), "")
    steps = {step["name"]: step for step in report["steps"]}
    assert list(steps) == [
        "parse",
        "clean",
        "nsfw",
        "length",
        "letters",
        "language",
        "exact duplicates",
        "near-duplicates",
    ]
    for name, step in steps.items():
        wanted = [f"id-{number:06d}" for number, row in enumerate(ROWS) if row[2] == name]
        assert [example["uuid"] for example in step["examples"]] == wanted
        assert step["rows_in"] - step["rows_out"] == len(wanted)
    assert steps["nsfw"]["counts"] == {"at 0.05": 2, "at 0.2": 1, "at 0.5": 1}
    assert steps["nsfw"]["settings"]["threshold"] == 0.05 and "violent" not in json.dumps(report)
    assert steps["clean"]["counts"] == {"changed": 4} and steps["language"]["counts"] == {
        "languages": {"es": 1}
    }
    assert steps["near-duplicates"]["examples"][0]["repeats"] == LONG
    assert report["licence"].startswith("CC BY-NC 4.0") and report["kept"] == 3
    rows: Any = read_jsonl(tmp_path / "out" / "prompts.jsonl", "")
    assert rows[0]["original"] is None and rows[1]["original"] == ROWS[1][0]
    assert (
        rows[1]["prompt"] == "a cat, sleeping on the warm roof"
        and rows[1]["scores"]["obscene"] == 0.049
    )
    page = (tmp_path / "out" / "report.md").read_text()
    assert (
        "13 prompts in, 3 kept" in page
        and "| language | 6 | 5 | 1 | 16.67% |" in page
        and LONG in page
    )
    texts = [row["prompt"] for row in rows]
    assert (tmp_path / "out" / "prompts.txt").read_text() == "".join(f"{text}\n" for text in texts)
    for name in ("prompts.jsonl", "prompts.txt"):
        assert [row.prompt for row in read_prompt_file(tmp_path / "out" / name)] == texts
    again = replace(
        cfg,
        inputs=(str(tmp_path / "out" / "prompts.jsonl"),),
        out=str(tmp_path / "again"),
        licence="mine",
    )
    assert read_json(run_filter(again), "")["licence"] == "mine" and kept(
        tmp_path / "again"
    ) == kept(tmp_path / "out")


@pytest.mark.slow
def test_the_same_on_two_processes_and_when_rows_are_added(
    generator: ModuleType, tmp_path: Path
) -> None:
    whole, part = tmp_path / "whole.csv", tmp_path / "part.csv"
    generator.write_rows(whole, 3000, 1)
    with whole.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows[:2001])
    part.write_text(text.getvalue(), encoding="utf-8", newline="")
    assert whole.read_bytes().startswith(part.read_bytes())

    result = recipe_runner.succeed(SCRIPT, f"inputs=[{whole}]", f"out={tmp_path}/two", "workers=2")
    assert "report.md" in result.out
    base = FilterConfig((str(whole),), str(tmp_path / "one"), workers=1)
    run_filter(base)
    for name in ("prompts.jsonl", "prompts.txt"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    run_filter(replace(base, inputs=(str(part),), out=str(tmp_path / "part")))
    before = {row[0] for row in rows[1:2001]}
    assert kept(tmp_path / "part") == [name for name in kept(tmp_path / "one") if name in before]
    assert len(kept(tmp_path / "part")) < len(kept(tmp_path / "one")) < 2600

    run_filter(replace(base, out=str(tmp_path / "drawn"), sample=300, seed=5))
    run_filter(
        replace(base, inputs=(str(part),), out=str(tmp_path / "drawn part"), sample=300, seed=5)
    )
    drawn, drawn_part = kept(tmp_path / "drawn"), kept(tmp_path / "drawn part")
    assert len(drawn) == len(drawn_part) == 300 and drawn == [
        n for n in kept(tmp_path / "one") if n in set(drawn)
    ]
    assert (
        sorted(drawn_part, key=lambda n: rank(5, n))
        == sorted(kept(tmp_path / "part"), key=lambda n: rank(5, n))[:300]
    )
    # newer rows may push out, but never let another old one in
    assert set(drawn) & before <= set(drawn_part)
    report: Any = read_json(tmp_path / "drawn" / "report.json", "")
    assert report["steps"][-1]["name"] == "sample" and report["steps"][-1]["examples"] == []


@pytest.mark.slow
def test_killed_while_writing(tmp_path: Path) -> None:
    source = f"inputs=[{write_csv(tmp_path / 'a.csv', ROWS)}]"
    writes = "pathlib:Path.replace"
    calls = recipe_runner.run(
        SCRIPT, source, f"out={tmp_path}/out", "workers=1", at=At(writes, 99)
    ).calls
    assert calls == 5
    names = ("prompts.jsonl", "prompts.txt", "report.md")
    whole = {name: (tmp_path / "out" / name).read_bytes() for name in names}
    for call in (1, 2, calls):
        out = tmp_path / str(call)
        killed = recipe_runner.run(SCRIPT, source, f"out={out}", "workers=1", at=At(writes, call))
        assert killed.code < 0 and not (out / "report.json").exists()
        run_filter(FilterConfig((str(tmp_path / "a.csv"),), str(out), workers=1))
        assert {name: (out / name).read_bytes() for name in whole} == whole


def test_a_folder_is_finished_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = FilterConfig(
        (str(write_csv(tmp_path / "a.csv", ROWS)),), str(tmp_path / "out"), workers=1
    )
    run_filter(cfg)
    stamp = (tmp_path / "out" / "report.json").stat().st_mtime_ns
    run_filter(replace(cfg, examples=2, workers=0))
    assert "already complete" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.json").stat().st_mtime_ns == stamp
    (tmp_path / "out" / "prompts.txt").unlink()
    run_filter(cfg)
    assert (tmp_path / "out" / "report.json").stat().st_mtime_ns != stamp and len(
        kept(tmp_path / "out")
    ) == 3
    (tmp_path / "out" / "prompts.txt").write_text("my own changes")
    with pytest.raises(
        UserError, match=r"prompts\.txt: was changed since report\.json was written; move it away"
    ):
        run_filter(cfg)
    assert (tmp_path / "out" / "prompts.txt").read_text() == "my own changes"
    with pytest.raises(UserError, match=r"begun with other nsfw; nothing is overwritten"):
        run_filter(replace(cfg, nsfw=0.2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"full: holds other files \(thesis\.txt\)"):
        run_filter(replace(cfg, out=str(tmp_path / "full")))


def test_bad_rows_are_left_out_up_to_a_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        f'{{"prompt": "{LONG}"}}',
        '{"prompt": "a \\ud800"}',
        "[1]",
        '{"prompt": "b", "time": 5}',
        "{" * 9999,
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    report: Any = read_json(
        run_filter(FilterConfig((str(tmp_path / "b.jsonl"),), str(tmp_path / "out"), workers=1)), ""
    )
    counts = report["steps"][0]["counts"]
    assert (
        counts["rows that cannot be read"] == 4 and "b.jsonl: line 2: not JSON" in counts["first"]
    )
    assert report["steps"][0]["rows_in"] == 5 and "left out: 4 rows" in capsys.readouterr().out
    (tmp_path / "c.jsonl").write_text("\n".join(lines * 3))
    with pytest.raises(
        UserError, match=r"12 of 15 rows cannot be read; the first: .*c\.jsonl: line 2"
    ):
        run_filter(FilterConfig((str(tmp_path / "c.jsonl"),), str(tmp_path / "third"), workers=1))
    assert not (tmp_path / "third").exists()


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_csv(tmp_path / "a.csv", ROWS[3:8])
    cfg = FilterConfig((str(path),), str(tmp_path / "out"), workers=1)
    with pytest.raises(UserError, match=r"none of 5 prompts passed \(length dropped 2\)"):
        run_filter(cfg)
    twice = (
        write_csv(tmp_path / "b.csv", [(LONG, 0.0, "")], first=0),
        write_csv(tmp_path / "c.csv", [ROWS[10]], first=0),
    )
    with pytest.raises(UserError, match=r"uuid id-000000 names two different prompts"):
        run_filter(replace(cfg, inputs=tuple(map(str, twice))))
    with pytest.raises(UserError, match=r"no prompt in it"):
        run_filter(replace(cfg, inputs=(str(write_csv(tmp_path / "d.csv", [])),)))
    for change in (
        {"nsfw": 1.5},
        {"min_words": 9, "max_words": 3},
        {"sample": -1},
        {"inputs": ()},
        {"run": 0},
    ):
        with pytest.raises(ValueError, match=r"must|empty"):
            replace(cfg, **change)
    result = recipe_runner.run(SCRIPT, f"inputs=[{tmp_path}/none.csv]", f"out={tmp_path}/out")
    assert (
        result.code == 2
        and result.err.startswith("error: ")
        and "none.csv: cannot be read" in result.err
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rensa" else 1)
    with pytest.raises(
        UserError, match=r"package rensa is missing; install it with: pip install scd-sf\[data\]"
    ):
        run_filter(cfg)
    assert not (tmp_path / "out").exists()


def test_lists_without_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(3)
    lines = [" ".join(rng.sample(LONG.split(), 8)) for _ in range(20)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    report: Any = read_json(
        run_filter(FilterConfig((str(tmp_path / "a.txt"),), str(tmp_path / "out"), workers=1)), ""
    )
    assert (
        report["steps"][2]["counts"] == {"not applied": "no scores"}
        and report["licence"] == "not stated; set licence="
    )
    assert "nsfw: not applied (no scores)\n" in capsys.readouterr().out, "not as if all had passed"
    assert read_jsonl(tmp_path / "out" / "prompts.jsonl", "")[0]["scores"] is None
    (tmp_path / "b.txt").write_text("...\n!!!\na\n")  # keys without a word, shorter than a shingle
    everything = FilterConfig(
        (str(tmp_path / "b.txt"),),
        str(tmp_path / "b"),
        min_words=0,
        letters=0.0,
        language_score=1.0,
        workers=1,
    )
    run_filter(everything)
    assert (tmp_path / "b" / "prompts.txt").read_text() == "...\na\n"


def test_nothing_of_others_is_overwritten(tmp_path: Path) -> None:
    """An input inside out=, a prompts.txt or a report.md that were there, somebody at work in the
    folder."""
    (tmp_path / "own").mkdir()
    own, out = write_csv(tmp_path / "own" / "prompts.jsonl.csv", ROWS), tmp_path / "out"
    cfg = FilterConfig((str(own),), str(tmp_path / "own"), workers=1)
    with pytest.raises(UserError, match=r"holds prompts\.jsonl\.csv, one of the inputs"):
        run_filter(cfg)
    for name in ("prompts.txt", "report.md", "report.json", "settings.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text('{"mine": 1}')
        with pytest.raises(UserError):
            run_filter(replace(cfg, out=str(folder)))
        assert [file.name for file in folder.iterdir() if file.name != ".lock"] == [name]
        assert (folder / name).read_text() == '{"mine": 1}'
    with locked(out, "filter_vidprom"), pytest.raises(UserError, match="is at work in it"):
        run_filter(replace(cfg, out=str(out)))
    run_filter(replace(cfg, out=str(out)))
    with pytest.raises(UserError, match=r"holds prompts\.jsonl, one of the inputs"):
        run_filter(replace(cfg, inputs=(str(out),), out=str(out)))
    run_filter(replace(cfg, inputs=(str(out),), out=str(tmp_path / "again")))
    assert kept(tmp_path / "again") == kept(out)
