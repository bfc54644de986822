"""I3D on Kinetics-400, the network of FVD: its 400 logits, averaged over time, are the features of
a video.

The architecture is the Inception-v1 I3D of "Quo Vadis, Action Recognition?" (arXiv 1705.07750),
RGB, with TensorFlow's SAME padding; batch normalisation (no scale, eps 1e-3) is folded into the
convolutions when weights are placed. Weights: ours (``scd weights metrics``: those behind tfhub's
i3d-kinetics-400/1), a state dict of VideoGPT or TATS (``i3d_pretrained_400.pt``), or StyleGAN-V's
TorchScript program (``i3d_torchscript.pt``). Every class here is a ``FeatureExtractor`` of one
group that is used as it is. Letters: V videos, F frames, H W pixels.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scd_sf.evaluation.weights import State, load_weights
from scd_sf.files import foreign, read_bytes, sha256_bytes
from scd_sf.tensor_files import check_finite
from scd_sf.types import UserError, on_device

CLASSES = 400
SIDE = 224  # pixels
FEWEST_FRAMES = 9  # the last average pool sees two of every eighth frame
EPS = 1e-3
TORCHSCRIPT_BYTES = 2**30  # the known file has 51 MB
TORCHSCRIPT_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
Triple = tuple[int, int, int]
Widths = tuple[int, int, int, int, int, int]
MIXED: dict[str, Widths] = {  # channels of b0, b1a, b1b, b2a, b2b, b3b
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding (before, after), which gives ceil(size / stride) outputs; an odd
    total has the larger part after."""
    outputs = math.ceil(size / stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _pad_same(x: Tensor, kernel: Triple, stride: Triple, value: float) -> Tensor:
    """x (B, C, T, H, W), padded with ``value`` for a convolution or pool without padding of its
    own."""
    pads = [_same(size, k, s) for size, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    flat = [side for pair in reversed(pads) for side in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


class _Unit(nn.Module):
    """A convolution with bias (into which the normalisation is folded), SAME padding, and a
    ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, relu: bool = True
    ) -> None:
        super().__init__()
        self.kernel = (kernel, kernel, kernel)
        self.stride = (stride, stride, stride)
        self.relu = relu
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *self.kernel), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv3d(
            _pad_same(x, self.kernel, self.stride, 0.0), self.weight, self.bias, self.stride
        )
        return x.relu_() if self.relu else x


class _Pool(nn.Module):
    """Maximum with SAME padding (minus infinity)."""

    def __init__(self, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(
            _pad_same(x, self.kernel, self.stride, -torch.inf), self.kernel, self.stride
        )


class _Mixed(nn.Module):
    """Four branches, joined along the channels: a 1x1x1 unit, two pairs of a 1x1x1 and a 3x3x3
    unit, and a pool with a 1x1x1 unit."""

    def __init__(self, inputs: int, widths: Widths) -> None:
        super().__init__()
        self.b0 = _Unit(inputs, widths[0])
        self.b1a, self.b1b = _Unit(inputs, widths[1]), _Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = _Unit(inputs, widths[3]), _Unit(widths[3], widths[4], 3)
        self.b3a, self.b3b = _Pool((3, 3, 3), (1, 1, 1)), _Unit(inputs, widths[5])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1
        )


class InceptionI3d(nn.Module):
    """x (B, 3, F, 224, 224) in [-1, 1], F >= 9 -> logits (B, 400), averaged over time, before the
    softmax."""

    def __init__(self) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {
            "Conv3d_1a_7x7": _Unit(3, 64, 7, 2),
            "MaxPool3d_2a_3x3": _Pool((1, 3, 3), (1, 2, 2)),
            "Conv3d_2b_1x1": _Unit(64, 64),
            "Conv3d_2c_3x3": _Unit(64, 192, 3),
            "MaxPool3d_3a_3x3": _Pool((1, 3, 3), (1, 2, 2)),
        }
        pools = {"Mixed_4b": ("MaxPool3d_4a_3x3", 3), "Mixed_5b": ("MaxPool3d_5a_2x2", 2)}
        width = 192
        for name, widths in MIXED.items():
            if name in pools:
                pool, kernel = pools[name]
                layers[pool] = _Pool((kernel, kernel, kernel), (2, 2, 2))
            layers[name] = _Mixed(width, widths)
            width = widths[0] + widths[2] + widths[4] + widths[5]
        self.layers = nn.ModuleDict(layers)
        self.logits = _Unit(width, CLASSES, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return self.logits(F.avg_pool3d(x, (2, SIDE // 32, SIDE // 32), stride=1)).mean(
            dim=(2, 3, 4)
        )


def place_i3d(state: Mapping[str, Tensor], where: str) -> InceptionI3d:
    """The network with the tensors of ``state`` (names: ``Mixed_3b.b1a.conv3d.weight``,
    ``.bn.running_mean``, ..).

    y = (conv(x) - mean) / sqrt(var + eps) * scale + bias is folded into weight and bias in fp64;
    ``bn.weight`` may be absent (the original has none). Every tensor is placed: UserError (naming
    ``where``) for missing or further ones.
    """
    with torch.device("meta"):
        network = InceptionI3d()
    remaining_tensors = {
        name: value for name, value in state.items() if not name.endswith("num_batches_tracked")
    }
    parameters: State = {}
    for name, unit in network.named_modules():
        if not isinstance(unit, _Unit):
            continue
        key = name.removeprefix("layers.")
        try:
            weight, bias = _fold(remaining_tensors, key)
        except KeyError as error:
            raise UserError(
                f"{where}: tensor {error.args[0]} is missing; these are not the weights of I3D"
            ) from error
        if weight.shape != unit.weight.shape or bias.shape != unit.bias.shape:
            raise UserError(
                f"{where}: {key} has shape {tuple(weight.shape)}, not {tuple(unit.weight.shape)}"
            )
        parameters |= {f"{name}.weight": weight, f"{name}.bias": bias}
    if remaining_tensors:
        raise UserError(
            f"{where}: tensor {sorted(remaining_tensors)[0]} has no place in I3D; these are other weights"
        )
    network.load_state_dict(parameters, assign=True)
    return network.requires_grad_(False)


def _fold(tensors: State, key: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of one unit, normalisation folded in; its entries are removed from
    ``tensors``."""
    weight = tensors.pop(f"{key}.conv3d.weight").double()
    if f"{key}.conv3d.bias" in tensors:  # the logits: no normalisation
        return weight.float(), tensors.pop(f"{key}.conv3d.bias").float()
    mean, var = (
        tensors.pop(f"{key}.bn.{name}").double() for name in ("running_mean", "running_var")
    )
    shift, scale = (
        tensors.pop(f"{key}.bn.bias").double(),
        tensors.pop(f"{key}.bn.weight", torch.ones_like(var)).double(),
    )
    factor = scale / torch.sqrt(var + EPS)
    return (weight * factor.view(-1, 1, 1, 1, 1)).float(), (shift - mean * factor).float()


def _check_clip(videos: Tensor) -> None:
    if videos.ndim != 5 or videos.shape[2] != 3 or videos.shape[1] < FEWEST_FRAMES:
        raise UserError(
            f"I3D: videos {tuple(videos.shape)}; it needs (V, F, 3, H, W) of at least {FEWEST_FRAMES} frames"
        )


class I3dFeatures:
    """400 logits of each video, by our network; plugs into ``VideoFrechet``. ``sha256`` names the
    weights."""

    components: tuple[int | None, ...] = (None,)

    def __init__(self, network: nn.Module, sha256: str, device: torch.device | str = "cpu") -> None:
        self.network = network.to(device)
        self.sha256 = sha256
        self.device = torch.device(device)

    @classmethod
    def load(cls, folder: Path | None = None, device: torch.device | str = "cpu") -> I3dFeatures:
        """The network with the weights of ``scd weights metrics``. UserError when they are
        missing."""
        state, digest = load_weights("i3d", folder)
        return cls(place_i3d(state, "i3d.safetensors"), digest, device)

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> tuple[Tensor, ...]:
        """Float (V, F, 3, H, W) in [0, 1] -> one group (V, 1, 400) fp64, on the CPU. One video at a
        time.

        Resized to 224x224 (bilinear, corners not aligned), then mapped to [-1, 1]. UserError below
        9 frames.
        """
        _check_clip(videos)
        rows = []
        for video in videos:
            frames = F.interpolate(
                on_device(video, self.device).float(), size=(SIDE, SIDE), mode="bilinear"
            )
            rows.append(self.network((frames * 2 - 1).transpose(0, 1).unsqueeze(0)).double().cpu())
        return (torch.stack(rows),)


class TorchscriptFeatures:
    """StyleGAN-V's I3D, a TorchScript program that resizes by itself; FAR, SCD's release and ExtDM
    use it."""

    components: tuple[int | None, ...] = (None,)

    def __init__(
        self, path: Path, sha256: str = TORCHSCRIPT_SHA256, device: torch.device | str = "cpu"
    ) -> None:
        """Load the file only if its hash is ``sha256``, by default that of StyleGAN-V's file,
        because a TorchScript file is a program. UserError, with the file's hash, before anything of
        it runs."""
        data = read_bytes(path, "give StyleGAN-V's i3d_torchscript.pt", TORCHSCRIPT_BYTES)
        self.sha256 = sha256_bytes(data)
        if self.sha256 != sha256:
            raise UserError(
                f"{path}: sha256 is {self.sha256}, not {sha256 or 'known'}; a TorchScript file is a program: "
                "name this hash, too, if you know where the file is from"
            )
        self.device = torch.device(device)
        with (
            foreign(path, "not a TorchScript file of I3D; fetch it again"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is old; so is this file
            self.program = torch.jit.load(io.BytesIO(data), map_location=self.device).eval()
            tensors = self.program.state_dict()
        for name, tensor in tensors.items():
            check_finite(tensor, name, str(path))
        self.path = path

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> tuple[Tensor, ...]:
        """Float (V, F, 3, H, W) in [0, 1] -> one group (V, 1, 400) fp64, on the CPU."""
        _check_clip(videos)
        rows = []
        for video in videos:
            clip = (on_device(video, self.device).float() * 2 - 1).transpose(0, 1).unsqueeze(0)
            with foreign(self.path, "not StyleGAN-V's I3D; fetch i3d_torchscript.pt again"):
                rows.append(
                    self.program(clip, rescale=False, resize=True, return_features=True)
                    .double()
                    .cpu()
                )
        return (torch.stack(rows),)
