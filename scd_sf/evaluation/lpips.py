"""LPIPS (arXiv 1801.03924), version 0.1, AlexNet or VGG16: the ``lpips`` package's network with weights read offline.

Letters: V videos, F frames, H W pixels.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from scd_sf.evaluation.frames import check_pair
from scd_sf.evaluation.weights import State, load_weights
from scd_sf.types import UserError, on_device

Trunk = Literal["alex", "vgg"]
SMALLEST = {"alex": 31, "vgg": 16}  # pixels a side, below which a pool has nothing to pool


def lpips_network(trunk: Trunk, state: State) -> nn.Module:
    """``lpips.LPIPS`` with trunk and heads of ``state`` (the package's own names), in evaluation mode.

    Built without weights: nothing is downloaded. UserError when tensors are missing, too many, or of other shapes.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.filterwarnings("ignore", message=r"(?s).*pretrained.*|.*Arguments other than a weight enum.*")
        try:
            import lpips
        except ImportError as error:
            raise UserError(f"LPIPS needs the package lpips ({error}); pip install 'scd-sf[eval]'") from error
        network: nn.Module = lpips.LPIPS(net=trunk, pretrained=False, pnet_rand=True, verbose=False)
    own = network.state_dict()
    heads = {name.replace("lin", "lins.", 1): value for name, value in state.items() if name.startswith("lin")}
    scaling = {name: value for name, value in own.items() if name.startswith("scaling_layer.")}  # constants, not meta
    try:
        network.load_state_dict({**state, **heads, **scaling}, assign=True)
    except RuntimeError as error:
        raise UserError(f"lpips {trunk}: these are not its weights ({str(error).splitlines()[-1].strip()})") from error
    return network.requires_grad_(False)


class Lpips:
    """LPIPS per frame; ``sha256`` names the weights."""

    def __init__(
        self, network: nn.Module, trunk: Trunk, sha256: str, device: torch.device | str = "cpu", batch: int = 16
    ) -> None:
        """``batch``: pairs of frames per forward pass."""
        self.network = network.to(device)
        self.trunk = trunk
        self.sha256 = sha256
        self.device = torch.device(device)
        self.batch = batch

    @classmethod
    def load(cls, trunk: Trunk = "alex", folder: Path | None = None, device: torch.device | str = "cpu") -> Lpips:
        """With the weights of ``scd weights metrics``. UserError when they are not there."""
        state, digest = load_weights(f"lpips_{trunk}", folder)
        return cls(lpips_network(trunk, state), trunk, digest, device)

    @torch.no_grad()
    def __call__(self, videos: Tensor, reference: Tensor, *, unscaled: bool = False) -> Tensor:
        """Float videos (V, F, 3, H, W) in [0, 1], twice -> (V, F) fp64 on the CPU; 0 = the same, lower is nearer.

        Mapped to [-1, 1] as the network wants; ``unscaled`` feeds it [0, 1], as FAR and SCD's release do (their figures
        can only be compared with such). Raises UserError for other shapes or values, or frames that are too small.
        """
        check_pair(videos, reference, "LPIPS")
        if min(videos.shape[-2:]) < SMALLEST[self.trunk]:
            size = f"{videos.shape[-1]}x{videos.shape[-2]}"
            raise UserError(f"LPIPS {self.trunk}: frames of {size}; it needs {SMALLEST[self.trunk]} pixels a side")
        found = []
        pairs = (torch.split(each.flatten(0, 1), self.batch) for each in (videos, reference))
        for first, second in zip(*pairs, strict=True):
            first, second = (on_device(part, self.device).float() for part in (first, second))
            found.append(self.network(first, second, normalize=not unscaled).flatten().double().cpu())
        return torch.cat(found).view(videos.shape[:2])
