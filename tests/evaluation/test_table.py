"""Rows survive JSON, the table shows every column, passes are counted exactly."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from scd_sf.evaluation.table import (
    COLUMNS,
    Adherence,
    BlockPassCounter,
    ResultRow,
    read_rows,
    result_table,
    write_rows,
)
from scd_sf.types import UserError

FULL = ResultRow(
    name="SCD, distilled",
    family="SCD",
    stage="3",
    steps=4,
    sampler="renoise",
    video_frechet=12.345,
    sharpness=0.987,
    adherence=Adherence(1.0, 0.9, 0.5),
    block_passes_per_frame=26.0,
    seconds_per_frame=0.0123,
    seconds_to_first_frame=0.05,
    seed=7,
    clips=96,
    video_frechet_std=1.5,
    sharpness_std=0.01,
    spread_over="3 seeds",
    note="a note",
)
CONTROL = ResultRow("other real clips", "control", "-", 0, "-", 30.0, 1.0, None)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_rows(path, [FULL, CONTROL], {"machine": "2 cores", "seeds": [1, 2]})
    rows, context = read_rows(path)
    assert rows == [FULL, CONTROL]
    assert context == {"machine": "2 cores", "seeds": [1, 2]}
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]
    assert set(json.loads(path.read_text())["rows"][0]) >= {
        "name",
        "family",
        "stage",
        "steps",
        "sampler",
        "video_frechet",
        "sharpness",
        "adherence",
        "block_passes_per_frame",
        "seconds_per_frame",
        "seconds_to_first_frame",
    }


def test_a_nan_is_refused_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_rows(path, [FULL], {})
    with pytest.raises(UserError, match="NaN or infinite"):
        write_rows(path, [FULL, ResultRow("x", "x", "x", 1, "x", float("nan"), None, None)], {})
    assert read_rows(path)[0] == [FULL]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not JSON"),
        ("{}", "'schema'"),
        ('{"schema": 1, "rows": 3, "context": {}}', r"\$\.rows"),
        ('{"schema": 1, "rows": [{"name": "x"}], "context": {}}', r"family.*rows\[0\]"),
        ('{"schema": 1, "rows": [], "context": 3}', r"\$\.context"),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=word) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_a_wrong_field_of_a_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_rows(path, [FULL], {})
    whole = path.read_text()
    for change, word in (
        (('"place"', '"plaice"'), r"place.*rows\[0\]\.adherence"),
        (("0.987", '"0.987"'), "sharpness"),
    ):
        path.write_text(whole.replace(*change))
        with pytest.raises(UserError, match=word):
            read_rows(path)


def test_table_prints_figures_units_and_dashes() -> None:
    console = Console(width=250, file=io.StringIO(), record=True)
    console.print(result_table([FULL, CONTROL], "Results", ["a note on all"]))
    text = console.export_text()
    assert text.rstrip().endswith("a note on all")
    for piece in (
        "12.3 ± 1.5",
        "0.99 ± 0.01",
        "100",
        "90",
        "50",
        "26.0",
        "12.3",
        "50.0",
        "ms per latent frame",
    ):
        assert piece in text
    shown = {column.title: column.title.split()[0] in text for column in COLUMNS}
    assert {title for title, there in shown.items() if not there} == {
        "family",
        "stage",
        "steps",
        "sampler",
    }
    assert "-" in text.splitlines()[-3]


def test_names_of_others_are_text_in_a_table() -> None:
    """What looks like markup stays as it is, and no escape reaches the terminal."""
    console = Console(width=250, file=io.StringIO(), record=True)
    console.print(result_table([replace(FULL, name="[/bold]a\x1b[2J")], "Results", ["a [/note]"]))
    text = console.export_text()
    assert "[/bold]a" in text and "a [/note]" in text and "\x1b" not in text


class Block(nn.Linear):
    pass


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Block(2, 2) for _ in range(3))
        self.decoder = nn.ModuleList(Block(2, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.encoder, *self.decoder]:
            x = block(x)
        return x


def test_block_passes_are_exact_and_hooks_are_removed() -> None:
    trunk = Trunk()
    with BlockPassCounter(trunk, Block) as counter:
        for _ in range(4):
            trunk(torch.zeros(2, 2))
    trunk(torch.zeros(2, 2))
    assert (counter.calls, counter.samples) == (20, 40)
    assert counter.per_frame(4) == 10
    assert counter.per_frame(4, batch=2) == 5
    assert counter.per_frame(8, batch=2, frames_per_pass=8) == 20


def test_block_passes_by_predicate_and_after_an_error() -> None:
    trunk = Trunk()
    counter = BlockPassCounter(trunk, lambda name, module: name.startswith("decoder."))
    with pytest.raises(RuntimeError), counter:
        trunk(torch.zeros(1, 2))
        trunk(torch.zeros(1, 3))
    trunk(torch.zeros(1, 2))
    assert counter.calls == 2
    with pytest.raises(UserError, match="no submodule"):
        BlockPassCounter(trunk, nn.Conv2d)
