"""The static filter's rule against VBench's, and which candidates are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torchvision.models.optical_flow import raft_large

from scd_sf.distributed import Ranks
from scd_sf.evaluation.vbench.static_filter import (
    StaticFilter,
    chosen_of,
    flow_scores,
    is_static,
    run_static_filter,
)
from scd_sf.types import UserError

GOLDEN = Path(__file__).with_name("golden.json")
ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def test_the_rule_is_vbenchs() -> None:
    """40 decisions of VBench's ``StaticFilter.check_static`` (make_golden.py)."""
    cases = json.loads(GOLDEN.read_text())["static"]
    assert {case["static"] for case in cases} == {True, False}
    for case in cases:
        assert is_static(case["scores"], tuple(case["size"]), case["frames"]) == case["static"]


def test_scores_are_the_longest_two_percent() -> None:
    frames = torch.arange(3, dtype=torch.float32).view(3, 1, 1, 1).expand(3, 3, 10, 10)

    def flow(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        step = float(two[0, 0, 0, 0] - one[0, 0, 0, 0])
        field = torch.zeros(1, 2, 10, 10)
        # two of 100 pixels move: by 5 and by 3
        field[0, 0, 0, :2], field[0, 1, 0, 0] = 3 * step, 4 * step
        return field

    assert flow_scores(frames, flow) == [4.0, 4.0, 8.0, 8.0]


def test_candidates_are_kept_in_vbenchs_order(tmp_path: Path) -> None:
    """The first five names as text are kept, 0, 1, 10, 11, 2; then nothing is done. (A real judge:
    test_sample.py.)"""
    torch.save(raft_large(weights=None).state_dict(), tmp_path / "raft.pth")
    (tmp_path / "flickering").mkdir()
    for number in range(12):
        (tmp_path / "flickering" / f"a wall-{number}.mp4").write_text(str(number))
    static, judged = StaticFilter(tmp_path / "raft.pth", torch.device("cpu")), list[str]()

    def still(path: Path) -> bool:
        judged.append(path.name)
        return path.name != "a wall-1.mp4"

    static.judge = still  # type: ignore[method-assign]
    run_static_filter(tmp_path, ["a wall"], 12, static, ALONE)
    assert (
        chosen_of(tmp_path, "a wall") == [f"a wall-{n}.mp4" for n in (0, 10, 11, 2, 3)]
        and len(judged) == 6
    )
    assert [(tmp_path / "static" / f"a wall-{n}.mp4").read_text() for n in range(5)] == [
        "0",
        "10",
        "11",
        "2",
        "3",
    ]
    run_static_filter(tmp_path, ["a wall"], 12, static, ALONE)
    assert len(judged) == 6
    (tmp_path / "static" / "a wall-3.mp4").unlink()
    run_static_filter(tmp_path, ["a wall"], 12, static, ALONE)
    assert len(judged) == 6 and (tmp_path / "static" / "a wall-3.mp4").is_file()
    (tmp_path / "flickering" / "a wall-7.mp4").write_text("new")
    static.judge = lambda path: path.name == "a wall-7.mp4"  # type: ignore[method-assign]
    run_static_filter(tmp_path, ["a wall"], 12, static, ALONE)
    assert chosen_of(tmp_path, "a wall") == ["a wall-7.mp4"]
    assert [file.name for file in (tmp_path / "static").iterdir()] == ["a wall-0.mp4"]
    with pytest.raises(UserError, match="run the static filter"):
        chosen_of(tmp_path, "another wall")
