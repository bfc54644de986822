"""The autoencoder: geometry, normalisation, the training forward against diffusers' own, and kinds
of bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from scd_sf.files import current_umask
from scd_sf.models.tokenizers.vae_training import (
    inflate,
    patch_components,
    whole_decode,
    whole_encode,
)
from scd_sf.models.wan.vae import WEIGHTS, Vae, VaeEncoderStream, VaeStream, load_vae, save_vae
from scd_sf.types import UserError

CHANNELS = 4
MEAN = [0.1, -0.2, 0.3, -0.4]
STD = [2.0, 2.0, 0.5, 1.0]


def residual_model() -> AutoencoderKLWan:
    """The demo's layout: patches of 2, residual blocks, time halved at both stages."""
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        patch_size=2,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        latents_mean=MEAN,
        latents_std=STD,
    )


def flat_model() -> AutoencoderKLWan:
    """Wan 2.1's layout, narrow: three halvings in space, the last two also in time."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=MEAN,
        latents_std=STD,
    )


def video(frames: int, batch: int = 2, size: int = 16) -> Tensor:
    """(B, F, 3, H, W) in [-1, 1]."""
    return (
        torch.rand(batch, frames, 3, size, size, generator=torch.Generator().manual_seed(frames))
        * 2
        - 1
    )


@pytest.fixture(params=[residual_model, flat_model], ids=["residual", "wan21"])
def model(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    torch.manual_seed(0)
    made: AutoencoderKLWan = request.param().eval()
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    residual_model().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_training_forward_is_the_models_own(model: AutoencoderKLWan, frames: int) -> None:
    pixels = video(frames).transpose(1, 2)
    with torch.no_grad():
        latents = model.encode(pixels).latent_dist.mean
        torch.testing.assert_close(whole_encode(model, pixels), latents, atol=1e-5, rtol=1e-5)
        noisy = latents + torch.randn_like(latents)
        ours = whole_decode(model, noisy).clamp(-1, 1)
        torch.testing.assert_close(ours, model.decode(noisy).sample, atol=1e-5, rtol=1e-5)


def test_training_forward_reaches_every_weight(model: AutoencoderKLWan) -> None:
    pixels = video(9).transpose(1, 2)
    (whole_decode(model, whole_encode(model, pixels)) - pixels).square().mean().backward()
    without = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert without == []


@pytest.mark.parametrize("make", [residual_model, flat_model])
def test_inflated_networks_copy_single_frames(make: Callable[[], AutoencoderKLWan]) -> None:
    """After inflation every group of a still clip decodes to the same frame, and the encoder sees
    the newest frame."""
    torch.manual_seed(0)
    made = make().eval()
    inflate(made)
    with torch.no_grad():
        latents = torch.randn(1, CHANNELS, 1, 2, 2).expand(-1, -1, 3, -1, -1).contiguous()
        frames = whole_decode(made, latents)
        torch.testing.assert_close(frames[:, :, 1:5], frames[:, :, 5:9])
        pixels = video(9).transpose(1, 2)
        # the residual layout's averaging shortcut reads every frame of a group
        if make is flat_model:
            alone = torch.cat(
                [whole_encode(made, pixels[:, :, i : i + 1]) for i in (0, 4, 8)], dim=2
            )
            torch.testing.assert_close(whole_encode(made, pixels), alone)


def test_patch_components_are_uncorrelated_and_bounded() -> None:
    frames = video(64, batch=1)[0] * torch.linspace(0.1, 1.0, 16)
    pca = patch_components(frames, CHANNELS, floor=0.5)
    z = (
        torch.nn.functional.conv2d(frames, pca["weight"], pca["bias"], stride=8)
        .transpose(0, 1)
        .flatten(1)
    )
    covariance = z.cov()
    torch.testing.assert_close(z.mean(1), torch.zeros(CHANNELS), atol=1e-4, rtol=0)
    torch.testing.assert_close(covariance, covariance.diag().diag(), atol=1e-3, rtol=0)
    assert covariance[0, 0] == pytest.approx(1.0, abs=0.01) and covariance.diag().max() < 1.01


def test_latents_are_the_normalised_posterior_mean(model: AutoencoderKLWan) -> None:
    vae, pixels = Vae(model), video(5)
    with torch.no_grad():
        mean = model.encode(pixels.transpose(1, 2)).latent_dist.mean.transpose(1, 2)
    view = (1, 1, CHANNELS, 1, 1)
    latents = vae.encode(pixels)
    torch.testing.assert_close(
        latents * torch.tensor(STD).view(view) + torch.tensor(MEAN).view(view), mean
    )
    assert torch.equal(latents, vae.encode(pixels))
    with torch.no_grad():
        torch.testing.assert_close(
            vae.decode(latents).transpose(1, 2), model.decode(mean.transpose(1, 2)).sample
        )


def test_geometry_and_shapes(model: AutoencoderKLWan) -> None:
    vae = Vae(model)
    assert (vae.geometry.channels, vae.geometry.temporal, vae.geometry.spatial) == (CHANNELS, 4, 8)
    shape = vae.geometry.shape(9, 16, 24)
    pixels = torch.rand(3, 9, 3, 16, 24) * 2 - 1
    latents = vae.encode(pixels)
    assert latents.shape == shape.latent(3)
    decoded = vae.decode(latents * 50)
    assert decoded.shape == pixels.shape and decoded.dtype == torch.float32
    assert decoded.min() >= -1 and decoded.max() <= 1


def test_slicing_and_batch_do_not_change_the_result(model: AutoencoderKLWan) -> None:
    pixels = video(5, batch=3)
    whole, sliced = Vae(model), Vae(model, slice_size=1)
    torch.testing.assert_close(whole.encode(pixels), sliced.encode(pixels), atol=1e-5, rtol=1e-5)
    latents = whole.encode(pixels)
    torch.testing.assert_close(whole.decode(latents), sliced.decode(latents), atol=1e-5, rtol=1e-5)


def test_encoding_is_causal_in_groups_of_four(model: AutoencoderKLWan) -> None:
    vae, pixels = Vae(model), video(9)
    changed = pixels.clone()
    changed[:, 5:] = 0
    before, after = vae.encode(pixels), vae.encode(changed)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])


def test_loads_folder_or_its_parent_and_fp16_files(folder: Path) -> None:
    direct, parent = load_vae(folder), load_vae(folder.parent)
    pixels = video(5)
    assert torch.equal(direct.encode(pixels), parent.encode(pixels))
    assert not any(parameter.requires_grad for parameter in direct.model.parameters())
    AutoencoderKLWan.from_pretrained(folder).half().save_pretrained(folder)
    half = load_vae(folder)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.encode(pixels), direct.encode(pixels), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    "shape", [(2, 6, 3, 16, 16), (2, 5, 3, 16, 20), (2, 5, 4, 16, 16), (5, 3, 16, 16)]
)
def test_wrong_pixel_shapes_are_refused(model: AutoencoderKLWan, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError):
        Vae(model).encode(torch.zeros(shape))


def test_wrong_latent_channels_are_refused(model: AutoencoderKLWan) -> None:
    with pytest.raises(UserError, match=r"must be \(B, F, 4, H, W\)"):
        Vae(model).decode(torch.zeros(1, 2, 5, 2, 2))


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        load_vae(tmp_path / "nowhere")
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=WEIGHTS):
        load_vae(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{WEIGHTS}.*copy the VAE again"):
        load_vae(folder)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name"),
        ({"base_dim": 8}, "config.json implies"),
        ({"dim_mult": "many"}, "config.json"),
        ({"latents_std": [1.0, 1.0]}, "latents_std"),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "positive"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial"),
    ],
)
def test_foreign_configs_are_refused(folder: Path, changes: dict[str, object], word: str) -> None:
    edit(folder, **changes)
    with pytest.raises(UserError, match=word):
        load_vae(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_res_blocks": 100_000},
        {"num_res_blocks": 10**12},
        {"base_dim": 10**12},
        {"base_dim": 10**18},
        {"base_dim": "4"},
        {"base_dim": -4},
        {"base_dim": None},
        {"dim_mult": [1] * 100_000},
        {"dim_mult": 3},
        {"z_dim": "4"},
        {"z_dim": 4.0},
        {"latents_mean": 0.0},
        {"latents_mean": [None] * 4},
        {"latents_std": ["1"] * 4},
        {"patch_size": 0},
        {"patch_size": [2]},
        {"temperal_downsample": "yes"},
        {"attn_scales": {"a": 1}},
        {"is_residual": []},
        {"_class_name": "\ud800"},
        {"_class_name": ["AutoencoderKLWan"]},
    ],
)
def test_configs_of_others(folder: Path, changes: dict[str, object]) -> None:
    """One line that names a file of the folder, before anything large is made."""
    edit(folder, **changes)
    with pytest.raises(UserError, match=re.escape(str(folder))) as caught:
        load_vae(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_broken_weights_are_refused(folder: Path) -> None:
    file = folder / WEIGHTS
    tensors = load_file(file)
    save_file(
        {**tensors, "decoder.conv_in.bias": tensors["decoder.conv_in.bias"] * float("nan")}, file
    )
    with pytest.raises(
        UserError, match=rf"{WEIGHTS}: tensor 'decoder\.conv_in\.bias' holds NaN or infinity"
    ):
        load_vae(folder)
    save_file(
        {**tensors, "decoder.conv_in.bias": tensors["decoder.conv_in.bias"].to(torch.int8)}, file
    )
    with pytest.raises(
        UserError, match=r"'decoder\.conv_in\.bias' is I8, as quantised weights are"
    ):
        load_vae(folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2838276208\n"
    for name in (WEIGHTS, "config.json"):
        (folder / name).write_text(pointer)
        with pytest.raises(UserError, match=rf"{name}: a Git LFS pointer"):
            load_vae(folder)


def test_saved_with_the_rights_of_the_umask(folder: Path, tmp_path: Path) -> None:
    vae = load_vae(folder)
    save_vae(vae.model, tmp_path / "again")
    again = load_vae(tmp_path / "again").model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in vae.model.state_dict().items())
    assert (tmp_path / "again" / WEIGHTS).stat().st_mode & 0o777 == 0o666 & ~current_umask()


def test_damaged_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_vae(folder)


def test_decoded_as_a_stream_equals_decoded_whole(model: AutoencoderKLWan) -> None:
    """In single frames and in chunks; two streams at once and a whole decode between them do not
    mix."""
    vae = Vae(model)
    latents = torch.randn(2, 6, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(1))
    whole, other = vae.decode(latents), vae.decode(latents.flip(0) * 2)
    for sizes in ([1] * 6, [3, 3], [1, 2, 3], [6]):
        stream, beside, parts, more = VaeStream(vae), VaeStream(vae), [], []
        for part in latents.split(sizes, dim=1):
            parts.append(stream.push(part))
            more.append(beside.push(part.flip(0) * 2))
            vae.decode(part)
        assert [p.shape[1] for p in parts] == [
            1 + 4 * (sizes[0] - 1),
            *(4 * size for size in sizes[1:]),
        ]
        assert float((torch.cat(parts, 1) - whole).abs().max()) < 1e-5
        assert float((torch.cat(more, 1) - other).abs().max()) < 1e-5


def test_a_stream_keeps_nothing_of_the_distant_past(model: AutoencoderKLWan) -> None:
    stream, sizes = VaeStream(Vae(model)), []
    for step in range(6):
        stream.push(
            torch.randn(1, 1, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(step))
        )
        sizes.append(
            sum(
                kept.untyped_storage().nbytes()
                for kept in stream._cache
                if isinstance(kept, Tensor)
            )
        )
    assert sizes[2] == sizes[3] == sizes[4] == sizes[5]


SHIPPED = Path(__file__).resolve().parents[3] / "assets" / "wan_doom"


@pytest.mark.parametrize("kind", [residual_model, flat_model, None], ids=["wan22", "wan21", "demo"])
def test_encoded_as_a_stream_equals_encoded_whole(
    kind: Callable[[], AutoencoderKLWan] | None,
) -> None:
    """In groups and in larger pieces; two streams at once and a whole encode between them do not
    mix. What is kept does not grow."""
    torch.manual_seed(0)
    vae = load_vae(SHIPPED) if kind is None else Vae(kind().eval())
    pixels = video(25)
    whole, other = vae.encode(pixels), vae.encode(pixels.flip(0) * 0.5)
    for sizes in ([1] + [4] * 6, [9, 12, 4], [1, 24], [25]):
        stream, beside, parts, more = vae.encoder_stream(), VaeEncoderStream(vae), [], []
        kept: list[int] = []
        for part in pixels.split(sizes, dim=1):
            parts.append(stream.push(part))
            more.append(beside.push(part.flip(0) * 0.5))
            vae.encode(pixels[:, :5])
            tensors = [held for held in stream._cache if isinstance(held, Tensor)]
            kept.append(sum(held.untyped_storage().nbytes() for held in tensors))
        assert [p.shape[1] for p in parts] == [
            1 + (sizes[0] - 1) // 4,
            *(n // 4 for n in sizes[1:]),
        ]
        assert float((torch.cat(parts, 1) - whole).abs().max()) < 1e-5
        assert float((torch.cat(more, 1) - other).abs().max()) < 1e-5
        assert parts[0].dtype == torch.float32 and len(set(kept[2:])) <= 1


def test_a_stream_of_frames_is_refused_in_parts_of_groups(model: AutoencoderKLWan) -> None:
    """What is refused leaves no trace."""
    vae, pixels = Vae(model), video(9)
    stream = vae.encoder_stream()
    with pytest.raises(UserError, match=r"frames is 4; the VAE needs 1 \+ 4\*k frames"):
        stream.push(pixels[:, :4])
    first = stream.push(pixels[:, :5])
    for frames, words in ((1, "1 further frames; push a multiple of 4"), (0, "0 further frames")):
        with pytest.raises(UserError, match=words):
            stream.push(pixels[:, :frames])
    with pytest.raises(UserError, match="height is 12"):
        stream.push(pixels[:, 5:, :, :12])
    with pytest.raises(UserError, match=r"must be \(B, F, 3, H, W\)"):
        stream.push(pixels[:, 5:, :2])
    torch.testing.assert_close(
        torch.cat([first, stream.push(pixels[:, 5:])], 1), vae.encode(pixels), atol=1e-5, rtol=1e-5
    )
