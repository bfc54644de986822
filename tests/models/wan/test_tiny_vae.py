"""The tiny decoder: TAEHV's network and conventions, streams, exact frame counts, and kinds of bad
files. Random weights: their values decide nothing here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scd_sf.generation.generate import decode
from scd_sf.models.wan.tiny_vae import (
    DECODER,
    TinyDecoder,
    TinyVae,
    TinyVaeConfig,
    decoder_file,
    latents_of,
    load_decoder,
    save_decoder,
    wan_2_1_latents,
)
from scd_sf.models.wan.vae import Vae, VaeGeometry, load_vae
from scd_sf.types import UserError

DEMO = Path(__file__).parents[3] / "assets" / "wan_doom"
SHIPPED = DEMO.parent / "tiny_vae_doom"
SMALL = TinyVaeConfig(channels=16, widths=(8, 6, 4, 4))
PATCHED = TinyVaeConfig(channels=48, widths=(8, 6, 4, 4), patch=2)
Tensors = dict[str, Tensor]


@torch.no_grad()
def network(cfg: TinyVaeConfig = SMALL) -> TinyDecoder:
    """Weights so large that some pixels reach the ends of the range."""
    torch.manual_seed(0)
    model = TinyDecoder(cfg)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    model.get_parameter("decoder.22.bias").add_(0.4)
    return model


def latents(frames: int, channels: int = 16, batch: int = 2) -> Tensor:
    return 2 * torch.randn(
        batch, frames, channels, 2, 3, generator=torch.Generator().manual_seed(frames)
    )


def reference(model: TinyDecoder, latents_BFCHW: Tensor, patch: int) -> Tensor:
    """TAEHV as its description says, a frame at a time through its list of layers: every block
    meets the input that it had a frame earlier (at first zeros), growth in time cuts the channels,
    the first 3 frames are dropped, pixels are in [0, 1]."""
    layers: list[Any] = list(model.decoder)
    past: dict[int, Tensor] = {}

    def go(x: Tensor, place: int) -> list[Tensor]:
        if place == len(layers):
            return [x]
        layer = layers[place]
        if place == 0:
            return go(3 * torch.tanh(x / 3), 1)
        if place in (3, 4, 5, 9, 10, 11, 15, 16, 17):  # a block with memory
            pair = torch.cat([x, past.get(place, torch.zeros_like(x))], 1)
            past[place] = x
            return go(F.relu(layer.conv(pair) + x), place + 1)
        if place in (7, 13, 19):  # growth in time
            frames = layer.conv(x).split(x.shape[1], dim=1)
            return [frame for part in frames for frame in go(part, place + 1)]
        return go(layer(x), place + 1)

    frames = [out for frame in latents_BFCHW.unbind(1) for out in go(frame, 0)][3:]
    if patch > 1:
        frames = [nn.PixelShuffle(patch)(frame) for frame in frames]
    return torch.stack(frames, 1).clamp(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("cfg", [SMALL, PATCHED], ids=["2.1", "2.2"])
def test_decodes_as_taehv_says_whole_and_as_a_stream(cfg: TinyVaeConfig) -> None:
    """Latents as the video model has them, 1 + 4k frames of 1 + k, in [-1, 1]; two streams at once
    do not mix."""
    model = network(cfg)
    vae, x = TinyVae(model, slice_size=1), latents(5, cfg.channels)
    assert vae.geometry == VaeGeometry(cfg.channels, 4, 8 * cfg.patch)
    expected = reference(model, x, cfg.patch) * 2 - 1
    whole = vae.decode(x)
    assert (
        whole.shape == (2, 17, 3, 16 * cfg.patch, 24 * cfg.patch) and whole.dtype == torch.float32
    )
    assert whole.std() > 0.05 and -1 <= whole.min() < whole.max() <= 1
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0)
    for sizes in ([1] * 5, [2, 3], [5]):
        stream, beside, parts = vae.stream(), vae.stream(), []
        for part in x.split(sizes, dim=1):
            parts.append(stream.push(part))
            beside.push(part * 2)
        counts = [1 + 4 * (sizes[0] - 1), *(4 * size for size in sizes[1:])]
        assert [part.shape[1] for part in parts] == counts
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
    assert vae.decode(x[:, :1]).shape[1] == 1


def test_sizes_are_those_of_the_published_files() -> None:
    """Parameters of taew2_1's and taew2_2's decoders, 9.84 and 9.92 million."""
    for cfg, count in (
        (TinyVaeConfig(), 9_844_611),
        (TinyVaeConfig(channels=48, patch=2), 9_923_532),
    ):
        with torch.device("meta"):
            model = TinyDecoder(cfg)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
    names = list(model.state_dict())
    assert names[:3] == ["decoder.1.weight", "decoder.1.bias", "decoder.3.conv.0.weight"]
    assert names[-3:] == ["decoder.20.weight", "decoder.22.weight", "decoder.22.bias"]


def test_files_of_taehv_are_read(tmp_path: Path) -> None:
    """safetensors and .pth, with the encoder beside; a folder with one file; half precision."""
    model = network()
    tensors = {**model.state_dict(), "encoder.0.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "taew2_1.safetensors")
    (tmp_path / "old").mkdir()
    torch.save(tensors, tmp_path / "old" / "taew2_1.pth")
    x = latents(2)
    expected = TinyVae(model).decode(x)
    for path in (tmp_path, tmp_path / "taew2_1.safetensors", tmp_path / "old"):
        loaded = load_decoder(path)
        torch.testing.assert_close(loaded.decode(x), expected, atol=1e-5, rtol=0)
        assert loaded.latents == wan_2_1_latents()
    half = load_decoder(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.decode(x).dtype == torch.float32
    assert (half.decode(x) - expected).abs().max() < 0.05
    save_file(tensors, tmp_path / "taew2_2.safetensors")
    with pytest.raises(
        UserError, match=r"holds 2 safetensors files, such as taew2_1.*name the one"
    ):
        load_decoder(tmp_path)


def test_saved_and_bound_to_its_vae(tmp_path: Path) -> None:
    """A decoder of the demo's VAE fits no other one of the same sizes, nor TAEHV's the demo's."""
    demo = load_vae(DEMO)
    file = save_decoder(network(), tmp_path, latents_of(demo))
    assert file == decoder_file(tmp_path) == tmp_path / DECODER
    assert load_file(file)["decoder.1.weight"].dtype == torch.float16
    decoder = load_decoder(tmp_path, vae=demo)
    z = demo.encode(torch.zeros(1, 5, 3, 16, 16))
    assert decoder.stream().push(z).shape == demo.stream().push(z).shape == (1, 5, 3, 16, 16)
    wan = Vae(AutoencoderKLWan(base_dim=4, num_res_blocks=1))
    assert latents_of(wan) == wan_2_1_latents()
    with pytest.raises(UserError, match=r"decoder.safetensors: is for another VAE"):
        load_decoder(tmp_path, vae=wan)
    save_file(network().state_dict(), tmp_path / "taew2_1.safetensors")
    load_decoder(tmp_path / "taew2_1.safetensors", vae=wan)
    with pytest.raises(UserError, match=r"taew2_1.safetensors: is for another VAE"):
        load_decoder(tmp_path / "taew2_1.safetensors", vae=demo)
    save_decoder(network(PATCHED), tmp_path, "")
    with pytest.raises(UserError, match="is for latents of channels 48, the VAE's have 16"):
        load_decoder(tmp_path / DECODER, vae=demo)


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def replaced(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: {"conv1.weight": torch.zeros(2)}, "has no tensor 'decoder.1.weight'"),
        (without("decoder.7.conv.weight"), "has no tensor 'decoder.7.conv.weight'"),
        (without("decoder.9.conv.2.bias"), "1 tensors missing, first 'decoder.9.conv.2.bias'"),
        (replaced("decoder.3.conv.0.weight", 8, 8, 3, 3), "implies [8, 16, 3, 3]"),
        (replaced("decoder.23.weight", 1), "implies no such tensor"),
        (replaced("decoder.1.weight", 8), "shape [8] of tensor 'decoder.1.weight'"),
        (replaced("decoder.7.conv.weight", 4, 8, 1, 1), "growth is (0, 2, 2)"),
        (replaced("decoder.22.weight", 2, 4, 3, 3), "patch is 0"),
        (replaced("decoder.0.weight", 8, 16, 1, 1), "'super' decoder of TAEHV"),
        (
            lambda tensors: {**tensors, "decoder.22.bias": torch.full((3,), torch.nan)},
            "'decoder.22.bias' holds NaN or infinity",
        ),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, change: Callable[[Tensors], Tensors], words: str
) -> None:
    file = tmp_path / "taew2_1.safetensors"
    save_file(change(network().state_dict()), file)
    with pytest.raises(UserError) as error:
        load_decoder(file)
    assert words in str(error.value) and str(file) in str(error.value)


def test_nothing_there_and_latents_of_another_shape(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "holds no tiny decoder"), (tmp_path / "none.pth", "missing")):
        with pytest.raises(UserError, match=words):
            load_decoder(path)
    vae = TinyVae(network())
    for shape in ((2, 1, 4, 2, 2), (2, 16, 2, 2)):
        for call in (vae.decode, vae.stream().push):
            with pytest.raises(UserError, match=r"they must be \(B, F, 16, H, W\)"):
                call(torch.zeros(shape))
    with pytest.raises(ValueError, match="widths is"):
        TinyVaeConfig(widths=(0, 1, 1, 1))


def test_the_shipped_decoder_is_near_the_demos_vae() -> None:
    """On drifting clouds of colour, which neither has seen."""
    vae, rng = load_vae(DEMO), torch.Generator().manual_seed(0)
    clouds = torch.rand(1, 3, 4, 12, generator=rng)
    wide = torch.nn.functional.interpolate(clouds, size=(64, 192), mode="bicubic").clamp(0, 1)
    clip = torch.stack([wide[0, :, :, 3 * f : 3 * f + 64] for f in range(17)])[None]
    encoded = vae.encode(2 * clip - 1)
    own, quick = decode(vae, encoded), decode(load_decoder(SHIPPED, vae=vae), encoded)
    assert quick.shape == own.shape
    assert -10 * float((quick - own).square().mean().log10()) > 17
