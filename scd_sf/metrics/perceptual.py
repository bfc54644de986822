"""LPIPS as a training loss: the ``lpips`` package's network and heads on weights that the caller has.

The package brings the heads; the trunk is torchvision's VGG16 (``vgg16-397923af.pth``) or AlexNet, read from a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.models.weights import read_tensors
from scd_sf.types import UserError

_TRUNKS = {"features.28.weight": "vgg", "features.10.weight": "alex"}  # the last convolution of each


def load_perceptual(weights: Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """(N, 3, H, W) twice, in [-1, 1] -> the mean LPIPS distance, with gradient to both. UserError: other weights, or no
    ``lpips`` package."""
    try:
        import lpips
    except ImportError as error:
        raise UserError("lpips_weights: the lpips package is missing; pip install 'scd-sf[eval]'") from error
    trunk = {name: tensor for name, tensor in read_tensors(weights).items() if name.startswith("features.")}
    kind = next((kind for name, kind in _TRUNKS.items() if name in trunk), None)
    if kind is None:
        raise UserError(f"{weights}: no VGG16 or AlexNet of torchvision; give vgg16-397923af.pth")
    net = lpips.LPIPS(net=kind, pnet_rand=True, verbose=False).eval().requires_grad_(False)
    layers = {re.sub(r"slice\d\.", "features.", name): value for name, value in net.net.state_dict().items()}
    for name, value in layers.items():
        if name not in trunk or trunk[name].shape != value.shape:
            found = list(trunk[name].shape) if name in trunk else "missing"
            raise UserError(f"{weights}: tensor '{name}' is {found}, not {list(value.shape)}; use torchvision's {kind}")
        value.copy_(trunk[name])
    net = net.to(device)
    return lambda made, real: net(made.float(), real.float()).mean()
