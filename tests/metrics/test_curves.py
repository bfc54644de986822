"""Figures are drawn: every line and every bar is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from scd_sf.metrics.curves import curve_figure, group_figure


def colours(path: Path) -> int:
    """How many different colours a picture has, roughly."""
    return len(np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3) // 32, axis=0))


def test_lines_and_bars(tmp_path: Path) -> None:
    one = curve_figure(tmp_path / "a" / "one.png", {"x": ([1, 2, 3], [3.0, 2.0, 4.0])}, "frame", "PSNR, dB")
    two = curve_figure(
        tmp_path / "two.png", {"x": ([1, 2, 3], [3.0, 2.0, 4.0]), "y": ([1, 2, 3], [1.0, 1.5, 0.5])}, "frame", "dB"
    )
    assert Image.open(one).size == Image.open(two).size and colours(two) > colours(one) > 3
    bars = group_figure(
        tmp_path / "bars.png", {"a": {"fvd": [1.0, 2.0], "lpips": [0.2, 0.3]}, "b": {"fvd": [3.0], "lpips": [0.1]}}
    )
    assert Image.open(bars).size[0] > Image.open(one).size[0]  # a panel per measure
