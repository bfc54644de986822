"""The floor of a computation is made of its own heavy calls, forward and backward, and lies below
its time."""

from __future__ import annotations

import mmap
import time
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scd_sf.evaluation.roofline import HeavyCalls, peak_gib


def test_counts_forward_and_backward_with_masks() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64), torch.randn(2, 32, 64, requires_grad=True)
    mask = torch.ones(32, 32, dtype=torch.bool).tril()
    with HeavyCalls() as heavy:
        for _ in range(3):
            q = layer(x).unflatten(-1, (4, 16)).transpose(1, 2)
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask).sum().backward()
    names = Counter[str]()
    for (func, *_), count in heavy.calls.items():
        names[func.overloadpacket.__name__.removesuffix("_for_cpu")] += count
    assert names["addmm"] == 3 and names["mm"] == 6, names  # input and weight gradients
    attention = {name: count for name, count in names.items() if "attention" in name}
    assert sum(attention.values()) == 6 and any("backward" in name for name in attention), names
    assert heavy.floor() > 0


def test_floor_is_below_the_time_and_near_it_for_one_big_matmul(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that stands while other processes have the core."""
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    a = torch.randn(700, 700)
    with HeavyCalls() as heavy:
        started = time.perf_counter()
        for _ in range(20):
            torch.mm(a, a)
        seconds = time.perf_counter() - started
    assert 0.1 * seconds < heavy.floor(5) < 1.5 * seconds


def test_peak_memory_follows_allocation() -> None:
    before = peak_gib(reset=True)
    kept = mmap.mmap(-1, 64 << 20)  # malloc may give memory that the process has already
    kept.write(bytes(64 << 20))
    assert peak_gib() - before > 0.05
    kept.close()


def test_convolutions_of_the_decoder_are_no_part_of_the_students_floor() -> None:
    """Counting can go on and off: what runs between is not counted."""
    a, image = torch.randn(8, 8), torch.randn(1, 3, 8, 8)
    heavy = HeavyCalls()
    for _ in range(2):
        with heavy:
            torch.mm(a, a)
        F.conv2d(image, torch.randn(3, 3, 3, 3))
    assert [(func.overloadpacket.__name__, count) for (func, *_), count in heavy.calls.items()] == [
        ("mm", 2)
    ]
