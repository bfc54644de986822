"""Someone's own videos -> latents and text states, one file per clip, shared by any number of
ranks.

``OUT/train`` and ``OUT/val`` (with several sizes ``OUT/832x480/train`` ..) are folders of
:mod:`scd_sf.data.clip_files`. A clip's file has a name that is the hash of all that decides it, and
appears whole: so the same command goes on after any kill, on any number of ranks, and a clip that
is made twice is the same file. Beside the folders lie ``encoding.json`` (the settings),
``scans.jsonl`` (what each video file is), ``videos.jsonl`` (which clips are cut from it),
``report.json`` (what was taken, and what was left out for which reason; written last). Nothing is
written into the folder of the videos.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from scd_sf import __version__
from scd_sf.data.clip_files import About, clip_path, sweep_clips, write_clip
from scd_sf.data.clip_index import JOB, Common, fault_of, open_job, read_folder_job
from scd_sf.data.manifest import MANIFEST, Format
from scd_sf.data.prefetch import ThreadedTasks
from scd_sf.data.prompts import index_clips, write_fixed_prompts
from scd_sf.data.sources.raw_files import Refused
from scd_sf.data.sources.video_reader import cut_clips
from scd_sf.data.video_captions import VideoFolder, read_video_folder
from scd_sf.data.video_plan import (
    REPAIR,
    CutConfig,
    Plan,
    PlannedVideo,
    VideoScan,
    plan_videos,
    raise_disk_error,
    scan_video,
)
from scd_sf.distributed import Ranks
from scd_sf.files import (
    Json,
    hash_json,
    locked,
    read_json,
    read_jsonl,
    require_own_folder,
    sha256_file,
    sha256_folder,
    typed,
    write_json,
    write_jsonl,
)
from scd_sf.models.wan.text import encoder_parts, encoder_width, text_config
from scd_sf.models.wan.text_cache import OFF, CachedTextEncoder
from scd_sf.models.wan.vae import VaeGeometry, load_vae, vae_geometry, vae_source
from scd_sf.tensor_files import LONG_DTYPES, dtype_name, dtype_of
from scd_sf.tools.data.progress import progress_of
from scd_sf.types import UserError, VideoShape, as_cell, on_device, printable, say

SETTINGS, SCANS, PLAN, REPORT = "encoding.json", "scans.jsonl", "videos.jsonl", "report.json"
TEXT = "text-cache"
WORK = "work"  # folder of what ranks write while they are at work: scans and faults
OWN_NAMES = {SETTINGS, SCANS, PLAN, REPORT, TEXT, WORK}
ENCODING = Format("scd-sf-encoding", 1, "no such file; encode the videos first")
SHOWN = 20
PROMPTS_AT_ONCE = 64
TOKENS_PER_WORD = 1.5  # of umT5, for the estimate of disk space
WAN = VaeGeometry(16, 4, 8)
WAN_TEXT_WIDTH, WAN_PATCH = 4096, 2
_State = tuple[str, int, int]  # file, bytes, time of change
Unit = tuple[int, int]  # number of a video in the plan, number of a group of its clips


@dataclass(frozen=True)
class VideosJob:
    """The options of an encoding. ``table``: a file of captions; ``caption``: of videos without
    one; ``batch``: clips in a call of the VAE; ``workers``: threads that decode; ``store``: type on
    the disk; ``splits``: only these, empty: all."""

    videos: Path
    model: Path
    out: Path
    cut: CutConfig
    table: Path | None = None
    caption: str = ""
    batch: int = 1
    workers: int = 2
    text_cache: str = OFF
    negative_prompt: str = ""
    text_dtype: str = "float32"
    store: str = "float16"
    splits: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        return f"use another --out, or delete {self.out} and encode again"

    @property
    def cache_folder(self) -> Path:
        return self.out / TEXT if self.text_cache == OFF else Path(self.text_cache).expanduser()


# -------------------------------------------------------------------------------------------- check


def check_video_folder(
    videos: Path,
    table: Path | None,
    caption: str,
    cut: CutConfig,
    model: Path | None,
    report: Path | None,
    *,
    store: str = "float16",
    workers: int = 2,
) -> None:
    """Say what an encoding would take, cut and leave out, and write it as JSON to ``report``. Reads
    the videos; loads no model.

    ``model`` None: the geometry of Wan 2.1 is used. UserError: no clip would be made.
    """
    geometry, patch = WAN, WAN_PATCH
    width = WAN_TEXT_WIDTH
    if model is not None:
        geometry, patch = vae_geometry(model), _patch(model)
        width = encoder_width(text_config(model))
    shapes = _shapes(cut, geometry, patch)
    if report is not None and report.resolve().is_relative_to(videos.resolve()):
        raise UserError(f"{report}: lies in the folder of the videos; choose another --report")
    folder = read_video_folder(videos, table, caption)
    scans: dict[str, VideoScan] = {}
    for scan in _scanned(videos, [video.file for video in folder.videos], workers, "videos"):
        scans[scan.file] = scan
    plan = plan_videos(folder.videos, scans, cut)
    _check_folders(plan)
    summary = _summary(folder, plan, cut, _bytes(plan, shapes, width, store))
    if report is not None:
        write_json(report, summary)
    _print_summary(summary, report)
    if not plan.videos:
        raise UserError(f"{videos}: no clip can be cut; the reasons are above")


# ------------------------------------------------------------------------------------------- encode


def encode_videos(job: VideosJob, ranks: Ranks) -> None:
    """Encode the clips that are not encoded yet. UserError for a folder of other files, of other
    settings, or of other videos, and for a full disk."""
    with ExitStack() as locks:
        unscanned = ranks.on_main(lambda: _begin(job, locks))
        _scan_share(job, unscanned[ranks.rank :: ranks.world], ranks)
        ranks.barrier()
        ranks.on_main(lambda: _write_plan(job))
        plan = _read_plan(job)
        units = ranks.on_main(lambda: _missing_units(job, plan))
        if not units and ranks.on_main(lambda: _is_complete(job, plan)):
            if ranks.is_main:
                say(f"{job.out}: already complete")
            return
        _encode_texts(job, plan, units, ranks)
        ranks.barrier()
        first, last = (len(units) * n // ranks.world for n in (ranks.rank, ranks.rank + 1))
        _encode_units(job, plan, units[first:last], ranks)
        ranks.barrier()
        ranks.on_main(lambda: _finish(job, plan, ranks))


def _begin(job: VideosJob, locks: ExitStack) -> list[str]:
    """Begin or resume ``out``, hold it until ``locks`` is closed, and return the files that must be
    scanned."""
    out = job.out
    if out.resolve().is_relative_to(job.videos.resolve()):
        raise UserError(f"--out {out}: lies in the folder of the videos; choose another place")
    if job.cache_folder.resolve().is_relative_to(job.videos.resolve()):
        raise UserError(
            f"--text-cache {job.text_cache}: lies in the folder of the videos; choose another place"
        )
    settings = _settings(job)
    require_own_folder(out, [SETTINGS], "use another --out")
    locks.enter_context(locked(out, "the encoding of videos"))
    path = out / SETTINGS
    if path.is_file():
        old = ENCODING.read(out, SETTINGS).get("settings")
        old_settings = old if isinstance(old, dict) else {}
        names = sorted(n for n in settings if old_settings.get(n) != settings[n])
        if names:
            raise UserError(f"{path}: made with other settings ({', '.join(names)}); {job.remedy}")
    else:
        write_json(path, ENCODING.sealed({"settings": settings}))
    (out / WORK).mkdir(exist_ok=True)
    for pattern in (f"*/{JOB}", f"*/*/{JOB}"):
        for path in sorted(out.glob(pattern)):
            sweep_clips(path.parent)
    known = _known_scans(job)
    files = [video.file for video in read_video_folder(job.videos, job.table, job.caption).videos]
    return [file for file in files if _state(job, file) not in known]


def _settings(job: VideosJob) -> Json:
    """All that the clips depend on besides the videos. UserError: a size that the model cannot
    take."""
    _shapes(job.cut, vae_geometry(job.model), _patch(job.model))
    config = text_config(job.model)
    weights, tokens = encoder_parts(config)
    vae = vae_source(job.model)
    settings: Json = {
        **asdict(job.cut),
        "sizes": [list(size) for size in job.cut.sizes],
        "batch": job.batch,
        "vae_sha256": sha256_file(vae) if vae.is_file() else sha256_folder(vae),
        "text_weights_sha256": sha256_file(weights)
        if weights.is_file()
        else sha256_folder(weights, "*.safetensors"),
        "text_tokenizer_sha256": sha256_folder(tokens, "token*.json"),
        "text_config": config.settings,
        "negative_prompt": job.negative_prompt,
        "text_dtype": job.text_dtype,
        "store": job.store,
    }
    return settings


def _patch(model: Path) -> int:
    """Latent positions along a side that the video model takes together: Wan's for a name on the
    hub, 1 where the model directory holds no transformer."""
    path = model / "transformer" / "config.json"
    if not path.is_file():
        return 1 if model.exists() else WAN_PATCH
    patch = read_json(path, "copy the model again").get("patch_size")
    return max(int(side) for side in patch[1:]) if isinstance(patch, list) else WAN_PATCH


def _shapes(cut: CutConfig, geometry: VaeGeometry, patch: int) -> dict[tuple[int, int], VideoShape]:
    """The latent shape of every size. UserError: the VAE or the video model cannot take it."""
    shapes = {}
    for width, height in cut.sizes:
        multiple = geometry.spatial * patch
        if width % multiple or height % multiple or min(width, height) < 1:
            near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
            raise UserError(
                f"--size {width}x{height}: sides must be multiples of {multiple}; use {near[0]}x{near[1]}"
            )
        if (cut.frames - 1) % geometry.temporal:
            near_frames = 1 + round((cut.frames - 1) / geometry.temporal) * geometry.temporal
            raise UserError(
                f"--frames {cut.frames}: the VAE takes 1 + {geometry.temporal}*k frames; use {near_frames}"
            )
        shapes[width, height] = geometry.shape(cut.frames, height, width)
    return shapes


# --------------------------------------------------------------------------------------------- scan


def _scanned(videos: Path, files: Sequence[str], workers: int, label: str) -> Iterator[VideoScan]:
    """Scan the files in threads, in order."""
    with ThreadPoolExecutor(workers) as pool, progress_of(label, len(files)) as progress:
        for number, scan in enumerate(pool.map(lambda file: scan_video(videos, file), files), 1):
            yield scan
            progress(number)


def _scan_share(job: VideosJob, files: Sequence[str], ranks: Ranks) -> None:
    """Scan the files, and write each result at once."""
    if files:
        lines = _Lines(job.out / WORK, "scan")
        for scan in _scanned(job.videos, files, job.workers, f"scan of rank {ranks.rank}"):
            lines.append(asdict(scan))


def _known_scans(job: VideosJob) -> dict[_State, VideoScan]:
    """Results of earlier scans, also those of files that were changed since."""
    rows = _read_lines(job.out / WORK, "scan")
    scans = [typed(row, VideoScan, job.out / WORK, job.remedy) for row in rows]
    scans += _planned_scans(job).values()
    return {(scan.file, scan.bytes, scan.mtime_ns): scan for scan in scans}


def _planned_scans(job: VideosJob) -> dict[str, VideoScan]:
    """The scans that the plan was made from, by file."""
    path = job.out / SCANS
    rows = read_jsonl(path, job.remedy) if path.is_file() else []
    return {scan.file: scan for scan in (typed(row, VideoScan, path, job.remedy) for row in rows)}


def _state(job: VideosJob, file: str) -> _State:
    """What tells whether a file is still the one that was scanned."""
    try:
        status = (job.videos / file).stat()
    except OSError as error:
        raise UserError(f"{job.videos / file}: {error.strerror}; put it back") from error
    return file, status.st_size, status.st_mtime_ns


def _write_plan(job: VideosJob) -> None:
    """Write ``videos.jsonl``, or compare it. UserError: no clip can be cut, or the videos or
    captions are not those that the encoding was begun with."""
    known = _known_scans(job)
    folder = read_video_folder(job.videos, job.table, job.caption)
    scans: dict[str, VideoScan] = {}
    for video in folder.videos:
        scan = known.get(_state(job, video.file))
        if scan is None:
            raise UserError(
                f"{job.videos / video.file}: came or changed while the others were scanned; run the command again"
            )
        scans[video.file] = scan
    plan = plan_videos(folder.videos, scans, job.cut)
    _check_folders(plan)
    rows: list[Json] = [json.loads(json.dumps(asdict(video))) for video in plan.videos]
    path = job.out / PLAN
    if path.is_file():
        if fault := _difference(read_jsonl(path, job.remedy), rows):
            raise UserError(f"{job.videos}: {fault}; {job.remedy}")
    elif not rows:
        _print_summary(_summary(folder, plan, job.cut, 0), None)
        raise UserError(f"{job.videos}: no clip can be cut; the reasons are above")
    else:
        write_jsonl(path, rows)
    splits = {video.folder.rpartition("/")[2] for video in plan.videos}
    if unknown_splits := sorted(set(job.splits) - splits):
        raise UserError(f"--split {unknown_splits[0]}: the videos make {', '.join(sorted(splits))}")
    _open_folders(job, plan)
    rows = [asdict(scans[video.file]) for video in folder.videos]
    if not (job.out / SCANS).is_file() or read_jsonl(job.out / SCANS, job.remedy) != rows:
        write_jsonl(job.out / SCANS, rows)
    for file in (job.out / WORK).glob("scan-*.jsonl"):
        file.unlink()


def _check_folders(plan: Plan) -> None:
    """UserError where a split has the name of a file or folder of the encoding itself."""
    for video in plan.videos:
        if video.folder in OWN_NAMES:
            raise UserError(
                f"{printable(video.file)}: its split is '{video.folder}', a name that the encoding uses itself; "
                "rename it"
            )


def _open_folders(job: VideosJob, plan: Plan) -> None:
    """Write the ``job.json`` of each folder. UserError: the disk is too small."""
    config = text_config(job.model)
    width = encoder_width(config)
    shapes = _shapes(job.cut, vae_geometry(job.model), _patch(job.model))
    settings = ENCODING.read(job.out, SETTINGS)["settings"]
    assert isinstance(settings, dict)
    dtype = dtype_name(dtype_of(job.store))
    for video in {video.folder: video for video in plan.videos if _is_wanted(job, video)}.values():
        folder_settings = {**settings, "folder": video.folder}
        common = Common(shapes[video.size], dtype, width, config.max_length, folder_settings)
        open_job(job.out / video.folder, common)
    ids = _Ids(job)
    size = sum(
        math.prod(shapes[video.size].latent(1)) * LONG_DTYPES[job.store].itemsize
        for video in plan.videos
        if _is_wanted(job, video)
        for start in video.starts
        if not ids.path(video, start).is_file()
    )
    if size > (free := shutil.disk_usage(job.out).free):
        raise UserError(
            f"--out {job.out}: the clips need {size / 1e9:.3g} GB, {free / 1e9:.3g} GB are free there"
        )


def _difference(old_rows: Sequence[Json], new_rows: Sequence[Json]) -> str:
    """The first difference between two plans in words; "" where there is none. A video that is in
    another split comes last: that follows from a change of another one."""
    moved = ""
    old = {str(row.get("file")): row for row in old_rows}
    new = {str(row["file"]): row for row in new_rows}
    for file in sorted(old.keys() | new.keys()):
        name = printable(file)
        if file not in new:
            return f"{name} was taken when the encoding began, and is gone or left out now"
        if file not in old:
            return f"{name} is new since the encoding began"
        if old[file] != new[file]:
            fields = [key for key in new[file] if old[file].get(key) != new[file][key]]
            if fields == ["folder"]:
                moved = moved or f"{name} is in another split than when the encoding began"
                continue
            changed = "contents" if "sha256" in fields else ", ".join(fields)
            return f"{name} was changed since the encoding began ({changed})"
    return moved


def _read_plan(job: VideosJob) -> list[PlannedVideo]:
    rows = read_jsonl(job.out / PLAN, job.remedy)
    return [typed(row, PlannedVideo, job.out / PLAN, job.remedy) for row in rows]


# -------------------------------------------------------------------------------------------- clips


def _groups(video: PlannedVideo, batch: int) -> list[tuple[int, ...]]:
    """The starts of the clips that go through the VAE together."""
    return [video.starts[first : first + batch] for first in range(0, len(video.starts), batch)]


def _missing_units(job: VideosJob, plan: Sequence[PlannedVideo]) -> list[Unit]:
    """The groups with clips that do not exist or whose files are damaged. Clips that lie behind the
    damage of a video are not among them."""
    faults = _faults(job)
    ids = _Ids(job)
    commons = {
        folder: read_folder_job(job.out / folder)
        for folder in {video.folder for video in plan if _is_wanted(job, video)}
    }
    units = []
    for number, video in enumerate(plan):
        first_bad = faults[video.file][0] if video.file in faults else video.frames
        for group, starts in enumerate(_groups(video, job.batch)):
            paths = [ids.path(video, start) for start in starts if start < first_bad]
            if _is_wanted(job, video) and any(
                not path.is_file() or fault_of(path, commons[video.folder]) for path in paths
            ):
                units.append((number, group))
    return units


def _is_wanted(job: VideosJob, video: PlannedVideo) -> bool:
    return not job.splits or video.folder.rpartition("/")[2] in job.splits


class _Ids:
    """Names of clips: 32 hexadecimal digits of blake2b over all that decides the clip."""

    def __init__(self, job: VideosJob) -> None:
        self.out = job.out
        settings = ENCODING.read(job.out, SETTINGS)
        self.settings_sha256 = hash_json(settings.get("settings"))

    def id(self, video: PlannedVideo, start: int) -> str:
        key = [self.settings_sha256, video.sha256, video.size, video.caption, start]
        return hashlib.blake2b(hash_json(key).encode(), digest_size=16).hexdigest()

    def path(self, video: PlannedVideo, start: int) -> Path:
        return clip_path(self.out / video.folder, self.id(video, start))


def _text_encoder(job: VideosJob, ranks: Ranks) -> CachedTextEncoder:
    """The encoder behind the cache; loaded where a prompt is not in it."""
    return CachedTextEncoder(
        job.model, job.cache_folder, device=ranks.device, dtype=dtype_of(job.text_dtype)
    )


def _encode_texts(
    job: VideosJob, plan: Sequence[PlannedVideo], units: Sequence[Unit], ranks: Ranks
) -> None:
    """Encode this rank's share of the captions into the cache."""
    captions = ["", job.negative_prompt, *(plan[number].caption for number, _ in units)]
    share = list(dict.fromkeys(captions))[ranks.rank :: ranks.world]
    encoder = _text_encoder(job, ranks)
    with progress_of(f"captions of rank {ranks.rank}", len(share)) as progress:
        for first in range(0, len(share), PROMPTS_AT_ONCE):
            encoder.states(share[first : first + PROMPTS_AT_ONCE])
            progress(min(first + PROMPTS_AT_ONCE, len(share)))
    del encoder
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Decoded:
    """Clips of one group, uint8 (B, F, 3, H, W). ``fault``: why the clip that begins at
    ``first_bad`` and those after it cannot be made."""

    video: PlannedVideo
    starts: tuple[int, ...]
    pixels: Tensor | None
    fault: str = ""
    first_bad: int = 0


def _encode_units(
    job: VideosJob, plan: Sequence[PlannedVideo], units: Sequence[Unit], ranks: Ranks
) -> None:
    """Decode in threads, encode and write this rank's clips."""
    if not units:
        return
    vae, text = load_vae(job.model, device=ranks.device), _text_encoder(job, ranks)
    ids, scans = _Ids(job), _planned_scans(job)
    dtype = dtype_of(job.store)
    if vae.geometry != vae_geometry(job.model):
        raise UserError(f"{vae_source(job.model)}: its config.json is not that of its weights")
    groups: dict[int, list[tuple[int, ...]]] = {}
    for number, group in units:
        groups.setdefault(number, []).append(_groups(plan[number], job.batch)[group])
    tasks = [
        lambda video=plan[number], starts=starts: _decode(job, scans[video.file], video, starts)
        for number, starts in groups.items()
    ]
    total = sum(len(starts) for parts in groups.values() for starts in parts)
    count, faults = 0, _Lines(job.out / WORK, "fault")
    with (
        progress_of(f"clips of rank {ranks.rank}", total) as progress,
        ThreadedTasks(tasks, job.workers) as decoded,
    ):
        for part in decoded:
            if part.fault:
                row = {"file": part.video.file, "first_bad": part.first_bad, "reason": part.fault}
                faults.append(row)
            if part.pixels is None:
                continue
            pixels = on_device(part.pixels, ranks.device).float().div_(127.5).sub_(1)
            latents = vae.encode(pixels).to("cpu", dtype)
            states = text.states([part.video.caption])[0].to(dtype)
            for start, clip in zip(part.starts, latents, strict=True):
                about = _about(job, part.video, start, ids.id(part.video, start))
                write_clip(job.out / part.video.folder, clip, states, about)
            count += len(part.starts)
            progress(count)


def _about(job: VideosJob, video: PlannedVideo, start: int, clip: str) -> About:
    width, height = video.size
    return About(
        clip,
        video.caption,
        fps=int(job.cut.fps) if job.cut.fps.is_integer() else 0,  # job.json has it
        frames=job.cut.frames,
        size=f"{width}x{height}",
        source="videos",
        toolkit=__version__,
        tags={**video.tags, "video": video.file, "seconds": f"{start / job.cut.fps:.3f}"},
    )


def _decode(
    job: VideosJob, scan: VideoScan, video: PlannedVideo, groups: Sequence[tuple[int, ...]]
) -> Iterator[_Decoded]:
    """The groups of one video. A damaged video gives the whole clips before the damage, then its
    fault. UserError where the file is another one than was scanned."""
    if _state(job, video.file) != (scan.file, scan.bytes, scan.mtime_ns):
        raise UserError(
            f"{job.videos / video.file}: was changed while it was encoded; {job.remedy}"
        )
    width, height = video.size
    starts = [start for group in groups for start in group]
    clips = cut_clips(
        job.videos / video.file,
        video.file,
        starts,
        frames=job.cut.frames,
        height=height,
        width=width,
        fps=job.cut.fps,
        remedy=REPAIR,
    )
    for group in groups:
        parts: list[Tensor] = []
        fault = ""
        try:
            for _ in group:
                parts.append(next(clips))
        except UserError as error:
            raise_disk_error(error)
            fault = printable(str(error).removeprefix(f"{video.file}: "))
        pixels = torch.stack(parts) if parts else None
        first_bad = group[len(parts)] if fault else 0
        yield _Decoded(video, group[: len(parts)], pixels, fault, first_bad)
        if fault:
            return


# ------------------------------------------------------------------------------------------- finish


def _is_complete(job: VideosJob, plan: Sequence[PlannedVideo]) -> bool:
    """Whether the folders have their manifests, and the report is written."""
    folders = {video.folder for video in plan if _is_wanted(job, video)}
    report = job.out / REPORT
    if not all(file.is_file() for file in [report, *(job.out / f / MANIFEST for f in folders)]):
        return False
    finished = read_json(report, job.remedy).get("finished")
    return isinstance(finished, list) and folders <= set(finished)


def _finish(job: VideosJob, plan: Sequence[PlannedVideo], ranks: Ranks) -> None:
    """Write the index of each folder, then the report, and say what to do next."""
    text = _text_encoder(job, ranks)
    faults, ids = _faults(job), _Ids(job)
    counts = {
        video.file: sum(ids.path(video, start).is_file() for start in video.starts)
        for video in plan
    }
    finished = []
    for name in sorted({video.folder for video in plan if _is_wanted(job, video)}):
        if any(counts[video.file] for video in plan if video.folder == name):
            root = job.out / name
            write_fixed_prompts(root, text.states, job.negative_prompt, dtype_of(job.store))
            index_clips(root)
            finished.append(name)
    summary = _result(job, plan, counts, faults)
    old = read_json(job.out / REPORT, job.remedy) if (job.out / REPORT).is_file() else {}
    old_names = old.get("finished")
    names = set(finished) | set(old_names if isinstance(old_names, list) else [])
    write_json(job.out / REPORT, {**summary, "finished": sorted(names)})
    _print_summary(summary, job.out / REPORT)
    if job.text_cache == OFF:
        shutil.rmtree(job.out / TEXT, ignore_errors=True)
    if not finished:
        raise UserError(f"{job.out}: no clip could be made; the reasons are above")
    for name in finished:
        if name.endswith("train"):
            val = name.removesuffix("train") + "val"
            hint = f" val={job.out / val}" if val in names else " val=.."
            say(f"stage 2 reads it: recipes/stage2_flow_matching.py .. data={job.out / name}{hint}")


def _result(
    job: VideosJob,
    plan: Sequence[PlannedVideo],
    counts: dict[str, int],
    faults: dict[str, tuple[int, str]],
) -> Json:
    """The report, with the clips that are there."""
    folder = read_video_folder(job.videos, job.table, job.caption)
    planned = plan_videos(folder.videos, _planned_scans(job), job.cut)
    notes = list(planned.notes)
    refused = list(planned.refused)
    wanted = {video.file: video for video in plan}
    for file, (_, why) in sorted(faults.items()):
        if counts.get(file):
            notes.append(
                f"{file}: {counts[file]} of {len(wanted[file].starts)} clips, then it {why}"
            )
        else:
            refused.append(Refused(file, why))
    taken = [_with_clips(video, counts[video.file]) for video in plan if counts[video.file]]
    size = sum(
        file.stat().st_size
        for name in {video.folder for video in taken}
        for file in (job.out / name).glob("??/*.safetensors")
    )
    return _summary(folder, Plan(taken, refused, notes), job.cut, size)


def _with_clips(video: PlannedVideo, count: int) -> PlannedVideo:
    return replace(video, starts=video.starts[:count])


def _faults(job: VideosJob) -> dict[str, tuple[int, str]]:
    """Of each video that turned out to be damaged while it was encoded: the start of the first clip
    that cannot be made, and the reason."""
    faults: dict[str, tuple[int, str]] = {}
    for row in _read_lines(job.out / WORK, "fault"):
        fault = typed(row, _Fault, job.out / WORK, job.remedy)
        known = faults.get(fault.file, (fault.first_bad, fault.reason))
        faults[fault.file] = min(known, (fault.first_bad, fault.reason))
    return faults


@dataclass(frozen=True)
class _Fault:
    """A line about a damaged video."""

    file: str
    first_bad: int
    reason: str


# ------------------------------------------------------------------------------------------- report


def _bytes(
    plan: Plan, shapes: dict[tuple[int, int], VideoShape], text_width: int, store: str
) -> int:
    """Bytes on the disk, estimated: latents exactly, text states by the words of the captions."""
    itemsize = LONG_DTYPES[store].itemsize
    total = 0
    for video in plan.videos:
        latents = math.prod(shapes[video.size].latent(1))
        tokens = 2 + TOKENS_PER_WORD * len(video.caption.split())
        total += round(len(video.starts) * itemsize * (latents + tokens * text_width))
    return total


def _summary(folder: VideoFolder, plan: Plan, cut: CutConfig, size: int) -> Json:
    """The report: counts for each output folder, and every video that is left out with the
    reason."""
    left_out = sorted({(part.name, part.reason) for part in [*folder.refused, *plan.refused]})
    rows = {}
    for name in plan.folders:
        videos = [video for video in plan.videos if video.folder == name]
        clips = sum(len(video.starts) for video in videos)
        rows[name] = {
            "videos": len(videos),
            "clips": clips,
            "size": "x".join(str(side) for side in videos[0].size),
            "frames": cut.frames,
            "minutes": round(clips * cut.frames / cut.fps / 60, 2),
            "unused_minutes": round(sum(video.unused for video in videos) / cut.fps / 60, 2),
            "cropped_over_a_tenth": sum(video.kept < 0.9 for video in videos),
            "enlarged": sum(video.enlarged for video in videos),
        }
    return {
        "videos": len(plan.videos) + len(left_out),
        "taken": len(plan.videos),
        "clips": sum(len(video.starts) for video in plan.videos),
        "folders": rows,
        "left_out": [{"file": printable(file), "reason": printable(why)} for file, why in left_out],
        "other_files": folder.other_files,
        "notes": [printable(note) for note in [*folder.notes, *plan.notes]],
        "bytes": size,
        "cut": {**asdict(cut), "sizes": ["x".join(map(str, size)) for size in cut.sizes]},
    }


def _size_text(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _print_summary(summary: Json, report: Path | None) -> None:
    """``report``: the file that has the summary, where one was written."""
    left_out, folders, cut = summary["left_out"], summary["folders"], summary["cut"]
    assert isinstance(left_out, list) and isinstance(folders, dict) and isinstance(cut, dict)
    for part in left_out[:SHOWN]:
        say(f"left out: {part['file']}: {part['reason']}")
    if len(left_out) > SHOWN:
        place = report or "--check --report FILE"
        say(f"... and {len(left_out) - SHOWN} more; {place} names them all")
    table = Table(title=f"clips of {cut['frames']} frames at {cut['fps']:g} per second")
    columns = (
        "videos",
        "clips",
        "size",
        "minutes",
        "unused_minutes",
        "cropped_over_a_tenth",
        "enlarged",
    )
    table.add_column("folder")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for name, row in folders.items():
        table.add_row(as_cell(name), *(as_cell(row[column]) for column in columns))
    Console(width=max(110, Console().width)).print(table)
    notes, others = summary["notes"], summary["other_files"]
    assert isinstance(notes, list) and isinstance(others, dict)
    if others:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in others.items())
        say(f"files that are neither videos nor captions: {kinds}")
    for note in notes:
        say(f"note: {note}")
    size = summary["bytes"]
    assert isinstance(size, int)
    say(
        f"{summary['taken']} of {summary['videos']} videos, {summary['clips']} clips, "
        f"about {_size_text(size)} on the disk"
    )


class _Lines:
    """JSON lines of one process in a file of its own, each on the disk before the next. A kill
    leaves at most a torn last line, which :func:`_read_lines` skips."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.path = folder / f"{kind}-{secrets.token_hex(8)}.jsonl"

    def append(self, row: Json) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read_lines(folder: Path, kind: str) -> list[Json]:
    rows: list[Json] = []
    for path in sorted(folder.glob(f"{kind}-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):  # torn
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows
