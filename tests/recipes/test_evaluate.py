"""Scoring by the real script: the table's rows, what is drawn again and what is not, and
refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import recipe_runner
import tiny_run
from tiny_run import Chain

from scd_sf.config import load_config
from scd_sf.data.latents import LatentClip
from scd_sf.evaluation.table import read_rows
from scd_sf.types import UserError

SCRIPT = "recipes/evaluate.py"
ROWS = [
    {"name": "teacher", "stage": "teacher", "steps": 3, "guidance": {"scale": 3.0}, "seeds": [0]},
    {"name": "student", "checkpoint": "stage2", "stage": "2", "steps": 3},
    {"name": "distilled", "checkpoint": "stage3", "stage": "3", "sampler": "renoise", "steps": 4},
]


def arguments(chain: Chain, data: Path, out: Path, rows: list[dict[str, object]]) -> list[str]:
    settings = [
        "clips=6",
        "batch=4",
        "timing_repeats=2",
        "timing_seconds=60",
        f"rows={json.dumps(rows)}",
    ]
    return [
        f"base={chain.wan}",
        f"train={data}/train",
        f"val={data}/val",
        f"root={chain.root}",
        f"out={out}",
        *settings,
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    tiny_run.write_latents(root / "train", 24, held_out=True)
    tiny_run.write_latents(root / "val", 12, 1, held_out=True)
    return root


def test_rows_and_what_a_second_run_draws_again(chain: Chain, data: Path) -> None:
    out = data / "results"
    untrained = {**ROWS[2], "checkpoint": "not-trained-yet"}
    early = arguments(chain, data, out, [*ROWS[:2], untrained])
    said = recipe_runner.succeed(SCRIPT, *early, "sample_stages=[teacher,'2']").out
    assert "sampled 2/2 student" in said and not (out / "results.json").exists()
    drawn = {file.name: file.stat().st_mtime_ns for file in (out / "samples").iterdir()}
    assert sorted(drawn) == ["student.safetensors", "teacher.safetensors"]
    said = recipe_runner.succeed(SCRIPT, *arguments(chain, data, out, ROWS)).out
    assert "scored 3/3 distilled" in said and "shuffled prompts" in said, (
        "the table is not folded in a log"
    )
    rows, context = read_rows(out / "results.json")
    by_name = {row.name: row for row in rows}
    assert list(by_name) == [r["name"] for r in ROWS] + [
        "copy of the last frame",
        "other real clips",
        "shuffled prompts",
    ]
    assert [by_name[name].family for name in ("teacher", "student", "distilled")] == [
        "bidirectional",
        "scd",
        "scd",
    ]
    # 6 layers x 3 steps x 2 (CFG); encoder 3 + early 1 + decoder 2 x steps
    assert [by_name[n].block_passes_per_frame for n in ("teacher", "student", "distilled")] == [
        36.0,
        10.0,
        12.0,
    ]
    assert by_name["teacher"].spread_over is None and by_name["student"].spread_over == "2 seeds"
    assert context["clips"] == 6 and (out / "gallery.html").is_file()

    before = {file.name: file.stat().st_mtime_ns for file in (out / "samples").iterdir()}
    assert sorted(before) == ["distilled.safetensors", "student.safetensors", "teacher.safetensors"]
    assert {name: before[name] for name in drawn} == drawn, (
        "what was drawn early is not drawn again"
    )
    changed = [*ROWS[:2], {**ROWS[2], "weights": "model"}]
    recipe_runner.succeed(SCRIPT, *arguments(chain, data, out, changed))
    after = {file.name: file.stat().st_mtime_ns for file in (out / "samples").iterdir()}
    assert [name for name in sorted(before) if before[name] != after[name]] == [
        "distilled.safetensors"
    ]


def test_nothing_to_score_or_too_many_clips(chain: Chain, data: Path) -> None:
    result = recipe_runner.run(SCRIPT, *arguments(chain, data, data / "none", []))
    assert result.code == 2 and "rows" in result.err
    result = recipe_runner.run(SCRIPT, *arguments(chain, data, data / "none", ROWS), "clips=7")
    assert result.code == 2 and "at most 6" in result.err
    result = recipe_runner.run(
        SCRIPT, *arguments(chain, data, data / "none", ROWS), "sample_stages=[4]"
    )
    assert result.code == 2 and "sample_stages" in result.err


def test_what_cannot_be_scored() -> None:
    schema = recipe_runner.load_script(SCRIPT).EvaluateConfig
    folders = [f"{name}=x" for name in ("base", "train", "val", "root", "out")]
    for change, words in (
        ("clips=0", "clips, batch, gallery_clips, timing_repeats must be at least 1"),
        ("batch=-1", "must be at least 1"),
        ("seeds=[]", r"seeds is \[\]"),
        ("fps=0", "fps is 0"),
    ):
        with pytest.raises(UserError, match=words):
            load_config(schema, None, [*folders, change])


def test_clips_without_tags() -> None:
    clips = SimpleNamespace(root=Path("val"), rows=[LatentClip("c", 0, None, {"place": "hall"})])
    with pytest.raises(UserError, match=r"clips\.jsonl:1: tags lack motion; the judges need both"):
        recipe_runner.load_script(SCRIPT).require_tags(clips)


def test_what_others_left_in_its_folder(chain: Chain, data: Path, tmp_path: Path) -> None:
    """Nothing of theirs is overwritten; samples that are damaged are named."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    given = arguments(chain, data, out, ROWS[1:2])
    result = recipe_runner.run(SCRIPT, *given)
    assert result.code == 2 and "no judges.safetensors of ours" in result.err
    (out / "thesis.txt").unlink()
    recipe_runner.succeed(SCRIPT, *given, "sample_stages=['2']")
    for name in ("results.json", "gallery.html"):
        (out / name).write_text("mine")
        result = recipe_runner.run(SCRIPT, *given)
        assert result.code == 2 and f"{name}: is there and not of ours" in result.err
        (out / name).unlink()
    file = out / "samples" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    result = recipe_runner.run(SCRIPT, *given)
    assert result.code == 2 and "student.safetensors" in result.err and "drawn again" in result.err
