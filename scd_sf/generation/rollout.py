"""The self-rollout: one loop over the chunks of a video, by which stage 3 trains and every video is
made, the same for every family of students."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from scd_sf.diffusion.noise import Noise
from scd_sf.diffusion.samplers import OnStep, Sampler
from scd_sf.generation.prompt_change import KeptChunks, PromptChange
from scd_sf.models.interface import FrameStreamer, Stream, check_chunks
from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.types import Conditioning


def stream_rollout(
    generator: FrameStreamer,
    noise: Tensor | Iterable[Tensor],
    cond: Conditioning,
    sampler: Sampler,
    noise_like: Noise,
    *,
    query_noise: Noise | None = None,
    exit_step: int | None = None,
    cache: CacheConfig | None = None,
    history: Tensor | None = None,
    prompts: Callable[[int], PromptChange | None] | None = None,
    on_step: OnStep | None = None,
) -> Iterator[Tensor]:
    """Yield finished chunks (B, n, C, H, W) one by one from ``noise``: (B, F, C, H, W), or its
    chunks as they come.

    The encoder's query gets noise of its own, as in training: an encoder that has seen the chunk's
    noise tells the decoder how to undo it, and sampling falls back to the blurred mean (ADR 0004).
    ``query_noise`` draws it (None: ``noise_like``, which draws what the sampler adds). With
    ``exit_step`` every chunk stops there and carries gradients of that step only; history is
    detached.

    ``history`` (B, F', C, H, W): frames that are there already (an image, a video to continue);
    they are not yielded. The query beside them is not read, so no noise is drawn for it.
    ``prompts``: asked before the n-th yielded chunk for another prompt from there on, or None.
    ``on_step``: called after every denoising step (:class:`~scd_sf.diffusion.samplers.Sampler`).
    """
    chunks, draw_query = _chunks(noise, generator.chunk), query_noise or noise_like
    x_T = next(chunks, None)
    if x_T is None:
        return
    placeholder, latent_size = x_T, (x_T.shape[-2], x_T.shape[-1])

    def begin(cond: Conditioning, known: Iterable[Tensor]) -> tuple[Stream, Tensor | None]:
        """A stream that has read all but the last of these chunks, and the last one."""
        stream, last = generator.start(cond, latent_size, cache), None
        for known_chunk in known:
            stream, last = generator.advance(stream, last, placeholder), known_chunk
        return stream, last

    known = [] if history is None else list(_chunks(history, generator.chunk))
    kept, number = KeptChunks(cache, generator.chunk, known), 0
    stream, previous = begin(cond, known)
    while x_T is not None:
        if prompts is not None and (new := prompts(number)) is not None:
            if new.history == "keep":
                stream = generator.switch(stream, new.cond)
            else:
                stream = None  # the next one may have its buffers
                stream, previous = begin(new.cond, kept.after(new.history))
        stream = generator.advance(stream, previous, draw_query(x_T))
        x_0 = sampler(partial(_velocity, generator, stream), x_T, noise_like, exit_step, on_step)
        previous = x_0.detach()
        kept.add(previous)
        yield x_0
        x_T, number = next(chunks, None), number + 1


def _velocity(generator: FrameStreamer, stream: Stream, x_t: Tensor, t: float) -> Tensor:
    times = torch.full(x_t.shape[:1], t, device=x_t.device, dtype=torch.float32)
    return generator.denoise(stream, x_t, times)


def _chunks(frames: Tensor | Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
    if not isinstance(frames, Tensor):
        return iter(frames)
    check_chunks(frames.shape[1], chunk)
    return iter(frames.split(chunk, dim=1))


def rollout(
    generator: FrameStreamer,
    noise: Tensor,
    cond: Conditioning,
    sampler: Sampler,
    noise_like: Noise,
    *,
    exit_step: int | None = None,
    cache: CacheConfig | None = None,
) -> Tensor:
    """The whole clip, (B, F, C, H, W)."""
    chunks = stream_rollout(
        generator, noise, cond, sampler, noise_like, exit_step=exit_step, cache=cache
    )
    return torch.cat(list(chunks), dim=1)
