"""What a request for videos means: sampler, size, guidance, seeds and start frames, as ``scd
sample`` and the pipeline take them."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import SupportsFloat

import numpy as np
import torch
from torch import Tensor

from scd_sf.data.start import (
    check_picture,
    count_pictures,
    picture_pixels,
    read_pictures,
    read_start,
)
from scd_sf.diffusion.guidance import GuidanceConfig
from scd_sf.diffusion.samplers import Sampler, first_step
from scd_sf.generation.generate import first_chunk, first_frame
from scd_sf.generation.guided import SampleGuidance
from scd_sf.generation.prompt_change import check_history
from scd_sf.models.build import SamplerConfig, Student
from scd_sf.models.interface import check_chunks
from scd_sf.models.wan.vae import VaeGeometry
from scd_sf.types import UserError, VideoShape, plural

START_FPS = 16  # Wan's; a start video or an input video is resampled to it
STRENGTH = 0.8  # of an input video, by default


def check_whole(numbers: Mapping[str, object], optional: Collection[str] = ()) -> None:
    """UserError for one that is no whole number: int() would cut 5.5 to 5. Those ``optional`` may be
    None."""
    for name, value in numbers.items():
        is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
        if not is_whole and not (value is None and name in optional):
            raise UserError(f"{name} is {value!r}; give a whole number")


def check_changes(
    frames: Iterable[int], shape: VideoShape, chunk: int, num_known: int = 0, where: str = "then"
) -> None:
    """``frames``: pixel frames from which a clip, the first ``num_known`` latent frames of which are
    there already, has other prompts. UserError for one that would not be seen: after the clip's
    last chunk begins, or for the same chunk as the next one."""
    chunks = (shape.frames - num_known) // chunk
    before: tuple[int, int] | None = None
    for frame in sorted(frames):
        number = first_chunk(frame, shape.temporal, chunk, num_known)
        if number >= chunks:
            raise UserError(
                f"{where}: frame {frame} is too late: no other prompt can begin after frame "
                f"{first_frame(shape.frames - chunk, shape.temporal)} of the clip's {shape.pixel_frames} frames; ask "
                "for more with frames=, or leave that prompt out"
            )
        if before is not None and before[1] == number:
            begin = first_frame(num_known + number * chunk, shape.temporal)
            raise UserError(
                f"{where}: the prompts of frames {before[0]} and {frame} would both begin with frame {begin}, where "
                "the next frames are made; leave one out"
            )
        before = frame, number


def check_strength(strength: float | None, has_video: bool) -> None:
    """UserError for a strength that is no share, or that nothing is made anew with."""
    if strength is None:
        return
    is_number = isinstance(strength, SupportsFloat) and not isinstance(strength, bool | str)
    if not is_number or getattr(strength, "ndim", False):  # numpy's and torch's are numbers, too
        raise UserError(f"strength is {strength!r}; give a number above 0 and at most 1")
    if not 0 < strength <= 1:
        raise UserError(f"strength is {strength}; it must be above 0 and at most 1")
    if not has_video:
        raise UserError(f"strength is {strength}, but there is no video; set video too")


def choose_strength(requested: float | None, sampler: Sampler) -> float:
    """The share of noise that an input video begins with: ``requested``, or by default 0.8, or where
    the sampler has no step at so little noise, the least that it knows. UserError: it has no step
    at the one requested."""
    if requested is None:
        return max(STRENGTH, sampler.times[-1])
    first_step(sampler, requested)
    return requested


def check_past(history: str, has_changes: bool) -> None:
    """UserError for a ``history`` of changing prompts where no prompt changes, or an unknown one."""
    check_history(history)
    if history != "keep" and not has_changes:
        raise UserError(
            f"history is '{history}', what becomes of the past where the prompt changes, but none changes; give later "
            "prompts ('then'), or leave history out"
        )


def choose_sampler(
    trained_sampler: SamplerConfig,
    requested_sampler: SamplerConfig | None,
    where: str,
    *,
    force: bool = False,
) -> SamplerConfig:
    """The checkpoint's sampler with the times it was trained at, or another one. A distilled
    student gives noise with one it was not trained for: UserError unless ``force``."""
    sampler = (
        trained_sampler
        if requested_sampler is None or requested_sampler == replace(trained_sampler, times=())
        else requested_sampler
    )
    if sampler != trained_sampler and trained_sampler.name == "renoise" and not force:
        raise UserError(
            f"{where}: distilled for sampler {_other_fields(trained_sampler, sampler)}, "
            f"not for {_other_fields(sampler, trained_sampler)}; leave the sampler unset, or set "
            "force=true"
        )
    return sampler


def _other_fields(sampler: SamplerConfig, other: SamplerConfig) -> str:
    """The fields in which ``sampler`` differs from ``other``, as they are typed."""
    values, other_values = asdict(sampler), asdict(other)
    return " ".join(
        f"{name}={[round(time, 4) for time in value] if name == 'times' else value}"
        for name, value in values.items()
        if value != other_values[name] and value != ()
    )


def choose_steps(
    trained_sampler: SamplerConfig,
    requested_sampler: SamplerConfig | None,
    steps: int | None,
    where: str,
    *,
    force: bool = False,
) -> SamplerConfig:
    """:func:`choose_sampler`, where diffusers' ``num_inference_steps`` may ask for another number
    of steps. UserError: a distilled student has its own, unless ``force``."""
    if not isinstance(requested_sampler, SamplerConfig | None):
        raise UserError(
            f"sampler is {requested_sampler!r}; give a SamplerConfig of scd_sf.models.build, such as "
            "SamplerConfig('unipc', 30)"
        )
    if steps is None or (requested_sampler or trained_sampler).steps == steps:
        return choose_sampler(trained_sampler, requested_sampler, where, force=force)
    if requested_sampler is not None:
        raise UserError(
            f"num_inference_steps is {steps}, but sampler has {requested_sampler.steps} steps; give one of them"
        )
    if trained_sampler.name == "renoise" and not force:
        raise UserError(
            f"num_inference_steps is {steps}, but {where} was distilled for {trained_sampler.steps} steps; "
            "leave it out, or set force=True"
        )
    return replace(trained_sampler, steps=steps, times=())


def choose_guidance(guidance: SampleGuidance | None, scale: object) -> SampleGuidance:
    """``guidance``, or text guidance of diffusers' ``guidance_scale``: w, off at 1 and below."""
    if not isinstance(guidance, SampleGuidance | None):
        raise UserError(f"guidance is {guidance!r}; give a SampleGuidance, or guidance_scale=")
    if scale is None:
        return guidance or SampleGuidance()
    if guidance is not None:
        raise UserError("guidance_scale and guidance are both set; give one of them")
    if not isinstance(scale, SupportsFloat):
        raise UserError(f"guidance_scale is {scale!r}; give a number")
    text = GuidanceConfig(float(scale))  # refuses what is no scale
    return SampleGuidance(text if text.w > 1 else GuidanceConfig())


def unusual(
    sampler: SamplerConfig,
    guidance: SampleGuidance,
    shape: VideoShape,
    num_held: int,
    origin: Mapping[str, object],
) -> list[str]:
    """What is asked for that the student was not trained for, in words; none of it is an error.
    ``sampler``: the trained one; ``num_held``: latent frames of window and sink (0: all);
    ``origin``: its provenance."""
    remarks = []
    if sampler.name == "renoise" and guidance.on:
        remarks.append(
            "guidance is on, but a student distilled by Self-Forcing is meant to be sampled without it"
        )
    video = origin.get("video")
    trained_frames = video.get("frames") if isinstance(video, dict) else None
    if isinstance(trained_frames, int) and shape.pixel_frames > trained_frames:
        latent_frames = 1 + (trained_frames - 1) // shape.temporal
        if not num_held or num_held > latent_frames:
            how = (
                f"with {num_held} latent frames in window and sink"
                if num_held
                else "without a window"
            )
            remarks.append(
                f"{shape.pixel_frames} frames are more than the {trained_frames} of training: {how} the picture may "
                f"drift; window and sink of together {latent_frames} latent frames are what was trained"
            )
    return remarks


def choose_seeds(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    prompts: int,
    per_prompt: int,
) -> list[int]:
    """One seed per video, the videos of a prompt together. ``seed``: one for all prompts (None: 0)
    or one each, to which a prompt's n-th video adds n. ``generator``: draws a seed for each video;
    a list has one for each."""
    videos = prompts * per_prompt
    if generator is not None:
        if seed is not None:
            raise UserError("seed and generator are both set; give one of them")
        own = [generator] * videos if isinstance(generator, torch.Generator) else generator
        if not isinstance(own, Sequence) or not all(isinstance(g, torch.Generator) for g in own):
            raise UserError("generator: give a torch.Generator, or a list with one for each video")
        if len(own) != videos:
            raise UserError(
                f"generator is a list of {len(own)} for {videos} videos; give one for each"
            )
        return [int(torch.randint(2**62, (), generator=g, device=g.device)) for g in own]
    try:
        one = operator.index(0 if seed is None else seed)  # type: ignore[arg-type]  # or a list
        seeds = [one] * prompts
    except TypeError:
        seeds = _whole(seed)
    if len(seeds) != prompts:
        raise UserError(f"{prompts} prompts but {len(seeds)} seeds; give one seed for each prompt")
    return [first + n for first in seeds for n in range(per_prompt)]


def _whole(seeds: object) -> list[int]:
    try:
        return [operator.index(seed) for seed in seeds]  # type: ignore[attr-defined]
    except TypeError as error:
        raise UserError(
            f"seed is {seeds!r}; give a whole number, or one for each prompt"
        ) from error


def start_pixels(start: object, prompts: int, shape: VideoShape, where: str) -> Tensor:
    """Pixels (P, F, 3, H, W) in [0, 1] of the frames that P clips begin with, cropped and resized.

    ``start``: a picture in memory (:func:`~scd_sf.data.start.picture_pixels`), the path of an image
    or a video, or frames (F, 3, H, W) or (F, H, W, 3), for all clips; or a list of these, one for each.
    """
    starts = list(start) if isinstance(start, list | tuple) else [start] * prompts
    if len(starts) != prompts:
        raise UserError(f"{where}: {len(starts)} for {prompts} prompts; give one, or one for each")
    size = (shape.pixel_height, shape.pixel_width)
    parts = []
    files: dict[Path, Tensor] = {}  # each is decoded once
    for one in starts:
        if isinstance(one, str | Path):
            path = Path(one)
            if path not in files:
                files[path] = read_start(path, size, shape.temporal, START_FPS)
            parts.append(files[path])
        else:
            frames = list(one) if isinstance(one, Tensor | np.ndarray) and one.ndim == 4 else [one]
            if not frames:
                raise UserError(f"{where}: holds no frame; give one at least")
            parts.append(torch.stack([picture_pixels(frame, size, where) for frame in frames]))
    if len({len(part) for part in parts}) != 1:
        raise UserError(f"{where}: the clips begin with different numbers of frames; cut them")
    return torch.stack(parts)


def video_pixels(video: object, size: tuple[int, int], where: str) -> tuple[int, Iterator[Tensor]]:
    """Number of frames of an input video, and the frames (1, 1, 3, H, W) in [0, 1], cropped and
    resized, as they are taken.

    ``video``: a path, resampled to 16 frames per second, or pictures in memory, one for each frame,
    (F, 3, H, W) or (F, H, W, 3) among them. UserError: anything else, no frame, not readable.
    """
    if isinstance(video, str | Path):
        path = Path(video)
        count = count_pictures(path, size, START_FPS, where)
        pictures = read_pictures(path, size, START_FPS, where)
        return count, (picture[None, None] for picture in pictures)
    is_batch = isinstance(video, Tensor | np.ndarray) and video.ndim == 4
    if not is_batch and not isinstance(video, list | tuple):
        raise UserError(f"{where}: is a {type(video).__name__}; give a path or a list of pictures")
    frames = list(video)  # type: ignore[call-overload]  # one of the two
    if not frames:
        raise UserError(f"{where}: holds no frame; give one at least")
    for frame in frames:
        if isinstance(frame, str | Path | list | tuple) or getattr(frame, "ndim", 3) == 4:
            raise UserError(
                f"{where}: is a list of videos, and one serves all prompts; give one, in a call for each"
            )
        check_picture(frame, size, where)
    return len(frames), (picture_pixels(frame, size, where)[None, None] for frame in frames)


def input_frames(available: int, requested: int, shape: VideoShape, chunk: int, where: str) -> int:
    """Pixel frames of a clip that is made from a video of ``available`` frames: ``requested``, or
    (0) as many as whole chunks take. UserError: it has fewer."""
    latents = (1 + (available - 1) // shape.temporal) // chunk * chunk
    longest = 1 + (latents - 1) * shape.temporal
    if not latents:
        raise UserError(
            f"{where}: gives {plural(available, 'frame')}, the model needs {1 + (chunk - 1) * shape.temporal}; "
            "use a longer video"
        )
    if requested > longest:
        raise UserError(
            f"{where}: gives {plural(available, 'frame')}, of which {longest} can be made anew, not {requested}; "
            "leave frames out"
        )
    return requested or longest


# Allowed numbers of frames and pixels of a request; 0: as trained.
SIZES_ASKED: dict[str, tuple[float, float]] = {
    "frames": (0, 10**6),
    "height": (0, 2**15),
    "width": (0, 2**15),
}


def choose_shape(
    requested_size: Mapping[str, int | None],
    origin: Mapping[str, object],
    student: Student,
    vae: VaeGeometry,
    where: str,
) -> VideoShape:
    """The clip's shape from ``requested_size`` (frames, height, width in pixels), else from the
    training videos that the provenance ``origin`` records. UserError: a size that nobody knows or
    that does not fit the VAE, the patches or the chunk."""
    video = origin.get("video")
    trained_size = video if isinstance(video, dict) else {}
    size = {
        name: int(requested_size.get(name) or trained_size.get(name) or 0)
        for name in ("frames", "height", "width")
    }
    if missing_fields := [f"{name}=" for name, value in size.items() if not value]:
        raise UserError(
            f"{where}: does not say what it was trained on; set {', '.join(missing_fields)}"
        )
    shape = vae.shape(size["frames"], size["height"], size["width"])
    if shape.channels != student.cfg.in_channels:
        raise UserError(
            f"{where}: takes {student.cfg.in_channels} latent channels, this VAE has {shape.channels}; set base="
        )
    student.cfg.tokens(shape.height, shape.width)
    check_chunks(shape.frames, student.chunk)
    return shape
