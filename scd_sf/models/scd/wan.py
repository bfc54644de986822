"""SCD on Wan 2.1: a causal encoder once per chunk, a light decoder S times per chunk (paper,
section 4).

Wan expects a noisy current frame at its input. So the encoder's input is reparameterised
(supplement E.1): the clean frames of the history, at t = 0, provide keys and values; one query
chunk of (nearly) pure noise attends to them and to itself, and its output is the context c_i.
While sampling both go through ONE fused pass per chunk, [clean x_{i-1}; query_i]; the clean frames
do not see the query.

Letters: B clips, K noisy samples, F latent frames, M target chunks, n frames per chunk,
C H W latent axes, L tokens of a chunk, E width, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from scd_sf.models.interface import Corruption, Query, check_chunks, chunk_frames, pick_chunks
from scd_sf.models.replay import Replayed, new_history, run_step
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import (
    Context,
    Decoder,
    contexts_per_sample,
    decode_samples,
    denoise_chunk,
)
from scd_sf.models.trunk import Text, Trunk
from scd_sf.models.wan.transformer import WanConfig
from scd_sf.nn.attention import FullSequence, Streaming
from scd_sf.nn.kv_cache import KV, Cache, CacheConfig
from scd_sf.nn.masks import Layout, teacher_forcing_mask
from scd_sf.nn.rope import Rotary
from scd_sf.types import Conditioning, UserError


@dataclass(frozen=True)
class WanStream:
    """State of a video that is being generated: the prompt's K/V for both nets, the encoder's
    history, the size (H, W) of a latent frame, the index of the coming chunk and its context."""

    encoder_text: Text
    decoder_text: Text
    cache: Cache
    latent_size: tuple[int, int]
    index: int = -1
    context: Context | None = None


class ScdWan(nn.Module):
    """A :class:`~scd_sf.models.interface.FrameGenerator`.

    ``samples_in_turn``: teacher forcing decodes the K noisy samples one after the other and
    computes each again for the backward pass, so that memory does not grow with K.
    """

    def __init__(self, cfg: WanConfig, scd: ScdConfig) -> None:
        """UserError if ``scd`` names a layer that ``cfg`` does not have."""
        super().__init__()
        scd.check(cfg.num_layers)
        self.cfg, self.scd = cfg, scd
        self.samples_in_turn = False
        self.replay: Replayed | None = None
        self.encoder = Trunk(cfg, scd.encoder_layers, with_head=False)
        self.decoder = Decoder(cfg, scd.decoder, scd.encoder_layers)

    @property
    def chunk(self) -> int:
        return self.scd.chunk

    @property
    def needs_query(self) -> bool:
        return True

    def trunks(self) -> list[Trunk]:
        """The stacks of blocks, e.g. to switch activation checkpointing."""
        return [self.encoder, self.decoder.trunk]

    def teacher_forced(
        self,
        x_t: Tensor,
        t: Tensor,
        x_clean: Tensor,
        cond: Conditioning,
        *,
        query: Query | None = None,
        corruption: Corruption | None = None,
        targets: Sequence[int] | None = None,
    ) -> Tensor:
        """Encoder once; decoder once on all K samples of all target chunks (``samples_in_turn``: K
        times)."""
        if query is None:
            raise UserError("SCD's teacher_forced on Wan needs the encoder's query frames")
        num_chunks = check_chunks(x_t.shape[2], self.chunk)
        targets = range(num_chunks) if targets is None else targets
        text = self.encoder.text(cond.text_BLE)
        x_query = pick_chunks(query.x, targets, self.chunk, 1)
        t_query = pick_chunks(query.t, targets, self.chunk, 1)
        c_BLE = self.encode(x_clean, x_query, t_query, text, targets)
        return decode_samples(
            self.decoder,
            contexts_per_sample(c_BLE, len(x_t), len(targets), corruption),
            x_query,
            t_query,
            text,
            pick_chunks(x_t, targets, self.chunk, 2),
            pick_chunks(t, targets, self.chunk, 2),
            chunk=self.chunk,
            in_turn=self.samples_in_turn,
        )

    def encode(
        self,
        x_clean: Tensor,
        x_query: Tensor,
        t_query: Tensor,
        text: Tensor,
        targets: Sequence[int],
    ) -> Tensor:
        """Contexts (B, M*L, E) of the target chunks, from one pass under the teacher-forcing mask.

        x_clean (B, F, C, H, W); x_query (B, M*n, C, H, W) at times t_query (B, M*n); embedded text.
        """
        x_clean = x_clean[:, : -self.chunk]  # no chunk attends to the last one
        frames, height, width = x_clean.shape[1], *x_clean.shape[-2:]
        tokens = self.cfg.tokens(height, width)
        x = torch.cat([x_clean, x_query.to(x_clean.dtype)], 1)
        clean_t = torch.zeros(x_clean.shape[:2], device=x_clean.device, dtype=t_query.dtype)
        t = torch.cat([clean_t, t_query], 1)
        positions = [*range(frames), *chunk_frames(targets, self.chunk)]
        rotary = self.encoder.rope(positions, height, width, x)
        layout = Layout.teacher_forced(
            frames // self.chunk, targets, samples=1, tokens=self.chunk * tokens
        )
        attend = FullSequence(teacher_forcing_mask(layout, x.device))
        out: Tensor = self.encoder(x, t, text, rotary, attend)
        return out[:, frames * tokens :]

    def start(
        self, cond: Conditioning, latent_size: tuple[int, int], cache: CacheConfig | None = None
    ) -> WanStream:
        history = new_history(
            self,
            self.replay,
            self.cfg,
            cache,
            cond.batch,
            latent_size,
            self.chunk,
            chunks_per_pass=2,
        )
        return self.switch(WanStream((), (), history, latent_size), cond)

    def switch(self, stream: WanStream, cond: Conditioning) -> WanStream:
        text = self._text_kv("encoder's text", self.encoder, cond)
        return self.switch_decoder(replace(stream, encoder_text=text), cond)

    def switch_decoder(self, stream: WanStream, cond: Conditioning) -> WanStream:
        """The decoder's prompts alone; they may be of more rows than the encoder's (guidance)."""
        text = self._text_kv("decoder's text", self.decoder.trunk, cond)
        return replace(stream, decoder_text=text)

    def _text_kv(self, name: str, trunk: Trunk, cond: Conditioning) -> Text:
        def step(text_BLE: Tensor) -> Text:
            return trunk.text_kv(self.encoder.text(text_BLE))

        return run_step(self.replay, name, (), step, cond.text_BLE)

    def advance(self, stream: WanStream, x_0: Tensor | None, query_noise: Tensor) -> WanStream:
        """ONE fused encoder pass; ``query_noise`` (B, n, C, H, W) is pure noise (t = 1)."""
        stream, c_BLE = self.encode_next(stream, x_0, query_noise)
        return self.with_context(stream, c_BLE, query_noise)

    def encode_next(
        self, stream: WanStream, x_0: Tensor | None, query_noise: Tensor
    ) -> tuple[WanStream, Tensor]:
        """The encoder's part of :meth:`advance`: x_0 joins the history; the next chunk's c (B, L,
        E)."""
        index, n = stream.index + 1, query_noise.shape[1]
        length = n * self.cfg.tokens(*stream.latent_size)
        ones = query_noise.new_ones(query_noise.shape[:2])
        if x_0 is None:
            x, t, positions, groups = query_noise, ones, range(n), [length]
        else:
            x = torch.cat([x_0.detach().to(query_noise.dtype), query_noise], 1)
            t = torch.cat([torch.zeros_like(ones), ones], 1)
            positions, groups = range((index - 1) * n, (index + 1) * n), [length, length]

        def step(
            x: Tensor, t: Tensor, text: Text, rotary: Rotary
        ) -> tuple[Tensor, Mapping[int, KV]]:
            attend = Streaming(stream.cache, tuple(groups), write=len(groups) - 1)
            c_BLE: Tensor = self.encoder(x, t, text, rotary, attend, keep=n)
            return c_BLE, stream.cache.write(attend.take())

        inputs = x, t, stream.encoder_text, self.encoder.rope(positions, *stream.latent_size, x)
        c_BLE, new_kv = run_step(self.replay, "encode", stream.cache.place, step, *inputs)
        cache = stream.cache.grown(new_kv, sum(groups[:-1]))
        return replace(stream, cache=cache, index=index, context=None), c_BLE

    def with_context(self, stream: WanStream, c_RLE: Tensor, query_noise: Tensor) -> WanStream:
        """The decoder's part of :meth:`advance`: contexts c (R, L, E), one per row of its
        prompts."""
        t = query_noise.new_ones(query_noise.shape[:2])
        inputs = c_RLE, query_noise, t, stream.decoder_text
        context = run_step(self.replay, "context", (), self.decoder.context, *inputs)
        return replace(stream, context=context)

    def denoise(self, stream: WanStream, x_t: Tensor, t: Tensor) -> Tensor:
        """The decoder alone, on the coming chunk and its context."""
        return denoise_chunk(self.decoder, self.replay, stream.context, x_t, t, stream.decoder_text)
