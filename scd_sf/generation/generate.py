"""The one way from conditions and seeds to latents and frames.

A video depends on its checkpoint, its conditions and its seed, and on nothing else: not on the
batch, the rank, the order or the length of the clip. The noise of a latent frame is a function of
(seed, frame), so a short clip is the beginning of a long one, and every sampler starts from the
same noise. Text states are rounded to float16 first, the type in which encoded prompts are stored:
a prompt that was just encoded and one from a folder give the same video.

Letters: B batch, F latent frames, n frames of a chunk, C channels, H W latent height and width, L
tokens, E width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from scd_sf.diffusion.noise import Noise, generator
from scd_sf.diffusion.samplers import OnStep, Sampler
from scd_sf.generation.guided import SampleGuidance, under_guidance
from scd_sf.generation.inputs import ChunkInput, FromInputs, InputsEnd
from scd_sf.generation.prompt_change import PromptChange
from scd_sf.generation.rollout import stream_rollout
from scd_sf.models.build import Student
from scd_sf.models.interface import FrameStreamer, check_chunks
from scd_sf.models.wan.vae import PixelDecoder, PixelStream, Vae
from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.types import Conditioning, UserError, VideoShape, on_device


class NotFinite(UserError):
    """Samples or frames hold NaN or infinity: a training may go on without its validation video."""


@torch.no_grad()
def generate(
    student: Student,
    vae: Vae,
    cond: Conditioning,
    seeds: Sequence[int],
    shape: VideoShape,
    sampler: Sampler,
    *,
    window: int = 0,
    sink: int = 0,
    start: Tensor | None = None,
    changes: Mapping[int, PromptChange] | None = None,
    guidance: SampleGuidance | None = None,
    null: Conditioning | None = None,
    decoder: PixelDecoder | None = None,
    inputs: Iterable[ChunkInput] | None = None,
) -> Iterator[Tensor]:
    """Pixels (B, m, 3, H, W) in [0, 1], as they are made: one frame for the first latent frame,
    ``temporal`` for each later one.

    ``shape``: of the whole clip. ``start``: pixels (B, F', 3, H, W) in [0, 1] that the clip begins
    with, F' = 1 + temporal*k; they come first, as the VAE gives them back. ``changes``: other
    prompts from a pixel frame on. ``decoder``: decodes instead of ``vae``. ``inputs``: a video that
    is made anew, see inputs.py. Other arguments as for :func:`generate_latents`. Raises
    UserError for samples that are not finite.
    """
    latents = clip_latents(
        student,
        vae,
        cond,
        seeds,
        shape,
        sampler,
        window=window,
        sink=sink,
        start=start,
        changes=changes,
        guidance=guidance,
        null=null,
        inputs=inputs,
    )
    yield from decoded(decoder or vae, latents)


@torch.no_grad()
def decoded(decoder: PixelDecoder, latents: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pixels (B, m, 3, H, W) in [0, 1] of a clip's latents (B, n, C, H, W), as they come."""
    stream = decoder.stream()
    for part in latents:
        yield pixels_of(stream, part)


@torch.no_grad()
def clip_latents(
    student: Student,
    vae: Vae,
    cond: Conditioning,
    seeds: Sequence[int],
    shape: VideoShape,
    sampler: Sampler,
    *,
    window: int = 0,
    sink: int = 0,
    start: Tensor | None = None,
    changes: Mapping[int, PromptChange] | None = None,
    guidance: SampleGuidance | None = None,
    null: Conditioning | None = None,
    next_prompt: Callable[[], PromptChange | None] | None = None,
    initial: Tensor | None = None,
    on_step: OnStep | None = None,
    inputs: Iterable[ChunkInput] | None = None,
) -> Iterator[Tensor]:
    """Latents (B, n, C, H, W) of the frames of :func:`generate`: those of ``start`` first, then
    chunk by chunk. ``next_prompt``, ``initial``, ``on_step``, ``inputs``: as for
    :func:`generate_latents`."""
    history, num_known = None, 0
    if start is not None:
        history = on_device(vae.encode(start * 2 - 1), cond.text_BLE.device)
        num_known = history.shape[1]
        yield history
    prompts = {
        first_chunk(frame, shape.temporal, student.chunk, num_known): new
        for frame, new in sorted((changes or {}).items())
    }
    yield from generate_latents(
        student,
        cond,
        seeds,
        shape.latent(1)[1:],
        sampler,
        window=window,
        sink=sink,
        history=history,
        changes=prompts,
        guidance=guidance,
        null=null,
        next_prompt=next_prompt,
        initial=initial,
        on_step=on_step,
        inputs=inputs,
    )


@torch.no_grad()
def generate_latents(
    student: Student,
    cond: Conditioning,
    seeds: Sequence[int],
    shape: tuple[int, int, int, int],
    sampler: Sampler,
    *,
    window: int = 0,
    sink: int = 0,
    history: Tensor | None = None,
    changes: Mapping[int, PromptChange] | None = None,
    guidance: SampleGuidance | None = None,
    null: Conditioning | None = None,
    next_prompt: Callable[[], PromptChange | None] | None = None,
    initial: Tensor | None = None,
    on_step: OnStep | None = None,
    inputs: Iterable[ChunkInput] | None = None,
) -> Iterator[Tensor]:
    """Chunks of latents (B, n, C, H, W) as they are made, on the device of ``cond``.

    ``cond``: B rows; ``seeds``: one per row. ``shape``: (F, C, H, W) of the whole clip, ``history``
    included. ``window``, ``sink``: latent frames that the cache keeps (0: all). ``history``:
    latents (B, F', C, H, W) that the clip begins with; they are not yielded. ``changes``: other
    prompts from the n-th yielded chunk on. ``next_prompt``: asked for them right before every
    chunk (None: they stay), for a prompt that is typed while the video runs. ``guidance`` with
    ``null``: away from this condition (one row, or B). ``initial``: noise (B, F, C, H, W) to begin
    from instead of the seeds' own; what is drawn later still is theirs. ``on_step``: called after
    every denoising step. Raises UserError: rows without a seed, frames that chunks do not divide,
    samples that are not finite.
    """
    if len(seeds) != cond.batch:
        raise UserError(f"{cond.batch} conditions but {len(seeds)} seeds; give one seed for each")
    check_window(window, sink, student.chunk)
    frames, *size = shape
    num_known = 0 if history is None else history.shape[1]
    noise = ClipNoise(seeds, cond.text_BLE.device)
    streamer: FrameStreamer = student
    if guidance is not None and guidance.on:
        if null is None:
            raise UserError("guidance needs the condition that it leads away from; give null")
        streamer = under_guidance(
            student, guidance, as_stored(null), noise.role("corruption", repeat=True)
        )

    def prompt_from(number: int) -> PromptChange | None:
        new = next_prompt() if next_prompt is not None else None
        new = (changes or {}).get(number) if new is None else new
        return None if new is None else replace(new, cond=as_stored(new.cond))

    chunks = stream_rollout(
        streamer,
        noise.chunks((size[0], size[1], size[2]), student.chunk, num_known, frames, initial),
        as_stored(cond),
        sampler if inputs is None else FromInputs(sampler, iter(inputs)),
        noise.role("step"),
        query_noise=noise.role("query"),
        cache=CacheConfig.sampling(window, sink, frames),
        history=history,
        prompts=prompt_from,
        on_step=on_step,
    )
    for latents in _until_inputs_end(chunks):
        if not latents.isfinite().all():
            raise NotFinite(
                "samples are not finite; the weights are broken or the sampler is not theirs"
            )
        yield latents


def _until_inputs_end(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    try:
        yield from chunks
    except InputsEnd:
        return


def clips_of(chunks: Iterable[Tensor]) -> Tensor:
    """Whole clips (B, F, ...) from chunks along the frames."""
    return torch.cat(list(chunks), dim=1)


def decode(decoder: PixelDecoder, latents: Tensor, batch: int = 16) -> Tensor:
    """Whole clips of latents (B, F, C, H, W) -> pixels (B, F', 3, H, W) in [0, 1], as
    :func:`generate` decodes them."""
    return torch.cat([pixels_of(decoder.stream(), part) for part in latents.split(batch)])


def pixels_of(stream: PixelStream, latents: Tensor) -> Tensor:
    """Pixels (B, m, 3, H, W) in [0, 1] of the stream's next latents. NotFinite: they are not."""
    pixels = (stream.push(latents) + 1) / 2
    if not pixels.isfinite().all():
        raise NotFinite("decoded frames are not finite; the VAE's weights are broken")
    return pixels


def first_chunk(pixel_frame: int, temporal: int, chunk: int, num_known: int = 0) -> int:
    """The first chunk after ``num_known`` latent frames that has no pixel frame (counted from 0)
    before ``pixel_frame``.

    The first latent frame is pixel frame 0, each later one is ``temporal`` of them.
    """
    latent_frames = math.ceil((pixel_frame - 1) / temporal) + 1 if pixel_frame > 0 else 0
    return max(0, math.ceil((latent_frames - num_known) / chunk))


def first_frame(latent: int, temporal: int) -> int:
    """The first pixel frame of latent frame ``latent``, both counted from 0."""
    return 1 + (latent - 1) * temporal if latent else 0


def check_window(window: int, sink: int, chunk: int) -> None:
    """UserError for a history that no student with ``chunk`` can have."""
    CacheConfig.sampling(window, sink, 1)
    if window and window < chunk:
        raise UserError(
            f"window is {window}, but the model makes {chunk} latent frames at a time; use no less"
        )


def as_stored(cond: Conditioning) -> Conditioning:
    """``cond`` with text states rounded to float16 but in their own type. States beyond the range
    of float16 are not rounded."""
    text = cond.text_BLE
    half = text.half()
    return replace(cond, text_BLE=half.to(text.dtype)) if half.isfinite().all() else cond


class ClipNoise:
    """Standard normal noise of B clips. The noise of row b and latent frame f depends on
    (seeds[b], f), on its role and on the number of earlier draws for that role in the chunk."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str) -> None:
        self.seeds, self.device = list(seeds), device
        self._frame, self._draws = 0, dict[str, int]()

    def chunks(
        self,
        size: tuple[int, int, int],
        chunk: int,
        first: int,
        frames: int,
        given: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Initial noise (B, n, C, H, W) of the chunks from latent frame ``first`` to ``frames``,
        one at a time; that of ``given`` (B, frames, C, H, W) where it is.

        What the roles draw belongs to the chunk that was taken last.
        """
        initial = self.role("initial")
        for number in range(check_chunks(frames - first, chunk)):
            self._frame, self._draws = first + number * chunk, {}
            if given is not None:
                yield on_device(given[:, self._frame : self._frame + chunk], self.device).float()
            else:
                yield initial(torch.empty(len(self.seeds), chunk, *size, device=self.device))

    def role(self, name: str, *, repeat: bool = False) -> Noise:
        """Noise like x for the use ``name``. Each call within a chunk is a new draw; with
        ``repeat`` all calls return the same one.

        x is (B, n, C, H, W), each frame with noise of its own, or (B, L, E)."""

        def like(x: Tensor) -> Tensor:
            draw = 0 if repeat else self._draws.get(name, 0)
            self._draws[name] = draw + 1
            frames = x.shape[1] if x.ndim == 5 else 1
            shape = x.shape[2:] if x.ndim == 5 else x.shape[1:]
            rows = [
                torch.randn(shape, generator=generator(seed, self._frame + frame, name, draw))
                for seed in self.seeds
                for frame in range(frames)
            ]
            return on_device(torch.stack(rows).view(x.shape), x.device, x.dtype)

        return like


def as_uint8(frames: Tensor) -> Tensor:
    """Frames for a video file: float in [0, 1] is rounded to uint8 (values outside are clipped),
    uint8 passes as is."""
    if frames.dtype == torch.uint8:
        return frames
    if not frames.is_floating_point():
        raise UserError(f"frames: dtype {frames.dtype}; give uint8 or float in [0, 1]")
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8)
