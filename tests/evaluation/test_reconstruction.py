"""PSNR and SSIM of pictures against torchmetrics, the sheet, and LPIPS as a loss against the lpips
package."""

from __future__ import annotations

from pathlib import Path

import lpips
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from scd_sf.evaluation.frames import reconstruction_figures, write_sheet
from scd_sf.evaluation.lpips import load_perceptual
from scd_sf.types import UserError


def pair(size: int = 24) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    real = torch.rand(3, 3, size, size + 4, generator=rng)
    return (real + 0.1 * torch.randn(real.shape, generator=rng)).clamp(0, 1), real


def test_figures_agree_with_torchmetrics() -> None:
    made, real = pair()
    found = reconstruction_figures(made, real)
    each = [
        peak_signal_noise_ratio(a[None], b[None], data_range=1.0)
        for a, b in zip(made, real, strict=True)
    ]
    assert found["psnr"] == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)
    _, pixels = structural_similarity_index_measure(
        made, real, data_range=1.0, return_full_image=True
    )
    assert found["ssim"] == pytest.approx(float(pixels[..., 5:-5, 5:-5].mean()), rel=1e-4)
    same = reconstruction_figures(real, real)
    assert (
        same["psnr"] == pytest.approx(120.0)
        and same["ssim"] == pytest.approx(1.0)
        and same["sharpness"] == 1.0
    )
    assert reconstruction_figures(real.mean((2, 3), keepdim=True).expand_as(real), real)[
        "sharpness"
    ] == pytest.approx(0.0)
    with pytest.raises(UserError, match="needs 11 pixels a side"):
        reconstruction_figures(made[..., :8], real[..., :8])


def test_sheet(tmp_path: Path) -> None:
    made, real = pair(16)
    write_sheet(tmp_path / "sheet.png", real, made, columns=3)
    picture = Image.open(tmp_path / "sheet.png")
    assert picture.size == (3 * 20, 2 * 16)
    assert picture.getpixel((20, 0)) == tuple(int(v) for v in (real[1, :, 0, 0] * 255).round())
    assert picture.getpixel((20, 16)) == tuple(int(v) for v in (made[1, :, 0, 0] * 255).round())
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    with pytest.raises(UserError, match="no row of 4"):
        write_sheet(tmp_path / "sheet.png", real, made, columns=4)


@pytest.mark.filterwarnings("ignore:.*(pretrained|weight enum):UserWarning:torchvision")
def test_perceptual(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    trunk = {
        f"features.{name.split('.', 1)[1]}": value for name, value in net.net.state_dict().items()
    }
    torch.save({**trunk, "classifier.1.weight": torch.zeros(1)}, tmp_path / "alexnet.pth")
    made, real = (2 * x - 1 for x in pair(64))
    made.requires_grad_()
    distance = load_perceptual(tmp_path / "alexnet.pth", torch.device("cpu"))(made, real)
    torch.testing.assert_close(distance, net(made, real).mean())
    torch.save(net.state_dict(), tmp_path / "lpips.pth")
    torch.testing.assert_close(
        load_perceptual(tmp_path / "lpips.pth", torch.device("cpu"))(made, real), distance
    )
    distance.backward()
    assert made.grad is not None and float(made.grad.abs().sum()) > 0
    torch.save(
        {name: value for name, value in trunk.items() if name != "features.0.bias"},
        tmp_path / "cut.pth",
    )
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    for name, said in (
        ("cut.pth", "'features.0.bias' is missing"),
        ("other.pth", "neither torchvision's"),
    ):
        with pytest.raises(UserError, match=said):
            load_perceptual(tmp_path / name, torch.device("cpu"))
