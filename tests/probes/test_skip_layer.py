"""P5 as a probe: rows against measurements made by hand, and the model run as before afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import probed
import pytest
import tiny
import torch

from scd_sf.models.blocks import BlocksConfig, SkipConfig, blocks_of, running_as
from scd_sf.models.causal import Causal
from scd_sf.models.wan.transformer import Wan
from scd_sf.probes.paired import NONE, FlowLosses, LossConfig, increase, moved
from scd_sf.probes.skip_layer import SkipProbe, skip_layer, skip_rows, with_costs
from scd_sf.types import UserError

LEVELS = (0.4, 0.9, 0.99)


def causal() -> Causal:
    model = tiny.student(tiny.Variant("causal", 1), dtype=torch.float32)
    assert isinstance(model, Causal)
    return model


@pytest.mark.parametrize("model", [causal(), tiny.wan(dtype=torch.float32)], ids=["causal", "wan"])
@torch.no_grad()
def test_rows_of_schedules(model: Causal | Wan) -> None:
    losses = FlowLosses(
        tiny.latents(3, 3, dtype=torch.float32), tiny.prompts(3, dtype=torch.float32), LEVELS
    )
    subject, ways = probed.subject(model, None), SkipProbe(2, 2, (1.0, 0.25, 0.0)).schedules(6, 4)
    found = with_costs(subject, skip_rows(subject, ways, losses), 0.1)
    assert [None if row.skip is None else row.skip.full_steps for row in found] == [None, 4, 1, 0]
    whole, every, one, none = found
    clean = 0 if isinstance(model, Wan) else 6 * 2 / 3  # the passes of two finished frames
    assert [row.block_passes_per_frame - clean for row in found] == pytest.approx(
        [24, 24, 6 + 12, 16]
    )
    assert whole.moved == every.moved == whole.loss == NONE
    assert every.loss_levels == (0.4,), "lower than any step of this sampler"
    assert one.moved.mean > 0.01 and one.moved.error > 0 and none.moved.mean > 0.01
    assert one.loss_levels == (0.4, 0.9) and none.loss_levels == LEVELS  # level 0.987 lies between
    assert all(row.seconds_per_frame > 0 for row in found)

    assert blocks_of(model) == BlocksConfig()
    low = replace(losses, levels=(0.4, 0.9))
    video, base = subject.sample(), low.measure(model)
    with running_as(model, BlocksConfig(skip=ways[1])):
        assert moved(video, subject.sample()) == one.moved
        assert increase(base, low.measure(model)) == one.loss
    assert [row.loss for row in skip_rows(subject, ways, None)] == [None] * 4


def test_the_probe_and_its_files(tmp_path: Path) -> None:
    subject = probed.subject(causal(), probed.write_clips(tmp_path / "clips"))
    cfg = SkipProbe(loss=LossConfig(clips=3, levels=2), timing_seconds=0.1)
    result = skip_layer(subject, cfg)
    rows: Any = result.data["rows"]
    assert [row["skip"] and row["skip"]["full_steps"] for row in rows] == [None, 1, 2], (
        "parts of 4 steps, rounded up"
    )
    assert "first 1 and the last 2 of 6" in result.text and "2 whole steps" in result.text
    assert (
        result.write(tmp_path / "out")[0].is_file()
        and (tmp_path / "out" / "skip_layer.json").is_file()
    )
    without = skip_layer(replace(subject, clips=None), cfg)
    assert "flow loss" not in without.text
    assert [row["moved"] for row in without.data["rows"]] == [row["moved"] for row in rows]  # type: ignore[attr-defined]


def test_shares_of_the_paper() -> None:
    """5 early and 10 late of 30 blocks; the second schedule is the supplement's 5 of 50 steps."""
    assert SkipProbe().schedules(30, 50)[1] == SkipConfig()
    assert [way.full_steps for way in SkipProbe().schedules(30, 50)] == [1, 5, 10, 25]
    assert [way.full_steps for way in SkipProbe(whole=(0.02, 0.1, 0.3)).schedules(12, 4)] == [1, 2]


def test_refusals() -> None:
    scd = tiny.student(tiny.Variant("scd", 1, "delta"), dtype=torch.float32)
    with pytest.raises(UserError, match="SCD's decoder is short already"):
        skip_layer(probed.subject(scd, None), SkipProbe())
    with pytest.raises(UserError, match="leave nothing of 6 blocks"):
        skip_layer(probed.subject(causal(), None), SkipProbe(prefix=3, suffix=3))
    with pytest.raises(UserError, match="at least 2 prompts"):
        skip_layer(probed.subject(causal(), None, prompts=1), SkipProbe())
    with pytest.raises(UserError, match=r"skip\.whole"):
        SkipProbe(whole=(1.5,))


@torch.no_grad()
def test_a_model_is_run_as_before_after_an_error() -> None:
    model = causal()
    with pytest.raises(RuntimeError, match="stop"), running_as(model, BlocksConfig(1, tiny.SKIP)):
        assert blocks_of(model) == BlocksConfig(1, tiny.SKIP)
        raise RuntimeError("stop")
    assert blocks_of(model) == BlocksConfig()
