"""P5 as a probe: rows against measurements made by hand, and the model run as before afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from scd_sf.diffusion.solvers import build_sampler
from scd_sf.models.blocks import BlocksConfig, SkipConfig
from scd_sf.models.build import blocks_of, running_as
from scd_sf.models.causal import Causal
from scd_sf.models.wan import Wan
from scd_sf.probes.paired import Change, clip_losses, increase, moved, samples
from scd_sf.probes.skip_layer import draw, schedules, skip_layer

SKIP = SkipConfig(prefix=2, suffix=2, full_steps=1, steps=4, shift=5.0)
LEVELS = (0.4, 0.9, 0.99)
EULER = build_sampler("euler", 4, 5.0)


def causal() -> Causal:
    model = tiny.student(tiny.Variant("causal", 1), dtype=torch.float32)
    assert isinstance(model, Causal)
    return model


@pytest.mark.parametrize("model", [causal(), tiny.wan(dtype=torch.float32)], ids=["causal", "wan"])
@torch.no_grad()
def test_rows_of_schedules(model: Causal | Wan, tmp_path: Path) -> None:
    x, cond = tiny.latents(3, 3, dtype=torch.float32), tiny.prompts(3, dtype=torch.float32)
    found = skip_layer(model, x, cond, EULER, schedules(SKIP, (4, 1, 0)), LEVELS, timing_seconds=0.1)
    assert [None if row.skip is None else row.skip.full_steps for row in found] == [None, 4, 1, 0]
    whole, every, one, none = found
    clean = 0 if isinstance(model, Wan) else 6 * 2 / 3  # the passes of two finished frames
    assert [row.block_passes_per_frame - clean for row in found] == pytest.approx([24, 24, 6 + 12, 16])
    assert whole.moved == every.moved == Change(0.0, 0.0) and whole.loss == Change(0.0, 0.0)
    assert one.moved.mean > 0.01 and one.moved.error > 0 and none.moved.mean > 0.01
    assert one.loss_levels == (0.4, 0.9) and none.loss_levels == LEVELS  # level 0.987 lies between
    assert all(row.seconds_per_frame > 0 for row in found)

    assert blocks_of(model) == BlocksConfig()
    plain, base = samples(model, x, cond, EULER), clip_losses(model, x, cond, (0.4, 0.9))
    with running_as(model, BlocksConfig(skip=SKIP)):
        assert moved(plain, samples(model, x, cond, EULER)) == one.moved
        assert increase(base, clip_losses(model, x, cond, (0.4, 0.9))) == one.loss
    assert draw(tmp_path / "skip.png", found).is_file()


@torch.no_grad()
def test_a_model_is_run_as_before_after_an_error() -> None:
    model = causal()
    with pytest.raises(RuntimeError, match="stop"), running_as(model, BlocksConfig(1, SKIP)):
        assert blocks_of(model) == BlocksConfig(1, SKIP)
        raise RuntimeError("stop")
    assert blocks_of(model) == BlocksConfig()
