"""Separable Causal Diffusion on Wan 2.1: a causal encoder once per chunk, a light decoder S times per chunk.

Encoder input reparameterisation (paper 4, supplement E.1; spec/scd.md W1-W5): clean history frames at t = 0 provide
K/V, one query chunk of (nearly) pure noise attends to them and to itself, and its output is the context c_i. While
sampling both go through ONE fused pass per chunk: [clean x_{i-1}; query_i]; the clean frames do not see the query.

Letters: B batch, K noisy samples, F latent frames, M target chunks, n frames per chunk, C H W latent axes, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from scd_sf.models.causal import new_cache
from scd_sf.models.generator import CacheConfig, Query, check_chunks, pick_chunks
from scd_sf.models.scd_decoder import Context, Decoder, DecoderConfig
from scd_sf.models.trunk import Trunk, WanConfig
from scd_sf.nn.attention import FullSequence, Streaming
from scd_sf.nn.kv_cache import KV, Cache
from scd_sf.nn.masks import Layout, teacher_forcing_mask
from scd_sf.types import Conditioning, UserError


@dataclass(frozen=True)
class ScdConfig:
    """Which Wan layers make the encoder and the decoder, how they are joined, and frames per chunk (paper: 1)."""

    encoder_layers: tuple[int, ...] = tuple(range(25))
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    chunk: int = 1

    def check(self, num_layers: int) -> None:
        """UserError unless every layer exists in a Wan of ``num_layers``."""
        for name, layers in (("encoder_layers", self.encoder_layers), ("decoder.layers", self.decoder.layers)):
            bad = [layer for layer in layers if not 0 <= layer < num_layers]
            if bad or not layers:
                raise UserError(
                    f"model.scd.{name} is {list(layers)}: the base model has layers 0..{num_layers - 1}; "
                    f"{'remove ' + str(bad) if bad else 'name at least one'}"
                )
        self.decoder.junction(self.encoder_layers)
        if self.chunk < 1:
            raise UserError(f"model.scd.chunk is {self.chunk}; it must be at least 1")


@dataclass(frozen=True)
class ScdStream:
    """One video in the making: prompt K/V of both nets, the encoder's history, the coming chunk's context."""

    encoder_text: tuple[KV, ...]
    decoder_text: tuple[KV, ...]
    cache: Cache
    latent: tuple[int, int]
    index: int = -1
    context: Context | None = None


class Scd(nn.Module):
    """A :class:`~scd_sf.models.generator.FrameGenerator`."""

    def __init__(self, cfg: WanConfig, scd: ScdConfig) -> None:
        super().__init__()
        scd.check(cfg.num_layers)
        self.cfg, self.scd = cfg, scd
        self.encoder = Trunk(cfg, scd.encoder_layers, with_head=False)
        self.decoder = Decoder(cfg, scd.decoder, scd.encoder_layers)

    @property
    def chunk(self) -> int:
        return self.scd.chunk

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
        targets: Sequence[int] | None = None,
    ) -> Tensor:
        """Encoder once on ``[clean | query]``, decoder once on all K samples of all target chunks."""
        if query is None:
            raise UserError("SCD's teacher_forced needs the encoder's query frames")
        samples, batch, frames = x_t.shape[:3]
        num_chunks = check_chunks(frames, self.chunk)
        targets = list(range(num_chunks)) if targets is None else targets
        rows = (batch, samples, len(targets))
        text = self.encoder.text(cond.text_BLE)
        x_query = pick_chunks(query.x, targets, self.chunk, 1)
        t_query = pick_chunks(query.t, targets, self.chunk, 1)
        c_BLE = self.encode(x_clean, x_query, t_query, text, targets)

        c_rows = c_BLE.unflatten(1, (1, len(targets), -1)).expand(*rows, -1, -1).flatten(0, 2)
        c_rows = corrupt(c_rows, query.eta, query.rng)
        context = self.decoder.context(
            c_rows, self._rows(x_query[:, None]), self._rows(t_query[:, None]), text, samples
        )
        x_rows = self._rows(pick_chunks(x_t, targets, self.chunk, 2).transpose(0, 1))
        t_rows = self._rows(pick_chunks(t, targets, self.chunk, 2).transpose(0, 1))
        velocity: Tensor = self.decoder(context, x_rows, t_rows, text)
        return velocity.unflatten(0, rows).flatten(2, 3).transpose(0, 1)

    def _rows(self, x_BKF: Tensor) -> Tensor:
        """(B, K, M*n, ...) -> (B*K*M, n, ...): batch-major, so that rows of one clip share its prompt."""
        return x_BKF.unflatten(2, (-1, self.chunk)).flatten(0, 2)

    def encode(self, x_clean: Tensor, x_query: Tensor, t_query: Tensor, text: Tensor, targets: Sequence[int]) -> Tensor:
        """Contexts of the target chunks, (B, M * n * tokens, E), under the teacher-forcing mask."""
        x_clean = x_clean[:, : max(targets) * self.chunk]  # nobody looks at later ones
        frames, height, width = x_clean.shape[1], *x_clean.shape[-2:]
        tokens = self.cfg.tokens(height, width)
        x = torch.cat([x_clean, x_query.to(x_clean.dtype)], 1)
        clean_t = torch.zeros(x_clean.shape[:2], device=x_clean.device, dtype=t_query.dtype)
        positions = [*range(frames), *(c * self.chunk + i for c in targets for i in range(self.chunk))]
        rotary = self.encoder.rope(positions, height, width, x)
        layout = Layout.teacher_forced(frames // self.chunk, targets, 1, self.chunk * tokens)
        attend = FullSequence(teacher_forcing_mask(layout, x.device))
        out: Tensor = self.encoder(x, torch.cat([clean_t, t_query], 1), text, rotary, attend)
        return out[:, frames * tokens :]

    def start(self, cond: Conditioning, latent: tuple[int, int], cache: CacheConfig | None = None) -> ScdStream:
        encoder_text, decoder_text = self.text_kv(cond)
        history = new_cache(cache, self.cfg.tokens(*latent), 2 * self.chunk)
        return ScdStream(encoder_text, decoder_text, history, latent)

    def switch(self, stream: ScdStream, cond: Conditioning) -> ScdStream:
        encoder_text, decoder_text = self.text_kv(cond)
        return replace(stream, encoder_text=encoder_text, decoder_text=decoder_text)

    def text_kv(self, cond: Conditioning) -> tuple[tuple[KV, ...], tuple[KV, ...]]:
        """The prompt's K/V for the encoder's blocks and for the decoder's."""
        text = self.encoder.text(cond.text_BLE)
        return self.encoder.text_kv(text), self.decoder.trunk.text_kv(text)

    def advance(self, stream: ScdStream, x_0: Tensor | None, query_noise: Tensor) -> ScdStream:
        """ONE fused encoder pass; ``query_noise`` (B, n, C, H, W) is pure noise (t = 1). x_0 is detached."""
        stream, c_BLE = self.encode_next(stream, x_0, query_noise)
        return self.with_context(stream, c_BLE, query_noise)

    def with_context(self, stream: ScdStream, c_RLE: Tensor, query_noise: Tensor) -> ScdStream:
        """The stream whose decoder reads the contexts ``c_RLE`` of these rows, one per row of its prompts."""
        ones = query_noise.new_ones(query_noise.shape[:2])
        return replace(stream, context=self.decoder.context(c_RLE, query_noise, ones, stream.decoder_text))

    def encode_next(self, stream: ScdStream, x_0: Tensor | None, query_noise: Tensor) -> tuple[ScdStream, Tensor]:
        """The encoder's part of :meth:`advance`: the stream with x_0 in its history, and the next chunk's c."""
        index, n = stream.index + 1, query_noise.shape[1]
        length = n * self.cfg.tokens(*stream.latent)
        ones = query_noise.new_ones(query_noise.shape[:2])
        if x_0 is None:
            x, t, positions, attend = query_noise, ones, range(n), Streaming(stream.cache, (length,))
        else:
            x = torch.cat([x_0.detach().to(query_noise.dtype), query_noise], 1)
            t = torch.cat([torch.zeros_like(ones), ones], 1)
            positions = range((index - 1) * n, (index + 1) * n)
            attend = Streaming(stream.cache, (length, length), write=1)
        rotary = self.encoder.rope(positions, *stream.latent, x)
        c_BLE = self.encoder(x, t, stream.encoder_text, rotary, attend, keep=n)
        cache = stream.cache if x_0 is None else stream.cache.extended(attend.take())
        return replace(stream, cache=cache, index=index, context=None), c_BLE

    def denoise(self, stream: ScdStream, x_t: Tensor, t: Tensor) -> Tensor:
        """The decoder alone, on the coming chunk and its context."""
        assert stream.context is not None, "advance() comes before denoise()"
        times = t.unsqueeze(1).expand(-1, x_t.shape[1])
        velocity: Tensor = self.decoder(stream.context, x_t, times, stream.decoder_text)
        return velocity


def corrupt(c_RLE: Tensor, eta: float, rng: torch.Generator | None) -> Tensor:
    """c + eta * rms(c) * zeta: Eq. 7's corruption at c's own scale (spec/scd.md W10); every row its own noise."""
    if eta == 0.0:
        return c_RLE
    assert rng is not None, "context corruption needs a generator"
    noise = torch.randn(c_RLE.shape, generator=rng).to(c_RLE)
    rms = c_RLE.detach().pow(2).mean(-1, keepdim=True).sqrt()
    return c_RLE + eta * rms * noise
