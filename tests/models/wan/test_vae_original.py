"""Wan's original VAE file: all names and shapes at full size, and the same numbers as its layers in
its own order."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor

from scd_sf.models.wan.components import copy_components
from scd_sf.models.wan.vae import ORIGINAL, load_vae, vae_source
from scd_sf.types import UserError

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]
LATENT, WIDENING, TEMPORAL = 16, (1, 2, 4, 4), (False, True, True)


def layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def residual(name: str, inner: int, outer: int) -> Shapes:
    shapes: Shapes = {
        f"{name}.residual.0.gamma": (inner, 1, 1, 1),
        f"{name}.residual.3.gamma": (outer, 1, 1, 1),
    }
    shapes |= layer(f"{name}.residual.2", outer, inner, 3, 3, 3) | layer(
        f"{name}.residual.6", outer, outer, 3, 3, 3
    )
    return shapes | (layer(f"{name}.shortcut", outer, inner, 1, 1, 1) if inner != outer else {})


def middle(name: str, width: int) -> Shapes:
    attention = layer(f"{name}.1.to_qkv", 3 * width, width, 1, 1) | layer(
        f"{name}.1.proj", width, width, 1, 1
    )
    attention |= {f"{name}.1.norm.gamma": (width, 1, 1)}
    return residual(f"{name}.0", width, width) | attention | residual(f"{name}.2", width, width)


def head(name: str, width: int, outer: int) -> Shapes:
    return {f"{name}.0.gamma": (width, 1, 1, 1)} | layer(f"{name}.2", outer, width, 3, 3, 3)


def original_shapes(dim: int) -> Shapes:
    """The tensors of the published file (dim 96), or of a narrow one: blocks and resamplings
    counted in one row."""
    widths = [dim * factor for factor in (1, *WIDENING)]
    shapes = layer("conv1", 2 * LATENT, 2 * LATENT, 1, 1, 1) | layer(
        "conv2", LATENT, LATENT, 1, 1, 1
    )
    shapes |= layer("encoder.conv1", dim, 3, 3, 3, 3) | middle("encoder.middle", widths[-1])
    shapes |= head("encoder.head", widths[-1], 2 * LATENT)
    number = 0
    for stage, (inner, outer) in enumerate(pairwise(widths)):
        name = "encoder.downsamples.{}".format
        shapes |= residual(name(number), inner, outer) | residual(name(number + 1), outer, outer)
        if stage < len(TEMPORAL):
            shapes |= layer(f"{name(number + 2)}.resample.1", outer, outer, 3, 3)
            shapes |= (
                layer(f"{name(number + 2)}.time_conv", outer, outer, 3, 1, 1)
                if TEMPORAL[stage]
                else {}
            )
        number += 3
    widths = [dim * factor for factor in (WIDENING[-1], *WIDENING[::-1])]
    shapes |= layer("decoder.conv1", widths[0], LATENT, 3, 3, 3) | middle(
        "decoder.middle", widths[0]
    )
    shapes |= head("decoder.head", widths[-1], 3)
    number = 0
    for stage, (inner, outer) in enumerate(pairwise(widths)):
        name = "decoder.upsamples.{}".format
        shapes |= residual(name(number), inner // 2 if stage else inner, outer)
        shapes |= residual(name(number + 1), outer, outer) | residual(
            name(number + 2), outer, outer
        )
        if stage < len(TEMPORAL):
            shapes |= layer(f"{name(number + 3)}.resample.1", outer // 2, outer, 3, 3)
            shapes |= (
                layer(f"{name(number + 3)}.time_conv", 2 * outer, outer, 3, 1, 1)
                if TEMPORAL[::-1][stage]
                else {}
            )
        number += 4
    return shapes


def random_state(dim: int) -> State:
    torch.manual_seed(0)
    return {
        name: torch.randn(shape) * 0.1 + name.endswith("gamma")
        for name, shape in original_shapes(dim).items()
    }


def conv(w: State, name: str, x: Tensor) -> Tensor:
    """On one frame: what a causal convolution sees of the time before is zero."""
    time, space = w[f"{name}.weight"].shape[2:4]
    edge = (space - 1) // 2
    return F.conv3d(F.pad(x, (edge,) * 4 + (time - 1, 0)), w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: State, name: str, x: Tensor) -> Tensor:
    return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * w[f"{name}.gamma"]


def block(w: State, name: str, x: Tensor) -> Tensor:
    """A residual block, an attention or a resampling, whichever ``name`` is."""
    if f"{name}.residual.0.gamma" in w:
        hidden = conv(w, f"{name}.residual.2", F.silu(norm(w, f"{name}.residual.0", x)))
        hidden = conv(w, f"{name}.residual.6", F.silu(norm(w, f"{name}.residual.3", hidden)))
        return hidden + (conv(w, f"{name}.shortcut", x) if f"{name}.shortcut.weight" in w else x)
    image = x[:, :, 0]
    if f"{name}.to_qkv.weight" in w:
        qkv = F.conv2d(
            norm(w, f"{name}.norm", image), w[f"{name}.to_qkv.weight"], w[f"{name}.to_qkv.bias"]
        )
        q, k, v = qkv.flatten(2).transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(image.shape)
        return x + F.conv2d(mixed, w[f"{name}.proj.weight"], w[f"{name}.proj.bias"]).unsqueeze(2)
    weight, bias = w[f"{name}.resample.1.weight"], w[f"{name}.resample.1.bias"]
    if name.startswith("encoder"):
        return F.conv2d(F.pad(image, (0, 1, 0, 1)), weight, bias, stride=2).unsqueeze(2)
    return F.conv2d(
        F.interpolate(image, scale_factor=2.0, mode="nearest-exact"), weight, bias, padding=1
    ).unsqueeze(2)


def blocks(w: State, name: str, x: Tensor) -> Tensor:
    for number in sorted(
        {int(key.removeprefix(f"{name}.").split(".")[0]) for key in w if key.startswith(f"{name}.")}
    ):
        x = block(w, f"{name}.{number}", x)
    return x


def ends(w: State, name: str, x: Tensor) -> Tensor:
    return conv(w, f"{name}.head.2", F.silu(norm(w, f"{name}.head.0", x)))


def test_all_names_and_shapes_of_the_published_file_are_diffusers_own() -> None:
    with torch.device("meta"):
        model = AutoencoderKLWan()
    shapes = original_shapes(96)
    assert len(shapes) == 194
    assert convert_wan_vae_to_diffusers(shapes) == {
        name: tuple(t.shape) for name, t in model.state_dict().items()
    }


def test_the_original_file_computes_what_its_own_layers_do(tmp_path: Path) -> None:
    """Given as a file, and as Wan's directory, where config.json and the safetensors are the
    transformer's."""
    state = random_state(4)
    torch.save(state, tmp_path / ORIGINAL)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel"}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"the transformer's")
    vae = load_vae(tmp_path)
    assert (vae.geometry.channels, vae.geometry.temporal, vae.geometry.spatial) == (LATENT, 4, 8)
    pixels = torch.rand(2, 1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        x = blocks(
            state, "encoder.downsamples", conv(state, "encoder.conv1", pixels.transpose(1, 2))
        )
        z = conv(state, "conv1", ends(state, "encoder", blocks(state, "encoder.middle", x)))[
            :, :LATENT
        ]
        latents = vae.encode(pixels)
        torch.testing.assert_close(latents, vae.normalised(z).transpose(1, 2), atol=1e-5, rtol=1e-5)
        x = blocks(state, "decoder.middle", conv(state, "decoder.conv1", conv(state, "conv2", z)))
        back = ends(state, "decoder", blocks(state, "decoder.upsamples", x)).clamp(-1, 1)
        torch.testing.assert_close(vae.decode(latents), back.transpose(1, 2), atol=1e-5, rtol=1e-5)
        assert torch.equal(load_vae(tmp_path / ORIGINAL).encode(pixels), latents)


def test_which_vae_a_directory_has(tmp_path: Path) -> None:
    """A vae/ beside the original file is read; it is the same VAE. Its weights may be shards, and
    are then copied as such."""
    torch.save(random_state(4), tmp_path / ORIGINAL)
    assert vae_source(tmp_path) == vae_source(tmp_path / ORIGINAL) == tmp_path / ORIGINAL
    original = load_vae(tmp_path).model
    original.save_pretrained(tmp_path / "vae", max_shard_size="100KB")
    assert vae_source(tmp_path) == tmp_path / "vae"
    assert len(list((tmp_path / "vae").glob("*-of-*.safetensors"))) > 1
    (tmp_path / "copy").mkdir()
    copy_components(tmp_path, tmp_path / "copy")
    for folder in (tmp_path, tmp_path / "copy"):
        state = load_vae(folder).model.state_dict()
        assert all(torch.equal(state[name], t) for name, t in original.state_dict().items())
    (tmp_path / ORIGINAL).unlink()
    shutil.rmtree(tmp_path / "vae")
    with pytest.raises(
        UserError, match=rf"neither config\.json nor vae/config\.json nor {ORIGINAL}"
    ):
        load_vae(tmp_path)


class Runs:
    """Something that a pickle would have to run code to make."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"encoder.conv1.weight": Runs()}, "holds more than tensors, which is refused"),
        ({"blocks.0.ffn.0.weight": torch.zeros(2)}, "has no tensor 'encoder.conv1.weight'"),
        ({"encoder.conv1.weight": torch.zeros(4, 3, 3, 3, 3)}, "193 tensors missing"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / ORIGINAL)
    with pytest.raises(UserError, match=rf"{ORIGINAL}: {message}"):
        load_vae(tmp_path)
    (tmp_path / ORIGINAL).write_bytes(b"cut")
    with pytest.raises(UserError, match=f"{ORIGINAL}: "):
        load_vae(tmp_path)
