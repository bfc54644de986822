"""Sharpness, PSNR and spreads against hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from raw_sets import bikes
from torch.nn import functional

from scd_sf.evaluation.frames import (
    bootstrap,
    gradient_energy,
    mse_frames,
    psnr_frames,
    sharpness_ratio,
    spread,
    ssim_frames,
)
from scd_sf.generation.generate import as_uint8
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
    assert float(psnr_frames(worse, real).mean()) == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert math.isinf(float(psnr_frames(real, real).mean()))
    with pytest.raises(UserError, match="differ"):
        float(psnr_frames(real, real[:, :1]).mean())


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
    assert result.mean == pytest.approx(7 / 3) and result.count == 3
    assert result.std == pytest.approx(1.5275252)
    assert spread([5.0]).std == 0.0
    with pytest.raises(UserError, match="no values"):
        spread([])


def test_bootstrap_of_a_mean_matches_its_standard_error_and_repeats_by_seed() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(3))
    result = bootstrap(lambda index: float(values[index].mean()), 400, resamples=400, seed=1)
    assert result.mean == pytest.approx(float(values.mean()), abs=0.02)
    assert result.std == pytest.approx(float(values.std()) / 20, rel=0.2)
    assert (
        bootstrap(lambda index: float(values[index].mean()), 400, resamples=400, seed=1) == result
    )


def test_frame_figures_are_torchmetrics_and_formulas() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    one, other = videos(1, (3, 4, 3, 20, 24)), videos(2, (3, 4, 3, 20, 24))
    found = psnr_frames(one, other)
    assert found.shape == (3, 4)
    wanted = peak_signal_noise_ratio(
        one.flatten(0, 1), other.flatten(0, 1), 1.0, reduction="none", dim=(1, 2, 3)
    )
    torch.testing.assert_close(found.flatten().float(), wanted)
    assert float(psnr_frames(one, other).mean()) == pytest.approx(float(wanted.mean()))
    theirs = float(peak_signal_noise_ratio(one, other, 1.0, dim=(2, 3, 4)))
    assert float(psnr_frames(one, other).mean()) == pytest.approx(theirs, rel=1e-5)
    assert float(
        psnr_frames(torch.full((1, 1, 3, 2, 2), 0.1), torch.zeros(1, 1, 3, 2, 2))
    ) == pytest.approx(20)
    torch.testing.assert_close(mse_frames(one, other), 10 ** (-found / 10))
    assert bool(psnr_frames(one, one).isinf().all())

    torch.testing.assert_close(ssim_frames(one, one), torch.ones(3, 4, dtype=torch.float64))
    with pytest.raises(UserError, match="frames of 10x20; it needs 11"):
        ssim_frames(one[..., :10], other[..., :10])
    with pytest.raises(UserError, match="pair the clips first"):
        psnr_frames(one, other[:, 1:])


def naive_ssim(one: torch.Tensor, other: torch.Tensor) -> float:
    """Wang et al.'s formula on (H, W) planes in NumPy fp64: every place where the 11x11 window fits
    whole."""
    offsets = np.arange(11) - 5
    row = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(row, row) / row.sum() ** 2
    a, b = (
        np.lib.stride_tricks.sliding_window_view(plane.double().numpy(), (11, 11))
        for plane in (one, other)
    )

    def mean(x: np.ndarray) -> np.ndarray:
        return np.asarray((x * weights).sum(axis=(2, 3)))

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = (
        mean(a * a) - mean_a**2,
        mean(b * b) - mean_b**2,
        mean(a * b) - mean_a * mean_b,
    )
    c1, c2 = 0.01**2, 0.03**2
    upper, lower = (
        (2 * mean_a * mean_b + c1) * (2 * cov + c2),
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2),
    )
    return float((upper / lower).mean())


def test_ssim_counts_the_valid_window_of_real_frames() -> None:
    """Against the formula itself, between frames of a film 4 apart; the padded form is
    torchmetrics' own mean, and higher by what it adds at the borders."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    # (3, 3, 272, 272): the square with the cyclist
    film = bikes().float()[100:112:4, :, :, 368:] / 255
    for side, least in ((64, 0.015), (128, 0.004)):
        frames = functional.interpolate(film, size=(side, side), mode="bilinear", antialias=True)
        one, other = frames[:-1][None], frames[1:][None]
        found = ssim_frames(one, other)
        wanted = [
            sum(naive_ssim(a, b) for a, b in zip(first, second, strict=True)) / 3
            for first, second in zip(one[0], other[0], strict=True)
        ]
        assert found.shape == (1, 2) and found.dtype == torch.float64
        assert found[0].tolist() == pytest.approx(wanted, abs=2e-5)
        padded = ssim_frames(one, other, "padded")
        theirs = structural_similarity_index_measure(
            one[0], other[0], data_range=1.0, reduction="none"
        )
        assert padded[0].tolist() == pytest.approx(torch.as_tensor(theirs).tolist(), abs=1e-6)
        assert float((padded - found).mean()) > least
    smallest = torch.rand(1, 1, 3, 11, 11), torch.rand(1, 1, 3, 11, 11)
    planes = zip(smallest[0][0, 0], smallest[1][0, 0], strict=True)
    wanted = [sum(naive_ssim(a, b) for a, b in planes) / 3]
    assert ssim_frames(*smallest)[0].tolist() == pytest.approx(wanted, abs=2e-5)
    with pytest.raises(UserError, match="ssim is 'same'; use one of valid, padded"):
        ssim_frames(*smallest, "same")  # type: ignore[arg-type]
