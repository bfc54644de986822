"""The Frechet distance against closed forms and scipy, and what the demo's features must and must
not react to."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.nn import functional

from scd_sf.evaluation.fvd import (
    FeatureExtractor,
    TextureMotion,
    VideoFrechet,
    fixed_uniform,
    frechet_distance,
)
from scd_sf.types import UserError


def rows(seed: int, count: int, dims: int) -> Tensor:
    return torch.randn(
        count, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def exact(mean: Tensor, covariance: Tensor, count: int = 400) -> Tensor:
    """Rows whose sample mean and (n-1) covariance are exactly these."""
    white = rows(0, count, mean.shape[0])
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / (count - 1))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_closed_form_of_commuting_gaussians() -> None:
    a = exact(
        torch.zeros(3, dtype=torch.float64),
        torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)),
    )
    b = exact(
        torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64),
        torch.diag(torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64)),
    )
    assert frechet_distance(a, b) == pytest.approx(5.25 + 1 + 0 + 4, rel=1e-9)


def test_equals_scipy_sqrtm() -> None:
    mix_a, mix_b = rows(1, 7, 7), rows(2, 7, 7)
    a, b = rows(3, 300, 7) @ mix_a, rows(4, 200, 7) @ mix_b + 0.3
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    wanted = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-8)


def test_zero_on_itself_symmetric_and_blind_to_order_also_with_singular_covariances() -> None:
    a, b = rows(5, 20, 60), rows(6, 30, 60) * 2 + 1
    scale = float(a.square().sum(1).mean())
    assert frechet_distance(a, a) < 1e-4 * scale
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a.flip(0), b), rel=1e-9)


def test_bad_features_are_refused() -> None:
    with pytest.raises(UserError, match="dimensions"):
        frechet_distance(rows(0, 5, 3), rows(0, 5, 4))
    with pytest.raises(UserError, match="rows >= 2"):
        frechet_distance(rows(0, 1, 3), rows(0, 5, 3))
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(rows(0, 5, 3) * float("inf"), rows(0, 5, 3))


def test_fixed_weights_are_the_documented_ones() -> None:
    """Exact bytes: a change of these weights changes every published figure."""
    network = TextureMotion()
    digest = hashlib.sha256(fixed_uniform(20240601, (64,)).numpy().tobytes()).hexdigest()
    assert digest == "1197160291af6bbcdf6325faded003a78cce3e2f98be56a91228527e293f64e5"
    assert (network.first.shape, network.second.shape) == ((16, 3, 5, 5), (32, 16, 3, 3))
    assert float(network.first.mean(dim=(2, 3)).abs().max()) < 1e-6
    assert network.frame_features(torch.rand(2, 3, 64, 64)).shape == (2, 256)


def world(seed: int, count: int = 24, frames: int = 9) -> Tensor:
    """Smooth random textures under a steady pan: (count, frames, 3, 32, 32) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 12, 18, generator=generator)
    wide = functional.interpolate(coarse, size=(32, 64), mode="bicubic").clamp(0, 1)
    speed = torch.randint(1, 4, (count,), generator=generator).tolist()
    return torch.stack(
        [
            torch.stack([wide[i, :, :, f * speed[i] : f * speed[i] + 32] for f in range(frames)])
            for i in range(count)
        ]
    )


@pytest.fixture(scope="module")
def fitted() -> VideoFrechet:
    return VideoFrechet.fit(world(0, count=48))


def test_reference_is_at_zero_and_fresh_videos_are_near(fitted: VideoFrechet) -> None:
    fresh, reference = world(1, count=48), world(0, count=48)
    assert fitted.features(reference).shape == (48, 8, 24)
    assert fitted.distance(reference) == pytest.approx(0.0, abs=1e-6)
    noise = 0.2 * torch.randn(fresh.shape, generator=torch.Generator().manual_seed(0))
    assert fitted.distance(fresh) < 0.5 * fitted.distance((fresh + noise).clamp(0, 1))


def test_every_kind_of_damage_raises_the_distance(fitted: VideoFrechet) -> None:
    fresh = world(1, count=48)
    base = fitted.distance(fresh)
    blurred = functional.avg_pool2d(fresh.flatten(0, 1), 5, stride=1, padding=2).view_as(fresh)
    frozen = fresh[:, :1].expand_as(fresh)
    shuffled = fresh[:, [4, 0, 7, 2, 8, 1, 6, 3, 5]]
    tinted = fresh * torch.tensor([1.0, 0.6, 0.6]).view(3, 1, 1)
    for name, damaged in {
        "blurred": blurred,
        "frozen": frozen,
        "shuffled": shuffled,
        "tinted": tinted,
    }.items():
        assert fitted.distance(damaged) > 1.2 * base, name


def test_grows_with_noise_and_ignores_the_order_of_videos(fitted: VideoFrechet) -> None:
    fresh = world(1, count=24)
    noise = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(0))
    levels = [
        fitted.distance((fresh + sigma * noise).clamp(0, 1)) for sigma in (0.0, 0.1, 0.2, 0.3)
    ]
    assert levels == sorted(levels)
    assert fitted.distance(fresh.flip(0)) == pytest.approx(levels[0], rel=1e-9)


def test_bootstrap_is_repeatable_and_brackets_the_figure(fitted: VideoFrechet) -> None:
    features = fitted.features(world(1))
    first = fitted.bootstrap(features, resamples=8, seed=4)
    assert first == fitted.bootstrap(features, resamples=8, seed=4)
    assert 0 < first.std < first.mean
    assert first.count == 8


def test_by_label_punishes_videos_under_the_wrong_label() -> None:
    dark, bright = world(2) * 0.4, world(3) * 0.4 + 0.6
    fitted = VideoFrechet.fit(torch.cat([dark, bright]))
    labels = ["dark"] * 24 + ["bright"] * 24
    features = fitted.features(torch.cat([world(4) * 0.4, world(5) * 0.4 + 0.6]))
    right = fitted.distance_by_label(features, labels, labels)
    wrong = fitted.distance_by_label(features, labels[::-1], labels)
    assert wrong > 3 * right
    with pytest.raises(UserError, match="'sea'"):
        fitted.distance_by_label(features, ["sea"] * 48, labels)
    with pytest.raises(UserError, match="one label per video"):
        fitted.distance_by_label(features, labels[1:], labels)


class MeanColour:
    """A clip network in miniature: one row per video, used without projection."""

    components: tuple[int | None, ...] = (None,)

    def __call__(self, videos: Tensor) -> tuple[Tensor, ...]:
        return (videos.double().mean(dim=(1, 3, 4)).unsqueeze(1),)


def test_the_extractor_is_an_argument() -> None:
    extractor: FeatureExtractor = MeanColour()
    reference, videos = world(6), world(7)
    fitted = VideoFrechet.fit(reference, extractor)
    wanted = frechet_distance(
        videos.double().mean(dim=(1, 3, 4)), reference.double().mean(dim=(1, 3, 4))
    )
    assert fitted.distance(videos) == pytest.approx(wanted)


def test_too_few_reference_videos_or_frames() -> None:
    with pytest.raises(UserError, match="give more videos"):
        VideoFrechet.fit(world(0, count=1))
    with pytest.raises(UserError, match="need more"):
        VideoFrechet.fit(world(0)[:, :1])
    with pytest.raises(UserError, match="gap is 0"):
        TextureMotion(gap=0)


@pytest.mark.parametrize("count", [24, 200])
def test_equals_scipy_sqrtm_with_fewer_rows_than_dimensions_too(count: int) -> None:
    """FAR and others take the real part of scipy's square root of a product that may be
    singular."""
    mix = rows(1, 60, 60)
    a, b = rows(2, count, 60) @ mix, (rows(3, count, 60) @ mix) * 1.2 + 0.5
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = np.real(scipy.linalg.sqrtm(cov_a @ cov_b))
    wanted = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-3)
