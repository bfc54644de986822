"""The self-rollout: one loop over the chunks of a video, by which stage 3 trains and every video is
made, the same for every family of students."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scd_sf.diffusion.noise import Noise, row_noise
from scd_sf.diffusion.samplers import OnStep, Sampler
from scd_sf.models.interface import FrameStreamer, Stream, check_chunks
from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.types import Conditioning, Denoiser, UserError

HISTORIES = ("keep", "recache", "flush")


@dataclass(frozen=True)
class PromptChange:
    """Another prompt for the chunks to come. ``history``, what becomes of the past, whose keys and
    values were computed under the prompts before:

    - ``keep``: it stays as it is;
    - ``recache``: the frames that the cache holds are encoded again under the new prompt (the KV
      recache of LongLive, arXiv 2509.22622);
    - ``flush``: all but the last chunk is forgotten, and that one encoded again.

    UserError: no such history, or one that is encoded again under actions, which count frames.
    """

    cond: Conditioning
    history: str = "keep"

    def __post_init__(self) -> None:
        check_history(self.history)
        if self.history != "keep" and self.cond.actions_BF is not None:
            raise UserError(f"history '{self.history}' is for prompts, not for actions; use keep")


def check_history(history: str) -> None:
    """UserError unless it is one of :data:`HISTORIES`."""
    if history not in HISTORIES:
        raise UserError(f"history is '{history}'; use {', '.join(HISTORIES)}")


class _Kept:
    """The finished chunks, as the cache keeps them: those of the sink and of the window."""

    def __init__(self, cache: CacheConfig | None, chunk: int) -> None:
        window = None if cache is None else cache.window
        self._num_sink = 0 if window is None or cache is None else -(-cache.sink // chunk)
        self._sink: list[Tensor] = []
        self._recent = deque[Tensor](maxlen=None if window is None else -(-window // chunk))

    def add(self, chunk: Tensor) -> None:
        if len(self._sink) < self._num_sink:
            self._sink.append(chunk)
        else:
            self._recent.append(chunk)

    def after(self, history: str) -> list[Tensor]:
        """What is left of them where the prompt changes; the others are forgotten."""
        chunks = [*self._sink, *self._recent]
        left = chunks if history == "recache" else chunks[-1:]
        self._sink = []
        self._recent.clear()
        for chunk in left:
            self.add(chunk)
        return left


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
    latent = (x_T.shape[-2], x_T.shape[-1])
    stream = generator.start(cond, latent, cache)
    kept = None if prompts is None else _Kept(cache, generator.chunk)
    previous: Tensor | None = None
    for known_chunk in () if history is None else _chunks(history, generator.chunk):
        stream = generator.advance(stream, previous, x_T)
        previous = known_chunk
        if kept is not None:
            kept.add(known_chunk)
    number = 0
    while x_T is not None:
        if prompts is not None and (new := prompts(number)) is not None:
            if new.history == "keep":
                stream = generator.switch(stream, new.cond)
            else:
                assert kept is not None
                stream = None  # the next one may have its buffers
                stream, previous = generator.start(new.cond, latent, cache), None
                for finished_chunk in kept.after(new.history):
                    stream = generator.advance(stream, previous, x_T)
                    previous = finished_chunk
        stream = generator.advance(stream, previous, draw_query(x_T))
        x_0 = sampler(partial(_velocity, generator, stream), x_T, noise_like, exit_step, on_step)
        previous = x_0.detach()
        if kept is not None:
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
