"""``scd data export-webdataset``: tar shards for object stores and for loaders that read one sample
after another.

``shard-00000.tar`` ... hold, per clip in id order, ``ID.safetensors`` (the clip's file as it is:
latents, text states, and all metadata in its header), ``ID.prompt.txt`` and, if kept, ``ID.mp4``.
Loaders group members by the name up to the first dot, as webdataset and rCM's do;
``safetensors.torch.load`` decodes the first. No pickle. Tars depend on the clips alone (no times,
no owners), appear whole, and 'scd data import' reads them back.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scd_sf.data.clip_files import VIDEO, read_header
from scd_sf.data.clip_index import ROWS
from scd_sf.files import (
    foreign,
    locked,
    new_file,
    others_in,
    read_json,
    read_jsonl,
    sha256_file,
    typed,
    write_json,
)
from scd_sf.tools.data.check import whole_clips
from scd_sf.types import UserError

INDEX = "index.json"
KEEP = "nothing of others is overwritten: use another folder"
Listing = list[tuple[str, int]]  # names and sizes of a tar's members


def export_webdataset(
    root: Path,
    out: Path,
    *,
    per_tar: int = 256,
    videos: bool = True,
    progress: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the clips of ``root``'s index as tars and return their number. A whole tar is kept.

    UserError for a folder without index, a damaged clip, or an output folder of other files."""
    if per_tar < 1:
        raise UserError(f"--per-tar is {per_tar}; it must be at least 1")
    ids = [str(row.get("id")) for row in read_jsonl(root / ROWS, f"run 'scd data manifest {root}'")]
    paths = whole_clips(root, ids)
    groups = [paths[start : start + per_tar] for start in range(0, len(paths), per_tar)]
    names = [f"shard-{number:05d}.tar" for number in range(len(groups))]
    listings = {
        name: [(member, size) for clip in group for member, size, _ in _members(clip, videos)]
        for name, group in zip(names, groups, strict=True)
    }
    _check_own(out, listings)
    with locked(out, "scd data export-webdataset"):
        table = {}
        for number, (name, group) in enumerate(zip(names, groups, strict=True), 1):
            if _listing(out / name) != listings[name]:
                _write_tar(out / name, group, videos)
            size, digest = (out / name).stat().st_size, sha256_file(out / name)
            table[name] = {"clips": len(group), "bytes": size, "sha256": digest}
            progress(number)
        write_json(out / INDEX, {"tars": table, "clips": len(paths)})
    return len(groups)


def _check_own(out: Path, listings: Mapping[str, Listing]) -> None:
    """UserError where ``out`` holds files that no export has written."""
    names, index = others_in(out), out / INDEX
    listed_tars = (
        typed(read_json(index, KEEP).get("tars"), dict[str, object], index, KEEP)
        if INDEX in names
        else {}
    )
    for name in names:
        if name == INDEX or (
            name in listings and (name in listed_tars or _listing(out / name) == listings[name])
        ):
            continue
        raise UserError(f"{out}: holds {name}, which is none of these tars; {KEEP}")


def _write_tar(target: Path, clips: Sequence[Path], videos: bool) -> None:
    with new_file(target) as part, tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, size, source in (member for clip in clips for member in _members(clip, videos)):
            entry = tarfile.TarInfo(name)
            entry.size = size
            if isinstance(source, bytes):
                tar.addfile(entry, io.BytesIO(source))
            else:
                with source.open("rb") as file:
                    tar.addfile(entry, file)


def _members(clip: Path, videos: bool) -> list[tuple[str, int, Path | bytes]]:
    """(name, size, file or contents) of a clip's members."""
    header = read_header(clip)
    prompt, video = header.about.prompt.encode(), clip.with_suffix(VIDEO)
    members: list[tuple[str, int, Path | bytes]] = [(clip.name, header.bytes, clip)]
    members.append((f"{clip.stem}.prompt.txt", len(prompt), prompt))
    if videos and video.is_file() and not video.is_symlink():
        members.append((video.name, os.stat(video).st_size, video))
    return members


def _listing(path: Path) -> Listing:
    """Names and sizes of a tar's members; empty where there is none, or it is damaged."""
    try:
        with foreign(path, KEEP), tarfile.open(path, "r:") as tar:
            return [(entry.name, entry.size) for entry in tar]
    except UserError:
        return []
