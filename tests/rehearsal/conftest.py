"""The rehearsal's device for one test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rehearsal.fake_cuda import FakeCuda
from rehearsal.world import CUDA, forget_tables


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    forget_tables()
    try:
        with CUDA:
            yield CUDA
    finally:
        forget_tables()
