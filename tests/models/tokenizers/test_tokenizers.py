"""Image tokenizers from disk: ours, FAR's, DC-AE's own names, LDM's; what they compute and what
they refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from scd_sf.files import current_umask
from scd_sf.models.tokenizers.tokenizer import (
    FrameTokenizer,
    Normalisation,
    load_tokenizer,
    save_tokenizer,
)
from scd_sf.types import UserError

C = 4
STATS = Normalisation((0.5, -1.0, 0.0, 2.0), (1.0, 2.0, 0.5, 4.0))


def tiny_dc(first: int = 0, norm: str = "rms_norm") -> AutoencoderDC:
    """f4 with a last stage of EfficientViT blocks, multi-scale in the encoder; statistics of batch
    norms are random."""
    torch.manual_seed(0)
    types = ("ResBlock", "ResBlock", "EfficientViTBlock")
    model = AutoencoderDC(
        latent_channels=C,
        attention_head_dim=8,
        encoder_block_types=types,
        decoder_block_types=types,
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(first, 1, 2),
        decoder_layers_per_block=(first, 2, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), ()),
        decoder_norm_types=(norm, norm, "rms_norm"),
        decoder_act_fns=("relu", "relu", "silu"),
        scaling_factor=0.2889,
    )
    return randomised(model)


def tiny_kl() -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
        latent_channels=C,
        norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    return randomised(model)


def randomised(model: AutoencoderDC | AutoencoderKL) -> AutoencoderDC | AutoencoderKL:
    """Norms and statistics that are not all one and zero, so that a mixed-up name shows."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.add_(0.2 * torch.rand_like(tensor) * (1 if "var" in name else 0.5))
    return model.eval()


def pixels(batch: int = 2, frames: int = 3, size: int = 16) -> Tensor:
    return (
        torch.rand(batch, frames, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    )


def expected(
    model: AutoencoderDC | AutoencoderKL, mean: Tensor, std: Tensor
) -> tuple[Tensor, Tensor]:
    """Latents and pixels of :func:`pixels` by the network itself."""
    with torch.no_grad():
        z = model.encode(pixels().flatten(0, 1), return_dict=False)[0]
        z = z if isinstance(z, Tensor) else z.mode()
        made = model.decode(z, return_dict=False)[0]
    return ((z - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)).unflatten(
        0, (2, 3)
    ), made.unflatten(0, (2, 3))


def agrees(tokenizer: FrameTokenizer, wanted: tuple[Tensor, Tensor]) -> None:
    latents = tokenizer.encode(pixels())
    torch.testing.assert_close(latents, wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokenizer.decode(latents), wanted[1], rtol=1e-4, atol=1e-4)


def config_of(model: AutoencoderDC | AutoencoderKL, folder: Path, **changes: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({**json.loads(model.to_json_string()), **changes})
    )


# ----------------------------------------------------------------------------- other people's names
# Written the other way round than the library's rules: from diffusers to the foreign layout, by plain replacement.


def to_efficientvit(model: AutoencoderDC, first: int) -> dict[str, Tensor]:
    table = [
        ("conv1.", "main.conv1.conv."),
        ("conv2.", "main.conv2.conv."),
        ("attn.to_qkv_multiscale.0.proj_in.", "context_module.main.aggreg.0.0."),
        ("attn.to_qkv_multiscale.0.proj_out.", "context_module.main.aggreg.0.1."),
        ("attn.to_out.", "context_module.main.proj.conv."),
        ("attn.norm_out.", "context_module.main.proj.norm."),
        ("conv_out.conv_inverted.", "local_module.main.inverted_conv.conv."),
        ("conv_out.conv_depth.", "local_module.main.depth_conv.conv."),
        ("conv_out.conv_point.", "local_module.main.point_conv.conv."),
        ("conv_out.norm.", "local_module.main.point_conv.norm."),
        ("conv.", "main.conv.conv."),
        ("norm.", "main.conv2.norm."),
    ]
    wrapped = "" if first else "conv."
    ends = {
        "encoder.conv_in." + wrapped: "encoder.project_in." + wrapped + "conv.",
        "encoder.conv_out.": "encoder.project_out.main.op_list.0.conv.",
        "decoder.conv_in.": "decoder.project_in.main.conv.",
        "decoder.norm_out.": "decoder.project_out.op_list.0.",
        "decoder.conv_out." + wrapped: "decoder.project_out.op_list.2." + wrapped + "conv.",
    }
    found: dict[str, Tensor] = {}
    queries: dict[str, list[Tensor]] = {}
    for name, tensor in model.state_dict().items():
        block = re.match(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(\d+)\.(.+)", name)
        if block is None:
            start = next(start for start in ends if name.startswith(start))
            found[name.replace(start, ends[start])] = tensor
            continue
        start, rest = f"{block[1]}.stages.{block[2]}.op_list.{block[3]}.", block[4]
        if rest in ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight"):
            queries.setdefault(f"{start}context_module.main.qkv.conv.weight", []).append(
                tensor[..., None, None]
            )
            continue
        old, new = next((old, new) for old, new in table if rest.startswith(old))
        found[start + rest.replace(old, new, 1)] = (
            tensor[..., None, None] if old == "attn.to_out." else tensor
        )
    return found | {name: torch.cat(parts) for name, parts in queries.items()}


def to_ldm(model: AutoencoderKL) -> dict[str, Tensor]:
    found = {}
    for name, tensor in model.state_dict().items():
        if (up := re.search(r"up_blocks\.(\d)", name)) is not None:
            name = name.replace(up[0], f"up.{2 - int(up[1])}")
        for old, new in [
            ("down_blocks.", "down."),
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"),
            ("resnets.", "block."),
            ("attentions.", "attn."),
            ("downsamplers.0.", "downsample."),
            ("upsamplers.0.", "upsample."),
            ("conv_shortcut", "nin_shortcut"),
            ("group_norm", "norm"),
            ("to_out.0", "proj_out"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("conv_norm_out", "norm_out"),
        ]:
            name = name.replace(old, new)
        is_kernel = "attn" in name and name.endswith("weight") and "norm" not in name
        found[name] = tensor[..., None, None] if is_kernel else tensor
    return found


# ------------------------------------------------------------------------------------- what is read


def test_ours_round_trip_and_diffusers_reads_it(tmp_path: Path) -> None:
    model = tiny_dc().half().float()  # exact in the file's fp16
    save_tokenizer(model, STATS, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.channels, tokenizer.spatial, tokenizer.normalisation) == (C, 4, STATS)
    agrees(tokenizer, expected(model, torch.tensor(STATS.mean), torch.tensor(STATS.std)))
    assert (
        load_file(tmp_path / "diffusion_pytorch_model.safetensors")["encoder.conv_out.weight"].dtype
        == torch.float16
    )
    theirs = AutoencoderDC.from_pretrained(tmp_path).float()
    assert theirs.config["scaling_factor"] == pytest.approx(4 / 7.5, abs=1e-6)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in model.state_dict().items())
    low = load_tokenizer(tmp_path, dtype=torch.bfloat16)
    latents = low.encode(pixels())
    assert (
        latents.dtype == low.decode(latents).dtype == torch.float32 and low.dtype == torch.bfloat16
    )
    torch.testing.assert_close(latents, tokenizer.encode(pixels()), rtol=0.1, atol=0.2)


def test_the_hash_is_of_weights_and_normalisation(tmp_path: Path) -> None:
    model = tiny_dc()
    other = Normalisation((0.0,) * C, STATS.std)
    for name, normalisation in (("a", STATS), ("b", STATS), ("c", other)):
        save_tokenizer(model, normalisation, tmp_path / name)
    model.encoder.conv_out.bias.data += 1
    save_tokenizer(model, STATS, tmp_path / "d")
    a, b, c, d = (load_tokenizer(tmp_path / name).sha256 for name in "abcd")
    assert a == b and len({a, c, d}) == 3 and len(a) == 64


def test_batches_equal_single_frames() -> None:
    model = tiny_dc()
    # 6 frames: 4 and 2
    whole, bounded = (FrameTokenizer(model, STATS, batch=batch) for batch in (100, 4))
    latents = whole.encode(pixels())
    assert latents.shape == (2, 3, C, 4, 4) and not latents.requires_grad
    single = torch.stack(
        [whole.encode(pixels()[b : b + 1, f : f + 1])[0, 0] for b in range(2) for f in range(3)]
    )
    torch.testing.assert_close(bounded.encode(pixels()), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single.unflatten(0, (2, 3)), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bounded.decode(latents), whole.decode(latents), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counters", [True, False])
def test_far(tmp_path: Path, counters: bool) -> None:
    """A .pth of the state, as training or its average leaves it, beside FAR's config; batch norms
    do not see the batch and ``scaling_factor`` is applied."""
    model = tiny_dc(norm="batch_norm")
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    state = {
        name: tensor
        for name, tensor in state.items()
        if counters or not name.endswith("num_batches_tracked")
    }
    config_of(model, tmp_path, _class_name="MyAutoencoderDC")
    torch.save(state, tmp_path / "DCAE_Minecraft_Res128-a5677f66.pth")
    agrees(load_tokenizer(tmp_path), expected(model, torch.zeros(C), torch.full((C,), 1 / 0.2889)))


@pytest.mark.parametrize("first", [0, 1])
def test_dc_ae_by_its_own_names(tmp_path: Path, first: int) -> None:
    """``first``: blocks in the first stage; without any, the outermost convolutions are of another
    kind."""
    model = tiny_dc(first)
    config_of(model, tmp_path)
    save_file(to_efficientvit(model, first), tmp_path / "model.safetensors")
    agrees(load_tokenizer(tmp_path), expected(model, torch.zeros(C), torch.full((C,), 1 / 0.2889)))


@pytest.mark.parametrize("kind", ["va-vae", "e2e-vae", "diffusers"])
def test_vae_with_statistics(tmp_path: Path, kind: str) -> None:
    """LDM's names need no config; the statistics lie beside them under either project's names, or
    in the config."""
    model, mean, std = tiny_kl(), torch.tensor(STATS.mean), torch.tensor(STATS.std)
    if kind == "diffusers":
        model.save_pretrained(tmp_path)
        config_of(
            model, tmp_path, latents_mean=[[[[m]] for m in STATS.mean]], latents_std=list(STATS.std)
        )
    elif kind == "va-vae":
        extra = {
            "loss.logvar": torch.zeros(()),
            "foundation_model.x.weight": torch.zeros(2),
            "linear_proj.weight": mean,
        }
        torch.save(
            {"state_dict": to_ldm(model) | extra, "epoch": 3},
            tmp_path / "vavae-imagenet256-f16d32-dinov2.pt",
        )
        torch.save(
            {"mean": mean.view(1, C, 1, 1), "std": std.view(1, C, 1, 1)},
            tmp_path / "latents_stats.pt",
        )
    else:
        torch.save(to_ldm(model), tmp_path / "e2e-vavae-400k.pt")
        torch.save(
            {"latents_scale": 1 / std, "latents_bias": mean},
            tmp_path / "e2e-vavae-400k-latents-stats.pt",
        )
    agrees(load_tokenizer(tmp_path), expected(model, mean, std))


def test_a_kl_autoencoder_with_scaling_and_shift(tmp_path: Path) -> None:
    model = tiny_kl()
    model.save_pretrained(tmp_path)
    config_of(model, tmp_path, scaling_factor=0.5, shift_factor=0.25)
    agrees(load_tokenizer(tmp_path), expected(model, torch.full((C,), 0.25), torch.full((C,), 2.0)))


# ---------------------------------------------------------------------------------- what is refused


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = dict(load_file(file))
    change(tensors)
    save_file(tensors, file)


def reconfigure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value != "gone"})
    )


def ldm_alone(folder: Path) -> None:
    (folder / "config.json").unlink()
    save_file(to_ldm(tiny_kl()), folder / "diffusion_pytorch_model.safetensors")


WEIGHT = "decoder.conv_in.weight"


def no_stages(folder: Path) -> None:
    reconfigure(folder, decoder_block_out_channels=[8, 16])
    rewrite(folder, dict.clear)


def odd_statistics(folder: Path) -> None:
    reconfigure(folder, latents_mean="gone")
    torch.save({"x": torch.ones(C)}, folder / "latents_stats.pt")


def code_in_a_pickle(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"x": Path("y")}, folder / "w.pth")


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (
        lambda d: (d / "diffusion_pytorch_model.safetensors").unlink(),
        "no file of weights",
    ),
    "two weights": (
        lambda d: (
            (d / "diffusion_pytorch_model.safetensors").rename(d / "a.safetensors")
            and (d / "b.safetensors").write_bytes(b"")
        ),
        "2 files of weights",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: missing"),
    "another class": (
        lambda d: reconfigure(d, _class_name="AutoencoderKLWan"),
        "'AutoencoderKLWan'",
    ),
    "nonsense in the config": (
        lambda d: reconfigure(d, encoder_block_types=["X"] * 3),
        "describes no AutoencoderDC",
    ),
    "stages differ": (
        no_stages,
        "tensors missing",
    ),
    "missing": (
        lambda d: rewrite(d, lambda t: t.pop(WEIGHT)),
        f"1 tensors missing, first '{WEIGHT}'",
    ),
    "foreign": (
        lambda d: rewrite(d, lambda t: t.update(blob=torch.zeros(1))),
        "config.json implies no such tensor",
    ),
    "misshapen": (
        lambda d: rewrite(d, lambda t: t.update({WEIGHT: torch.zeros(2)})),
        f"'{WEIGHT}' has shape [2]",
    ),
    "foreign among DC-AE's": (
        lambda d: rewrite(d, lambda t: t.update({"encoder.stages.0.x": torch.zeros(1)})),
        "is not one of DC-AE",
    ),
    "truncated": (
        lambda d: (d / "diffusion_pytorch_model.safetensors").write_bytes(b"12"),
        "diffusion_pytorch_model.safetensors",
    ),
    "few means": (lambda d: reconfigure(d, latents_mean=[0.0]), "'latents_mean' has 1 entries"),
    "zero std": (lambda d: reconfigure(d, latents_std=[0.0] * C), "positive"),
    "words as stds": (lambda d: reconfigure(d, latents_std=["x"] * C), "must be numbers"),
    "no statistics": (
        lambda d: reconfigure(d, latents_mean="gone", latents_std="gone", scaling_factor="gone"),
        "no statistics",
    ),
    "negative factor": (
        lambda d: reconfigure(d, latents_mean="gone", scaling_factor=-1.0),
        "must be positive",
    ),
    "odd statistics": (
        odd_statistics,
        "holds x",
    ),
    "code in a pickle": (
        code_in_a_pickle,
        "more than tensors",
    ),
    "LDM without statistics": (ldm_alone, "no statistics"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(tmp_path: Path, case: str) -> None:
    damage, said = REFUSALS[case]
    save_tokenizer(tiny_dc(), STATS, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert (
        said in str(error.value)
        and str(tmp_path) in str(error.value)
        and "\n" not in str(error.value)
    )


def test_refused_ldm_tensors(tmp_path: Path) -> None:
    stats = {"mean": torch.zeros(C), "std": torch.ones(C)}
    torch.save(stats, tmp_path / "latents_stats.pt")
    for change, said in (
        ({"encoder.down.0.block.0.norm3.weight.x": torch.zeros(1)}, "is not one of LDM's"),
        ({"post_quant_conv.weight": None}, "'post_quant_conv.weight' is missing"),
        ({"encoder.down.2.attn.1.q.weight": torch.zeros(3)}, "has shape [3]"),
    ):
        tensors = {
            name: value for name, value in (to_ldm(tiny_kl()) | change).items() if value is not None
        }
        torch.save(tensors, tmp_path / "vae.pt")
        with pytest.raises(UserError, match=re.escape(said)):
            load_tokenizer(tmp_path)


def test_bad_pixels_and_latents() -> None:
    tokenizer = FrameTokenizer(tiny_dc(), STATS)
    for bad, said in (
        (torch.zeros(1, 1, 3, 18, 16), "height is 18, no multiple of 4; resize to 16"),
        (torch.zeros(1, 1, 3, 16, 2), "width is 2, no multiple of 4; resize to 4"),
        (torch.zeros(1, 3, 16, 16), "they must be float (B, F, 3, H, W)"),
        (torch.zeros(1, 1, 3, 16, 16, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(1, 0, 3, 16, 16), "holds no frame"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            tokenizer.encode(bad)
    with pytest.raises(UserError, match=re.escape("must be (B, F, 4, H, W)")):
        tokenizer.decode(torch.zeros(1, 1, 3, 4, 4))
    with pytest.raises(UserError, match="batch is 0"):
        FrameTokenizer(tiny_dc(), STATS, batch=0)
    with pytest.raises(UserError, match="no such directory"):
        load_tokenizer(Path("/nowhere"))


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_layers_per_block": [10**6, 1, 1]},
        {"encoder_block_out_channels": [8] * 10_000},
        {"encoder_block_out_channels": [10**12, 8, 8]},
        {"encoder_block_out_channels": 3},
        {"latent_channels": 10**18},
        {"latent_channels": "4"},
        {"latent_channels": None},
        {"attention_head_dim": 0},
        {"decoder_layers_per_block": {"a": 1}},
        {"_class_name": ["AutoencoderDC"]},
        {"latents_mean": [[[["x"]]]]},
        {"latents_std": [0.0] * C},
        {"latents_std": [True] * C},
    ],
)
def test_configs_of_others(tmp_path: Path, changes: dict[str, object]) -> None:
    """One line that names a file of the folder, before anything large is made."""
    save_tokenizer(tiny_dc(), STATS, tmp_path)
    reconfigure(tmp_path, **changes)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    save_tokenizer(tiny_dc(), STATS, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    tensors = load_file(file)
    name = "decoder.conv_in.weight"
    for bad, words in (
        (torch.full_like(tensors[name], float("inf")), "holds NaN or infinity"),
        (tensors[name].to(torch.int8), "as quantised weights are"),
    ):
        save_file({**tensors, name: bad}, file)
        with pytest.raises(UserError, match=rf"tensor 'decoder\.conv_in\.weight' .*{words}"):
            load_tokenizer(tmp_path)
    save_file(tensors, file)
    whole = (tmp_path / "config.json").read_bytes()
    for part in (tmp_path / "config.json", file):
        part.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2838276208\n"
        )
        with pytest.raises(UserError, match=rf"{part.name}: a Git LFS pointer"):
            load_tokenizer(tmp_path)
        (tmp_path / "config.json").write_bytes(whole)
