"""One video of a folder of samples made once more, from what the folder says of it (``scd again``).

The manifest has the settings; the video's record its prompts, seed, start file or input video, the videos that
were made together with it (sums are rounded otherwise in another batch) and what was compiled. All
of that batch is generated, the one video is written: on the same machine, with the same versions
and the same number of threads, it has the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from scd_sf.checkpoint import weights_sha256
from scd_sf.config import from_yaml, stored_settings
from scd_sf.data.prompt_files import PromptRow
from scd_sf.distributed import Ranks
from scd_sf.files import locked, read_json, require_own_folder, safe_path, typed, write_json
from scd_sf.generation.folder import (
    DONE,
    FROM_VIDEO,
    INDEX,
    finished_videos,
    make,
    open_sample_folder,
    record_file,
)
from scd_sf.generation.sampling import SampleConfig, VideoRequest, open_generator, start_sha256
from scd_sf.types import UserError, say

REMEDY = "name a video of a folder that scd sample made"


@dataclass
class _Record:
    """A video's entry in the manifest, as :func:`~scd_sf.generation.folder.make` writes it."""

    prompt: str
    seed: int
    prompt_index: int = 0
    sample: int = 0
    title: str = ""
    then: list[tuple[int, str]] = field(default_factory=list)
    start: str = ""
    start_sha256: str = ""
    video: str = ""
    video_sha256: str = ""
    sha256: str = ""
    batch: list[str] = field(default_factory=list)
    compile: dict[str, bool] = field(default_factory=dict)


def make_again(
    video: Path,
    out: Path,
    ranks: Ranks,
    *,
    checkpoint: str = "",
    base: str = "",
    text_cache: str = "",
) -> bool:
    """Make ``video``, a path inside a folder of samples, as ``out`` with the same name; whether its
    bytes are the recorded ones.

    ``checkpoint``, ``base``: where these are now, if elsewhere. The file itself need not be there
    any more. UserError: no such record, other weights or another start file than then, a folder of
    other settings at ``out``.
    """
    folder = _folder_of(video)
    name = video.absolute().relative_to(folder).as_posix()
    record = _record(folder, name)
    together = record.batch or [name]
    if name not in together or len(set(together)) < len(together):
        raise UserError(
            f"{folder / name}: its record's 'batch' does not name every video once; {REMEDY}"
        )
    requests = [_request(folder, file, _record(folder, file)) for file in together]
    cfg = _config(folder, record, len(together), out, checkpoint, base, text_cache)
    weights = ranks.checkpoint(cfg.checkpoint, cfg.weights)
    recorded_weights = _settings(folder).get("checkpoint_sha256")
    if (found := weights_sha256(weights, cfg.weights)) != recorded_weights:
        raise UserError(
            f"{cfg.checkpoint}: its weights have sha256 {found[:16]}.., {folder / INDEX} was made with "
            f"{str(recorded_weights)[:16]}..; give the step of then as --checkpoint"
        )
    video_generator, settings = open_generator(cfg, ranks.device, weights)
    if FROM_VIDEO in _settings(folder):
        settings[FROM_VIDEO] = video_generator.input_settings()
    if settings.get("decoder_sha256") != _settings(folder).get("decoder_sha256"):
        raise UserError(
            f"{cfg.decoder}: is another file than {folder / INDEX} was made with; put that one back"
        )
    require_own_folder(out, [INDEX])
    with locked(out, "samples"):
        open_sample_folder(out, settings | {"checkpoint_sha256": recorded_weights})
        wanted = [request for request in requests if request.file == name]
        if record_file(out, wanted[0]).is_file():
            raise UserError(f"{out / name}: was made already; use another --out")
        make(video_generator, out, requests, wanted)
        content = read_json(out / INDEX, "use another --out")
        write_json(out / INDEX, {**content, "videos": finished_videos(out)})
    is_equal = _record(out, name).sha256 == record.sha256
    if not is_equal and not record.batch:
        say(f"{folder / INDEX}: does not say what {name} was made together with; it was made alone")
    return is_equal


def _folder_of(video: Path) -> Path:
    """The folder of samples that ``video`` lies in."""
    for parent in video.absolute().parents:
        if (parent / INDEX).is_file() and (parent / DONE).is_dir():
            return parent
    raise UserError(f"{video}: no {INDEX} of samples beside it; {REMEDY}")


def _settings(folder: Path) -> dict[str, object]:
    settings = read_json(folder / INDEX, REMEDY).get("settings")
    if not isinstance(settings, dict):
        raise UserError(f"{folder / INDEX}: has no settings; {REMEDY}")
    return stored_settings(SampleConfig, settings, str(folder / INDEX))


def _record(folder: Path, name: str) -> _Record:
    file = safe_path(folder / DONE, f"{name}.json", f"{folder / INDEX}: a video's name")
    if not file.is_file():
        raise UserError(f"{folder / name}: no finished video of this folder; {REMEDY}")
    return typed(read_json(file, REMEDY), _Record, file, REMEDY)


def _request(folder: Path, name: str, record: _Record) -> VideoRequest:
    """What was asked for. UserError: the start file or the input video is another one now."""
    for path, sha256, verb in (
        (record.start, record.start_sha256, "began with"),
        (record.video, record.video_sha256, "was made from"),
    ):
        if path and not Path(path).is_file():
            raise UserError(f"{folder / name}: {verb} {path}, which is gone; put it back")
        if path and start_sha256(path) != sha256:
            raise UserError(f"{folder / name}: {verb} {path}, which was changed since; put it back")
    row = PromptRow(record.prompt, tuple(record.then), record.start, video=record.video)
    return VideoRequest(name, row, record.prompt_index, record.sample, record.seed, record.title)


def _config(
    folder: Path,
    record: _Record,
    batch: int,
    out: Path,
    checkpoint: str,
    base: str,
    text_cache: str,
) -> SampleConfig:
    """The settings of the folder as ``scd sample`` takes them."""
    stored = _settings(folder)
    same = ("checkpoint", "base", "weights", "dtype", "blocks", "sampler", "decoder", "history")
    tree = {name: stored[name] for name in (*same, "fps", "crf", "seed") if name in stored}
    tree |= {"out": str(out), "batch": batch, "force": True, "text_cache": text_cache}
    tree |= {"compile": record.compile}
    for name, fields in (("size", ("frames", "height", "width")), ("window", ("window", "sink"))):
        values = stored.get(name)
        if isinstance(values, list):
            if len(values) != len(fields):
                raise UserError(
                    f"{folder / INDEX}: settings: {name} has {len(values)} numbers, not {len(fields)}; {REMEDY}"
                )
            tree |= dict(zip(fields, values, strict=True))
    from_video = stored.get(FROM_VIDEO)
    if record.video and not isinstance(from_video, dict):
        raise UserError(
            f"{folder / INDEX}: settings: has no {FROM_VIDEO}, so with what strength is not known; {REMEDY}"
        )
    if isinstance(from_video, dict):  # 0 frames: as many as the file gives
        tree |= {name: from_video.get(name) for name in ("strength", "frames")}
    guidance = stored.get("guidance")
    if isinstance(guidance, dict):
        tree["negative_prompt"] = guidance.get("negative_prompt", "")
        tree["guidance"] = {
            key: value for key, value in guidance.items() if key != "negative_prompt"
        }
    tree |= {name: value for name, value in (("checkpoint", checkpoint), ("base", base)) if value}
    try:
        return from_yaml(SampleConfig, json.dumps(tree))
    except UserError as error:
        raise UserError(f"{folder / INDEX}: settings: {error}") from error
