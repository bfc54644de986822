"""The run directory: metrics, progress, seeds, and refusing to overwrite another run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from scd_sf.checkpoint import provenance
from scd_sf.config import from_yaml
from scd_sf.distributed import Ranks
from scd_sf.train.run import Run, RunConfig, rank_zero_print
from scd_sf.types import UserError

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@dataclass
class Recipe:
    run: RunConfig
    steps: int = 10
    width: int = 8
    extra: dict[str, int] = field(default_factory=dict)


_OPEN: list[Run] = []


def open_run(path: Path, steps: int = 10, width: int = 8, **changes: object) -> Run:
    """A new job, after the one before has ended."""
    while _OPEN:
        _OPEN.pop().finish()
    recipe = Recipe(RunConfig(str(path), **changes), steps, width)  # type: ignore[arg-type]
    _OPEN.append(Run(recipe.run, ALONE, config=recipe, may_change=("steps",)))
    return _OPEN[-1]


def save(run: Run, step: int) -> None:
    run.checkpoints.write(
        step, {"model": {"w": torch.ones(1)}}, "", provenance(stage="t", step=step, seed=0)
    )


def test_metrics_config_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(tmp_path / "run", log_every=2)
    run.start()
    for step in run.progress(total=5):
        run.log(step, {"loss": 1.0 / step, "odd": float("nan")})
    run.finish()
    records = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"], r["odd"]) for r in records] == [
        (s, 1.0 / s, None) for s in range(1, 6)
    ]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/5", "2/5", "4/5", "5/5"]
    assert "loss 0.5" in lines[1] and "s/step" in lines[1] and "left 0:00:0" in lines[1]
    assert from_yaml(Recipe, run.dir / "config.yaml").width == 8
    assert list((run.dir / "tensorboard").iterdir())


def test_resume_drops_later_records_and_a_cut_line(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    for step in (1, 2, 3):
        run.log(step, {"loss": 0.0})
    run.finish()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    again = open_run(tmp_path, steps=20)
    again.start(2)
    again.log(3, {"loss": 9.0})
    again.finish()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in records] == [(1, 0.0), (2, 0.0), (3, 9.0)]


@pytest.mark.parametrize(
    "odd", ["[]", "7", '{"loss": 1}', '{"step": "1"}', '{"step": 1e0}', "[" * 10000, "\udcff"]
)
def test_an_odd_line_of_the_metrics_forbids_nothing(
    tmp_path: Path, odd: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(tmp_path)
    run.log(1, {"loss": 0.5})
    run.finish()
    with (tmp_path / "metrics.jsonl").open("a", errors="surrogateescape") as file:
        file.write(f"{odd}\n")
    run = open_run(tmp_path)
    run.start(1)
    run.log(2, {"loss": 0.25})
    run.finish()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and "1 lines are no records" in caplog.text


@pytest.mark.parametrize("name", ["notes.txt", "save", ".git", "config.yaml", "checkpoints"])
def test_a_folder_of_others_is_no_run_directory(tmp_path: Path, name: str) -> None:
    """Nothing is written into it, not even the lock; what a run left that did not come to begin is
    no stranger's."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("other: 1\n")
    with pytest.raises(UserError, match=r"holds other files|is 1 there but"):
        open_run(tmp_path / "mine")
    left = {path.name for path in (tmp_path / "mine").iterdir()} - (
        {".lock"} if name == "config.yaml" else set()
    )
    assert left == {name} and (tmp_path / "mine" / name).read_text() == "other: 1\n"
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".lock").write_text("process 1 of here\n")
    open_run(tmp_path / "begun")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"dir": ""}, "dir is empty"),
        ({"dir": " "}, "dir is empty"),
        ({"heartbeat_seconds": 1e-9}, "heartbeat_seconds is 1e-09; it must be between"),
        ({"heartbeat_seconds": 1e12}, "heartbeat_seconds is"),
        ({"timeout_minutes": 1e300}, "timeout_minutes is"),
        ({"peak_tflops": -1.0}, "peak_tflops is"),
    ],
)
def test_fields_out_of_range(field: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RunConfig(**{"dir": "runs/x", **field})  # type: ignore[arg-type]


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(tmp_path)
    run.log(1, {"loss": 0.5})
    run.finish()

    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    run = open_run(tmp_path)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run.start(1)
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_another_configuration_is_refused_by_key(tmp_path: Path) -> None:
    open_run(tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(
        UserError, match=r"config\.yaml: width is 8 there but 9 now; nothing is overwritten"
    ):
        open_run(tmp_path, width=9)
    assert (tmp_path / "config.yaml").read_text() == before
    with pytest.raises(UserError, match=r"run\.seed is 0 there but 3 now; .*, or run\.seed=0 to"):
        open_run(tmp_path, seed=3)
    open_run(tmp_path, steps=20, log_every=3, timeout_minutes=1.0)


def test_resume_policy(tmp_path: Path) -> None:
    assert open_run(tmp_path).resume_from() is None
    with pytest.raises(UserError, match="resume was asked for but there is no checkpoint"):
        open_run(tmp_path, resume="must").resume_from()
    run = open_run(tmp_path)
    save(run, 4)
    assert open_run(tmp_path, resume="must").resume_from() == run.checkpoints.path(4)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match="resume is 'never'"):
        open_run(tmp_path, resume="never").resume_from()
    assert (tmp_path / "config.yaml").read_text() == before


def test_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the run directory .*; set run\.dir"):
        open_run(tmp_path / "file" / "run")


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(RunConfig(str(tmp_path / "run")))
    other = Ranks(1, 1, 1, torch.device("cpu"))
    run = Run(recipe.run, other, config=recipe)
    for step in run.progress(total=2):
        run.log(step, {"loss": 1.0})
    run.finish()
    rank_zero_print(other, "hello")
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


@dataclass
class LaterRecipe:
    run: RunConfig
    steps: int = 10
    width: int = 8
    extra: dict[str, int] = field(default_factory=dict)
    depth: int = 3


def test_a_field_that_was_added_since_is_no_other_configuration(tmp_path: Path) -> None:
    """The run goes on with the field's default, and not with another value; then its config.yaml
    has the field."""
    open_run(tmp_path).finish()
    for depth in (3, 4):
        recipe = LaterRecipe(RunConfig(str(tmp_path)), depth=depth)
        if depth == 4:
            with pytest.raises(UserError, match="depth is 3 there but 4 now"):
                Run(recipe.run, ALONE, config=recipe)
            continue
        Run(recipe.run, ALONE, config=recipe).finish()
        assert from_yaml(LaterRecipe, tmp_path / "config.yaml").depth == 3
