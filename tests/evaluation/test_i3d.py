"""The I3D network on random weights, and the readers of other projects' files. Real weights:
test_real_weights.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scd_sf.evaluation.fvd import FeatureExtractor, VideoFrechet
from scd_sf.evaluation.i3d import (
    FEWEST_FRAMES,
    I3dFeatures,
    InceptionI3d,
    TorchscriptFeatures,
    _same,
    place_i3d,
)
from scd_sf.files import sha256_file
from scd_sf.types import UserError


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights under the ports' names, with their extra ``bn.weight`` and
    ``num_batches_tracked``."""
    torch.manual_seed(0)
    with torch.device("meta"):
        network = InceptionI3d()
    found: dict[str, Tensor] = {}
    for name, value in network.named_parameters():
        unit, _, kind = name.removeprefix("layers.").rpartition(".")
        if kind == "weight":
            found[f"{unit}.conv3d.weight"] = (
                torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5
            )
        elif unit == "logits":
            found["logits.conv3d.bias"] = torch.randn(value.shape)
        else:
            size = value.shape
            found |= {
                f"{unit}.bn.running_mean": torch.randn(size) / 4,
                f"{unit}.bn.running_var": torch.rand(size),
            }
            found |= {
                f"{unit}.bn.bias": torch.randn(size) / 4,
                f"{unit}.bn.weight": torch.rand(size) + 0.5,
            }
            found[f"{unit}.bn.num_batches_tracked"] = torch.tensor(7)
    return found


def clips(count: int, frames: int = FEWEST_FRAMES) -> Tensor:
    return torch.rand(count, frames, 3, 24, 32, generator=torch.Generator().manual_seed(1))


def test_same_padding_is_tensorflow_s() -> None:
    wanted = {
        (224, 7, 2): (2, 3),
        (112, 3, 2): (0, 1),
        (9, 7, 2): (3, 3),
        (7, 2, 2): (0, 1),
        (56, 3, 1): (1, 1),
    }
    assert {key: _same(*key) for key in wanted} == wanted
    assert _same(5, 1, 1) == (0, 0)


def test_every_tensor_is_placed_and_normalisation_is_folded(state: dict[str, Tensor]) -> None:
    plain = {
        name: value for name, value in state.items() if not name.endswith(("bn.weight", "tracked"))
    }
    assert len(plain) == 230
    network = place_i3d(state, "x")
    assert not any(
        parameter.requires_grad or parameter.is_meta for parameter in network.parameters()
    )
    x = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    norm = nn.BatchNorm3d(64, eps=1e-3).requires_grad_(False)
    norm.load_state_dict(
        {k.split(".bn.")[1]: v for k, v in state.items() if k.startswith("Conv3d_1a_7x7.bn.")}
    )
    padded = F.pad(x, (2, 3, 2, 3, 3, 3))
    wanted = F.conv3d(padded, state["Conv3d_1a_7x7.conv3d.weight"], stride=2)
    wanted = norm.train(False)(wanted).relu()
    torch.testing.assert_close(network.layers["Conv3d_1a_7x7"](x), wanted, atol=1e-4, rtol=1e-4)

    with pytest.raises(UserError, match=r"tensor Mixed_3b\.b1a\.bn\.bias is missing"):
        place_i3d(
            {name: value for name, value in state.items() if name != "Mixed_3b.b1a.bn.bias"}, "x"
        )
    with pytest.raises(UserError, match="tensor extra has no place"):
        place_i3d({**state, "extra": torch.ones(1)}, "x")
    with pytest.raises(UserError, match=r"y\.pt: logits has shape \(600, 1024, 1, 1, 1\)"):
        place_i3d({**state, "logits.conv3d.weight": torch.ones(600, 1024, 1, 1, 1)}, "y.pt")


def test_features_plug_into_the_frechet_distance(state: dict[str, Tensor]) -> None:
    extractor: FeatureExtractor = I3dFeatures(place_i3d(state, "x"), "0" * 64)
    reference = clips(2)
    fitted = VideoFrechet.fit(reference, extractor)
    assert fitted.reference.shape == (2, 1, 400) and fitted.reference.dtype == torch.float64
    assert fitted.distance_of(fitted.reference) == pytest.approx(
        0, abs=1e-6 * float(fitted.reference.square().sum())
    )
    assert fitted.distance(reference.flip(1)) > 0
    with pytest.raises(UserError, match="of at least 9 frames"):
        extractor(reference[:, :8])


class Detector(nn.Module):
    """StyleGAN-V's signature; its features are the means of colours and frames."""

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        assert resize and return_features and not rescale
        return x.mean(dim=(3, 4)).flatten(1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_torchscript_runs_only_when_known_or_trusted(tmp_path: Path) -> None:
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(Detector()).save(str(path))
    own = sha256_file(path)
    with pytest.raises(UserError, match=f"sha256 is {own}, not bec6519.*is a program"):
        TorchscriptFeatures(path)
    videos = clips(3)
    (rows,) = TorchscriptFeatures(path, own)(videos)
    wanted = (videos * 2 - 1).mean(dim=(3, 4)).transpose(1, 2).flatten(1)
    torch.testing.assert_close(rows[:, 0], wanted.double())
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a TorchScript file of I3D"):
        TorchscriptFeatures(path, sha256_file(path))
    with pytest.raises(UserError, match="cannot be read"):
        TorchscriptFeatures(tmp_path / "none.pt")

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    torch.jit.script(Other()).save(str(path))
    with pytest.raises(UserError, match="not StyleGAN-V's I3D"):
        TorchscriptFeatures(path, sha256_file(path))(videos)
