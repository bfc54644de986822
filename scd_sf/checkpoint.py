"""Checkpoints: a directory that explains itself, appears whole or not at all, and is verified
before it is used.

    <root>/step_00000400/   model.safetensors [ema.safetensors ...] config.yaml provenance.json
                            state/ manifest.json
    <root>/latest           the name of the last complete step, for people and other tools

A step is built in ``step_N.tmp``: tensors, config, provenance, training state, fsync, then
``manifest.json`` (size and sha256 of every file) last, then one atomic rename, then ``latest``. The
rename commits: a kill at any moment leaves the previous steps as they were. Readers take the newest
step whose manifest agrees with the files and say what they skip.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from msgspec import Meta
from safetensors import SafetensorError
from torch import Tensor

from scd_sf.files import (
    Json,
    files_below,
    fsync,
    fsync_tree,
    parse_json,
    read_json,
    read_text,
    sha256_bytes,
    sha256_file,
    typed,
    write_tensors,
    write_text,
)
from scd_sf.types import UserError, printable

MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
CONFIG = "config.yaml"
STATE = "state"
LATEST = "latest"
LATEST_BYTES = 2**16
_STEP = re.compile(r"^step_\d{8,}$")
_UNFINISHED = re.compile(r"^step_\d{8,}(\.damaged)?\.tmp$")
_log = logging.getLogger(__name__)


class SaveFailed(UserError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpoints:
    """The checkpoints of one run, in ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps that were committed, ascending; not verified."""
        if not self.root.is_dir():
            return []
        names = [
            entry.name
            for entry in self.root.iterdir()
            if entry.is_dir() and _STEP.match(entry.name)
        ]
        return sorted(int(name.removeprefix("step_")) for name in names)

    def has(self, step: int) -> bool:
        """Whether ``step`` is saved and intact; a damaged one is named in a warning and may be
        written again."""
        if not self.path(step).exists():
            return False
        try:
            verify(self.path(step))
        except UserError as error:
            _log.warning("damaged checkpoint: %s", error)
            return False
        return True

    def write(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Tensor]],
        config_yaml: str,
        provenance: Mapping[str, object],
        training_state: Callable[[Path], None] | None = None,
    ) -> Path:
        """Save one step from one process: :meth:`prepare`, ``training_state(dir)``, :meth:`commit`.
        Raises SaveFailed.

        Several processes do the same through ``train/checkpointing.py``.
        """
        partial = self.path(step).with_suffix(".tmp")
        for work in (
            lambda: self.prepare(step, _bytes(files)),
            lambda: None if training_state is None else training_state(partial / STATE),
            lambda: self.commit(step, files, config_yaml, provenance),
        ):
            if problem := problem_of(work):
                shutil.rmtree(partial, ignore_errors=True)
                raise SaveFailed(self.not_saved(step, problem))
        return self.path(step)

    def prepare(self, step: int, num_bytes: int) -> None:
        """Remove files of killed runs and a damaged copy of this step, check the space for
        ``num_bytes``, make ``step_N.tmp/state``. UserError when the step is already there or space
        is short."""
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob("step_*.tmp"):
            if _UNFINISHED.match(leftover.name) and leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
        final = self.path(step)
        if self.has(step):
            raise UserError(
                f"{final}: step {step} is already saved and is never overwritten; resume from it instead"
            )
        if final.exists():
            damaged = final.with_name(final.name + ".damaged.tmp")
            os.rename(final, damaged)
            shutil.rmtree(damaged)
        self.require_space(num_bytes, f"step {step}")
        (final.with_suffix(".tmp") / STATE).mkdir(parents=True)

    def commit(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Tensor]],
        config_yaml: str,
        provenance: Mapping[str, object],
    ) -> None:
        """Write the rest of ``step_N.tmp`` and its manifest, rename it, update ``latest``.
        ``files`` maps a name ("model" -> model.safetensors) to its tensors. All other processes
        must have written their parts."""
        final = self.path(step)
        partial = final.with_suffix(".tmp")
        _write_contents(partial, files, config_yaml, provenance)
        write_manifest(partial, step)
        os.rename(partial, final)
        fsync(self.root)
        write_text(self.root / LATEST, final.name + "\n")

    def not_saved(self, step: int, problem: str) -> str:
        return f"{self.path(step)}: step {step} is not saved; the steps before it are as they were. {problem}"

    def newest(self, *, required: bool = False, weights: str = "") -> Path | None:
        """The newest verified step, warning about each newer one it skips. None when nothing was
        ever saved here. ``weights``: verify only what reading these takes (:func:`find`).

        Raises UserError when something was saved but no step verifies (training must not restart
        from zero unnoticed), and when ``required`` (resume was asked for) and there is no
        checkpoint at all.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.path(step)
            try:
                verify(path, weights)
            except UserError as error:
                _log.warning("skipping checkpoint: %s", error)
                continue
            self._check_latest(path)
            return path
        latest = self.root / LATEST
        if steps or latest.exists():
            with_weights = f" and has weights '{weights}'" if weights else ""
            problem = (
                f"none of its {len(steps)} steps is intact{with_weights}"
                if steps
                else "it has 'latest' but no step directory"
            )
            raise UserError(
                f"{self.root}: {problem}; restore a step from a copy, or start over in a new run directory"
            )
        if required:
            problem = "resume was asked for but there is no checkpoint ('latest' is missing)"
            raise UserError(
                f"{self.root}: {problem}; check the run directory, or start without resume"
            )
        return None

    def prune(self, keep: int, every: int = 0, protected: Collection[int] = ()) -> list[int]:
        """Delete all but the newest ``keep`` intact steps, multiples of ``every`` (0: none) and
        ``protected`` ones (main rank only). Returns the removed steps."""
        if keep < 1:
            raise UserError(f"keep is {keep}; at least one checkpoint must be kept")
        intact, removed_steps = 0, []
        for step in reversed(self.steps()):
            path = self.path(step)
            if intact >= keep:
                if step in protected or (every and step % every == 0):
                    continue
                partial = path.with_name(path.name + ".tmp")
                os.rename(path, partial)
                shutil.rmtree(partial)
                removed_steps.append(step)
            elif sizes_agree(path):
                intact += 1
        return removed_steps

    def require_space(self, num_bytes: int, what: str) -> None:
        """Raises UserError unless the disk has room for ``num_bytes`` and a fifth more."""
        folder = next(parent for parent in (self.root, *self.root.parents) if parent.exists())
        free = shutil.disk_usage(folder).free
        if free < 1.2 * num_bytes:
            raise UserError(
                f"{self.root}: {free / 1e9:.1f} GB free but {what} needs {1.2 * num_bytes / 1e9:.1f} GB; "
                "free some space or keep fewer checkpoints (train.keep)"
            )

    def _check_latest(self, path: Path) -> None:
        latest = self.root / LATEST
        if not latest.exists():
            _log.warning(
                "%s: 'latest' is missing; using the newest verified step %s", self.root, path.name
            )
            return
        try:
            name = read_text(
                latest, "it is written anew with the next checkpoint", LATEST_BYTES
            ).strip()
        except UserError as error:
            _log.warning("%s; using the newest verified step %s", error, path.name)
            return
        if name != path.name:
            _log.warning(
                "%s: 'latest' says %s; using the newest verified step %s",
                self.root,
                name,
                path.name,
            )


def find(path: Path, weights: str = "") -> Path:
    """A checkpoint a person named: a step directory, a run's ``checkpoints`` directory or the run.
    Verified: all of it, or with ``weights`` ("ema", "model", "best") what reading these takes:
    configuration, provenance, one file.

    Raises UserError when there is none or it is damaged.
    """
    if (path / MANIFEST).exists() or _STEP.match(path.name):
        verify(path, weights)
        return path
    for root in (path, path / "checkpoints"):
        newest = Checkpoints(root).newest(weights=weights)
        if newest is not None:
            return newest
    problem = "no checkpoint here" if path.exists() else "no such folder, so no checkpoint"
    remedy = "give a step_N directory, or a run directory that holds some"
    if (path / "model_index.json").exists():
        remedy = (
            "a Wan directory becomes a student by 'scd transplant'; of an exported pipeline give "
            "its transformer/model.safetensors"
        )
    elif runs := sorted(one.parent.name for one in path.glob("*/checkpoints"))[:8]:
        remedy = f"give one of the runs in it: {', '.join(map(printable, runs))}"
    raise UserError(f"{path}: {problem}; {remedy}")


# sha256 of files that this process has hashed, by (path, inode, bytes, mtime in ns); directories
# that rank 0 has verified.
_digests: dict[tuple[str, int, int, int], str] = {}
_trusted: set[Path] = set()


def verify(path: Path, weights: str = "") -> None:
    """Check a checkpoint directory against its manifest: every file's presence and size, and the
    sha256 of all files, or with ``weights`` of those that reading these takes. A file is hashed
    once in a process.

    Raises UserError naming the first missing, truncated, changed or unlisted file.
    """
    entries = _read_manifest(path)
    hashed_names = (
        set(entries) if not weights else {CONFIG, PROVENANCE, weights_file(path, weights).name}
    )
    for name, (size, digest) in entries.items():
        file = path / name
        if not file.exists():
            raise UserError(f"{file}: missing (it is in the manifest); {_AGAIN}")
        if not stat.S_ISREG(file.lstat().st_mode) or not file.resolve().is_relative_to(
            path.resolve()
        ):
            raise UserError(
                f"{file}: not a file of the checkpoint but a link or a folder; {_AGAIN}"
            )
        actual = file.stat().st_size
        if actual != size:
            raise UserError(
                f"{file}: {actual} bytes, but the manifest says {size}: truncated or changed; {_AGAIN}"
            )
        if (
            name in hashed_names
            and path.resolve() not in _trusted
            and _digest_of_file(file) != digest
        ):
            raise UserError(
                f"{file}: its sha256 differs from the manifest: the file was changed; {_AGAIN}"
            )
    for file in _files(path):
        name = file.relative_to(path).as_posix()
        if name not in entries and name != MANIFEST:
            raise UserError(
                f"{file}: not in the manifest: something was added to the checkpoint; move it elsewhere"
            )


def vouch(path: Path) -> None:
    """Note that another process of this job has verified ``path``. This process then compares its
    sizes but hashes nothing."""
    _trusted.add(path.resolve())


def _digest_of_file(file: Path) -> str:
    status = file.stat()
    key = (str(file.resolve()), status.st_ino, status.st_size, status.st_mtime_ns)
    if key not in _digests:
        _digests[key] = sha256_file(file)
    return _digests[key]


def weights_file(path: Path, weights: str) -> Path:
    """The file of a step directory that these weights are read from: "model", "ema" (a stage-1
    checkpoint has no average: its model) or "best". UserError: there is none."""
    names = {"model": ["model"], "ema": ["ema", "model"], "best": ["best"]}.get(weights, [])
    for name in names:
        if (path / f"{name}.safetensors").is_file():
            return path / f"{name}.safetensors"
    present = [
        name for name in ("model", "ema", "best") if (path / f"{name}.safetensors").is_file()
    ]
    hint = " (stage 3 has them from its first healthy step on)" if weights == "best" else ""
    raise UserError(
        f"{path}: no weights '{weights}' there{hint}; use {' or '.join(present) or 'another step'}"
    )


def weights_sha256(path: Path, weights: str) -> str:
    """sha256 of the file that weights are read from: of an exported file, or the manifest's entry
    for :func:`weights_file`."""
    if path.is_file():
        return sha256_file(path)
    return _read_manifest(path)[weights_file(path, weights).name][1]


def read_provenance(path: Path) -> dict[str, object]:
    """``provenance.json`` of a checkpoint directory. Raises UserError when missing or not a JSON
    object."""
    return read_json(path / PROVENANCE, _AGAIN)


# ------------------------------------------------------------------------------------------ writing


def write_manifest(path: Path, step: int) -> None:
    """Fsync every file under ``path``, then write ``manifest.json`` (size and sha256 of each) as
    the last file."""
    fsync_tree(path)
    entries = {
        file.relative_to(path).as_posix(): {
            "size": file.stat().st_size,
            "sha256": sha256_file(file),
        }
        for file in sorted(_files(path))
    }
    body: dict[str, object] = {"format": 1, "step": step, "files": entries}
    write_text(path / MANIFEST, json.dumps({**body, "self": _digest_of(body)}, indent=1) + "\n")


def _bytes(files: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values())


def problem_of(work: Callable[[], None]) -> str:
    """Why ``work`` failed, in one line; empty when it did not. torch reports a full disk as
    RuntimeError."""
    try:
        work()
    except UserError as error:
        return str(error)
    except (OSError, RuntimeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}; check the disk (space, rights)".replace("\n", " ")
    return ""


def _write_contents(
    partial: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    config_yaml: str,
    record: Mapping[str, object],
) -> None:
    provenance = json.dumps(dict(record), indent=1, default=str) + "\n"
    parse_json(provenance, PROVENANCE, "nothing is saved that could not be read again")
    for name, tensors in files.items():
        write_tensors(
            partial / (name if name.endswith(".safetensors") else f"{name}.safetensors"),
            _saveable(tensors),
        )
    write_text(partial / CONFIG, config_yaml)
    write_text(partial / PROVENANCE, provenance)
    if not any((partial / STATE).iterdir()):
        (partial / STATE).rmdir()


def _saveable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU, contiguous, and no two names on one storage (safetensors refuses shared memory)."""
    storages: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        storage = value.untyped_storage()
        if (
            storage.data_ptr() in storages
            or storage.nbytes() != value.numel() * value.element_size()
        ):
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        out[name] = value
    return out


# ------------------------------------------------------------------------------------------ reading


_AGAIN = "use another step, or copy this one again"


@dataclass
class _Entry:
    """A file's entry in the manifest."""

    size: int
    sha256: str


def _files(path: Path) -> Iterator[Path]:
    return (file for file in files_below(path) if not file.name.startswith("."))


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """File name -> (size, sha256). Raises UserError when the manifest is missing, damaged or names
    a path outside."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint directory; check the path")
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"{path / MANIFEST}: missing; this is not a complete checkpoint, use another step"
        )
    manifest = read_json(path / MANIFEST, _AGAIN)
    if manifest.pop("self", None) != _digest_of(manifest):
        raise UserError(f"{path / MANIFEST}: the manifest itself was changed; {_AGAIN}")
    entries = typed(manifest.get("files"), dict[str, _Entry], path / MANIFEST, _AGAIN)
    for name in entries:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise UserError(
                f"{path / MANIFEST}: names {name!r}, outside the checkpoint; do not use this directory"
            )
    return {name: (entry.size, entry.sha256) for name, entry in entries.items()}


def sizes_agree(path: Path) -> bool:
    """Whether every file of the manifest is there with its size: quick, while :func:`verify` reads
    all contents."""
    try:
        return all(
            (path / name).stat().st_size == size for name, (size, _) in _read_manifest(path).items()
        )
    except (UserError, OSError):
        return False


def _digest_of(body: Mapping[str, object]) -> str:
    return sha256_bytes(json.dumps(body, sort_keys=True).encode())


# --------------------------------------------------------------------------------------- provenance

_Size = Annotated[int, Meta(ge=1, le=2**20)]  # frames, channels or pixels
AGAIN = "copy or export the checkpoint again"


@dataclass
class _Origin:
    """The fields of a record that commands read; all others are for people."""

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
    """Where a checkpoint comes from: stage, step, parent checkpoints, seed, data, git revision,
    library versions.

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
    """Versions of Python and of the libraries that decide numbers; 'absent' for one that is not
    installed."""
    numbers = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("scd-sf", "deepspeed", "diffusers", "transformers", "safetensors"):
        try:
            numbers[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            numbers[name] = "absent"
    return numbers


def git_revision() -> str:
    """Commit of the source tree, '+dirty' when it has uncommitted changes, 'unknown' outside a git
    checkout."""
    command = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.check_output(
            [*command, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL
        )
        status = subprocess.check_output(
            [*command, "status", "--porcelain"], text=True, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.strip() + ("+dirty" if status.strip() else "")


def absolute(path: str | Path) -> str:
    """An existing path in absolute form; any other unchanged."""
    return str(Path(path).resolve()) if str(path) and Path(path).exists() else str(path)


def _parent(path: Path) -> dict[str, object]:
    """A parent by path and, when it is one of our checkpoints, by the digest of its manifest."""
    digest = sha256_file(path / MANIFEST) if (path / MANIFEST).is_file() else None
    return {"path": absolute(path), "manifest_sha256": digest}
