"""Optical flow by RAFT from a local weights file: torchvision's ``raft_large``, or the original
``raft-things.pth``.

The original's tensors are renamed into torchvision's network, which computes the same. Nothing is
downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scd_sf.tensor_files import read_tensors
from scd_sf.types import UserError

WHERE = (
    "raft-things.pth from models.zip of github.com/princeton-vl/RAFT (VBench's own file, at "
    "raft_model/models/raft-things.pth of its cache), or torchvision's raft_large_C_T_V1-22a6c225.pth"
)
SMALLEST = 128  # pixels: the correlation pyramid halves an eighth of the picture three times
_TO_TORCHVISION = (
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    (r"^(\w+_encoder)\.conv1\.", r"\1.convnormrelu.0."),
    (r"^(\w+_encoder)\.norm1\.", r"\1.convnormrelu.1."),
    (r"^(\w+_encoder)\.conv2\.", r"\1.conv."),
    (r"(layer\d\.\d)\.conv(\d)\.", r"\1.convnormrelu\2.0."),
    (r"(layer\d\.\d)\.norm(\d)\.", r"\1.convnormrelu\2.1."),
    (r"^update_block\.encoder\.convc(\d)\.", r"update_block.motion_encoder.convcorr\1.0."),
    (r"^update_block\.encoder\.convf(\d)\.", r"update_block.motion_encoder.convflow\1.0."),
    (r"^update_block\.encoder\.conv\.", "update_block.motion_encoder.conv.0."),
    (r"^update_block\.gru\.conv([zrq])(\d)\.", r"update_block.recurrent_block.convgru\2.conv\1."),
    (r"^update_block\.flow_head\.", "update_block.flow_head."),
    (r"^update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"^update_block\.mask\.2\.", "mask_predictor.conv."),
)


def torchvision_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original RAFT's tensors under torchvision's names; norm3 of a block is its downsample.1 a
    second time."""
    tensors = {}
    for original_name, value in state.items():
        name = original_name.removeprefix("module.")
        if ".norm3." in name:
            continue
        for pattern, replacement in _TO_TORCHVISION:
            name = re.sub(pattern, replacement, name)
        tensors[name] = value
    return tensors


def load_raft(path: Path) -> nn.Module:
    """RAFT with the weights of ``path``, in evaluation mode. UserError names the file and sources
    of the weights."""
    from torchvision.models.optical_flow import raft_large

    state = read_tensors(path, f"it must be {WHERE}")
    if not state:
        raise UserError(f"raft {path}: holds no weights; it must be {WHERE}")
    is_original_layout = any(name.removeprefix("module.").startswith("fnet.") for name in state)
    model: nn.Module = raft_large(weights=None)
    try:
        model.load_state_dict(torchvision_names(state) if is_original_layout else state)
    except RuntimeError as error:
        raise UserError(
            f"raft {path}: these are not the weights of the large RAFT; it must be {WHERE}"
        ) from error
    return model.eval()


@torch.no_grad()
def optical_flow(model: nn.Module, first: Tensor, second: Tensor, updates: int = 20) -> Tensor:
    """Flow in pixels, float (B, 2, H', W'), between frames (B, 3, H, W) in 0..255; H', W' are
    padded to multiples of 8.

    Padded by repeating the border, half on each side, as the original's ``InputPadder`` does.
    """
    height, width = first.shape[-2:]
    if min(height, width) < SMALLEST:
        raise UserError(
            f"optical flow: frames of {width}x{height}; RAFT needs at least {SMALLEST} pixels a side"
        )
    rows, columns = -height % 8, -width % 8
    pad = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    pair = [F.pad(x.float() / 255 * 2 - 1, pad, mode="replicate") for x in (first, second)]
    flow: Tensor = model(*pair, num_flow_updates=updates)[-1]
    return flow
