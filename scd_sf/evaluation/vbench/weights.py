"""The files of VBench's networks: where it looks for each in its cache, and where each comes from
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
    """``path`` inside the cache, its ``url``, the ``dimensions`` that need it; ``how``: if not by
    plain download."""

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
    """UserError, after a line for each on stdout, if a file is missing, and if one is a pointer of
    Git LFS."""
    absent = [weight for weight in needed(dimensions) if not (folder / weight.path).is_file()]
    for weight in absent:
        first = next(name for name in dimensions if name in weight.dimensions)
        how = f" ({weight.how})" if weight.how else ""
        say(f"missing for {first}: {folder / weight.path}, from {weight.url}{how}")
    if absent:
        raise UserError(
            f"{folder}: {len(absent)} files of VBench's networks are missing (listed above); put each at its place, "
            "or let VBench download them with download=true, or name other dimensions"
        )
    for weight in needed(dimensions):
        refuse_lfs_pointer(folder / weight.path)


def link_dino(folder: Path) -> None:
    """DINO's own code looks under TORCH_HOME (``folder/torch_home`` for us), not where VBench puts
    the weights."""
    source = folder / "dino_model" / _DINO_FILE
    target = folder / "torch_home" / "hub" / "checkpoints" / _DINO_FILE
    if source.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(source.resolve())
