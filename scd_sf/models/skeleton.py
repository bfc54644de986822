"""Networks that someone else's config describes: built without storage first, and compared with
what a file holds.

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
# Parameters that a constructor may register: each tensor of the file some times (ties,
# replacements), and a few.
PER_TENSOR, SPARE = 4, 200


def skeleton(
    build: Callable[[], M], tensors: Mapping[str, object], where: str | Path, remedy: str
) -> M:
    """What ``build`` makes, on the meta device: names and shapes without storage.

    ``where``: the description it follows. UserError when that describes no network, or one of far
    more parameters than ``tensors``, its weights file, holds.
    """
    budget, made = PER_TENSOR * len(tensors) + SPARE, 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal made
        made += 1
        if made > budget:
            raise UserError(
                f"{where}: describes more than the {len(tensors)} tensors of the weights file; {remedy}"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), foreign(where, remedy):
            return build()
    finally:
        handle.remove()


def check_fit(
    model: nn.Module,
    tensors: Mapping[str, Lazy],
    where: Path,
    described: str,
    remedy: str,
    shown: Callable[[str], str] = str,
) -> None:
    """UserError unless ``tensors`` are the model's, by name and shape, and numbers of the same
    kind.

    ``where``: what is read; ``described``: what says how the tensors should be; ``shown``: the
    model's name of a tensor -> the file's.
    """
    expected = model.state_dict()
    for name, tensor in tensors.items():
        which = f"{tensor.origin}: tensor '{shown(name)}'"
        if name not in expected or tensor.shape != tuple(expected[name].shape):
            implied = list(expected[name].shape) if name in expected else "no such tensor"
            raise UserError(
                f"{which} has shape {list(tensor.shape)}, {described} implies {implied}; {remedy}"
            )
        if expected[name].is_floating_point() and not tensor.meta.is_floating_point():
            raise UserError(f"{which} is {kind_of(tensor)}, as quantised weights are; use others")
    if missing := [name for name in expected if name not in tensors]:
        raise UserError(
            f"{where}: {len(missing)} tensors missing, first '{shown(missing[0])}'; {remedy}"
        )
