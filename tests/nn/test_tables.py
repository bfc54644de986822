"""Tables are kept while they stay within a number of bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from scd_sf.nn.rope import rope_table
from scd_sf.nn.tables import LIMIT, MOST, kept_within, tensor_bytes


def test_the_latest_stay_within_the_limit() -> None:
    made = []

    @kept_within(tensor_bytes, limit=10_000)
    def table(size: int, number: int = 0) -> Tensor:
        made.append((size, number))
        return torch.zeros(size, dtype=torch.uint8)

    assert table(4000) is table(4000) and table(4000, number=1) is not table(4000)
    table(4000, number=2)  # too much: the one that was asked for longest ago goes
    assert made == [(4000, 0), (4000, 1), (4000, 2)]
    table(4000)
    table(4000, number=1)
    assert made[3:] == [(4000, 1)]
    assert table(20_000) is table(20_000), "the latest is kept, however large"
    table(4000)
    assert made[4:] == [(20_000, 0), (4000, 0)]
    for number in range(20):
        table(0, number)  # nothing in it: counts for a KiB
    table(0, 0)
    assert made[-1] == (0, 0)


def test_random_targets_do_not_fill_the_memory() -> None:
    """At Wan's size a table of rotary positions is 43 MB: three stay, where 32 did."""
    frames = tuple(range(27))
    first = rope_table(frames, 30, 52, (44, 42, 42), torch.device("meta"))
    size = tensor_bytes(*first)
    assert 40e6 < size < 45e6
    for number in range(LIMIT // size):
        rope_table((*frames[1:], 100 + number), 30, 52, (44, 42, 42), torch.device("meta"))
    assert rope_table(frames, 30, 52, (44, 42, 42), torch.device("meta")) is not first


def test_a_video_without_end_does_not_fill_the_memory() -> None:
    """Each of its frames asks for a small table of its own."""
    rope_table.clear()
    for frame in range(MOST + 100):
        rope_table((frame,), 2, 2, (4, 2, 2), torch.device("meta"))
    assert len(rope_table._entries) == MOST
    last = ((MOST + 99,), 2, 2, (4, 2, 2), torch.device("meta"))
    assert rope_table(*last) is rope_table(*last)
