"""The sweep of splits: its cuts, its commands, what it collects, and once the whole of it at the
smallest size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import recipe_runner
import tiny_run

from scd_sf.config import load_config
from scd_sf.evaluation.table import Adherence, ResultRow, write_rows
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.scd.transplant import TransplantConfig
from scd_sf.tools.stage_configs import Stage2Config
from scd_sf.types import UserError

SCRIPT = "recipes/sweep_split.py"
sweep: Any = recipe_runner.load_script(SCRIPT)


def plan(run: Path, seeds: tuple[int, ...] = (0,), latents: Path | None = None) -> Any:
    return sweep.Plan(run, Path("assets/wan_doom"), latents or run / "latents", 8, seeds, 4, 4)


def test_cuts_of_the_demos_teacher_and_of_wan() -> None:
    """The demo's and the paper's own split is "both ends"; every cut is one that stage 1 takes."""
    twelve = sweep.cuts(12, sweep.both_ends(12, 2))
    assert (
        twelve["both ends"] == sweep.Cut(tuple(range(10)), (0, 1, 10, 11))
        and twelve["both ends"].work == 1.0
    )
    assert twelve["encoder-heavier"] == sweep.Cut(tuple(range(11)), (0, 11))
    assert twelve["decoder-heavier"] == sweep.Cut(tuple(range(8)), (0, 1, 2, 3, 8, 9, 10, 11))
    assert twelve["early / late"] == sweep.Cut(tuple(range(8)), (8, 9, 10, 11))
    thirty = sweep.cuts(30, sweep.both_ends(30, 10))
    assert thirty["both ends"] == sweep.Cut(tuple(range(25)), (*range(5), *range(25, 30)))
    for depth, found in ((12, twelve), (30, thirty), (6, sweep.cuts(6, sweep.both_ends(6, 1)))):
        assert len(found) == 5
        for cut in found.values():
            ScdConfig(cut.encoder, DecoderConfig(cut.decoder)).check(depth)
            assert set(cut.encoder) | set(cut.decoder) == set(range(depth)), (
                "no layer of the teacher is lost"
            )
    with pytest.raises(UserError, match="at least 6"):
        sweep.cuts(5, sweep.both_ends(5, 1))


def test_commands_fit_their_scripts_and_no_split_is_trained_twice(tmp_path: Path) -> None:
    chosen = sweep.cuts(12, sweep.both_ends(12, 4))
    assert sweep.first_names(chosen)[chosen["leave-one-out"]] == "both ends"
    steps = [step for group in plan(tmp_path, (0, 1)).training(chosen) for step in group]
    assert len({step.name for step in steps}) == len(steps) == 4 + 8
    layers = []
    for step in steps:
        config, given = recipe_runner.ROOT / step.command[3], list(step.command[4:])
        if step.name.startswith("stage1"):
            scd = load_config(TransplantConfig, config, given).scd
            layers.append((scd.encoder_layers, scd.decoder.layers))
        else:
            assert load_config(Stage2Config, config, given).train.steps == 8
    assert set(layers) == {(cut.encoder, cut.decoder) for cut in chosen.values()}
    script = recipe_runner.load_script("recipes/evaluate.py")
    given = list(plan(tmp_path, (0, 1)).scoring(chosen).command[2:])
    rows = load_config(script.EvaluateConfig, None, given).rows
    assert len({row.name for row in rows}) == len(rows) == 4 * 2 * 2
    places = [
        word.removeprefix(f"run.dir={tmp_path}/")
        for step in steps
        for word in step.command
        if "run.dir=" in word
    ]
    assert {row.checkpoint for row in rows} == set(places)


def test_what_is_collected(tmp_path: Path) -> None:
    """Means over training seeds, of losses and rows that are written here; a split of two names
    stands under both."""
    ours, chosen = plan(tmp_path, (0, 1)), sweep.cuts(12, sweep.both_ends(12, 4))
    rows, number = [], 0.0
    for cut, name in sweep.first_names(chosen).items():
        for seed in (0, 1):
            folder = ours.place(2, cut, seed)
            folder.mkdir(parents=True)
            lines = [{"step": 4, "val/loss": 9.0}, {"step": 8, "loss": 1.0, "val/loss": number}]
            (folder / "metrics.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in lines)
            )
            for steps in (4, 50):
                number += 1
                said = Adherence(0.5, 0.25 * seed)
                title = sweep.row_name(name, seed, steps)
                rows.append(
                    ResultRow(
                        title, "scd", "", steps, "euler", number, 1.0, said, 28.0, number / 10, 0.1
                    )
                )
    (tmp_path / "scores").mkdir()
    write_rows(tmp_path / "scores" / "results.json", rows, {})
    found = sweep.collect(ours, chosen)
    assert list(found) == list(chosen)
    assert (
        found["leave-one-out"]["same_as"] == "both ends" and found["both ends"]["same_as"] is None
    )
    assert found["both ends"]["loss"] == [0.0, 2.0] and found["encoder-heavier"]["loss"] == [
        4.0,
        6.0,
    ]
    first = found["both ends"]["steps"]["4"]
    assert (first["video_frechet"], first["video_frechet_by_training_seed"]) == (2.0, [1.0, 3.0])
    assert (first["place"], first["motion"], first["seconds_per_frame"]) == (0.5, 0.125, 0.2)
    assert first["video_frechet_std_over_sampling_seeds"] is None
    assert sweep.draw(ours, found).is_file()
    sweep.show(found, 8)
    (ours.place(2, chosen["both ends"], 1) / "metrics.jsonl").write_text(
        '{"step": 4, "val/loss": 9.0}\n'
    )
    with pytest.raises(UserError, match="no validation loss of update 8"):
        sweep.collect(ours, chosen)


def test_refusals(tmp_path: Path) -> None:
    result = recipe_runner.run(SCRIPT, "--run", tmp_path / "run", "--probe-clips", "1")
    assert result.code == 2 and "--probe-clips at least 2" in result.err
    result = recipe_runner.run(SCRIPT, "--run", tmp_path / "run", "--teacher", tmp_path)
    assert (
        result.code == 2 and "Wan 2.1 directory" in result.err and not (tmp_path / "run").exists()
    )


@pytest.mark.slow
def test_the_whole_sweep_and_again(tmp_path: Path) -> None:
    """Five splits of a 6-layer teacher, two updates each; the second run does nothing and finds the
    same."""
    wan = tiny_run.write_wan(tmp_path / "wan")
    for split, count in (("train", 24), ("val", 12)):
        tiny_run.write_latents(tmp_path / "latents" / split, count, held_out=True)
    run = tmp_path / "run"
    given = [
        "--run",
        run,
        "--teacher",
        wan,
        "--latents",
        tmp_path / "latents",
        "--updates",
        "2",
        "--clips",
        "4",
    ]
    said = recipe_runner.succeed(SCRIPT, *given, "--probe-clips", "3").out
    assert (
        "leaving out each of 6 blocks" in said
        and "Encoder / decoder splits after 2 updates" in said
    )
    document = json.loads((run / "sweep.json").read_text())
    assert len(document["splits"]) == 5 and document["context"]["updates"] == 2
    for split in document["splits"].values():
        early = len(set(split["encoder_layers"]) & set(split["decoder_layers"]))
        for steps, row in split["steps"].items():
            passes = (
                len(split["encoder_layers"]) + early + int(steps) * len(split["decoder_layers"])
            )
            assert (
                row["block_passes_per_frame"] == passes
                and row["video_frechet"] > 0 < row["seconds_per_frame"]
            )
    probed = json.loads((run / "probe" / "leave_one_out.json").read_text())
    proposed = document["splits"]["leave-one-out"]
    assert (
        probed["proposed_split"]["decoder_layers"] == proposed["decoder_layers"]
        and len(probed["blocks"]) == 6
    )
    assert (run / "figures" / "sweep_split.png").stat().st_size > 5000
    again = recipe_runner.succeed(SCRIPT, *given, "--probe-clips", "3").out
    assert "finished before" in again and "leaving out" not in again
    assert json.loads((run / "sweep.json").read_text()) == document
