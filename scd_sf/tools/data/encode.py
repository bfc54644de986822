"""``scd data encode`` and ``data_prep/encode_latents.py``: videos with captions -> what stage 2
reads."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scd_sf.files import loads
from scd_sf.types import UserError, device_of

if TYPE_CHECKING:
    from scd_sf.data.video_plan import CutConfig

WAIT_MINUTES = 24 * 60.0  # of the ranks that are done, for the slowest
SIZE = re.compile(r"([1-9]\d{0,4})[xX]([1-9]\d{0,4})")
FRAMES, FPS, VAL, REST, WORKERS = 81, 16.0, 0.05, "drop", 2


def encode(
    clips: Annotated[
        Path, typer.Option(help="Folder of your videos, or a clip directory of make_doom_clips.py.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="Model directory with VAE and text encoder: diffusers' layout or Wan's."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Output: OUT/train and OUT/val, which stage 2 takes as data= and val=."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Only report what would be taken, cut and left out; no model is loaded."
        ),
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="With --check: also write the report as JSON to this file.")
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="Table of captions (csv, jsonl). Default: the folder's own, then NAME.txt beside each video."
        ),
    ] = None,
    caption: Annotated[str, typer.Option(help="Caption of all videos that have none.")] = "",
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="WIDTHxHEIGHT; repeat it, and each video goes to the nearest shape. Default: 832x480."
        ),
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of a clip: 1 + 4*k.")] = FRAMES,
    fps: Annotated[
        float, typer.Option(help="Frames per second that all videos are resampled to; 16 is Wan's.")
    ] = FPS,
    rest: Annotated[
        str,
        typer.Option(
            help="The end of a video that fills no clip: drop, or overlap with the clip before it."
        ),
    ] = REST,
    val: Annotated[
        float,
        typer.Option(
            help="For validation: a share of the videos, or from 1 on their number; 0: none."
        ),
    ] = VAL,
    split: Annotated[
        list[str] | None, typer.Option(help="Only these splits (repeatable). Default: all.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Clips per VAE call. Default: 1; of a clip directory 8."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Threads that decode; each holds a clip.")] = WORKERS,
    device: Annotated[str, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = "",
    text_cache: Annotated[
        str,
        typer.Option(
            help="Folder that keeps encoded prompts for other runs; '' is the user's cache."
        ),
    ] = "off",
    negative_prompt: Annotated[
        str,
        typer.Option(
            help="Negative prompt of stage 3's teacher: 'wan' is Wan's own, '' the empty prompt."
        ),
    ] = "wan",
    text_dtype: Annotated[
        str, typer.Option(help="Data type of the text encoder (umT5-xxl: bfloat16).")
    ] = "float32",
    store_text: Annotated[
        str | None,
        typer.Option(help="Storage type of the text states. Default: float16, or --store-latents."),
    ] = None,
    store_latents: Annotated[str, typer.Option(help="Storage type of the latents.")] = "float16",
    local_rank: Annotated[
        int, typer.Option("--local_rank", "--local-rank", hidden=True, help="Of the launcher.")
    ] = 0,
) -> None:
    """Encode captioned videos into latents and text states. Run again to resume.

    CLIPS is a folder as you have it: any names, subfolders, sizes, lengths and frame rates, turned
    or not, with sound. Nothing is written into it. The caption of a.mp4 is its row in metadata.csv,
    metadata.jsonl, metadata.json, captions.csv or captions.jsonl (file, file_name, video,
    video_path or path; caption, prompt or text; perhaps split), or its line in prompts.txt beside
    videos.txt, else the text of a.txt, else --caption. Videos are
    resampled by their timestamps to --fps, cut into clips of --frames, scaled and cropped to
    --size. All clips of a video are in one split, chosen by the hash of its contents. What is too
    short, broken or without caption is left out and listed.

    Output: OUT/train and OUT/val, one file per clip (ab/abcd...safetensors), manifest.json and
    clips.jsonl; with several sizes OUT/832x480/train and so on, as stage 2 takes one size in a run.
    OUT/report.json says what was taken and what was left out, OUT/videos.jsonl what was cut from
    each video. "scd data check OUT/train" verifies a folder. Several ranks (torchrun, deepspeed)
    share the work.
    """
    del local_rank
    if not check and (model is None or out is None):
        raise UserError("--model and --out: are missing; give both, or --check to only look")
    cut = _cut(size, frames, fps, rest, val)
    if (batch is not None and batch < 1) or workers < 1:
        raise UserError(f"--batch is {batch} and --workers {workers}; both must be at least 1")
    types = {
        "text_dtype": text_dtype,
        "store_text": store_text or "float16",
        "store_latents": store_latents,
    }
    _check_types(types)
    if captions is None and is_clip_directory(clips):
        defaults = (FRAMES, FPS, REST, VAL, WORKERS, "", None, False)
        if (frames, fps, rest, val, workers, caption, size, check) != defaults:
            raise UserError(
                f"{clips}: is a clip directory, whose clips are cut already; --frames, --fps, --size, --rest, --val, "
                "--workers, --caption and --check are for folders of videos"
            )
        assert model is not None and out is not None
        _encode_clip_directory(
            clips, model, out, split, batch or 8, device, text_cache, negative_prompt, types
        )
        return
    if store_text not in (None, store_latents):
        raise UserError(
            f"--store-text is {store_text} and --store-latents {store_latents}; a clip's file has one type: leave out "
            "--store-text"
        )
    if check:
        from scd_sf.tools.data.encode_videos import check_video_folder

        check_video_folder(
            clips, captions, caption, cut, model, report, store=store_latents, workers=workers
        )
        return
    if report is not None:
        raise UserError("--report: is for --check; an encoding writes OUT/report.json")
    from scd_sf.distributed import init_distributed
    from scd_sf.models.wan.text import wan_negative
    from scd_sf.tools.data.encode_videos import VideosJob, encode_videos

    assert model is not None and out is not None
    ranks = init_distributed(timeout_minutes=WAIT_MINUTES)
    if device:
        ranks = dataclasses.replace(ranks, device=device_of(device))
    job = VideosJob(
        videos=clips,
        model=model,
        out=out,
        cut=cut,
        table=captions,
        caption=caption,
        batch=batch or 1,
        workers=workers,
        text_cache=text_cache,
        negative_prompt=wan_negative(negative_prompt),
        text_dtype=text_dtype,
        store=store_latents,
        splits=tuple(split or ()),
    )
    encode_videos(job, ranks)


def is_clip_directory(root: Path) -> bool:
    """Whether a folder is a clip directory of ours, by its manifest.json."""
    try:
        manifest = loads((root / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == "scd-sf-clips"


def _cut(size: list[str] | None, frames: int, fps: float, rest: str, val: float) -> CutConfig:
    from scd_sf.data.video_plan import CutConfig

    sizes = []
    for text in size or ["832x480"]:
        match = SIZE.fullmatch(text)
        if match is None:
            raise UserError(f"--size is '{text[:40]}'; write WIDTHxHEIGHT, like 832x480")
        sizes.append((int(match[1]), int(match[2])))
    if rest not in ("drop", "overlap"):
        raise UserError(f"--rest is '{rest[:40]}'; use drop or overlap")
    return CutConfig(frames, fps, tuple(sizes), "drop" if rest == "drop" else "overlap", val)


def _check_types(types: dict[str, str]) -> None:
    from scd_sf.tensor_files import LONG_DTYPES

    for name, value in types.items():
        if value not in LONG_DTYPES:
            raise UserError(
                f"--{name.replace('_', '-')}: '{value}' is unknown; use one of {', '.join(LONG_DTYPES)}"
            )


def _encode_clip_directory(
    clips: Path,
    model: Path,
    out: Path,
    splits: list[str] | None,
    batch: int,
    device: str,
    text_cache: str,
    negative_prompt: str,
    types: dict[str, str],
) -> None:
    from scd_sf.data.clips import ClipSet
    from scd_sf.models.wan.text import wan_negative
    from scd_sf.tools.data.encode_clips import ClipSetJob, encode_split

    job = ClipSetJob(
        clips,
        model,
        out,
        batch,
        str(device_of(device)),
        text_cache,
        wan_negative(negative_prompt),
        types,
    )
    for name in splits or sorted({clip.split for clip in ClipSet(clips).clips}):
        encode_split(job, name)
