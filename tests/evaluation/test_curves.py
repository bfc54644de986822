"""Figures are drawn: every line and every bar is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from scd_sf.evaluation.curves import curve_figure, group_figure, tradeoff_figure


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def colours(path: Path) -> int:
    """How many different colours a picture has, roughly."""
    return len(np.unique(picture(path).reshape(-1, 3) // 32, axis=0))


def test_lines_and_bars(tmp_path: Path) -> None:
    one = curve_figure(
        tmp_path / "a" / "one.png", {"x": ([1, 2, 3], [3.0, 2.0, 4.0])}, "frame", "PSNR, dB"
    )
    two = curve_figure(
        tmp_path / "two.png",
        {"x": ([1, 2, 3], [3.0, 2.0, 4.0]), "y": ([1, 2, 3], [1.0, 1.5, 0.5])},
        "frame",
        "dB",
    )
    assert picture(one).shape == picture(two).shape and colours(two) > colours(one) > 3
    bars = group_figure(
        tmp_path / "bars.png",
        {"a": {"fvd": [1.0, 2.0], "lpips": [0.2, 0.3]}, "b": {"fvd": [3.0], "lpips": [0.1]}},
    )
    assert picture(bars).shape[1] > picture(one).shape[1]  # a panel per measure


def test_points_of_a_trade_off(tmp_path: Path) -> None:
    points = {"a": {"4 steps": (10.0, 3.0, 0.5), "50 steps": (100.0, 1.0, 0.0)}}
    one = tradeoff_figure(tmp_path / "one.png", points, "ms", "distance")
    two = tradeoff_figure(
        tmp_path / "two.png", points | {"b": {"4 steps": (20.0, 2.0, 0.1)}}, "ms", "distance"
    )
    assert colours(two) > colours(one) > 3
