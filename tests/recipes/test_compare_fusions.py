"""The comparison of fusions: its commands, what it collects, and once the whole of it at the
smallest size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import recipe_runner

from scd_sf.config import load_config
from scd_sf.evaluation.table import Adherence, ResultRow, write_rows
from scd_sf.models.scd.transplant import TransplantConfig
from scd_sf.tools.stage_configs import Stage2Config, Stage3Config
from scd_sf.types import UserError

SCRIPT = "recipes/compare_fusions.py"
compare: Any = recipe_runner.load_script(SCRIPT)


def plan(run: Path) -> Any:
    return compare.Plan(
        run, Path("assets/wan_doom"), run / "latents", tuple(compare.FUSIONS), (0, 1), 4
    )


def test_every_fusion_is_trained_as_the_demo_trains_its_own(tmp_path: Path) -> None:
    """Configs, budgets and layers are the demo's; the fusion is all that differs, and one training
    runs at a time."""
    ours, demo = plan(tmp_path), recipe_runner.load_script("recipes/demo.py")
    assert all(len(group) == 1 for group in ours.training())
    steps = [group[0] for group in ours.training()]
    assert len({step.name for step in steps}) == len(steps) == 4 + 2 * 4 * 2
    assert [step.name for step in steps[4:6]] == ["stage2-delta-s0", "stage3-delta-s0"]
    schemas: dict[str, type[Any]] = {
        "stage1": TransplantConfig,
        "stage2": Stage2Config,
        "stage3": Stage3Config,
    }
    own = load_config(
        TransplantConfig,
        recipe_runner.ROOT / "recipes/configs/demo_stage1_scd.yaml",
        ["base=", "out="],
    )
    decoders = []
    for step in steps:
        stage = step.name.split("-")[0]
        cfg: Any = load_config(
            schemas[stage], recipe_runner.ROOT / step.command[3], list(step.command[4:])
        )
        assert all(str(place).startswith(str(tmp_path)) for place in step.outputs)
        if stage == "stage1":
            assert cfg.scd.encoder_layers == own.scd.encoder_layers
            assert cfg.scd.decoder.layers == own.scd.decoder.layers
            decoders.append(
                (cfg.scd.decoder.fusion, cfg.scd.decoder.prefix_rope, cfg.scd.decoder.prefix)
            )
    assert (
        decoders[0]
        == ("delta", "identical", "full")
        == (own.scd.decoder.fusion, "identical", "full")
    )
    assert decoders[2] == ("paper", "temporal", "full") and [row[0] for row in decoders] == list(
        compare.FUSIONS
    )
    theirs = demo.training_steps(tmp_path, Path("assets/wan_doom"), 0)[1][0].command
    assert list(theirs) == [
        word.replace("-delta-s0", "-scd").replace("-delta", "-scd") for word in steps[4].command
    ]


def test_rows_name_every_training_and_sampler(tmp_path: Path) -> None:
    ours, script = plan(tmp_path), recipe_runner.load_script("recipes/evaluate.py")
    rows = load_config(script.EvaluateConfig, None, list(ours.scoring().command[2:])).rows
    assert len({row.name for row in rows}) == len(rows) == 4 * 2 * 3
    places = {step.outputs[0].parent.name for group in ours.training()[4:] for step in group}
    assert {row.checkpoint for row in rows} == places
    assert {(row.stage, row.sampler, row.steps, row.weights) for row in rows} == {
        ("2", "euler", 50, "ema"),
        ("2", "euler", 4, "ema"),
        ("3", "renoise", 4, "best"),
    }


def test_what_is_collected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each seed's own figures, from losses and rows that are written here."""
    ours, rows, number = plan(tmp_path), [], 0.0
    for fusion in ours.fusions:
        for seed in ours.seeds:
            folder = ours.place(2, fusion, seed)
            folder.mkdir(parents=True)
            lines = [
                {"step": 4, "val/loss": 9.0},
                {"step": 8, "val/loss": number},
                {"step": 8, "loss": 1.0},
            ]
            (folder / "metrics.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in lines)
            )
            for way in compare.SAMPLINGS:
                number += 1
                name, said = compare.row_name(fusion, seed, way), Adherence(0.5, 0.25 * seed)
                rows.append(
                    ResultRow(
                        name,
                        "scd",
                        str(way.stage),
                        way.steps,
                        way.sampler,
                        number,
                        1.0,
                        said,
                        28.0,
                        0.1,
                        0.1,
                    )
                )
    (tmp_path / "scores").mkdir()
    write_rows(tmp_path / "scores" / "results.json", rows, {})
    document = compare.collect(ours)
    assert list(document) == list(compare.FUSIONS) and document["delta"]["loss"] == [0.0, 3.0]
    assert document["channel"]["samplings"]["stage 3, 4 renoise"]["video_frechet"] == [9.0, 12.0]
    assert document["channel"]["samplings"]["stage 2, 50 euler"]["motion"] == [0.0, 0.25]
    compare.show(document)
    assert "10.5 (9.0 12.0)" in capsys.readouterr().out
    (ours.place(2, "paper", 1) / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="run --part train first"):
        compare.collect(ours)


def test_refusals(tmp_path: Path) -> None:
    result = recipe_runner.run(SCRIPT, "--run", tmp_path / "run", "--updates", "0")
    assert result.code == 2 and "--updates must be at least 1" in result.err
    result = recipe_runner.run(SCRIPT, "--run", tmp_path / "run", "--part", "score")
    assert (
        result.code == 2
        and "run --part train first" in result.err
        and not (tmp_path / "run").exists()
    )
