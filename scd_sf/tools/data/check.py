"""``scd data check`` and ``repair``: find missing and damaged clips of a folder, and set damaged
ones aside."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from scd_sf.data.clip_files import (
    SUFFIX,
    VIDEO,
    clip_path,
    files_of,
    is_clip,
    quarantine_of,
    read_header,
)
from scd_sf.data.clip_index import JOB, ROWS, Common, fault_of, read_folder_job
from scd_sf.data.latents import LatentClips
from scd_sf.data.manifest import MANIFEST
from scd_sf.data.prompts import PromptTable, index_clips
from scd_sf.files import files_below, is_part, locked, read_jsonl, sha256_file
from scd_sf.types import UserError

WANTED = "wanted.jsonl"
OLD_SECONDS = 3600.0  # age after which a temporary file is removed
Progress = Callable[[int], None]


@dataclass
class Report:
    """Result of a check. ``clips``: number of whole ones. ``faults``: file -> its fault, in words.
    ``index_faults``: of the index, in words. ``missing_ids``: ids of the last run's clips that do
    not exist or are damaged."""

    clips: int = 0
    bytes: int = 0
    faults: dict[Path, str] = field(default_factory=dict)
    temporary_files: list[Path] = field(default_factory=list)
    index_faults: list[str] = field(default_factory=list)
    missing_ids: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """One line for each problem. Temporary files are none, because a process may be writing
        them."""
        lines = [*self.faults.values(), *self.index_faults]
        if self.missing_ids:
            lines.append(
                f"{len(self.missing_ids)} clips that the last run wanted are missing, first {self.missing_ids[0]}"
            )
        return lines


def check(root: Path, *, full: bool = False, progress: Progress = lambda count: None) -> Report:
    """Compare headers with file sizes, shapes and the index; ``full`` also reads and hashes
    everything.

    Of a directory of shards: the checks of :class:`LatentClips`. UserError where ``root`` is
    neither.
    """
    if not (root / JOB).is_file():
        clips = LatentClips(root)
        if full:
            clips.verify()
        return Report(
            clips=len(clips), bytes=sum(file.stat().st_size for file in files_below(root))
        )
    common = read_folder_job(root)
    report = Report()
    digests: dict[str, str] = {}  # of whole clips
    for number, path in enumerate(files_of(root), 1):
        if is_part(path):
            report.temporary_files.append(path)
        elif is_clip(root, path):
            _check_clip(path, common, full, report, digests)
        elif path.suffix != VIDEO:
            report.faults[path] = f"{path}: not a file of a clip"
        elif not path.with_suffix(SUFFIX).is_file():
            # a video without latents is made again
            report.temporary_files.append(path)
        progress(number)
    report.clips = len(digests)
    if (root / WANTED).is_file():
        wanted_ids = [
            str(row.get("id")) for row in read_jsonl(root / WANTED, "run the generation again")
        ]
        report.missing_ids = sorted(set(wanted_ids) - set(digests))
    report.index_faults = _check_index(root, digests)
    return report


def _check_clip(
    path: Path, common: Common, full: bool, report: Report, digests: dict[str, str]
) -> None:
    fault = fault_of(path, common, full=full)
    if not fault:
        header = read_header(path)
        video = path.with_suffix(VIDEO)
        if header.about.video_sha256 and common.settings.get("videos") and not video.is_file():
            fault = f"{video}: missing beside its latents"
        elif full and video.is_file() and sha256_file(video) != header.about.video_sha256:
            fault = f"{video}: contents changed (sha256 differs from its latents' header)"
    if fault:
        report.faults[path] = fault
    else:
        digests[path.stem] = header.about.sha256
        report.bytes += header.bytes


def _check_index(root: Path, digests: dict[str, str]) -> list[str]:
    """Faults of the index. ``digests``: clip id -> sha256 of the whole files."""
    if not (root / MANIFEST).is_file():
        return [f"{root / MANIFEST}: not written yet; run 'scd data manifest {root}'"]
    rows = read_jsonl(root / ROWS, f"run 'scd data manifest {root}'")
    indexed = {str(row.get("id")): row.get("sha256") for row in rows}
    if indexed == digests:
        return _check_fixed_prompts(root)
    absent = sorted(indexed.keys() - digests.keys())
    unlisted = sorted(digests.keys() - indexed.keys())
    changed = sorted(
        name for name in indexed.keys() & digests.keys() if indexed[name] != digests[name]
    )
    counts = f"{len(absent)} listed but not whole, {len(unlisted)} not listed, {len(changed)} of other contents"
    return [f"{root / ROWS}: {counts}; run 'scd data manifest {root}'"]


def _check_fixed_prompts(root: Path) -> list[str]:
    """Faults of the states of the empty and the negative prompt, which lie beside the clips."""
    try:
        PromptTable(root)
    except UserError as error:
        return [str(error)]
    return []


def repair(
    root: Path, *, full: bool = False, progress: Progress = lambda count: None
) -> tuple[Report, int]:
    """Move damaged files to ``quarantine/``, remove old temporary files, write the index again.

    Returns the report and the number of clips in the new index. The next run of the command that
    made the clips makes the moved ones again. UserError for a directory of shards.
    """
    if not (root / JOB).is_file():
        raise UserError(
            f"{root}: has no {JOB}; only folders of one file per clip can be repaired, copy shards again"
        )
    read_folder_job(root)
    with locked(root, "scd data repair"):
        return _repair(root, full, progress)


def _repair(root: Path, full: bool, progress: Progress) -> tuple[Report, int]:
    quarantine_of(root)  # before anything is read
    report = check(root, full=full, progress=progress)
    for path in report.faults:
        quarantine(root, path)
        video = path.with_suffix(VIDEO)
        if path.suffix == SUFFIX and video.is_file() and not video.is_symlink():
            quarantine(root, video)
    for path in report.temporary_files:
        if is_part(path) and time.time() - path.stat().st_mtime > OLD_SECONDS:
            path.unlink(missing_ok=True)
    return report, index_clips(root) if report.clips else 0


def quarantine(root: Path, path: Path) -> Path:
    """Move a file out of the data and return its new path. An older file of that name is kept."""
    folder = quarantine_of(root)
    names = (folder / f"{path.name}{f'.{n}' if n else ''}" for n in range(10_000))
    target = next(name for name in names if not os.path.lexists(name))
    os.replace(path, target)
    return target


def whole_clips(root: Path, ids: Iterable[str]) -> list[Path]:
    """The files of these clips. UserError for the first that is damaged."""
    common, paths = read_folder_job(root), []
    for clip in ids:
        path = clip_path(root, clip)
        if fault := fault_of(path, common):
            raise UserError(f"{fault}; run 'scd data repair {root}'")
        paths.append(path)
    return paths
