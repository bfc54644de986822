"""Numbered safetensors files: written one after another and resumable, read lazily (only the needed
rows are read).

A shard is known by its :class:`ShardFile` record (file name, rows, bytes, sha256), kept in the
dataset's manifest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from scd_sf.config import stored_settings
from scd_sf.data.manifest import AGAIN, BUILDING, MANIFEST
from scd_sf.files import (
    Json,
    foreign,
    others_in,
    read_typed,
    refuse_lfs_pointer,
    safe_path,
    sha256_bytes,
    sha256_file,
    typed,
    write_bytes,
    write_json,
)
from scd_sf.types import UserError

COPY = f"copy it again, or {AGAIN}"


@dataclass(frozen=True)
class ShardFile:
    """A shard's record: its file, number of rows (clips or prompts), bytes and sha256."""

    file: str
    count: int
    bytes: int
    sha256: str


def shard_files(section: Json, where: str) -> list[ShardFile]:
    """The ``shards`` list of a manifest section. UserError: empty, other fields, or counts and
    sizes below 1."""
    shards = typed(section.get("shards"), list[ShardFile], f"{where}: 'shards'", AGAIN)
    for shard in shards:
        if min(shard.count, shard.bytes) < 1:
            raise UserError(
                f"{where}: shard {shard.file} has {shard.count} rows, {shard.bytes} bytes; {AGAIN}"
            )
    if not shards:
        raise UserError(f"{where}: 'shards' is empty; {AGAIN}")
    return shards


def check_place(root: Path) -> None:
    """UserError where a directory holds files but no begun or finished encoding."""
    names = others_in(root)
    if names and not {MANIFEST, BUILDING} & set(names) and names != ["report.json"]:
        raise UserError(
            f"{root}: holds {names[0]}, but no data of ours; use another output directory"
        )


class _Slice(Protocol):
    """The methods of safetensors' lazy slices (the library has no public type)."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


class ShardReader:
    """Rows over a list of shards. Every file's existence and size are checked at once, its contents
    when opened."""

    def __init__(self, root: Path, shards: Sequence[ShardFile], where: str) -> None:
        self.shards = list(shards)
        self.paths = [safe_path(root, shard.file, f"{where}: shard 'file'") for shard in shards]
        for shard, path in zip(self.shards, self.paths, strict=True):
            if not path.is_file():
                raise UserError(f"{path}: listed in {where} but missing; {COPY}")
            if (size := path.stat().st_size) != shard.bytes:
                refuse_lfs_pointer(path)
                raise UserError(
                    f"{path}: {size} bytes instead of {shard.bytes} (truncated?); {COPY}"
                )
        self._stops = list(accumulate(shard.count for shard in self.shards))
        self._open_files: dict[int, safe_open] = {}

    def __len__(self) -> int:
        return self._stops[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """Row -> (shard, row in the shard). Raises IndexError outside 0..len-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = bisect_right(self._stops, index)
        return shard, index - (self._stops[shard - 1] if shard else 0)

    def shape(self, shard: int, name: str) -> tuple[int, ...]:
        """The stored shape of tensor ``name``. Raises UserError when the shard has no such
        tensor."""
        return tuple(self._slice(shard, name).get_shape())

    def rows(self, shard: int, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 of tensor ``name``: only these are read."""
        with foreign(f"{self.paths[shard]}: tensor '{name}' cannot be read", COPY):
            return self._slice(shard, name)[start:stop]

    def verify(self) -> None:
        """Compare every file's sha256 with its record. Raises UserError for the first that
        changed."""
        for shard, path in zip(self.shards, self.paths, strict=True):
            if sha256_file(path) != shard.sha256:
                raise UserError(
                    f"{path}: contents changed (sha256 differs from the manifest); {COPY}"
                )

    def _slice(self, shard: int, name: str) -> _Slice:
        path = self.paths[shard]
        with foreign(f"{path}: tensor '{name}' cannot be read", COPY):
            if shard not in self._open_files:
                self._open_files[shard] = safe_open(path, framework="pt")
            rows: _Slice = self._open_files[shard].get_slice(name)
            return rows


class ShardWriter:
    """Writes shards of several kinds into one directory and remembers them in ``building.json``.

    ``inputs`` says what the data is made from: a directory that holds shards of other inputs is a
    UserError, one begun with the same inputs is continued after its last complete shard.
    ``sections``: inputs that are the fields of a dataclass; fields that a directory lacks are at
    their defaults there.
    """

    def __init__(
        self,
        root: Path,
        inputs: Mapping[str, object],
        sections: Mapping[str, type[Any]] | None = None,
    ) -> None:
        self.root = root
        self.inputs = dict(inputs)
        self.sections = dict(sections or {})
        self.progress = root / BUILDING
        self.shards: dict[str, list[ShardFile]] = {}
        self.finished = False
        root.mkdir(parents=True, exist_ok=True)
        for name in (MANIFEST, BUILDING):
            if (root / name).is_file():
                self._resume(root / name)
                return
        check_place(root)
        self._save()

    def count(self, kind: str) -> int:
        """Rows of this kind that lie in complete shards."""
        return sum(shard.count for shard in self.shards.get(kind, []))

    def write(self, kind: str, count: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the next shard of a kind (temporary file, fsync, rename), then record it."""
        shards = self.shards.setdefault(kind, [])
        path = self.root / f"{kind}-{len(shards):05d}.safetensors"
        data = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
        write_bytes(path, data)
        shards.append(ShardFile(path.name, count, len(data), sha256_bytes(data)))
        self._save()

    def section(self, kind: str) -> list[Json]:
        """The records of a kind, for the manifest."""
        return [asdict(shard) for shard in self.shards.get(kind, [])]

    def finish(self, manifest: Mapping[str, object]) -> None:
        """Write the manifest (last of all) and forget the progress file."""
        write_json(self.root / MANIFEST, {**manifest, "inputs": self.inputs})
        self.progress.unlink(missing_ok=True)
        self.finished = True

    def _save(self) -> None:
        kinds = {kind: self.section(kind) for kind in self.shards}
        write_json(self.progress, {"inputs": self.inputs, "kinds": kinds})

    def _resume(self, path: Path) -> None:
        state = read_typed(path, _Progress, AGAIN)
        # no shard exists yet, so other inputs do no harm
        if path == self.progress and not any(state.kinds.values()):
            self._save()
            return
        inputs = dict(state.inputs)
        for name, schema in self.sections.items():
            if isinstance(section := inputs.get(name), dict):
                inputs[name] = stored_settings(schema, section, str(path))
        if inputs != self.inputs:
            keys = sorted(key for key in self.inputs if inputs.get(key) != self.inputs[key])
            names = ", ".join(keys) or "fewer"
            raise UserError(
                f"{path}: made from other inputs ({names} differ); choose another output directory"
            )
        self.finished = path.name == MANIFEST
        if self.finished:
            self.progress.unlink(missing_ok=True)  # of a run that was killed after its manifest
        self.shards = state.kinds
        for shards in self.shards.values():
            if shards:
                ShardReader(self.root, shards, path.name)


@dataclass(frozen=True)
class _Progress:
    """``building.json`` or the manifest of a directory. ``kinds`` are its shards until it is
    finished."""

    inputs: Json = field(default_factory=dict)
    kinds: dict[str, list[ShardFile]] = field(default_factory=dict)
