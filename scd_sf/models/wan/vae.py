"""The video autoencoder: diffusers' ``AutoencoderKLWan`` behind two calls, :meth:`Vae.encode` and
:meth:`Vae.decode`, and the same bit by bit, :meth:`Vae.encoder_stream` and :meth:`Vae.stream`.

One code path serves Wan 2.1's VAE and the small one of the embedded demo: geometry, channels,
``latents_mean`` and ``latents_std`` come from the directory's ``config.json`` (diffusers layout);
Wan's original file has no config and is always Wan 2.1's. The temporal layout is Wan's: the first
frame alone, then groups of ``temporal``; 1 + temporal*k pixel frames become 1 + k latent frames.

Letters: B batch, F frames, C latent channels, H W height and width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from scd_sf.files import foreign, read_json, typed, write_tensors
from scd_sf.models.sections import choose_section
from scd_sf.models.skeleton import check_fit, skeleton
from scd_sf.models.wan.hub import wan_folder
from scd_sf.nn.layers import channels_last
from scd_sf.tensor_files import in_memory, open_tensor_folder, open_tensors, read_all
from scd_sf.types import UserError, VideoShape, on_device

if TYPE_CHECKING:  # seconds to import: only where a VAE is read
    from diffusers import AutoencoderKLWan

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
ROOTS = {"encoder", "decoder", "conv1", "conv2"}  # what the names in Wan's original file begin with
AGAIN = "copy the VAE again"
ORIGINAL = "Wan2.1_VAE.pth"
FRAME_GROUP = 4  # AutoencoderKLWan's own chunk loop is written for groups of four frames


@dataclass(frozen=True)
class VaeGeometry:
    """``channels`` latent channels; ``temporal`` frames and ``spatial`` x ``spatial`` pixels per
    latent position."""

    channels: int
    temporal: int
    spatial: int

    def shape(self, frames: int, height: int, width: int) -> VideoShape:
        """Latent shape of a pixel clip. Raises UserError unless frames = 1 + temporal*k and the
        sizes divide."""
        return VideoShape.from_pixels(
            frames,
            height,
            width,
            channels=self.channels,
            temporal=self.temporal,
            spatial=self.spatial,
        )


class PixelStream(Protocol):
    """One batch of videos on the way from latents to pixels."""

    def push(self, latents_BFCHW: Tensor) -> Tensor:
        """The next normalised latents (B, F', C, H', W') -> their pixels (B, F, 3, H, W) in [-1,
        1], fp32: one frame for a video's first latent frame, ``temporal`` for each later one."""
        ...


class PixelDecoder(Protocol):
    """What decodes latents: a :class:`Vae`, or a tiny decoder in its place (tiny_vae.py)."""

    geometry: VaeGeometry

    @property
    def device(self) -> torch.device: ...

    def stream(self) -> PixelStream: ...


class Vae:
    """A frozen ``AutoencoderKLWan``: pixels (B, F, 3, H, W) in [-1, 1] <-> normalised latents (B,
    F', C, H', W').

    Normalised means ``(z - latents_mean) / latents_std`` per channel, z the posterior mean (so
    encoding is deterministic). Work runs in slices of ``slice_size`` clips, which bounds memory;
    results do not depend on it.
    """

    def __init__(
        self, model: AutoencoderKLWan, *, slice_size: int = 8, where: str = "vae config.json"
    ) -> None:
        """``where``: the description that errors name."""
        if slice_size < 1:
            raise UserError(f"vae: slice_size is {slice_size}; it must be at least 1")
        self.model = model.eval().requires_grad_(False)
        self.geometry = _geometry(model, where)
        self.slice_size = slice_size
        view = (1, self.geometry.channels, 1, 1, 1)
        weight = model.quant_conv.weight
        self._mean = on_device(
            torch.tensor(model.config["latents_mean"]).float().view(view), weight.device
        )
        self._std = on_device(
            torch.tensor(model.config["latents_std"]).float().view(view), weight.device
        )

    @property
    def device(self) -> torch.device:
        return self.model.quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.quant_conv.weight.dtype

    def normalised(self, z_BCFHW: Tensor) -> Tensor:
        """The network's latents -> latents of the video model."""
        return (z_BCFHW - self._mean.to(z_BCFHW.device)) / self._std.to(z_BCFHW.device)

    def raw(self, latents_BCFHW: Tensor) -> Tensor:
        """Latents of the video model, anywhere -> the network's, on its device and in its dtype."""
        latents = on_device(latents_BCFHW, self.device).float()
        return (latents * self._std.to(self.device) + self._mean.to(self.device)).to(self.dtype)

    @torch.no_grad()
    def encode(self, video_BFCHW: Tensor) -> Tensor:
        """Pixels (B, F, 3, H, W) in [-1, 1] -> normalised latents (B, F', C, H', W'), fp32.
        UserError: bad shape."""
        _check_pixels(video_BFCHW)
        self.geometry.shape(video_BFCHW.shape[1], video_BFCHW.shape[3], video_BFCHW.shape[4])
        parts = []
        for part in video_BFCHW.split(self.slice_size):
            latents = self.model.encode(self._network_pixels(part), return_dict=False)[0].mean
            parts.append(self.normalised(latents.float()).transpose(1, 2))
        return torch.cat(parts)

    def _network_pixels(self, video_BFCHW: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W) as the network takes them: on its device, in its dtype."""
        pixels = on_device(video_BFCHW, self.device, self.dtype).transpose(1, 2)
        return pixels.contiguous(memory_format=torch.channels_last_3d)

    def encoder_stream(self) -> VaeEncoderStream:
        """An encoder of one batch of videos whose frames come bit by bit."""
        return VaeEncoderStream(self)

    def stream(self) -> VaeStream:
        """A decoder of one batch of videos whose latents come bit by bit."""
        return VaeStream(self)

    @torch.no_grad()
    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Normalised latents (B, F', C, H', W') -> pixels (B, F, 3, H, W) in [-1, 1], fp32.
        UserError: bad shape."""
        if latents_BFCHW.ndim != 5 or latents_BFCHW.shape[2] != self.geometry.channels:
            shape = f"(B, F, {self.geometry.channels}, H, W)"
            raise UserError(
                f"vae.decode: latents have shape {tuple(latents_BFCHW.shape)}; they must be {shape}"
            )
        parts = []
        for part in latents_BFCHW.split(self.slice_size):
            pixels = self.model.decode(self.raw(part.transpose(1, 2)), return_dict=False)[0]
            parts.append(pixels.float().transpose(1, 2))
        return torch.cat(parts)


class VaeStream:
    """One batch of videos decoded as their latent frames arrive: equal to :meth:`Vae.decode` of the
    whole clip.

    The first latent frame gives one pixel frame, each later one ``geometry.temporal``. Memory does
    not grow: what is kept of the past is the last frames that the causal convolutions look back at.
    """

    def __init__(self, vae: Vae) -> None:
        self._vae = vae
        self._cache = _empty_cache(vae.model.decoder)
        self._started = False

    @torch.no_grad()
    def push(self, latents_BFCHW: Tensor) -> Tensor:
        """The next normalised latents (B, F', C, H', W') -> their pixels (B, F, 3, H, W) in [-1,
        1], fp32."""
        vae, parts = self._vae, []
        hidden = vae.model.post_quant_conv(vae.raw(latents_BFCHW.transpose(1, 2)))
        for frame in hidden.split(1, dim=2):
            first = not self._started
            parts.append(
                vae.model.decoder(frame, feat_cache=self._cache, feat_idx=[0], first_chunk=first)
            )
            self._started = True
        pixels = torch.cat(parts, dim=2)
        if (patch := vae.model.config["patch_size"]) is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            pixels = unpatchify(pixels, patch_size=patch)
        return pixels.clamp(-1, 1).float().transpose(1, 2)


class VaeEncoderStream:
    """One batch of videos encoded as their frames arrive: equal to :meth:`Vae.encode` of the whole
    clip.

    The first pixel frame gives one latent frame, and each ``geometry.temporal`` later ones another.
    Memory does not grow: what is kept of the past is the last frames that the causal convolutions
    look back at.
    """

    def __init__(self, vae: Vae) -> None:
        self._vae = vae
        self._cache = _empty_cache(vae.model.encoder)
        self._started = False

    @torch.no_grad()
    def push(self, video_BFCHW: Tensor) -> Tensor:
        """The next pixels (B, F, 3, H, W) in [-1, 1] -> their normalised latents (B, F', C, H',
        W'), fp32. F is 1 + temporal*k at first and temporal*k later. UserError: any other shape."""
        vae, group = self._vae, self._vae.geometry.temporal
        _check_pixels(video_BFCHW)
        frames, height, width = video_BFCHW.shape[1], *video_BFCHW.shape[3:]
        if self._started and (not frames or frames % group):
            raise UserError(f"vae: {frames} further frames; push a multiple of {group}")
        first = 0 if self._started else 1
        vae.geometry.shape(frames + 1 - first, height, width)
        pixels = vae._network_pixels(video_BFCHW)
        if (patch := vae.model.config["patch_size"]) is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

            pixels = patchify(pixels, patch_size=patch)
        parts = []
        sizes = [1] * first + [group] * ((frames - first) // group)
        for part in pixels.split(sizes, dim=2):
            parts.append(vae.model.encoder(part, feat_cache=self._cache, feat_idx=[0]))
            self._started = True
        mean = vae.model.quant_conv(torch.cat(parts, dim=2))[:, : vae.geometry.channels]
        return vae.normalised(mean.float()).transpose(1, 2)


def _empty_cache(network: nn.Module) -> list[object]:
    """What the causal convolutions of an encoder or decoder look back at, at a video's beginning."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [None for module in network.modules() if isinstance(module, WanCausalConv3d)]


def _check_pixels(video_BFCHW: Tensor) -> None:
    if video_BFCHW.ndim != 5 or video_BFCHW.shape[2] != 3:
        raise UserError(
            f"vae.encode: video has shape {tuple(video_BFCHW.shape)}; it must be (B, F, 3, H, W)"
        )


def load_vae(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Vae:
    """The VAE of a model directory (diffusers' layout or Wan's original one), of a ``vae/`` folder,
    or of Wan's file.

    Raises UserError: nothing there, a damaged or foreign config, missing, truncated or foreign
    weights.
    """
    source = vae_source(Path(path))
    model = _read_original(source) if source.is_file() else _read_folder(source)
    if dtype != torch.float32:
        model = model.to(dtype=dtype)
    description = source if source.is_file() else source / "config.json"
    return Vae(channels_last(model.to(device=device)), where=str(description))


def save_vae(model: AutoencoderKLWan, folder: Path) -> None:
    """Write what :func:`load_vae` and diffusers read: config.json, and the weights as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(folder)
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


def vae_geometry(path: Path | str) -> VaeGeometry:
    """The geometry of the VAE of ``path`` as its configuration states it; no weights are read.
    UserError as :func:`load_vae`."""
    source = vae_source(Path(path))
    file = source / "config.json"
    config = _Json() if source.is_file() else typed(_read_config(file), _Json, file, AGAIN)
    halvings = (len(config.dim_mult) or 4) - 1
    in_time = sum(config.temperal_downsample) if config.temperal_downsample else 2
    return VaeGeometry(config.z_dim, 2**in_time, 2**halvings * (config.patch_size or 1))


def vae_source(path: Path) -> Path:
    """Path of the VAE of ``path``: a folder with config.json and weights, or Wan's original
    file.

    The name of a repository on the hub: see hub.py. Raises UserError where there is neither.
    """
    if path.is_file():
        return path
    path = wan_folder(path, ("vae",))
    # config.json beside it is the transformer's
    if (path / ORIGINAL).is_file() and not (path / "vae").is_dir():
        return path / ORIGINAL
    for folder in (path, path / "vae"):
        config = folder / "config.json"
        if config.is_file() and (
            folder == path / "vae" or (folder / WEIGHTS).is_file() or not (path / "vae").is_dir()
        ):
            return folder
    raise UserError(
        f"{path}: holds neither config.json nor vae/config.json nor {ORIGINAL}; use a directory with a VAE"
    )


def _read_folder(folder: Path) -> AutoencoderKLWan:
    from diffusers import AutoencoderKLWan

    config = _read_config(folder / "config.json")
    tensors = open_tensor_folder(folder, STEM, AGAIN)
    model = skeleton(
        lambda: AutoencoderKLWan.from_config(config), tensors, folder / "config.json", AGAIN
    )
    check_fit(model, tensors, folder, "config.json", AGAIN)
    model.load_state_dict(
        {name: tensor.float() for name, tensor in read_all(tensors).items()}, assign=True
    )
    return model


def _read_original(file: Path) -> AutoencoderKLWan:
    """Wan 2.1's VAE from its original file. Its width is taken from the tensors, all else is the
    class's default."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    lazy_tensors = choose_section(open_tensors(file), ROOTS, "", str(file))
    first = lazy_tensors.get("encoder.conv1.weight")
    if first is None or not first.shape:
        raise UserError(
            f"{file}: has no tensor 'encoder.conv1.weight', so it is not Wan 2.1's VAE; use {ORIGINAL}"
        )
    with foreign(file, f"use {ORIGINAL}"):
        tensors = convert_wan_vae_to_diffusers(read_all(lazy_tensors))
    model = skeleton(lambda: AutoencoderKLWan(base_dim=first.shape[0]), tensors, file, AGAIN)
    lazy = {name: in_memory(tensor, str(file)) for name, tensor in tensors.items()}
    check_fit(model, lazy, file, "Wan 2.1's VAE", AGAIN)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model


@dataclass
class _Json:
    """The types of config.json's fields, as ``AutoencoderKLWan`` has them."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    in_channels: int = 3
    out_channels: int = 3
    num_res_blocks: int = 2
    dim_mult: list[int] = field(default_factory=list)
    attn_scales: list[float] = field(default_factory=list)
    temperal_downsample: list[bool] = field(default_factory=list)
    dropout: float = 0.0
    is_residual: bool = False
    latents_mean: list[float] = field(default_factory=list)
    latents_std: list[float] = field(default_factory=list)
    patch_size: int | None = None
    scale_factor_temporal: int | None = None
    scale_factor_spatial: int | None = None


def _read_config(path: Path) -> dict[str, object]:
    config = read_json(path, "copy the VAE's config.json again")
    name = config.get("_class_name")
    if name != "AutoencoderKLWan":
        raise UserError(
            f"{path}: '_class_name' is {repr(name)[:80]}; only 'AutoencoderKLWan' can be loaded"
        )
    typed(config, _Json, path, AGAIN)
    return config


def _geometry(model: AutoencoderKLWan, where: str) -> VaeGeometry:
    """Factors and channels of the config, checked against the network's own layers. Raises
    UserError."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample

    config = model.config
    channels: int = config["z_dim"]
    down = 2 ** sum(1 for module in model.encoder.modules() if isinstance(module, WanResample))
    temporal = 2 ** sum(
        1
        for m in model.encoder.modules()
        if isinstance(m, WanResample) and m.mode == "downsample3d"
    )
    real = {
        "scale_factor_spatial": down * (config["patch_size"] or 1),
        "scale_factor_temporal": temporal,
    }
    for name, value in real.items():
        if config[name] != value:
            raise UserError(
                f"{where}: '{name}' is {config[name]}, the network's is {value}; correct it"
            )
    if temporal != FRAME_GROUP:
        raise UserError(
            f"{where}: the network groups {temporal} frames, not {FRAME_GROUP}; use another VAE"
        )
    for name in ("latents_mean", "latents_std"):
        if len(config[name]) != channels:
            raise UserError(
                f"{where}: '{name}' has {len(config[name])} entries, not z_dim = {channels}"
            )
    if not all(0 < value < math.inf for value in config["latents_std"]):
        raise UserError(
            f"{where}: 'latents_std' must be positive in every channel; copy the file again"
        )
    return VaeGeometry(channels, temporal, real["scale_factor_spatial"])
