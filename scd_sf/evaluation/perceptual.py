"""LPIPS as a training loss: the ``lpips`` package's network and heads on weights that the caller has.

The package brings the heads; the trunk is VGG16 or AlexNet, read from torchvision's file (``vgg16-397923af.pth``) or
from one in the package's own names (``net.slice1.0.weight``).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.tensor_files import read_tensors
from scd_sf.types import UserError

_TRUNKS = {"features.28.weight": "vgg", "features.10.weight": "alex"}  # the last convolution of each


def load_perceptual(weights: Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """(N, 3, H, W) twice, in [-1, 1] -> the mean LPIPS distance, with gradient to both. UserError: other weights, or no
    ``lpips`` package."""
    try:
        import lpips
    except ImportError as error:
        raise UserError("lpips_weights: the lpips package is missing; pip install 'scd-sf[eval]'") from error
    found = read_tensors(weights)
    layers = {_torchvision(name): tensor for name, tensor in found.items()}
    kind = next((kind for name, kind in _TRUNKS.items() if name in layers), None)
    if kind is None:
        raise UserError(f"{weights}: neither torchvision's VGG16 or AlexNet nor LPIPS; give one of these")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*pretrained.*|.*Arguments other than a weight enum.*")
        net = lpips.LPIPS(net=kind, pnet_rand=True, verbose=False).eval().requires_grad_(False)
    for name, value in net.net.state_dict().items():
        layer = _torchvision(f"net.{name}")
        if layer not in layers or layers[layer].shape != value.shape:
            shape = list(layers[layer].shape) if layer in layers else "missing"
            raise UserError(f"{weights}: tensor '{layer}' is {shape}, not {list(value.shape)}; use another file")
        value.copy_(layers[layer])
    net = net.to(device)
    return lambda made, real: net(made.float(), real.float()).mean()


def _torchvision(name: str) -> str:
    """``net.slice2.3.weight`` of the lpips package -> ``features.3.weight``."""
    return re.sub(r"net\.slice\d\.", "features.", name)
