"""Encode captioned clips into training data: VAE latents and text states, one directory per split.

    python data_prep/encode_latents.py --clips data/doom --model models/teacher \\
        --out data/doom_latents

reads a clip directory (``scd_sf.data.clips.ClipSet``), the VAE (``vae/``) and the text encoder
(``text_encoder/`` + ``tokenizer/``, or ``text_encoder.json``) of a model directory in diffusers
layout, or the same from Wan's original files, and writes ``<out>/<split>`` (read with
``scd_sf.data.latents.LatentClips``). An interrupted run goes on where it stopped; a finished one
does nothing; other clips, another VAE or another text encoder than the directory was begun with is
an error.

Your own videos: put them under one directory with a file of JSON lines ``{"file": "a.mp4",
"caption": "..."}`` (optional: ``held_out_caption``, ``split``, ``place``, ``motion``) and add
``--captions FILE``. All must have the same size and, at ``--fps``, 1 + 4*k frames: they are
resampled to that rate by their timestamps and turned upright. This writes ``manifest.json`` and
``clips.jsonl`` beside the videos, then encodes as above.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from scd_sf.data.clips import CLIPS, Clip, ClipSet, read_video, write_clips
from scd_sf.data.latents import LatentClip, LatentWriter
from scd_sf.data.prompts import Prompt, encode_prompts
from scd_sf.data.shards import ShardWriter
from scd_sf.files import (
    lines_of,
    locked,
    parse_json,
    read_json,
    read_text,
    safe_path,
    sha256_bytes,
    sha256_file,
    sha256_folder,
    typed,
)
from scd_sf.models.wan.text import encoder_parts, text_config, wan_negative
from scd_sf.models.wan.text_cache import OFF, open_text_encoder
from scd_sf.models.wan.vae import Vae, load_vae, vae_source
from scd_sf.tensor_files import LONG_DTYPES, dtype_of
from scd_sf.tools.data.progress import progress_of
from scd_sf.types import UserError, device_of, exit_on_user_error, say

CAPTIONS = 'write one {"file": ..., "caption": ...} per line'
KEEP = (
    "nothing of others is overwritten: move it away, or put the videos into a folder of their own"
)


@dataclass(frozen=True)
class Caption:
    """One line of a captions file: a video of one's own, relative to the folder of videos."""

    file: str
    caption: str
    held_out_caption: str = ""
    split: str = "train"
    place: str = ""
    motion: str = ""


def index_folder(root: Path, captions: Path, fps: int) -> None:
    """Make a folder of videos a clip directory: write ``clips.jsonl`` and ``manifest.json`` beside
    them.

    UserError, before a video is read, where these names are taken by files that this command has
    not written.
    """
    rows = read_captions(captions)
    index, manifest = root / "clips.jsonl", root / "manifest.json"
    old_manifest = read_json(manifest, KEEP) if manifest.is_file() else None
    if old_manifest is not None and old_manifest.get("format") != CLIPS.name:
        raise UserError(f"{manifest}: is not of this command; {KEEP}")
    files = [safe_path(root, row.file, f"{captions}:{number}: 'file'") for number, row in rows]
    for (number, _), path in zip(rows, files, strict=True):
        if not path.is_file():
            raise UserError(f"{path}: no such file ({captions}:{number}); correct 'file'")
    frames, _, height, width = read_video(files[0], fps).shape
    clips = [_own_clip(row, path, frames) for (_, row), path in zip(rows, files, strict=True)]
    lines = "".join(clip.to_json() + "\n" for clip in clips)
    current = index.is_file() and sha256_file(index) == sha256_bytes(lines.encode())
    captioned = old_manifest is not None and bool(old_manifest.get("captioned"))
    foreign = old_manifest is not None and not captioned
    if not current and (index.exists() or foreign):
        remedy = "delete it and manifest.json to index the folder again" if captioned else KEEP
        raise UserError(
            f"{index}: exists with other contents (clips, captions or --fps differ); {remedy}"
        )
    write_clips(
        root,
        clips,
        {"frames": frames, "height": height, "width": width, "fps": fps},
        {"captioned": True},
    )


def read_captions(captions: Path) -> list[tuple[int, Caption]]:
    """The lines with their numbers, which count from 1.

    UserError names the line: unknown or missing fields, or a file that is listed twice.
    """
    names = {entry.name for entry in fields(Caption)}
    rows: list[tuple[int, Caption]] = []
    files: set[str] = set()
    for number, line in enumerate(lines_of(read_text(captions, CAPTIONS)), 1):
        if not line.strip():
            continue
        place = f"{captions}:{number}"
        row = parse_json(line, place, CAPTIONS)
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object; {CAPTIONS}")
        if unknown_names := sorted(set(row) - names):
            raise UserError(
                f"{place}: unknown field '{unknown_names[0]}'; it knows {', '.join(sorted(names))}"
            )
        caption = typed(row, Caption, place, CAPTIONS)
        for name in ("file", "caption", "split"):
            if not str(row.get(name, name)).strip():
                raise UserError(
                    f"{place}: '{name}' must be a text that is not empty; correct the line"
                )
        if caption.file in files:
            raise UserError(f"{place}: 'file' {caption.file} is listed twice; list every clip once")
        files.add(caption.file)
        rows.append((number, caption))
    if not rows:
        raise UserError(f"{captions}: no line; {CAPTIONS}")
    return rows


def _own_clip(row: Caption, path: Path, frames: int) -> Clip:
    return Clip(
        id=row.file,
        split=row.split,
        place=row.place,
        motion=row.motion,
        actions=(row.motion,) * frames,
        degrees_per_frame=0.0,
        caption=row.caption,
        held_out_caption=row.held_out_caption,
        seed=0,
        tries=1,
        path=row.file,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
    )


def plan(clips: ClipSet) -> tuple[list[Prompt], list[LatentClip]]:
    """The distinct prompts, training prompts first, and the clips with the numbers of theirs.

    UserError: a held-out caption is a training caption.
    """
    tags: list[dict[str, str]] = []
    for clip in clips.clips:
        pairs = {"place": clip.place, "motion": clip.motion}
        tags.append({name: value for name, value in pairs.items() if value})
    captions = [(clip.caption, False, tag) for clip, tag in zip(clips.clips, tags, strict=True)]
    captions += [
        (clip.held_out_caption, True, tag)
        for clip, tag in zip(clips.clips, tags, strict=True)
        if clip.held_out_caption
    ]
    prompts: list[Prompt] = []
    numbers: dict[tuple[str, bool, tuple[str, ...]], int] = {}
    for text, held_out, tag in captions:
        if (key := (text, held_out, tuple(tag.values()))) not in numbers:
            numbers[key] = len(prompts)
            prompts.append(Prompt(f"p{len(prompts):06d}", text, held_out, tag))
    held_out_texts = {prompt.prompt for prompt in prompts if prompt.held_out}
    shared_prompts = held_out_texts & {prompt.prompt for prompt in prompts if not prompt.held_out}
    if shared_prompts:
        index = clips.root / "clips.jsonl"
        raise UserError(
            f"{index}: held-out caption {min(shared_prompts)!r} is a training caption; change it"
        )
    rows = []
    for clip, tag in zip(clips.clips, tags, strict=True):
        held_out_prompt = (
            numbers[clip.held_out_caption, True, tuple(tag.values())]
            if clip.held_out_caption
            else None
        )
        rows.append(
            LatentClip(
                clip.id, numbers[clip.caption, False, tuple(tag.values())], held_out_prompt, tag
            )
        )
    return prompts, rows


def inputs_of(clips: ClipSet, split: str, job: Job) -> dict[str, object]:
    """Everything that the output's contents depend on, as it is stored beside them."""
    config = text_config(job.model)
    weights, tokens = encoder_parts(config)
    return {
        "clips_sha256": clips.hash,
        "split": split,
        "vae_sha256": _sha256(vae_source(job.model), "*"),
        "text_weights_sha256": _sha256(weights, "*.safetensors"),
        "text_tokenizer_sha256": sha256_folder(tokens, "token*.json"),
        "text_config": config.settings,
        **({"fps": clips.fps} if clips.captioned else {}),
        **({"negative_prompt": job.negative_prompt} if job.negative_prompt else {}),
        **job.dtypes,
    }


def _sha256(source: Path, pattern: str) -> str:
    return sha256_file(source) if source.is_file() else sha256_folder(source, pattern)


@dataclass(frozen=True)
class Job:
    """The options of one run."""

    clips: Path
    model: Path
    out: Path
    batch: int
    device: str
    text_cache: str
    negative_prompt: str
    dtypes: dict[str, str]


def encode_clips(clips: ClipSet, vae: Vae, writer: LatentWriter, batch: int) -> None:
    """Append the latents of every clip that is not in a complete shard yet."""
    with progress_of("clips", len(clips), writer.done) as report:
        for first in range(writer.done, len(clips), batch):
            indices = range(first, min(first + batch, len(clips)))
            pixels = clips.videos(indices).float().div(127.5).sub(1)
            writer.append(vae.encode(pixels))
            report(indices[-1] + 1)


def encode_split(job: Job, split: str) -> None:
    """Encode one split into a directory of its own. UserError: its name is no name of a folder."""
    clips = ClipSet(job.clips, split)
    out = safe_path(job.out, split, "split")
    if out == job.out:
        raise UserError(
            f"{job.clips / 'clips.jsonl'}: split is {split!r}, which is no name of a folder; rename it"
        )
    with locked(out, "encode_latents"):
        _encode_split(job, clips, split, out)


def _encode_split(job: Job, clips: ClipSet, split: str, out: Path) -> None:
    vae = load_vae(job.model, device=job.device)
    shape = vae.geometry.shape(clips.frames, clips.height, clips.width)
    writer = ShardWriter(out, inputs_of(clips, split, job))
    if writer.finished:
        say(f"{out}: already complete")
        return
    prompts, rows = plan(clips)
    text_dtype = dtype_of(job.dtypes["text_dtype"])
    encoder = open_text_encoder(job.model, job.text_cache, device=job.device, dtype=text_dtype)
    with progress_of("prompts", len(prompts), writer.count("text")) as report:
        text = encode_prompts(
            writer,
            prompts,
            encoder.states,
            max_length=encoder.max_length,
            dtype=dtype_of(job.dtypes["store_text"]),
            negative=job.negative_prompt,
            progress=report,
        )
    del encoder
    latents = LatentWriter(writer, shape, dtype=dtype_of(job.dtypes["store_latents"]))
    encode_clips(clips, vae, latents, job.batch)
    latents.finish(rows, text)
    say(f"{out}: {len(rows)} clips of {shape.latent(1)[1:]}, {len(prompts)} prompts")


def main(
    clips: Annotated[
        Path, typer.Option(help="Clip directory (ClipSet), or a folder of videos with --captions.")
    ],
    model: Annotated[
        Path,
        typer.Option(help="Model directory with VAE and text encoder: diffusers' layout or Wan's."),
    ],
    out: Annotated[
        Path, typer.Option(help="Output; every split gets a directory of its own in it.")
    ],
    split: Annotated[
        list[str] | None, typer.Option(help="Only these splits (repeatable). Default: all.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Clips per VAE call.")] = 8,
    captions: Annotated[
        Path | None, typer.Option(help="JSON lines (file, caption): index --clips first.")
    ] = None,
    fps: Annotated[
        int, typer.Option(help="Frames per second your videos are resampled to (with --captions).")
    ] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = "",
    text_cache: Annotated[
        str,
        typer.Option(
            help="Folder that keeps encoded prompts for other runs; '' is the user's cache."
        ),
    ] = OFF,
    negative_prompt: Annotated[
        str,
        typer.Option(
            help="Negative prompt of stage 3's teacher: 'wan' is Wan's own, '' the empty prompt."
        ),
    ] = "wan",
    text_dtype: Annotated[
        str, typer.Option(help="Data type of the text encoder (umT5-xxl: bfloat16).")
    ] = "float32",
    store_text: Annotated[str, typer.Option(help="Storage type of the text states.")] = "float16",
    store_latents: Annotated[str, typer.Option(help="Storage type of the latents.")] = "float16",
) -> None:
    """Encode captioned clips into latents and text states. Run again to resume."""
    types = {"text_dtype": text_dtype, "store_text": store_text, "store_latents": store_latents}
    for name, value in types.items():
        if value not in LONG_DTYPES:
            raise UserError(
                f"--{name.replace('_', '-')}: '{value}' is unknown; use one of {', '.join(LONG_DTYPES)}"
            )
    if batch < 1 or fps < 1:
        raise UserError(f"--batch is {batch} and --fps {fps}; both must be at least 1")
    device = str(device_of(device))
    if captions is not None:
        index_folder(clips, captions, fps)
    job = Job(clips, model, out, batch, device, text_cache, wan_negative(negative_prompt), types)
    for name in split or sorted({clip.split for clip in ClipSet(clips).clips}):
        encode_split(job, name)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    exit_on_user_error(app)
