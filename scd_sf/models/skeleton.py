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
# Parameters that a constructor may register: PER_TENSOR for each tensor of the file (ties,
# replacements), and SPARE more.
PER_TENSOR, SPARE = 4, 200


def skeleton(
    build: Callable[[], M], tensors: Mapping[str, object], where: str | Path, remedy: str
) -> M:
    """The module that ``build`` returns, on the meta device: names and shapes without storage.

    ``where``: the description it follows. UserError when that describes no network, or one of far
    more parameters than ``tensors``, its weights file, holds.
    """
    budget, num_parameters = PER_TENSOR * len(tensors) + SPARE, 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal num_parameters
        num_parameters += 1
        if num_parameters > budget:
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
    description: str,
    remedy: str,
    file_name: Callable[[str], str] = str,
) -> None:
    """UserError unless ``tensors`` are the model's, by name and shape, and numbers of the same
    kind.

    ``where``: the file that is read. ``description``: how errors call the config that implies
    the shapes. ``file_name``: the model's name of a tensor -> the file's.
    """
    model_tensors = model.state_dict()
    for name, tensor in tensors.items():
        label = f"{tensor.origin}: tensor '{file_name(name)}'"
        if name not in model_tensors or tensor.shape != tuple(model_tensors[name].shape):
            model_shape = (
                list(model_tensors[name].shape) if name in model_tensors else "no such tensor"
            )
            raise UserError(
                f"{label} has shape {list(tensor.shape)}, {description} implies {model_shape}; {remedy}"
            )
        if model_tensors[name].is_floating_point() and not tensor.meta.is_floating_point():
            raise UserError(f"{label} is {kind_of(tensor)}, as quantised weights are; use others")
    if missing_names := [name for name in model_tensors if name not in tensors]:
        raise UserError(
            f"{where}: {len(missing_names)} tensors missing, first '{file_name(missing_names[0])}'; {remedy}"
        )
