"""Export of weights: a checkpoint as one file or in Wan's own layouts, and any Wan from one layout
to the other.

Everything written is read again and run beside its source; the largest difference of the outputs is
reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.checkpoint import CONFIG, MANIFEST, read_provenance
from scd_sf.config import differences, stored_settings
from scd_sf.files import new_folder, own_file
from scd_sf.models.build import (
    CheckpointConfig,
    Scd,
    Student,
    build_model,
    describe_checkpoint,
    load_checkpoint_model,
    load_state,
    probe_output,
    require_wan,
    write_single,
)
from scd_sf.models.wan.names import Layout
from scd_sf.models.wan.transformer import Wan
from scd_sf.models.wan.weights import WanFiles, load_wan, open_wan, save_wan, shard_size, write_wan
from scd_sf.tensor_files import dtype_of
from scd_sf.types import UserError

AGAIN = "choose another place"
_STEP = re.compile(r"step_\d+")


def require_same(path: Path, description: CheckpointConfig, record: Mapping[str, object]) -> None:
    """UserError unless the checkpoint was made from the same weights with the same settings."""
    stored = stored_settings(CheckpointConfig, path / CONFIG, str(path / CONFIG))
    changes = differences(stored, description)
    old_record = read_provenance(path)
    for name in sorted((old_record.keys() | record.keys()) - {"git_revision", "versions"}):
        if old_record.get(name) != record.get(name):
            changes.setdefault(name, (old_record.get(name), record.get(name)))
    if changes:
        name, (old, new) = next(iter(changes.items()))
        raise UserError(
            f"{path}: {name} is {old!r} there but {new!r} now; nothing is overwritten: choose another out="
        )


def must_be_new(out: Path, *inputs: Path) -> None:
    """UserError if there is anything at ``out`` (exports never overwrite), or if it lies in a
    folder that is read: one of ``inputs``, or any checkpoint's. Links are followed first."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out}: exists already, nothing is overwritten; choose another place")
    place = out.resolve()
    for folder in (place, *place.parents):
        if _STEP.fullmatch(folder.name) and (folder / MANIFEST).is_file():
            raise UserError(
                f"{out}: lies in the checkpoint {folder}, which it would make invalid; choose another place"
            )
        if folder in {source.resolve() for source in inputs if source.is_dir()}:
            raise UserError(f"{out}: lies in {folder}, which is read for it; choose another place")


def export_weights(
    checkpoint: Path, out: Path, layout: str, weights: str = "ema", dtype: str = "bf16"
) -> float:
    """Write a checkpoint's model as ``layout`` "single", "diffusers" or "original"; the largest
    output difference.

    The last two are Wan's own and hold a bidirectional Wan or the causal baseline, not SCD.
    UserError otherwise.
    """
    must_be_new(out)
    kind = dtype_of(dtype)
    if layout not in ("single", "diffusers", "original"):
        raise UserError(
            f"layout '{layout}' is unknown; use single, pipeline, diffusers or original"
        )
    model, config = load_checkpoint_model(checkpoint, weights)
    expected_output = probe_output(model)
    largest(expected_output, expected_output)
    if layout == "single":
        file = out if out.suffix == ".safetensors" else out / "model.safetensors"
        _, origin = describe_checkpoint(checkpoint)
        with own_file(file, fresh=True) as part:
            write_single(part, model, config, {**origin, "weights": weights}, kind)
            reloaded, _ = load_checkpoint_model(part)
            return largest(expected_output, probe_output(reloaded))
    require_wan(config.model, checkpoint)
    if isinstance(model, Scd):
        raise UserError(
            f"{checkpoint}: an SCD model does not fit Wan's {layout} layout; use single or pipeline"
        )
    wan_layout: Layout = "original" if layout == "original" else "diffusers"
    with new_folder(out, AGAIN) as part:
        save_wan(model.state_dict(), config.model.wan, part, kind, layout=wan_layout)
        wan_model: Student | Wan = build_model(config.model)
        load_state(wan_model, load_wan(part).state_dict(), out)
        return largest(expected_output, probe_output(wan_model))


def convert_wan(
    source: Path,
    out: Path,
    layout: Layout,
    *,
    section: str = "",
    heads: int = 0,
    max_shard: int | str = "10GB",
) -> tuple[WanFiles, float]:
    """A Wan transformer in any readable layout -> ``layout``; (what was read, largest output
    difference).

    Every tensor is read again and must be the same bits. One shard is in memory at a time while
    writing; the comparison of outputs then loads each side once, one after the other.
    """
    must_be_new(out, source)
    size = shard_size(max_shard)
    files = open_wan(source, section=section, heads=heads)
    with new_folder(out, AGAIN) as part:
        write_wan(files.tensors, files.config, part, layout, size)
        written_tensors = open_wan(part).tensors
        for name, tensor in files.tensors.items():
            if not torch.equal(tensor.read(), written_tensors[name].read()):
                raise UserError(
                    f"{out}: tensor '{name}' is not what was read from {source}; the disk or the memory is broken"
                )
        expected_output = probe_output(load_wan(source, section=section, heads=heads))
        return files, largest(expected_output, probe_output(load_wan(part)))


def largest(first: Tensor, second: Tensor) -> float:
    """max |first - second|; UserError if either is not finite."""
    difference = float((first.float() - second.float()).abs().max())
    if not math.isfinite(difference):
        raise UserError("the model's outputs are not finite; its weights are broken")
    return difference
