"""LPIPS (arXiv 1801.03924), version 0.1, AlexNet or VGG16: the ``lpips`` package's network with
weights read offline.

:class:`Lpips` is the metric, :func:`load_perceptual` the training loss.
Letters: V videos, F frames, N images, H W pixels.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from scd_sf.evaluation.frames import check_pair
from scd_sf.evaluation.weights import State, load_weights
from scd_sf.tensor_files import read_tensors
from scd_sf.types import UserError, on_device

Trunk = Literal["alex", "vgg"]
SMALLEST = {"alex": 31, "vgg": 16}  # pixels a side, below which a pool has nothing to pool


# torchvision's names
LAST_CONVOLUTION = {"features.28.weight": "vgg", "features.10.weight": "alex"}


def _package_network(trunk: str, *, heads: bool) -> nn.Module:
    """``lpips.LPIPS`` with a trunk of random weights; ``heads``: load the heads that the package
    contains. Nothing is downloaded."""
    try:
        import lpips
    except ImportError as error:
        raise UserError(
            f"LPIPS needs the package lpips ({error}); pip install 'scd-sf[eval]'"
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"(?s).*pretrained.*|.*Arguments other than a weight enum.*"
        )
        network: nn.Module = lpips.LPIPS(net=trunk, pretrained=heads, pnet_rand=True, verbose=False)
    return network.eval()


def lpips_network(trunk: Trunk, state: State) -> nn.Module:
    """``lpips.LPIPS`` with trunk and heads of ``state`` (the package's own names), in evaluation
    mode.

    UserError when tensors are missing, too many, or of other shapes.
    """
    with torch.device("meta"):
        network = _package_network(trunk, heads=False)
    package_state = network.state_dict()
    heads = {
        name.replace("lin", "lins.", 1): value
        for name, value in state.items()
        if name.startswith("lin")
    }
    # constants, not meta
    scaling = {
        name: value for name, value in package_state.items() if name.startswith("scaling_layer.")
    }
    try:
        network.load_state_dict({**state, **heads, **scaling}, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"lpips {trunk}: these are not its weights ({str(error).splitlines()[-1].strip()})"
        ) from error
    return network.requires_grad_(False)


def load_perceptual(weights: Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS as a training loss: (N, 3, H, W) twice, in [-1, 1] -> the mean distance, with gradient
    to both.

    The package brings the heads. ``weights`` holds the trunk: torchvision's file
    (``vgg16-397923af.pth``), or one in the package's own names (``net.slice1.0.weight``).
    UserError: other weights, or no ``lpips`` package.
    """
    layers = {_torchvision_name(name): tensor for name, tensor in read_tensors(weights).items()}
    trunk = next((trunk for name, trunk in LAST_CONVOLUTION.items() if name in layers), None)
    if trunk is None:
        raise UserError(
            f"{weights}: neither torchvision's VGG16 or AlexNet nor LPIPS; give one of these"
        )
    network = _package_network(trunk, heads=True).requires_grad_(False)
    for name, value in network.state_dict().items():
        if not name.startswith("net."):
            continue
        layer = _torchvision_name(name)
        if layer not in layers or layers[layer].shape != value.shape:
            shape = list(layers[layer].shape) if layer in layers else "missing"
            raise UserError(
                f"{weights}: tensor '{layer}' is {shape}, not {list(value.shape)}; use another file"
            )
        value.copy_(layers[layer])
    network = network.to(device)
    return lambda generated, real: network(generated.float(), real.float()).mean()


def _torchvision_name(name: str) -> str:
    """``net.slice2.3.weight`` of the lpips package -> ``features.3.weight``."""
    return re.sub(r"net\.slice\d\.", "features.", name)


class Lpips:
    """LPIPS per frame; ``sha256`` names the weights."""

    def __init__(
        self,
        network: nn.Module,
        trunk: Trunk,
        sha256: str,
        device: torch.device | str = "cpu",
        batch: int = 16,
    ) -> None:
        """``batch``: pairs of frames per forward pass."""
        self.network = network.to(device)
        self.trunk = trunk
        self.sha256 = sha256
        self.device = torch.device(device)
        self.batch = batch

    @classmethod
    def load(
        cls, trunk: Trunk = "alex", folder: Path | None = None, device: torch.device | str = "cpu"
    ) -> Lpips:
        """The metric with the weights of ``scd weights metrics``. UserError when they are
        missing."""
        state, digest = load_weights(f"lpips_{trunk}", folder)
        return cls(lpips_network(trunk, state), trunk, digest, device)

    @torch.no_grad()
    def __call__(self, videos: Tensor, reference: Tensor, *, unscaled: bool = False) -> Tensor:
        """Float videos (V, F, 3, H, W) in [0, 1], twice -> (V, F) fp64 on the CPU; 0 = the same,
        lower is nearer.

        Mapped to [-1, 1] as the network wants; ``unscaled`` feeds it [0, 1], as FAR and SCD's
        release do (their figures can only be compared with such). Raises UserError for other shapes
        or values, or frames that are too small.
        """
        check_pair(videos, reference, "LPIPS")
        if min(videos.shape[-2:]) < SMALLEST[self.trunk]:
            size = f"{videos.shape[-1]}x{videos.shape[-2]}"
            raise UserError(
                f"LPIPS {self.trunk}: frames of {size}; it needs {SMALLEST[self.trunk]} pixels a side"
            )
        distances = []
        pairs = (torch.split(side.flatten(0, 1), self.batch) for side in (videos, reference))
        for video_frames, reference_frames in zip(*pairs, strict=True):
            frames = on_device(video_frames, self.device).float()
            references = on_device(reference_frames, self.device).float()
            distances.append(
                self.network(frames, references, normalize=not unscaled).flatten().double().cpu()
            )
        return torch.cat(distances).view(videos.shape[:2])
