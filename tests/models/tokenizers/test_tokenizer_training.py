"""The networks of the tokenizer's training, and the linear start."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from scd_sf.models.tokenizers.start import first_channels, linear_start
from scd_sf.models.tokenizers.training import (
    DiscriminatorConfig,
    TokenizerConfig,
    build_discriminator,
    build_tokenizer,
    frozen,
    last_weight,
)
from scd_sf.models.tokenizers.vae_training import patch_components

SMALL = TokenizerConfig((32, 32, 32), (0, 1, 1), (0, 1, 1), res_stages=3, channels=8)


def smooth(count: int, size: int, seed: int = 0) -> Tensor:
    """Random pictures whose patches a few components describe well."""
    coarse = (
        torch.rand(
            count, 3, size // 4 + 1, size // 4 + 1, generator=torch.Generator().manual_seed(seed)
        )
        * 2
        - 1
    )
    return functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)


def mse(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean())


@pytest.mark.parametrize("first", [0, 1])
def test_linear_start_is_the_components(first: int) -> None:
    """On pictures it was not made from: the latents are the components and the error is near
    theirs, 5 dB below that of random weights; in the network's own way of reading and writing
    pixels either way (``first``)."""
    cfg = TokenizerConfig((32, 32, 32), (first, 1, 1), (first, 1, 1), res_stages=3, channels=8)
    model, pixels, fresh = build_tokenizer(cfg, 0), smooth(64, 32), smooth(8, 32, seed=1)
    with torch.no_grad():
        before = mse(model.decoder(model.encoder(fresh)), fresh)
        components = linear_start(model, pixels, 0.2)
        latents = model.encoder(fresh)
        made = model.decoder(latents)
    exact = patch_components(pixels, 8, 1e-6, 4)
    flat = functional.conv2d(fresh, exact["weight"], exact["bias"], stride=4)
    basis = torch.linalg.pinv(exact["weight"].flatten(1))
    mean = -basis @ exact["bias"]
    patches = functional.unfold(pixels, 4, stride=4).transpose(1, 2).flatten(0, 1).mean(0)
    # of the mean, outside the components
    rest = patches - basis @ (exact["weight"].flatten(1) @ patches)
    linear = torch.einsum("pc,nchw->nphw", basis, flat) + (mean + rest).view(1, -1, 1, 1)
    best = mse(functional.pixel_shuffle(linear, 4), fresh)
    assert mse(latents, components(fresh)) < 0.05 * float(components(fresh).var())
    assert mse(made, fresh) < 1.5 * best, (mse(made, fresh), best)  # context may make it better
    assert mse(made, fresh) < 0.3 * before


def test_first_channels_give_what_the_whole_gives_without_the_others() -> None:
    """The encoder's first 5 of 8 latents; the decoder's picture with the other three at their
    means, but at the border, where the means have no neighbours."""
    whole = build_tokenizer(SMALL, 0)
    narrow = build_tokenizer(replace(SMALL, channels=5, shortcuts=False), 1)
    pixels = smooth(2, 96)
    with torch.no_grad():
        latents = whole.encoder(pixels)
        for mean in ((0.0,) * 8, (0.3, -0.2, 0.1, 0.4, -0.5, 0.6, -0.7, 0.8)):
            narrow.load_state_dict(first_channels(whole, 5, mean))
            torch.testing.assert_close(narrow.encoder(pixels), latents[:, :5])
            others = torch.tensor(mean[5:]).view(1, 3, 1, 1).expand(2, 3, *latents.shape[2:])
            wanted = whole.decoder(torch.cat([latents[:, :5], others], 1))
            inner = slice(None) if not any(mean) else slice(32, 64)
            made = narrow.decoder(latents[:, :5])
            torch.testing.assert_close(made[..., inner, inner], wanted[..., inner, inner])
    with pytest.raises(
        ValueError, match="channels is 5; it must divide the last width, 32, or shortcuts be false"
    ):
        replace(SMALL, channels=5)


def test_linear_start_needs_room_for_the_pixels() -> None:
    model = build_tokenizer(
        TokenizerConfig((16, 16, 32), (0, 1, 1), (0, 1, 1), res_stages=3, channels=8), 0
    )
    with pytest.raises(ValueError, match="needs 25 channels"):
        linear_start(model, smooth(8, 32), 0.2)


def test_weights_follow_from_config_and_seed() -> None:
    torch.manual_seed(7)
    one, state = build_tokenizer(SMALL, 3), torch.random.get_rng_state()
    torch.manual_seed(8)
    two, other = build_tokenizer(SMALL, 3), build_tokenizer(SMALL, 4)
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert all(same) and not torch.equal(last_weight(one), last_weight(other))
    torch.manual_seed(7)
    assert torch.equal(state, torch.random.get_rng_state()), (
        "building must leave the global generator alone"
    )


def test_sizes() -> None:
    assert TokenizerConfig().spatial == 16
    model = build_tokenizer(
        TokenizerConfig((16, 16, 32), (1, 1, 1), (1, 1, 1), res_stages=2, head_dim=8, channels=8), 0
    )
    latents = model.encoder(smooth(2, 16))
    assert latents.shape == (2, 8, 4, 4) and model.decoder(latents).shape == (2, 3, 16, 16)
    kinds = [type(stage[-1]).__name__ for stage in model.decoder.up_blocks]
    assert kinds == ["ResBlock", "ResBlock", "EfficientViTBlock"]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (((32, 32), (0,), (0, 1), 2), "encoder_layers is (0,)"),
        (((32, 32), (0, 1), (0, 0), 2), "decoder_layers is (0, 0)"),
        (((32, 32), (0, 1), (0, 1), 3), "res_stages is 3"),
        (((32, 48), (0, 1), (0, 1), 2, 32, 4), "widths 32, 48"),
        (((32, 32), (0, 1), (0, 1), 2, 32, 5), "channels is 5"),
        (((32, 32), (0, 1), (0, 1), 1, 24), "head_dim is 24"),
    ],
)
def test_sizes_that_do_not_fit(sizes: tuple[object, ...], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        TokenizerConfig(*sizes)  # type: ignore[arg-type]


def test_discriminator_judges_patches_and_can_be_frozen() -> None:
    network = build_discriminator(DiscriminatorConfig(width=8, layers=2), 0)
    pixels = smooth(2, 32).requires_grad_()
    logits = network(pixels)
    assert logits.shape == (2, 1, 6, 6)
    asked = frozen(network)(pixels)
    torch.testing.assert_close(asked, logits)
    asked.sum().backward()
    assert pixels.grad is not None and float(pixels.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    with pytest.raises(ValueError, match="width is 9"):
        DiscriminatorConfig(width=9)
