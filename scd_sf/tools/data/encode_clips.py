"""A clip directory (``scd_sf.data.clips.ClipSet``, as make_doom_clips.py writes it) -> latents and
text states in shards, one directory per split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scd_sf.data.clips import ClipSet
from scd_sf.data.latents import LatentClip, LatentWriter
from scd_sf.data.prompts import Prompt, encode_prompts
from scd_sf.data.shards import ShardWriter
from scd_sf.files import locked, safe_path, sha256_file, sha256_folder
from scd_sf.models.wan.text import encoder_parts, text_config
from scd_sf.models.wan.text_cache import open_text_encoder
from scd_sf.models.wan.vae import Vae, load_vae, vae_source
from scd_sf.tensor_files import dtype_of
from scd_sf.tools.data.progress import progress_of
from scd_sf.types import UserError, say


@dataclass(frozen=True)
class ClipSetJob:
    """The options of one run."""

    clips: Path
    model: Path
    out: Path
    batch: int
    device: str
    text_cache: str
    negative_prompt: str
    dtypes: dict[str, str]


def prompts_and_rows(clips: ClipSet) -> tuple[list[Prompt], list[LatentClip]]:
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


def inputs_of(clips: ClipSet, split: str, job: ClipSetJob) -> dict[str, object]:
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


def encode_clips(clips: ClipSet, vae: Vae, writer: LatentWriter, batch: int) -> None:
    """Append the latents of every clip that is not in a complete shard yet."""
    with progress_of("clips", len(clips), writer.done) as report:
        for first in range(writer.done, len(clips), batch):
            indices = range(first, min(first + batch, len(clips)))
            pixels = clips.videos(indices).float().div(127.5).sub(1)
            writer.append(vae.encode(pixels))
            report(indices[-1] + 1)


def encode_split(job: ClipSetJob, split: str) -> None:
    """Encode one split into a directory of its own. UserError: its name is no name of a folder."""
    clips = ClipSet(job.clips, split)
    out = safe_path(job.out, split, "split")
    if out == job.out:
        raise UserError(
            f"{job.clips / 'clips.jsonl'}: split is {split!r}, which is no name of a folder; rename it"
        )
    with locked(out, "encode_latents"):
        _encode_split(job, clips, split, out)


def _encode_split(job: ClipSetJob, clips: ClipSet, split: str, out: Path) -> None:
    vae = load_vae(job.model, device=job.device)
    shape = vae.geometry.shape(clips.frames, clips.height, clips.width)
    writer = ShardWriter(out, inputs_of(clips, split, job))
    if writer.finished:
        say(f"{out}: already complete")
        return
    prompts, rows = prompts_and_rows(clips)
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
