"""The self-rollout: one loop over the chunks of a video, by which stage 3 trains and every video is
made, the same for every family of students."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from scd_sf.diffusion.noise import Noise, row_noise
from scd_sf.diffusion.samplers import OnStep, Sampler
from scd_sf.models.interface import FrameStreamer, Stream, check_chunks
from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.types import Conditioning, Denoiser


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
    prompts: Callable[[int], Conditioning | None] | None = None,
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
    stream = generator.start(cond, (x_T.shape[-2], x_T.shape[-1]), cache)
    previous: Tensor | None = None
    for known_chunk in () if history is None else _chunks(history, generator.chunk):
        stream = generator.advance(stream, previous, x_T)
        previous = known_chunk
    number = 0
    while x_T is not None:
        if prompts is not None and (new := prompts(number)) is not None:
            stream = generator.switch(stream, new)
        stream = generator.advance(stream, previous, draw_query(x_T))
        x_0 = sampler(partial(_velocity, generator, stream), x_T, noise_like, exit_step, on_step)
        previous = x_0.detach()
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


@torch.no_grad()
def sample_bidirectional(
    denoiser: Denoiser,
    cond: Conditioning,
    shape: tuple[int, int, int, int],
    sampler: Sampler,
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Latents (B, F, C, H, W) of a bidirectional model, one clip per prompt and seed: all frames
    denoised together.

    ``shape`` is (F, C, H, W). Students are sampled by generation/generate.py."""
    noise_like = row_noise(seeds)

    def velocity(x_t: Tensor, t: float) -> Tensor:
        return denoiser(x_t, torch.full(x_t.shape[:1], t, device=x_t.device), cond)

    return sampler(velocity, noise_like(torch.empty(len(seeds), *shape, device=device)), noise_like)
