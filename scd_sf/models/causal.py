"""The causal baseline: Wan's own layers under a frame-causal mask (Self-Forcing's generator, the paper's Causal DiT).

Every denoising step runs the whole trunk; a finished chunk is written to the cache by one more pass at t = 0.
Letters: B batch, K noisy samples, F latent frames, M target chunks, C H W latent axes, L tokens, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from scd_sf.models.generator import CacheConfig, Query, check_chunks, pick_chunks
from scd_sf.models.trunk import Trunk, WanConfig
from scd_sf.nn.attention import FullSequence, Streaming
from scd_sf.nn.kv_cache import KV, Cache, KVCache, RingKVCache
from scd_sf.nn.masks import Layout, teacher_forcing_mask
from scd_sf.types import Conditioning


def new_cache(config: CacheConfig | None, tokens: int, new_frames: int) -> Cache:
    """An empty history for ``tokens`` tokens per latent frame, read by forwards of up to ``new_frames`` frames."""
    config = config or CacheConfig()
    window, new = config.tokens(tokens), new_frames * tokens
    if config.preallocate is None:
        return KVCache.empty(window)
    if window.recent is None:
        return RingKVCache(config.preallocate * tokens, new)
    return RingKVCache(window.recent + window.sink, new, sink=window.sink, wrap=True, per_frame=window.per_frame)


@dataclass(frozen=True)
class CausalStream:
    """One video in the making: prompt K/V, history, and the index of the chunk that comes next."""

    text: tuple[KV, ...]
    cache: Cache
    latent: tuple[int, int]
    index: int = -1


class CausalWan(nn.Module):
    """A :class:`~scd_sf.models.generator.FrameGenerator` with exactly Wan's parameters."""

    def __init__(self, cfg: WanConfig, chunk: int = 1) -> None:
        super().__init__()
        self.cfg, self._chunk = cfg, chunk
        self.trunk = Trunk(cfg, range(cfg.num_layers))

    @property
    def chunk(self) -> int:
        return self._chunk

    def trunks(self) -> list[Trunk]:
        """The stacks of blocks, e.g. to switch activation checkpointing."""
        return [self.trunk]

    def teacher_forced(
        self,
        x_t: Tensor,
        t: Tensor,
        x_clean: Tensor,
        cond: Conditioning,
        *,
        query: Query | None = None,
        targets: Sequence[int] | None = None,
    ) -> Tensor:
        """``[clean | noisy 1 | .. | noisy K]`` as one sequence; see the protocol for shapes."""
        samples, height, width = x_t.shape[0], *x_t.shape[-2:]
        num_chunks = check_chunks(x_t.shape[2], self.chunk)
        targets = list(range(num_chunks)) if targets is None else targets
        x_clean = x_clean[:, : max(targets) * self.chunk]  # nobody looks at later ones
        frames = x_clean.shape[1]
        trunk, tokens = self.trunk, self.cfg.tokens(height, width)
        noisy = pick_chunks(x_t, targets, self.chunk, 2).transpose(0, 1).flatten(1, 2)
        noisy_t = pick_chunks(t, targets, self.chunk, 2).transpose(0, 1).flatten(1)
        sequence = trunk.embed(torch.cat([x_clean.to(noisy.dtype), noisy], 1))
        times = trunk.times(torch.cat([torch.zeros_like(t[0, :, :frames]), noisy_t], 1))
        target_frames = [c * self.chunk + i for c in targets for i in range(self.chunk)]
        rotary = trunk.rope([*range(frames), *(target_frames * samples)], height, width, sequence)
        layout = Layout.teacher_forced(max(targets), targets, samples, self.chunk * tokens)
        attend = FullSequence(teacher_forcing_mask(layout, sequence.device))
        out = trunk.run(sequence, times.mod, trunk.text(cond.text_BLE), rotary, attend)[:, frames * tokens :]
        velocity = trunk.velocity(out, times.temb[:, frames:], height, width)
        return velocity.unflatten(1, (samples, -1)).transpose(0, 1)

    def start(self, cond: Conditioning, latent: tuple[int, int], cache: CacheConfig | None = None) -> CausalStream:
        text = self.trunk.text_kv(self.trunk.text(cond.text_BLE))
        return CausalStream(text, new_cache(cache, self.cfg.tokens(*latent), self.chunk), latent)

    def switch(self, stream: CausalStream, cond: Conditioning) -> CausalStream:
        return replace(stream, text=self.trunk.text_kv(self.trunk.text(cond.text_BLE)))

    def advance(self, stream: CausalStream, x_0: Tensor | None, query_noise: Tensor) -> CausalStream:
        """Write the finished chunk's K/V (one clean pass at t = 0); nothing to write before the first chunk."""
        stream = replace(stream, index=stream.index + 1)
        if x_0 is None:
            return stream
        x_0 = x_0.detach()
        attend = Streaming(stream.cache, (x_0.shape[1] * self.cfg.tokens(*stream.latent),), write=1)
        with torch.no_grad():  # its output is unused and its K/V are detached
            self._pass(stream, x_0, torch.zeros(x_0.shape[:1], device=x_0.device), stream.index - 1, attend, keep=0)
        return replace(stream, cache=stream.cache.extended(attend.take()))

    def denoise(self, stream: CausalStream, x_t: Tensor, t: Tensor) -> Tensor:
        """The whole trunk on the noisy chunk, reading the history."""
        attend = Streaming(stream.cache, (x_t.shape[1] * self.cfg.tokens(*stream.latent),))
        return self._pass(stream, x_t, t, stream.index, attend)

    def _pass(
        self, stream: CausalStream, x: Tensor, t_B: Tensor, index: int, attend: Streaming, keep: int | None = None
    ) -> Tensor:
        frames = range(index * self.chunk, index * self.chunk + x.shape[1])
        rotary = self.trunk.rope(frames, *stream.latent, x)
        t = t_B.unsqueeze(1).expand(-1, x.shape[1])
        velocity: Tensor = self.trunk(x, t, stream.text, rotary, attend, keep=keep)
        return velocity
