"""P6 as a probe: rows against measurements made by hand, and the model run as before afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from scd_sf.diffusion.solvers import build_sampler
from scd_sf.models.blocks import BlocksConfig
from scd_sf.models.build import blocks_of, set_blocks
from scd_sf.models.causal import Causal
from scd_sf.probes.frame_diagonal import draw, frame_diagonal
from scd_sf.probes.paired import Change, clip_losses, increase
from scd_sf.types import UserError

LEVELS = (0.4, 0.9, 0.99)
EULER = build_sampler("euler", 4, 5.0)


@torch.no_grad()
def test_rows_of_frame_diagonal_blocks(tmp_path: Path) -> None:
    model = tiny.student(tiny.Variant("causal", 1), dtype=torch.float32)
    assert isinstance(model, Causal)
    x, cond = tiny.latents(3, 3, dtype=torch.float32), tiny.prompts(3, dtype=torch.float32)
    nothing, two, all_ = frame_diagonal(model, x, cond, EULER, (0, 2, 6), LEVELS)
    assert nothing.loss == nothing.moved == Change(0.0, 0.0) and [nothing.cache, all_.cache] == [1.0, 0.0]
    assert two.blocks == 2 and two.cache == pytest.approx(4 / 6) and two.moved.mean > 0.001
    assert blocks_of(model) == BlocksConfig()
    base = clip_losses(model, x, cond, LEVELS)
    set_blocks(model, BlocksConfig(2))
    assert two.loss == increase(base, clip_losses(model, x, cond, LEVELS))
    assert two.loss_by_level[1] == increase(base[1:2], clip_losses(model, x, cond, LEVELS)[1:2])
    assert draw(tmp_path / "diagonal.png", [nothing, two, all_]).is_file()
    with pytest.raises(UserError, match="the model has 6 blocks"):
        frame_diagonal(model, x, cond, EULER, (7,), LEVELS)
