"""The files of VBench's networks, with the path of each in VBench's cache and its source
(weights.json)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from scd_sf.evaluation.vbench.prompts import packaged
from scd_sf.files import refuse_lfs_pointer
from scd_sf.types import UserError, say

_DINO_FILE = "dino_vitbase16_pretrain.pth"
DETECTRON2 = ("object_class", "multiple_objects", "color", "spatial_relationship")
"""These dimensions import detectron2, which no package index has: it is installed from its
repository."""


@dataclass(frozen=True)
class Weight:
    """A file of weights: ``path`` inside the cache, its ``url``, the ``dimensions`` that need it.
    ``how``: further steps where a plain download is not enough."""

    path: str
    url: str
    dimensions: list[str]
    how: str = ""


@cache
def weights() -> tuple[Weight, ...]:
    """All files, each once."""
    rows = packaged("weights.json")["files"]
    assert isinstance(rows, list)
    return tuple(Weight(**row) for row in rows)


def needed(dimensions: Sequence[str]) -> list[Weight]:
    """The files that these dimensions need, each once."""
    return [weight for weight in weights() if set(weight.dimensions) & set(dimensions)]


def require_weights(dimensions: Sequence[str], folder: Path) -> None:
    """UserError if a file is missing (each is printed first), or is a pointer of Git LFS."""
    missing_weights = [
        weight for weight in needed(dimensions) if not (folder / weight.path).is_file()
    ]
    for weight in missing_weights:
        dimension = next(name for name in dimensions if name in weight.dimensions)
        further_steps = f" ({weight.how})" if weight.how else ""
        say(f"missing for {dimension}: {folder / weight.path}, from {weight.url}{further_steps}")
    if missing_weights:
        raise UserError(
            f"{folder}: {len(missing_weights)} files of VBench's networks are missing (listed above); "
            "put each at its place, or let VBench download them with download=true, or name other dimensions"
        )
    for weight in needed(dimensions):
        refuse_lfs_pointer(folder / weight.path)


def link_dino(folder: Path) -> None:
    """Link DINO's weights into ``folder/torch_home``, our TORCH_HOME, because DINO's own code looks
    for them there."""
    source = folder / "dino_model" / _DINO_FILE
    target = folder / "torch_home" / "hub" / "checkpoints" / _DINO_FILE
    if source.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(source.resolve())
