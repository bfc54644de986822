"""RAFT: the original's weights in torchvision's network give the flow of VBench's own RAFT."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from torchvision.models.optical_flow import raft_large

from scd_sf.evaluation.raft import load_raft, optical_flow, torchvision_names
from scd_sf.types import UserError

GOLDEN = Path(__file__).resolve().parent / "vbench" / "golden.json"


def original_weights() -> dict[str, torch.Tensor]:
    """As tests/evaluation/vbench/make_golden.py fills VBench's RAFT, under its names."""
    state = {}
    for name, shape in json.loads(GOLDEN.read_text())["raft"]["shapes"].items():
        drawn = torch.randn(
            shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
        )
        if name.endswith("num_batches_tracked"):
            drawn = torch.zeros(shape, dtype=torch.int64)
        state[f"module.{name}"] = (
            drawn.abs() + 0.5 if name.endswith("running_var") else drawn * 0.05
        )
    # norm3 and downsample.1 are one module there: what was loaded last counts for both
    for name in state:
        if ".norm3." in name:
            state[name] = state[name.replace(".norm3.", ".downsample.1.")]
    return {
        name: value.long() if name.endswith("tracked") else value for name, value in state.items()
    }


def test_flow_is_vbenchs(tmp_path: Path) -> None:
    state = original_weights()
    assert torchvision_names(state).keys() == raft_large(weights=None).state_dict().keys()
    torch.save(state, tmp_path / "raft-things.pth")
    model = load_raft(tmp_path / "raft-things.pth")
    one = torch.rand(1, 3, 132, 141, generator=torch.Generator().manual_seed(0)) * 255
    flow = optical_flow(model, one, one.roll(3, -1), updates=2)
    golden = json.loads(GOLDEN.read_text())["flow"]
    assert list(flow.shape) == golden["shape"]
    found, expected = flow[0, :, ::36, ::36].flatten(), torch.tensor(golden["values"])
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())
    with pytest.raises(UserError, match="at least 128 pixels"):
        optical_flow(model, one[..., :64], one[..., :64])


def test_wrong_files(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save({"a": 1}, tmp_path / "numbers.pth")
    torch.save({"fnet.a": torch.full((2,), float("nan"))}, tmp_path / "nan.pth")
    (tmp_path / "pointer.pth").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    for name, words in (
        ("nan.pth", "tensor 'fnet.a' holds NaN"),
        ("pointer.pth", "a Git LFS pointer"),
    ):
        with pytest.raises(UserError, match=rf"{name}: {words}"):
            load_raft(tmp_path / name)
    for name, words in (
        ("none.pth", "missing"),
        ("text.pth", "unreadable"),
        ("other.pth", "not the weights of the large RAFT"),
        ("numbers.pth", "holds no weights"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load_raft(tmp_path / name)
        assert "raft-things.pth from models.zip" in str(caught.value)
