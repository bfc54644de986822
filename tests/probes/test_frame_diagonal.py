"""P6 as a probe: rows against measurements made by hand, and the model run as before afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import probed
import pytest
import tiny
import torch

from scd_sf.models.blocks import BlocksConfig, blocks_of, set_blocks
from scd_sf.probes.frame_diagonal import DiagonalProbe, diagonal_rows, frame_diagonal
from scd_sf.probes.paired import NONE, FlowLosses, LossConfig, increase, moved
from scd_sf.types import UserError


@torch.no_grad()
def test_rows_of_frame_diagonal_blocks() -> None:
    """Beside a skip-layer schedule, which stays."""
    model = tiny.student(tiny.SKIPPING, dtype=torch.float32)
    losses = FlowLosses(
        tiny.latents(3, 3, dtype=torch.float32), tiny.prompts(3, dtype=torch.float32), (0.4, 0.9)
    )
    subject = probed.subject(model, None)
    nothing, two = diagonal_rows(subject, (0, 2), losses)
    assert nothing.loss == nothing.moved == NONE and nothing.cache == 1.0
    assert two.blocks == 2 and two.cache == pytest.approx(4 / 6) and two.moved.mean > 0.001
    assert blocks_of(model) == tiny.SKIPPING.blocks
    base, video = losses.measure(model), subject.sample()
    set_blocks(model, BlocksConfig(2, tiny.SKIP))
    changed = losses.measure(model)
    assert two.loss == increase(base, changed) and two.loss_by_level[1] == increase(
        base[1:], changed[1:]
    )
    assert two.moved == moved(video, subject.sample())


def test_the_probe_and_its_files(tmp_path: Path) -> None:
    model = tiny.student(tiny.Variant("causal", 1), dtype=torch.float32)
    subject = probed.subject(model, probed.write_clips(tmp_path / "clips"))
    result = frame_diagonal(subject, DiagonalProbe(loss=LossConfig(clips=3, levels=2)))
    rows: Any = result.data["rows"]
    assert [row["blocks"] for row in rows] == [1, 2, 3, 6] and rows[-1]["cache"] == 0.0
    assert "Last 6: flow loss" in result.text and len(result.write(tmp_path / "out")) == 1
    without = frame_diagonal(replace(subject, clips=None), DiagonalProbe((1,)))
    assert "flow loss" not in without.text and without.data["levels"] == []

    with pytest.raises(UserError, match="the model has 6 blocks"):
        frame_diagonal(subject, DiagonalProbe((7,)))
    with pytest.raises(UserError, match="for the causal baseline"):
        frame_diagonal(replace(subject, model=tiny.wan(dtype=torch.float32)), DiagonalProbe())
