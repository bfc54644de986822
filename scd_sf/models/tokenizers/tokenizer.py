"""Image tokenizers for SCD from scratch: a frozen autoencoder of single frames behind ``encode``
and ``decode``.

A directory holds ``config.json`` in diffusers' form and one file of weights, safetensors or a
pickle of tensors:

- ``AutoencoderDC`` of any factor: ours (``recipes/pretrain_tokenizer.py``), FAR's (UCF-101 f8c32,
  Minecraft f16c32: ``DCAE_*.pth`` beside FAR's ``model_*_config.json`` renamed to config.json),
  DC-AE's own under its authors' names;
- ``AutoencoderKL``: E2E-VAE and VA-VAE (f16, 32 channels) as diffusers has them, or under LDM's
  names; then no config.json is needed, and ``latents_stats.pt`` (E2E: ``*-latents-stats.pt``) lies
  beside the weights.

Latents are normalised by the first of: config.json's ``latents_mean`` and ``latents_std`` per
channel, (z - mean) / std; the statistics file; config.json's ``scaling_factor`` (and
``shift_factor``), (z - shift) * factor.

Letters: B batch, F frames, C latent channels, H W height and width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor

from scd_sf.files import Json, foreign, hash_json, read_json, sha256_file, write_json, write_tensors
from scd_sf.models.sections import choose_section
from scd_sf.models.skeleton import check_fit, skeleton
from scd_sf.models.tokenizers.names import (
    dc_from_efficientvit,
    is_efficientvit,
    is_ldm,
    kl_config,
    kl_from_ldm,
)
from scd_sf.models.wan.weights import WEIGHTS
from scd_sf.nn.layers import channels_last
from scd_sf.tensor_files import PICKLES, in_memory, open_tensors, read_all, read_tensors
from scd_sf.types import UserError, on_device

Autoencoder: TypeAlias = AutoencoderDC | AutoencoderKL
CONFIG = "config.json"
STATISTICS = ("latents_mean", "latents_std")
AGAIN = "copy the tokenizer again"
ROOTS = {"encoder", "decoder", "quant_conv", "post_quant_conv"}
_NAMES = {
    "AutoencoderDC": AutoencoderDC,
    "MyAutoencoderDC": AutoencoderDC,
    "AutoencoderKL": AutoencoderKL,
}
_STATISTICS_FILE = re.compile(r"(.*[-_])?latents?[-_]stats\.(pt|pth|safetensors)")
# of batch norms: averages of a training lack them, nothing reads them
_COUNTERS = ".num_batches_tracked"
_PIXELS = 5  # dimensions of (B, F, C, H, W)


@dataclass(frozen=True)
class Normalisation:
    """Per channel: latents = (z - ``mean``) / ``std`` of the network's z."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def check(self, channels: int, where: str) -> None:
        """UserError unless there are ``channels`` finite means and positive stds."""
        for name, values in zip(STATISTICS, (self.mean, self.std), strict=True):
            if len(values) != channels:
                raise UserError(
                    f"{where}: '{name}' has {len(values)} entries, the latents {channels}; {AGAIN}"
                )
        if not all(0 < value < float("inf") for value in self.std) or not all(
            abs(m) < float("inf") for m in self.mean
        ):
            raise UserError(
                f"{where}: the statistics must be finite and the stds positive in every channel; {AGAIN}"
            )


class FrameTokenizer:
    """A frozen image autoencoder; see :class:`scd_sf.types.Tokenizer`.

    Frames go through it ``batch`` at a time, which bounds memory; results do not depend on it
    beyond rounding.
    """

    def __init__(
        self, model: Autoencoder, normalisation: Normalisation, *, sha256: str = "", batch: int = 32
    ) -> None:
        """``sha256``: of weights and normalisation, for manifests (empty: not from files)."""
        if batch < 1:
            raise UserError(f"tokenizer: batch is {batch}; it must be at least 1")
        self.model = model.eval().requires_grad_(False)
        self.normalisation, self.sha256, self.batch = normalisation, sha256, batch
        self._channels, self._spatial = geometry(model)
        normalisation.check(self._channels, "tokenizer")
        view = (1, self._channels, 1, 1)
        self._mean = on_device(torch.tensor(normalisation.mean).view(view), self.device)
        self._std = on_device(torch.tensor(normalisation.std).view(view), self.device)

    @property
    def channels(self) -> int:
        return self._channels

    @property
    def spatial(self) -> int:
        return self._spatial

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @torch.no_grad()
    def encode(self, frames_BF3HW: Tensor) -> Tensor:
        """See the protocol. UserError: not (B, F, 3, H, W), or H or W not a multiple of ``spatial``
        (nothing is padded or cut in silence)."""
        if (
            frames_BF3HW.ndim != _PIXELS
            or frames_BF3HW.shape[2] != 3
            or not frames_BF3HW.is_floating_point()
        ):
            description = f"{frames_BF3HW.dtype} {tuple(frames_BF3HW.shape)}"
            raise UserError(
                f"tokenizer.encode: frames are {description}; they must be float (B, F, 3, H, W) in [-1, 1]"
            )
        for name, size in zip(("height", "width"), frames_BF3HW.shape[3:], strict=True):
            if size % self.spatial or not size:
                near = self.spatial * max(1, round(size / self.spatial))
                raise UserError(
                    f"tokenizer.encode: {name} is {size}, no multiple of {self.spatial}; resize to {near}"
                )
        return self._in_batches(
            frames_BF3HW, lambda pixels: (self._posterior(pixels) - self._mean) / self._std
        )

    @torch.no_grad()
    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """See the protocol. UserError: not (B, F, C, H, W)."""
        if latents_BFCHW.ndim != _PIXELS or latents_BFCHW.shape[2] != self.channels:
            shape = f"(B, F, {self.channels}, H, W)"
            raise UserError(
                f"tokenizer.decode: latents are {tuple(latents_BFCHW.shape)}; they must be {shape}"
            )
        return self._in_batches(
            latents_BFCHW, lambda latents: self._pixels(latents * self._std + self._mean)
        )

    def _in_batches(self, all_BFCHW: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        if not all_BFCHW.shape[0] * all_BFCHW.shape[1]:
            raise UserError(
                f"tokenizer: {tuple(all_BFCHW.shape)} holds no frame; give at least one"
            )
        parts = [
            work(on_device(part, self.device).float())
            for part in all_BFCHW.flatten(0, 1).split(self.batch)
        ]
        return torch.cat(parts).unflatten(0, all_BFCHW.shape[:2])

    def _posterior(self, pixels_N3HW: Tensor) -> Tensor:
        x = pixels_N3HW.to(self.dtype).contiguous(memory_format=torch.channels_last)
        posterior = self.model.encode(x, return_dict=False)[0]
        return (posterior if isinstance(self.model, AutoencoderDC) else posterior.mode()).float()

    def _pixels(self, z_NCHW: Tensor) -> Tensor:
        x = z_NCHW.to(self.dtype).contiguous(memory_format=torch.channels_last)
        pixels: Tensor = self.model.decode(x, return_dict=False)[0]
        return pixels.float().contiguous()


def geometry(model: Autoencoder) -> tuple[int, int]:
    """(latent channels, pixels per latent along a side). UserError: encoder and decoder
    disagree."""
    config = model.config
    if isinstance(model, AutoencoderKL):
        return int(config["latent_channels"]), 2 ** (len(config["block_out_channels"]) - 1)
    stages = [len(config[f"{side}_block_out_channels"]) for side in ("encoder", "decoder")]
    if stages[0] != stages[1]:
        raise UserError(
            f"tokenizer {CONFIG}: the encoder has {stages[0]} stages, the decoder {stages[1]}; {AGAIN}"
        )
    return int(config["latent_channels"]), 2 ** (stages[0] - 1)


def load_tokenizer(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> FrameTokenizer:
    """The tokenizer of a directory; see above. Pixels and latents are fp32 whatever ``dtype`` the
    network computes in.

    Raises UserError: nothing there, a foreign config, foreign, missing or misshapen weights, no
    statistics.
    """
    if not path.is_dir():
        raise UserError(
            f"{path}: no such directory; give one with {CONFIG} and the tokenizer's weights"
        )
    file = _weights_file(path)
    tensors = read_all(choose_section(open_tensors(file, AGAIN), ROOTS, "", str(file)))
    config = _config(path, tensors, file)
    with foreign(file, AGAIN):
        named_tensors = _diffusers_names(tensors, config, file)
    model = _build(config, named_tensors, path, file)
    normalisation = _normalisation(path, config, model)
    digest = hash_json([sha256_file(file), normalisation.mean, normalisation.std])
    model = (
        model.to(device=device, dtype=dtype) if dtype != torch.float32 else model.to(device=device)
    )
    return FrameTokenizer(channels_last(model), normalisation, sha256=digest)


def save_tokenizer(
    model: Autoencoder,
    normalisation: Normalisation,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write what :func:`load_tokenizer` reads: weights in ``dtype``, then config.json, each whole
    or not at all.

    diffusers reads it too; its ``scaling_factor`` is one over the mean std.
    """
    normalisation.check(geometry(model)[0], str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        name: value
        for name, value in json.loads(model.to_json_string()).items()
        if name != "_name_or_path"
    }
    config["scaling_factor"] = round(len(normalisation.std) / sum(normalisation.std), 6)
    config |= {"latents_mean": list(normalisation.mean), "latents_std": list(normalisation.std)}
    values = (
        tensor.to(dtype) if tensor.is_floating_point() else tensor
        for tensor in model.state_dict().values()
    )
    tensors = {
        name: tensor.contiguous() for name, tensor in zip(model.state_dict(), values, strict=True)
    }
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, config)


# ------------------------------------------------------------------------------------------ reading


def _weights_file(folder: Path) -> Path:
    """diffusers' file, or else the only file of weights there is."""
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    kinds = (".safetensors", *PICKLES)
    files = sorted(
        f for f in folder.iterdir() if f.suffix in kinds and not _STATISTICS_FILE.fullmatch(f.name)
    )
    if len(files) != 1:
        names = (
            f"{len(files)} files of weights ({', '.join(f.name for f in files)})"
            if files
            else "no file of weights"
        )
        raise UserError(f"{folder}: {names}; keep exactly one, or name it {WEIGHTS}")
    return files[0]


def _config(folder: Path, tensors: Mapping[str, Tensor], file: Path) -> Json:
    """config.json, or what the tensors of an LDM autoencoder imply."""
    path = folder / CONFIG
    if not path.is_file():
        if is_ldm(tensors):
            return kl_config(tensors, str(file))
        raise UserError(
            f"{path}: missing, and the weights alone do not say what they are; copy the tokenizer's config.json there "
            "(FAR's: options/model_cfg/dcae/model_*_config.json)"
        )
    config = read_json(path, AGAIN)
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _NAMES:
        classes = " or ".join(f"'{name}'" for name in ("AutoencoderDC", "AutoencoderKL"))
        raise UserError(f"{path}: '_class_name' is {repr(name)[:80]}; it must be {classes}")
    return config


def _diffusers_names(tensors: dict[str, Tensor], config: Json, file: Path) -> dict[str, Tensor]:
    if config["_class_name"] == "AutoencoderKL":
        return kl_from_ldm(tensors, str(file)) if is_ldm(tensors) else tensors
    return dc_from_efficientvit(tensors, str(file)) if is_efficientvit(tensors) else tensors


def _build(config: Json, tensors: dict[str, Tensor], folder: Path, file: Path) -> Autoencoder:
    cls = _NAMES[str(config["_class_name"])]
    fields = {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name not in STATISTICS
    }
    where = f"{folder / CONFIG}: describes no {cls.__name__}"
    model: Autoencoder = skeleton(lambda: cls.from_config(fields), tensors, where, AGAIN)
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    counters = [
        name for name in model.state_dict() if name.endswith(_COUNTERS) and name not in state
    ]
    state |= dict.fromkeys(counters, torch.zeros((), dtype=torch.long))
    lazy = {name: in_memory(tensor, str(file)) for name, tensor in state.items()}
    check_fit(model, lazy, file, f"{cls.__name__} of {CONFIG}", AGAIN)
    model.load_state_dict(state, assign=True)
    return model


def _normalisation(folder: Path, config: Json, model: Autoencoder) -> Normalisation:
    channels, where = geometry(model)[0], str(folder / CONFIG)
    files = [file for file in sorted(folder.iterdir()) if _STATISTICS_FILE.fullmatch(file.name)]
    statistics = [config.get(name) for name in STATISTICS]
    if all(isinstance(values, list) for values in statistics):
        numbers = partial(_numbers, where=where)
        normalisation = Normalisation(numbers(statistics[0]), numbers(statistics[1]))
    elif files:
        normalisation, where = _read_statistics(files[0]), str(files[0])
    elif "scaling_factor" in config:
        factor, shift = _numbers(
            [config["scaling_factor"], config.get("shift_factor") or 0.0], where
        )
        if factor <= 0:
            raise UserError(f"{where}: 'scaling_factor' is {factor}; it must be positive")
        normalisation = Normalisation((shift,) * channels, (1.0 / factor,) * channels)
    else:
        raise UserError(
            f"{folder}: no statistics of the latents; put latents_stats.pt (or a scaling_factor) there"
        )
    normalisation.check(channels, where)
    return normalisation


def _numbers(values: object, where: str) -> tuple[float, ...]:
    """A list of numbers, of any nesting: some configs have the shape (1, C, 1, 1)."""
    while isinstance(values, list) and values and all(isinstance(value, list) for value in values):
        values = [inner for value in values for inner in value]
    if not isinstance(values, list) or any(
        isinstance(v, bool) or not isinstance(v, int | float) for v in values
    ):
        raise UserError(
            f"{where}: latents_mean, latents_std, scaling_factor and shift_factor must be numbers; {AGAIN}"
        )
    return tuple(float(value) for value in values)


def _read_statistics(file: Path) -> Normalisation:
    """``mean`` and ``std`` (VA-VAE), or ``latents_bias`` and ``latents_scale`` = 1 / std (E2E-VAE),
    any shape of C."""
    tensors = {name: tensor.double().flatten() for name, tensor in read_tensors(file).items()}
    if {"mean", "std"} <= set(tensors):
        mean, std = tensors["mean"], tensors["std"]
    elif {"latents_bias", "latents_scale"} <= set(tensors):
        mean, std = tensors["latents_bias"], 1.0 / tensors["latents_scale"]
    else:
        names = ", ".join(tensors) or "nothing"
        raise UserError(
            f"{file}: holds {names}; it must hold mean and std, or latents_bias and latents_scale"
        )
    return Normalisation(tuple(mean.tolist()), tuple(std.tolist()))
