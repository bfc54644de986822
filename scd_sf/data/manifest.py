"""The manifest of a folder of data, and the index files beside it: one writer and one reader for
every format.

``manifest.json`` names its ``format`` and ``version``. The rest is the format's own: shapes, the
list of its shards (:mod:`scd_sf.data.shards`), and the hash of each index file. It is written last,
so a folder that has one is whole. An index file (``clips.jsonl``, ``prompts.jsonl``) has one JSON
object a line, each with exactly the fields of a dataclass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from scd_sf.files import Json, hash_json, read_json, read_jsonl, sha256_file, typed, write_jsonl
from scd_sf.types import UserError

MANIFEST = "manifest.json"
BUILDING = "building.json"  # in a folder whose encoding has begun
AGAIN = "delete the directory and encode it again"
SHOWN = 8  # folders that an error names
T = TypeVar("T")


@dataclass(frozen=True)
class Format:
    """A format of manifests. ``absent``: the error's text for a missing file. ``remedy``: the
    remedy for a damaged one."""

    name: str
    version: int
    absent: str
    remedy: str = AGAIN

    def sealed(self, sections: Mapping[str, object]) -> Json:
        """A manifest with ``hash``: over the contents (shard hashes, rows), not over where they
        came from."""
        return {
            "format": self.name,
            "version": self.version,
            "hash": hash_json(sections),
            **sections,
        }

    def read(self, root: Path, name: str = MANIFEST) -> Json:
        """``root/name``. UserError when it is missing, damaged, or of another format or version."""
        path = root / name
        if not path.is_file():
            raise UserError(f"{path}: {self._absent_in(root)}")
        manifest = read_json(path, self.remedy)
        if (manifest.get("format"), manifest.get("version")) != (self.name, self.version):
            raise UserError(
                f"{path}: 'format'/'version' must be {self.name}/{self.version}; "
                f"use another folder, or make this one with this release"
            )
        return manifest

    def _absent_in(self, root: Path) -> str:
        """Why a folder has no manifest, and what to do."""
        if (root / BUILDING).is_file():
            return "encoding was not finished; run the same encoding command again"
        parts = [*root.glob(f"*/{MANIFEST}"), *root.glob(f"*/*/{MANIFEST}")]
        folders = sorted(str(part.parent.relative_to(root)) for part in parts[:SHOWN])
        if folders:
            return f"no such file, but its folders {', '.join(folders)} have one; give one of them"
        return self.absent


def section_of(manifest: Json, name: str, where: str | Path) -> Json:
    """A manifest's entry that is an object. UserError: it has none."""
    section = manifest.get(name)
    if not isinstance(section, dict):
        raise UserError(f"{where}: section '{name}' is missing; {AGAIN}")
    return section


def write_index(path: Path, rows: Sequence[Any]) -> str:
    """Write dataclasses as JSON lines. Returns :func:`hash_json` of the rows, for the manifest."""
    lines = [asdict(row) for row in rows]
    write_jsonl(path, lines)
    return hash_json(lines)


def read_index(path: Path, kind: type[T], sha256: object, remedy: str = AGAIN) -> list[T]:
    """The rows of an index file as ``kind``. ``sha256``: of the rows (:func:`write_index`) or of
    the file.

    UserError: it is missing, empty, not the one of the manifest, or has a row with other fields.
    """
    lines = read_jsonl(path, remedy)
    if not lines or sha256 not in (hash_json(lines), sha256_file(path)):
        raise UserError(f"{path}: does not belong to the manifest (changed or cut); {remedy}")
    return [
        typed(line, kind, f"{path}:{number}", remedy, exact=True)
        for number, line in enumerate(lines, 1)
    ]
