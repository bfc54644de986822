"""Networks that someone else's config describes: built without storage first, and compared with what a file holds.

A config of 100,000 layers or of a width of 10^12 is refused before it costs time or memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from scd_sf.files import foreign
from scd_sf.tensor_files import Lazy, kind_of
from scd_sf.types import UserError

M = TypeVar("M", bound=nn.Module)
# Parameters that a constructor may register: each tensor of the file some times (ties, replacements), and a few.
PER_TENSOR, SPARE = 4, 200


def skeleton(build: Callable[[], M], tensors: Mapping[str, object], where: str | Path, remedy: str) -> M:
    """What ``build`` makes, on the meta device: names and shapes without storage.

    ``where``: the description it follows. UserError when that describes no network, or one of far more parameters
    than ``tensors``, its weights file, holds.
    """
    budget, made = PER_TENSOR * len(tensors) + SPARE, 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal made
        made += 1
        if made > budget:
            raise UserError(f"{where}: describes more than the {len(tensors)} tensors of the weights file; {remedy}")

    handle = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), foreign(where, remedy):
            return build()
    finally:
        handle.remove()


def check_fit(model: nn.Module, tensors: Mapping[str, Lazy], described: str, remedy: str) -> None:
    """UserError unless ``tensors`` are the model's, by name and shape, and numbers of the same kind.

    ``described``: what says how they should be.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    if wrong:
        name = wrong[0]
        where = tensors[name].origin if name in tensors else next((t.origin for t in tensors.values()), "weights")
        detail = f"{shapes.get(name, 'missing')} instead of {wanted.get(name, 'absent')}"
        raise UserError(f"{where}: {len(wrong)} tensors do not fit {described}: '{name}' is {detail}; {remedy}")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensors[name].meta.is_floating_point():
            kind = kind_of(tensors[name])
            raise UserError(f"{tensors[name].origin}: tensor '{name}' is {kind}, as quantised weights are; use others")
