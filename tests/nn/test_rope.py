"""Positions: Wan's split of the head, distinct over 1,000 frames, relative, and joined group by
group."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch

from scd_sf.nn.rope import axis_dims, join, rope_table, rotate

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("head_dim", "dims"), [(128, (44, 42, 42)), (12, (4, 4, 4)), (64, (24, 20, 20)), (6, (2, 2, 2))]
)
def test_axis_dims_are_wans(head_dim: int, dims: tuple[int, int, int]) -> None:
    assert axis_dims(head_dim) == dims


@pytest.mark.parametrize("head_dim", [12, 128])
def test_a_thousand_frames_are_distinct_in_bf16_runs(head_dim: int) -> None:
    """Positions are integers and angles fp32 whatever the model's dtype: in bf16 ids, 257 would be
    256."""
    table = rope_table(tuple(range(1000)), 1, 1, axis_dims(head_dim), CPU)
    assert table.cos.dtype == torch.float32
    rows = torch.cat([table.cos, table.sin], -1)
    assert len(torch.unique(rows, dim=0)) == 1000
    exact = rope_table(tuple(range(1000)), 1, 1, axis_dims(head_dim), CPU, torch.float64)
    assert float((rows - torch.cat([exact.cos, exact.sin], -1)).abs().max()) < 1e-7
    x = torch.randn(1, 1, 1, head_dim, generator=tiny.generator(0)).expand(1, 1, 1000, head_dim)
    assert len(torch.unique(rotate(x, table)[0, 0], dim=0)) == 1000
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16


def test_attention_sees_differences_of_positions_only() -> None:
    rng = tiny.generator(1)
    q, k = (torch.randn(1, 1, 6, 12, generator=rng, dtype=torch.float64) for _ in range(2))

    def scores(frame: int) -> torch.Tensor:
        table = rope_table((frame, frame + 3), 1, 3, axis_dims(12), CPU, torch.float64)
        return rotate(q, table) @ rotate(k, table).transpose(-1, -2)

    assert torch.allclose(scores(0), scores(900), rtol=0, atol=1e-10)


def test_every_token_of_the_grid_has_its_own_position_time_slowest() -> None:
    table = rope_table((0, 5), 2, 3, axis_dims(12), CPU, torch.float64)
    assert table.cos.shape == (12, 6)
    for row, (t, h, w) in enumerate(itertools.product((0, 5), range(2), range(3))):
        angles = torch.tensor([t, t * 1e-2, h, h * 1e-2, w, w * 1e-2], dtype=torch.float64)
        assert torch.allclose(table.cos[row], angles.cos(), rtol=0, atol=1e-12)
        assert torch.allclose(table.sin[row], angles.sin(), rtol=0, atol=1e-12)


def test_join_is_the_table_of_both_groups() -> None:
    joined = join(
        rope_table((2,), 2, 2, axis_dims(12), CPU), rope_table((0, 1), 2, 2, axis_dims(12), CPU)
    )
    whole = rope_table((2, 0, 1), 2, 2, axis_dims(12), CPU)
    assert torch.equal(joined.cos, whole.cos) and torch.equal(joined.sin, whole.sin)
