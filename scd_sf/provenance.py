"""Where a checkpoint comes from: what its ``provenance.json`` says."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from msgspec import Meta

from scd_sf.checkpoint import MANIFEST
from scd_sf.files import Json, sha256_file, typed

_Size = Annotated[int, Meta(ge=1, le=2**20)]  # frames, channels or pixels
AGAIN = "copy or export the checkpoint again"


@dataclass
class _Origin:
    """What commands read of a record; everything else in it is for people."""

    stage: str = ""
    step: int = 0
    parents: list[object] = field(default_factory=list)
    video: dict[str, _Size] | None = None
    latent: list[_Size] | None = None
    licence: str | None = None


def checked_origin(record: object, where: str | Path) -> Json:
    """``record``, a JSON value that someone else may have written, as the provenance it is.

    UserError naming ``where`` and the field that has another type.
    """
    typed(record, _Origin, where, AGAIN)
    return typed(record, Json, where, AGAIN)


def provenance(
    *,
    stage: str,
    step: int,
    seed: int,
    parents: Sequence[Path] = (),
    data_hash: str | None = None,
    extra: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Where a checkpoint comes from: stage, step, parent checkpoints, seed, data, git revision, library versions.

    ``extra`` adds fields of the stage (JSON values); it may not replace the standard ones.
    """
    record: dict[str, object] = {
        "stage": stage,
        "step": step,
        "seed": seed,
        "parents": [_parent(parent) for parent in parents],
        "data_hash": data_hash,
        "git_revision": git_revision(),
        "versions": versions(),
    }
    clash = sorted(set(record) & set(extra or {}))
    if clash:
        raise ValueError(f"provenance: extra field {clash[0]!r} is a standard field")
    return {**record, **(extra or {})}


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide numbers; 'absent' for one that is not installed."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("scd-sf", "deepspeed", "diffusers", "transformers", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def git_revision() -> str:
    """Commit of the source tree, '+dirty' when it has uncommitted changes, 'unknown' outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.check_output([*command, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL)
        status = subprocess.check_output([*command, "status", "--porcelain"], text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.strip() + ("+dirty" if status.strip() else "")


def absolute(path: str | Path) -> str:
    """A path as a record names it: the same from every folder, if something is there."""
    return str(Path(path).resolve()) if str(path) and Path(path).exists() else str(path)


def _parent(path: Path) -> dict[str, object]:
    """A parent by path and, when it is one of our checkpoints, by the digest of its manifest."""
    digest = sha256_file(path / MANIFEST) if (path / MANIFEST).is_file() else None
    return {"path": absolute(path), "manifest_sha256": digest}
