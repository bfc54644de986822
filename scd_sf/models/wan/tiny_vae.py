"""A tiny decoder in place of the VAE's own: a fraction of its operations, and less true. For
previews and live use, never for figures of quality.

Network and file layout are those of TAEHV (MIT licence, Ollin Boer Bohan, madebyollin/taehv), whose
files are read as they are: ``taew2_1`` for Wan 2.1, ``taew2_2`` for Wan 2.2 5B (its ``super``
variant is another network and is refused). ``recipes/pretrain_tiny_vae.py`` makes smaller ones.
The sizes of the network follow from the tensors' shapes.

TAEHV takes latents as the video model has them, normalised, and gives pixels in [0, 1]. Of its
``temporal`` frames per latent frame the first ``temporal`` - 1 of a video are dropped: 1 + k latent
frames become 1 + temporal*k pixel frames, as with the VAE. A block sees the present frame and the
one before it, so a stream keeps one frame per block.

Letters: B batch, F latent frames, C channels, T frames inside the network, H W height and width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scd_sf.files import hash_json, write_tensors
from scd_sf.models.skeleton import check_fit, skeleton
from scd_sf.models.wan.vae import Vae, VaeGeometry
from scd_sf.nn.layers import channels_last
from scd_sf.tensor_files import PICKLES, Lazy, open_tensors, read_all, read_metadata
from scd_sf.types import UserError, check_within, on_device

DECODER = "decoder.safetensors"
REMEDY = "use taew2_1 or taew2_2 of madebyollin/taehv, or train one: recipes/pretrain_tiny_vae.py"
STAGES, BLOCKS = 3, 3  # each stage doubles height and width
LAYERS = BLOCKS + 3  # of a stage: its blocks, upsampling, growth in time, a convolution
Memory = list[Tensor]
"""What a stream keeps: the last input (B, 1, C, H, W) of each block."""


@dataclass
class TinyVaeConfig:
    """Sizes of a tiny decoder; the defaults are those of ``taew2_1``."""

    channels: int = 16
    """Channels of the latents."""
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    """Channels of the three stages and of what follows them."""
    growth: tuple[int, int, int] = (1, 2, 2)
    """Frames that each stage makes of one."""
    patch: int = 1
    """Pixels on a side of what the last convolution gives."""

    def __post_init__(self) -> None:
        check_within(self, {"channels": (1, 2**12), "patch": (1, 64)})
        for name, values, limit in (("widths", self.widths, 2**13), ("growth", self.growth, 8)):
            if not all(1 <= value <= limit for value in values):
                raise ValueError(f"{name} is {tuple(values)}; each must be 1 to {limit}")

    @property
    def geometry(self) -> VaeGeometry:
        return VaeGeometry(self.channels, math.prod(self.growth), 2**STAGES * self.patch)


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the frame before it, added to the frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x_BTCHW: Tensor, before_B1CHW: Tensor) -> Tensor:
        past = torch.cat([before_B1CHW, x_BTCHW[:, :-1]], dim=1)
        change = self.conv(torch.cat([x_BTCHW, past], dim=2).flatten(0, 1))
        return F.relu(change.unflatten(0, x_BTCHW.shape[:2]) + x_BTCHW)


class TimeGrowth(nn.Module):
    """``factor`` frames of each, by a linear map of its channels."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * factor, 1, bias=False)
        self.width = width

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) -> (N * factor, C, H, W)."""
        return self.conv(x_NCHW).reshape(-1, self.width, *x_NCHW.shape[-2:])


class TinyDecoder(nn.Module):
    """The network, its parameters named as in TAEHV's files. Differentiable."""

    def __init__(self, cfg: TinyVaeConfig) -> None:
        super().__init__()
        self.cfg = cfg
        # ReLU and upsampling hold no weights: here they keep the places of TAEHV's names
        layers: list[nn.Module] = [nn.Identity(), _conv(cfg.channels, cfg.widths[0]), nn.ReLU()]
        for stage in range(STAGES):
            width = cfg.widths[stage]
            layers += [MemoryBlock(width) for _ in range(BLOCKS)]
            layers += [nn.Upsample(scale_factor=2), TimeGrowth(width, cfg.growth[stage])]
            layers += [_conv(width, cfg.widths[stage + 1], bias=False)]
        layers += [nn.ReLU(), _conv(cfg.widths[-1], 3 * cfg.patch**2)]
        self.decoder = nn.Sequential(*layers)

    def forward(self, latents_BFCHW: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """The next normalised latents -> their pixels (B, T, 3, H, W), [0, 1] but not clipped, and
        the memory for those that follow. ``memory`` None: the latents begin a video."""
        B, layers = len(latents_BFCHW), self.decoder
        x = torch.tanh(latents_BFCHW.flatten(0, 1) / 3) * 3  # TAEHV's soft limit
        x = layers[2](layers[1](x))
        kept: Memory = []
        for stage in range(STAGES):
            first = 3 + LAYERS * stage
            x = x.unflatten(0, (B, -1))
            for block in layers[first : first + BLOCKS]:
                before = torch.zeros_like(x[:, :1]) if memory is None else memory[len(kept)]
                kept.append(x[:, -1:])
                x = block(x, before)
            # Growth maps each pixel alone, so upsampling after it is the same, and cheaper.
            upsample, growth, conv = layers[first + BLOCKS : first + LAYERS]
            x = conv(upsample(growth(x.flatten(0, 1))))
        pixels = layers[-1](layers[-2](x))
        if self.cfg.patch > 1:
            pixels = F.pixel_shuffle(pixels, self.cfg.patch)
        start = self.cfg.geometry.temporal - 1 if memory is None else 0
        return pixels.unflatten(0, (B, -1))[:, start:], kept


class TinyVae:
    """A frozen tiny decoder: normalised latents (B, F', C, H', W') of a video model, as
    :class:`~scd_sf.models.wan.vae.Vae` has them, -> pixels (B, F, 3, H, W) in [-1, 1].

    ``latents``: whose latents it decodes (:func:`latent_identity`); "": not known. Work of a whole
    clip runs in slices of ``slice_size`` clips and of one latent frame, which bounds memory.
    """

    def __init__(self, model: TinyDecoder, *, latents: str = "", slice_size: int = 8) -> None:
        self.model = model.eval().requires_grad_(False)
        self.geometry = model.cfg.geometry
        self.latents = latents
        self.slice_size = slice_size
        self._weight = model.get_parameter("decoder.1.weight")

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    def stream(self) -> TinyVaeStream:
        """A decoder of one batch of videos whose latents come bit by bit."""
        return TinyVaeStream(self)

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Whole clips of normalised latents -> pixels in [-1, 1], fp32. UserError: bad shape."""
        _check_latents(latents_BFCHW, self.geometry)
        parts = []
        for part in latents_BFCHW.split(self.slice_size):
            stream = self.stream()
            parts.append(torch.cat([stream.push(frame) for frame in part.split(1, dim=1)], dim=1))
        return torch.cat(parts)


class TinyVaeStream:
    """One batch of videos decoded as their latent frames arrive; the interface and the number of
    frames are those of :class:`~scd_sf.models.wan.vae.VaeStream`."""

    def __init__(self, vae: TinyVae) -> None:
        self._vae = vae
        self._memory: Memory | None = None

    @torch.no_grad()
    def push(self, latents_BFCHW: Tensor) -> Tensor:
        """The next normalised latents (B, F', C, H', W') -> their pixels (B, F, 3, H, W) in [-1,
        1], fp32. UserError: bad shape."""
        vae = self._vae
        _check_latents(latents_BFCHW, vae.geometry)
        pixels, self._memory = vae.model(
            on_device(latents_BFCHW, vae.device, vae.dtype), self._memory
        )
        return pixels.float().clamp(0, 1) * 2 - 1


def load_decoder(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: Vae | None = None,
) -> TinyVae:
    """The tiny decoder of a file (safetensors or ``.pth``), or of a folder that holds one.

    ``vae``: the VAE whose place it takes. UserError: nothing or several there; no tiny decoder; a
    damaged file; or one for other latents than those of ``vae``: for TAEHV's own file of 48
    channels, which does not say whose they are, only the sizes are compared.
    """
    file = decoder_file(path)
    tensors = {
        name: tensor for name, tensor in open_tensors(file, REMEDY).items() if _is_decoders(name)
    }
    cfg = _config(tensors, file)
    model = skeleton(lambda: TinyDecoder(cfg), tensors, file, REMEDY)
    check_fit(model, tensors, file, "a tiny decoder of this size", REMEDY)
    model.load_state_dict(
        {name: tensor.float() for name, tensor in read_all(tensors).items()}, assign=True
    )
    metadata = {} if file.suffix in PICKLES else read_metadata(file, REMEDY)
    latents = metadata.get("latents", "")
    if not latents and cfg.channels == 16:
        latents = wan_2_1_latents()
    decoder = TinyVae(channels_last(model.to(device=device, dtype=dtype)), latents=latents)
    if vae is not None:
        _check_vae(decoder, vae, file)
    return decoder


def save_decoder(model: TinyDecoder, folder: Path, latents: str) -> Path:
    """Write ``folder/decoder.safetensors`` in fp16, as :func:`load_decoder` reads it; the file.
    ``latents``: :func:`latent_identity` of the VAE it was trained for."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().half().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    write_tensors(folder / DECODER, tensors, {"format": "pt", "latents": latents})
    return folder / DECODER


def decoder_file(path: Path | str) -> Path:
    """The file itself, or the only safetensors file (else the only ``.pth``) of a folder.
    UserError: there is none, or several."""
    path = Path(path)
    if not path.is_dir():
        return path
    for suffix in ("safetensors", "pth"):
        files = sorted(path.glob(f"*.{suffix}"))
        if len(files) > 1:
            raise UserError(
                f"{path}: holds {len(files)} {suffix} files, such as {files[0].name}; name the one to use"
            )
        if files:
            return files[0]
    raise UserError(f"{path}: holds no tiny decoder; {REMEDY}")


def latent_identity(mean: list[float], std: list[float]) -> str:
    """A short name of a VAE's latent space: a hash of its ``latents_mean`` and ``latents_std``."""
    return hash_json([[round(value, 6) for value in values] for values in (mean, std)])[:16]


def latents_of(vae: Vae) -> str:
    """:func:`latent_identity` of a VAE."""
    return latent_identity(vae.model.config["latents_mean"], vae.model.config["latents_std"])


def wan_2_1_latents() -> str:
    """:func:`latent_identity` of Wan 2.1's VAE, whose figures are diffusers' defaults."""
    from diffusers import AutoencoderKLWan

    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    return latent_identity(
        list(defaults["latents_mean"].default), list(defaults["latents_std"].default)
    )


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def _is_decoders(name: str) -> bool:
    return name.startswith("decoder.")


def _config(tensors: Mapping[str, Lazy], file: Path) -> TinyVaeConfig:
    """The sizes that the tensors' shapes imply; what they leave open is compared later."""
    if "decoder.0.weight" in tensors:
        raise UserError(
            f"{file}: is a 'super' decoder of TAEHV, which is not supported; use taew2_2"
        )

    def shape(name: str) -> tuple[int, ...]:
        tensor = tensors.get(name)
        if tensor is None or len(tensor.shape) != 4 or 0 in tensor.shape:
            wrong = "no" if tensor is None else f"shape {list(tensor.shape)} of"
            raise UserError(
                f"{file}: has {wrong} tensor '{name}', so it is no tiny decoder; {REMEDY}"
            )
        return tensor.shape

    first = shape("decoder.1.weight")
    last = 3 + LAYERS * STAGES + 1
    ends = [2 + LAYERS * (stage + 1) for stage in range(STAGES)]
    widths = [first[0], *(shape(f"decoder.{end}.weight")[0] for end in ends)]
    grown = [shape(f"decoder.{end - 1}.conv.weight")[0] for end in ends]
    patch = math.isqrt(shape(f"decoder.{last}.weight")[0] // 3)
    growth = [total // width for total, width in zip(grown, widths, strict=False)]
    try:
        return TinyVaeConfig(
            first[1],
            (widths[0], widths[1], widths[2], widths[3]),
            (growth[0], growth[1], growth[2]),
            patch,
        )
    except (ValueError, UserError) as error:
        raise UserError(f"{file}: no tiny decoder ({error}); {REMEDY}") from error


def _check_latents(latents_BFCHW: Tensor, geometry: VaeGeometry) -> None:
    if latents_BFCHW.ndim != 5 or latents_BFCHW.shape[2] != geometry.channels:
        shape = f"(B, F, {geometry.channels}, H, W)"
        raise UserError(
            f"tiny decoder: latents have shape {tuple(latents_BFCHW.shape)}; they must be {shape}"
        )


def _check_vae(decoder: TinyVae, vae: Vae, file: Path) -> None:
    """UserError unless the decoder reads the VAE's latents."""
    for name in ("channels", "temporal", "spatial"):
        own, other = getattr(decoder.geometry, name), getattr(vae.geometry, name)
        if own != other:
            raise UserError(
                f"{file}: is for latents of {name} {own}, the VAE's have {other}; use a decoder made for this VAE"
            )
    if decoder.latents and decoder.latents != latents_of(vae):
        raise UserError(
            f"{file}: is for another VAE (latents_mean and latents_std differ); use a decoder made for this VAE"
        )
