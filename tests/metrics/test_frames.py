"""Sharpness, PSNR and spreads against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from scd_sf.metrics.frames import (
    as_uint8,
    bootstrap,
    gradient_energy,
    mse_frames,
    psnr,
    psnr_frames,
    sharpness_ratio,
    spread,
    ssim_frames,
)
from scd_sf.types import UserError


def videos(seed: int, shape: tuple[int, ...] = (3, 4, 3, 16, 20)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_gradient_energy_of_a_ramp_is_its_slope() -> None:
    ramp = torch.arange(20).float().div(40).expand(2, 3, 3, 16, 20)
    assert gradient_energy(ramp).tolist() == pytest.approx([1 / 40, 1 / 40])
    assert gradient_energy(ramp.transpose(3, 4)).tolist() == pytest.approx([1 / 40, 1 / 40])


def test_sharpness_is_one_on_itself_falls_with_blur_and_scales_with_contrast() -> None:
    real = videos(0)
    blurred = functional.avg_pool2d(real.flatten(0, 1), 3, stride=1, padding=1).view_as(real)
    assert sharpness_ratio(real, real) == pytest.approx(1.0)
    assert sharpness_ratio(blurred, real) < 0.6
    assert sharpness_ratio(real / 2, real) == pytest.approx(0.5)
    with pytest.raises(UserError, match="flat"):
        sharpness_ratio(real, torch.zeros_like(real))


def test_psnr_closed_form_and_per_frame_mean() -> None:
    real = torch.full((1, 2, 3, 8, 8), 0.5)
    worse = real.clone()
    worse[:, 0] += 0.1
    worse[:, 1] += 0.01
    assert psnr(worse, real) == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert math.isinf(psnr(real, real))
    with pytest.raises(UserError, match="differ"):
        psnr(real, real[:, :1])


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (torch.rand(2, 3, 8, 8), "shape"),
        (torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8), "dtype"),
        (torch.rand(1, 1, 3, 8, 8) * 2 - 1, "values"),
        (torch.full((1, 1, 3, 8, 8), float("nan")), "values"),
        (torch.rand(0, 1, 3, 8, 8), "no pixel"),
    ],
)
def test_wrong_videos_are_named(bad: torch.Tensor, word: str) -> None:
    with pytest.raises(UserError, match=word):
        gradient_energy(bad)


def test_as_uint8_rounds_and_clips() -> None:
    assert as_uint8(torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.2])).tolist() == [0, 0, 128, 255, 255]
    kept = torch.tensor([3], dtype=torch.uint8)
    assert as_uint8(kept) is kept
    with pytest.raises(UserError, match="int64"):
        as_uint8(torch.tensor([3]))


def test_spread_is_the_textbook_one() -> None:
    result = spread([1.0, 2.0, 4.0])
    assert (result.mean, result.count) == (pytest.approx(7 / 3), 3)
    assert result.std == pytest.approx(1.5275252)
    assert spread([5.0]).std == 0.0
    with pytest.raises(UserError, match="no values"):
        spread([])


def test_bootstrap_of_a_mean_matches_its_standard_error_and_repeats_by_seed() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(3))
    result = bootstrap(lambda index: float(values[index].mean()), 400, resamples=400, seed=1)
    assert result.mean == pytest.approx(float(values.mean()), abs=0.02)
    assert result.std == pytest.approx(float(values.std()) / 20, rel=0.2)
    assert bootstrap(lambda index: float(values[index].mean()), 400, resamples=400, seed=1) == result


def test_frame_figures_are_torchmetrics_and_formulas() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    one, other = videos(1, (3, 4, 3, 20, 24)), videos(2, (3, 4, 3, 20, 24))
    found = psnr_frames(one, other)
    assert found.shape == (3, 4)
    wanted = peak_signal_noise_ratio(one.flatten(0, 1), other.flatten(0, 1), 1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(found.flatten().float(), wanted)
    assert psnr(one, other) == pytest.approx(float(wanted.mean()))
    assert psnr(one, other) == pytest.approx(float(peak_signal_noise_ratio(one, other, 1.0, dim=(2, 3, 4))), rel=1e-5)
    assert float(psnr_frames(torch.full((1, 1, 3, 2, 2), 0.1), torch.zeros(1, 1, 3, 2, 2))) == pytest.approx(20)
    torch.testing.assert_close(mse_frames(one, other), 10 ** (-found / 10))
    assert bool(psnr_frames(one, one).isinf().all())

    similar = ssim_frames(one, (0.8 * one + 0.2 * other).clamp(0, 1))
    for video in range(3):
        for frame in range(4):
            pair = one[video, frame][None], (0.8 * one + 0.2 * other).clamp(0, 1)[video, frame][None]
            value = structural_similarity_index_measure(*pair, data_range=1.0)
            assert float(similar[video, frame]) == pytest.approx(float(value), abs=1e-6)
    torch.testing.assert_close(ssim_frames(one, one), torch.ones(3, 4, dtype=torch.float64))
    with pytest.raises(UserError, match="frames of 10x20; it needs 11"):
        ssim_frames(one[..., :10], other[..., :10])
    with pytest.raises(UserError, match="pair the clips first"):
        psnr_frames(one, other[:, 1:])
