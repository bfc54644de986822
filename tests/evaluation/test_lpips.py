"""LPIPS on random weights: its formula, written out, and what is refused. Real weights:
test_real_weights.py."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scd_sf.evaluation.frames import ssim_frames
from scd_sf.evaluation.lpips import Lpips, lpips_network
from scd_sf.evaluation.weights import ALEX_PLACES, VGG_PLACES, State
from scd_sf.types import UserError

ALEX = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
SHIFT, SCALE = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])


def random_state() -> State:
    generator = torch.Generator().manual_seed(0)
    state: State = {}
    for head, ((block, place), (inputs, outputs, kernel)) in enumerate(
        zip(ALEX_PLACES, ALEX, strict=True)
    ):
        weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator)
        state[f"net.slice{block}.{place}.weight"] = weight * (2 / weight[0].numel()) ** 0.5
        state[f"net.slice{block}.{place}.bias"] = torch.randn(outputs, generator=generator) / 10
        state[f"lin{head}.model.1.weight"] = torch.rand(1, outputs, 1, 1, generator=generator)
    return state


def written_out(state: State, one: Tensor, other: Tensor) -> Tensor:
    """LPIPS Alex of images (B, 3, H, W) in [-1, 1], from the paper's formula: (B,)."""
    total = torch.zeros(len(one))
    xs = [(x - SHIFT.view(3, 1, 1)) / SCALE.view(3, 1, 1) for x in (one, other)]
    for head, (block, place) in enumerate(ALEX_PLACES):
        if head in (1, 2):
            xs = [F.max_pool2d(x, 3, 2) for x in xs]
        weight, bias = (state[f"net.slice{block}.{place}.{kind}"] for kind in ("weight", "bias"))
        stride, padding = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))[head]
        xs = [F.conv2d(x, weight, bias, stride, padding).relu() for x in xs]
        unit = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in xs]
        weights = state[f"lin{head}.model.1.weight"].view(1, -1, 1, 1)
        total += ((unit[0] - unit[1]).square() * weights).sum(1).mean(dim=(1, 2))
    return total


def test_it_is_the_formula_per_frame_with_scaling_and_without() -> None:
    state = random_state()
    metric = Lpips(lpips_network("alex", state), "alex", "0" * 64, batch=4)
    one, other = torch.rand(2, 3, 3, 64, 48), torch.rand(2, 3, 3, 64, 48)
    found = metric(one, other)
    assert found.shape == (2, 3) and found.dtype == torch.float64
    flat = [x.flatten(0, 1) for x in (one, other)]
    torch.testing.assert_close(
        found.flatten().float(), written_out(state, *(2 * x - 1 for x in flat))
    )
    torch.testing.assert_close(
        metric(one, other, unscaled=True).flatten().float(), written_out(state, *flat)
    )
    assert float(metric(one, one).abs().max()) == 0
    torch.testing.assert_close(metric(one, other), metric(other, one))


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"the package lpips .*pip install 'scd-sf\[eval\]'"):
        lpips_network("alex", {})
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(UserError, match="the package torchmetrics"):
        ssim_frames(torch.rand(1, 1, 3, 16, 16), torch.rand(1, 1, 3, 16, 16))


def test_what_is_refused() -> None:
    state = random_state()
    metric = Lpips(lpips_network("alex", state), "alex", "0" * 64)
    videos = torch.rand(1, 2, 3, 32, 32)
    with pytest.raises(UserError, match="pair the clips first"):
        metric(videos, videos[:, :1])
    with pytest.raises(UserError, match=r"map the decoder's \[-1, 1\]"):
        metric(videos * 2 - 1, videos)
    with pytest.raises(UserError, match="frames of 30x32; it needs 31"):
        metric(videos[..., :30], videos[..., :30])
    assert len(VGG_PLACES) == 13
    for damaged in (
        {**state, "extra": torch.ones(1)},
        {k: v for k, v in state.items() if k != "lin2.model.1.weight"},
    ):
        with pytest.raises(UserError, match="lpips alex: these are not its weights"):
            lpips_network("alex", damaged)
    with pytest.raises(UserError, match="lpips vgg: these are not its weights"):
        lpips_network("vgg", state)
