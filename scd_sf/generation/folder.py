"""A folder of sampled videos: its records of finished videos, the shares of the ranks, and the
manifest. Videos come from generation/sampling.py.

``out/manifest.json`` holds the settings and, at the end, every video's prompt, seed and hash.
``out/.done`` has a record of each finished video, written by whichever rank made it: so ranks share
a folder, and the same command goes on. A record also says what the video was made together with, so
that ``scd again`` (again.py) can make it once more to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from scd_sf.checkpoint import weights_sha256
from scd_sf.config import differences, stored_settings
from scd_sf.data.clips import video_writer
from scd_sf.distributed import Ranks
from scd_sf.files import locked, others_in, read_json, require_own_folder, sha256_file, write_json
from scd_sf.generation.compile import CompileConfig
from scd_sf.generation.request import check_changes
from scd_sf.generation.sampling import (
    EXTRAS,
    SampleConfig,
    VideoGenerator,
    VideoRequest,
    open_generator,
    wanted_videos,
)
from scd_sf.types import UserError, plural, say

INDEX = "manifest.json"
DONE = ".done"
FROM_VIDEO = "from_video"  # the setting of videos that are made from a video, where there is one


def open_sample_folder(out: Path, settings: dict[str, object]) -> dict[str, object]:
    """Make the folder, or check that it holds videos of the same settings. Returns the settings of
    all its videos: those of input videos (``FROM_VIDEO``), too, where only an earlier run had some.
    UserError where another run's, or somebody's, files would be overwritten."""
    file = out / INDEX
    if file.is_file():
        content = read_json(file, "use another out=")
        old_settings = content.get("settings")
        if not isinstance(old_settings, dict):
            raise UserError(f"{file}: not a sample manifest; use another out=")
        old_settings = stored_settings(SampleConfig, old_settings, str(file))
        is_first = FROM_VIDEO in settings and FROM_VIDEO not in old_settings
        new_settings = {
            n: value for n, value in settings.items() if n != FROM_VIDEO or not is_first
        }
        changes = differences({name: old_settings.get(name) for name in new_settings}, new_settings)
        if changes:
            name, (old, new) = next(iter(changes.items()))
            raise UserError(
                f"{file}: {name} is {old!r} there but {new!r} now; "
                "nothing is overwritten: use another out="
            )
        if is_first and any(record.get("video") for record in finished_videos(out).values()):
            raise UserError(
                f"{file}: settings: has no {FROM_VIDEO}, so with what strength its videos were made anew is not known; "
                "use another out="
            )
        if is_first:  # before a video is made, so that no other run has another
            write_json(file, {**content, "settings": settings})
        elif FROM_VIDEO in old_settings:
            return {**settings, FROM_VIDEO: old_settings[FROM_VIDEO]}
        return settings
    try:
        if others_in(out):
            raise UserError(
                f"{out}: holds files but no {INDEX}; nothing is overwritten: use another out="
            )
        write_json(file, {"settings": settings, "videos": {}})
        return settings
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error}); use another out=") from error


def record_file(out: Path, video: VideoRequest) -> Path:
    """Path of a finished video's record."""
    return out / DONE / f"{video.file}.json"


def waiting(out: Path, videos: Sequence[VideoRequest]) -> list[VideoRequest]:
    """The videos without an intact file. UserError for a finished one of another prompt."""
    missing_videos = []
    for video in videos:
        record = record_file(out, video)
        if not record.is_file():
            missing_videos.append(video)
            continue
        entry = read_json(record, "delete it to make the video again")
        request = video.record()
        names = dict.fromkeys((*request, *EXTRAS))
        if different := [name for name in names if entry.get(name) != request.get(name)]:
            name = "prompt" if "prompt" in different else different[0]
            raise UserError(
                f"{out / video.file}: made for {name} {entry.get(name)!r}, not {request.get(name)!r}; use another out="
            )
        if not (out / video.file).is_file() or sha256_file(out / video.file) != entry.get("sha256"):
            missing_videos.append(video)
    return missing_videos


def finished_videos(out: Path) -> dict[str, dict[str, object]]:
    """The records of all finished videos by file name."""
    files = sorted((out / DONE).rglob("*.json"))
    names = [file.relative_to(out / DONE).as_posix().removesuffix(".json") for file in files]
    return {
        name: read_json(file, "make the video again")
        for name, file in zip(names, files, strict=True)
    }


def batches(
    videos: Sequence[VideoRequest], size: int, history: str = "keep"
) -> list[list[VideoRequest]]:
    """At most ``size`` videos at a time: of one start file and input video, and where a change of
    the prompt encodes the past again, with changes at the same frames."""

    def alike(video: VideoRequest) -> tuple[object, ...]:
        row = video.row
        return row.start, row.video, history != "keep" and [frame for frame, _ in row.then]

    groups: list[list[VideoRequest]] = []
    for video in videos:
        last = groups[-1] if groups else []
        if last and len(last) < size and alike(last[0]) == alike(video):
            last.append(video)
        else:
            groups.append([video])
    return groups


def make(
    video_generator: VideoGenerator,
    out: Path,
    videos: Sequence[VideoRequest],
    wanted: Sequence[VideoRequest] | None = None,
) -> None:
    """Generate one batch of videos and write it, or of it only those that are ``wanted``. Frames
    are written as they come, each record after its file."""
    cfg, wanted = video_generator.cfg, videos if wanted is None else wanted
    for folder in {
        path.parent for video in wanted for path in (out / video.file, record_file(out, video))
    }:
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        writers = {
            place: files.enter_context(video_writer(out / video.file, cfg.fps, crf=cfg.crf))
            for place, video in enumerate(videos)
            if video in wanted
        }
        for part in video_generator.frames(videos):
            for place, frames in enumerate(part.cpu()):
                if place in writers:
                    writers[place](frames)
    how: dict[str, object] = {"batch": [video.file for video in videos]}  # for `scd again`
    if cfg.compile != CompileConfig():
        how["compile"] = asdict(cfg.compile)
    for video in wanted:
        digest = {"sha256": sha256_file(out / video.file)}
        write_json(record_file(out, video), video.record() | digest | how)


def run_samples(cfg: SampleConfig, ranks: Ranks) -> None:
    """Check everything and generate this rank's videos; rank 0 also writes the manifest."""
    make_videos(cfg, ranks, wanted_videos(cfg), {}, {})


def make_videos(
    cfg: SampleConfig,
    ranks: Ranks,
    videos: Sequence[VideoRequest],
    extra_settings: Mapping[str, object],
    notes: Mapping[str, object],
) -> None:
    """``videos`` as :func:`run_samples` makes them. ``extra_settings`` must be
    the same whenever the folder is used again. ``notes`` are further entries of the manifest, which
    each run replaces."""
    out = Path(cfg.out)
    checkpoint = ranks.checkpoint(cfg.checkpoint, cfg.weights)
    video_generator, settings = open_generator(cfg, ranks.device, checkpoint)
    if any(video.row.video for video in videos):
        settings[FROM_VIDEO] = inputs = video_generator.input_settings()
        if ranks.is_main:
            say(
                f"strength {inputs['strength']:.4g}: begins with noise {inputs['noise']:.4g}, {inputs['steps']} of "
                f"{video_generator.sampler.steps} steps; no student is trained to make videos anew"
            )
    ranks.on_main(lambda: check_requests(video_generator, videos))
    settings |= {
        "checkpoint_sha256": ranks.on_main(lambda: weights_sha256(checkpoint, cfg.weights)),
        **extra_settings,
    }
    with ExitStack() as locks:
        ranks.on_main(lambda: require_own_folder(out, [INDEX]))
        ranks.on_main(lambda: locks.enter_context(locked(out, "samples")))
        settings = ranks.on_main(lambda: open_sample_folder(out, settings))
        if ranks.is_main:
            for remark in video_generator.remarks(videos):
                say(remark)
        make_missing(video_generator, out, ranks, videos)
        if ranks.is_main:
            write_json(out / INDEX, {"settings": settings, **notes, "videos": finished_videos(out)})


def check_requests(video_generator: VideoGenerator, videos: Sequence[VideoRequest]) -> None:
    """UserError for a start file or an input video that cannot be used, and for a later prompt that
    would not be seen."""
    for video in videos:
        shape = video_generator.shape_of(video)
        frames = [frame for frame, _ in video.row.then]
        num_known = video_generator.known_frames(video)
        where = f"{video.file}, {video.row.prompt[:40]!r}: then"
        check_changes(frames, shape, video_generator.student.chunk, num_known, where)


def make_missing(
    video_generator: VideoGenerator, out: Path, ranks: Ranks, videos: Sequence[VideoRequest]
) -> None:
    """Generate this rank's share of the missing videos. Returns when all ranks are done."""
    missing_videos = waiting(out, videos)
    ranks.barrier()  # no rank finishes a video before all have counted
    own_videos = missing_videos[ranks.rank :: ranks.world]
    if ranks.is_main:
        say(
            f"{out}: {plural(len(videos), 'video')}, {len(videos) - len(missing_videos)} finished before"
        )
    start_time, num_made = time.monotonic(), 0
    for part in batches(own_videos, video_generator.cfg.batch, video_generator.cfg.history):
        make(video_generator, out, part)
        num_made += len(part)
        seconds = (time.monotonic() - start_time) / num_made
        minutes, remaining = divmod(round(seconds * (len(own_videos) - num_made)), 60)
        if ranks.is_main:
            say(
                f"{num_made}/{len(own_videos)} videos  {seconds:.3g} s/video  "
                f"left {minutes}:{remaining:02d}"
            )
    ranks.barrier()
