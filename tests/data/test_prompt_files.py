"""Lists of prompts: what a row may say, what ends a line, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from scd_sf.data.prompt_files import PromptRow, read_prompt_file
from scd_sf.types import UserError


def test_a_row_may_name_its_seed(tmp_path: Path) -> None:
    jsonl, table = tmp_path / "p.jsonl", tmp_path / "p.csv"
    jsonl.write_text('{"prompt": "a", "seed": 7}\n{"prompt": "b"}\n{"prompt": "c", "seed": 0}\n')
    table.write_text("prompt,seed\na,7\nb,\nc,0\n")
    for file in (jsonl, table):
        assert read_prompt_file(file) == [PromptRow("a", seed=7), PromptRow("b"), PromptRow("c", seed=0)]


@pytest.mark.parametrize("seed", ["-1", "1.5", "true", '"x"', str(2**63), "[1]", "1" * 19 + "0"])
def test_impossible_seeds_are_named(tmp_path: Path, seed: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "a", "seed": {seed}}}\n')
    with pytest.raises(UserError, match=r"p\.jsonl: line 1: 'seed' is .*a whole number from 0 to"):
        read_prompt_file(file)
