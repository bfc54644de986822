"""Separable Causal Diffusion: a causal encoder once per chunk, a light decoder S times per chunk.

On Wan 2.1, encoder input reparameterisation (paper 4, supplement E.1; spec/scd.md W1-W5): clean history frames at
t = 0 provide K/V, one query chunk of (nearly) pure noise attends to them and to itself, and its output is the context
c_i. While sampling both go through ONE fused pass per chunk, [clean x_{i-1}; query_i]; the clean frames do not see the
query.

From scratch (dit.py; paper 3, spec/scd.md 1): the encoder reads the finished frames alone, shifted by one: slot i holds
x_{i-1} and the action a_i, a learned start token stands before the first, and slot i's output is c_i.

Letters: B batch, K noisy samples, F latent frames, M target chunks, n frames per chunk, C H W latent axes, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scd_sf.diffusion.noise import local_noise
from scd_sf.models.causal import new_cache, places
from scd_sf.models.dit import ContextNorm, DitConfig
from scd_sf.models.interface import CacheConfig, Query, check_chunks, pick_chunks, pick_frames
from scd_sf.models.replay import Replayed, run_step
from scd_sf.models.scd.decoder import Context, Decoder, DecoderConfig
from scd_sf.models.trunk import Text, Trunk, TrunkConfig
from scd_sf.nn.attention import FullSequence, Streaming
from scd_sf.nn.kv_cache import KV, Cache
from scd_sf.nn.masks import CLEAN, Layout, teacher_forcing_mask
from scd_sf.nn.rope import Rotary
from scd_sf.types import Conditioning, UserError


@dataclass(frozen=True)
class ScdConfig:
    """How SCD is cut out of its base model."""

    encoder_layers: tuple[int, ...] = tuple(range(25))
    """Layers of the base model that make the encoder (from scratch: how many, numbered on)."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The decoder, and how the context enters it."""
    chunk: int = 1
    """Latent frames generated together (paper: 1)."""

    def check(self, num_layers: int) -> None:
        """UserError unless every layer exists in a model of ``num_layers``."""
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
    """One video in the making: prompt K/V and signals of both nets, the encoder's history, the coming chunk's context
    and (from scratch) the embedding that modulates it."""

    encoder_text: Text
    decoder_text: Text
    encoder_signal: Tensor | None
    decoder_signal: Tensor | None
    cache: Cache
    latent: tuple[int, int]
    index: int = -1
    context: Context | None = None
    temb: Tensor | None = None


class Scd(nn.Module):
    """A :class:`~scd_sf.models.interface.FrameGenerator`.

    ``samples_in_turn``: teacher forcing decodes the K noisy samples one after the other and computes each again for the
    backward pass, so that memory does not grow with K.
    """

    def __init__(self, cfg: TrunkConfig, scd: ScdConfig) -> None:
        super().__init__()
        scd.check(cfg.num_layers)
        self.cfg, self.scd, self.samples_in_turn = cfg, scd, False
        self.replay: Replayed | None = None
        self.encoder = Trunk(cfg, scd.encoder_layers, with_head=False)
        self.context_norm, self.start_token = None, None
        if isinstance(cfg, DitConfig):
            self.context_norm = ContextNorm(cfg)
            self.start_token = nn.Parameter(0.02 * torch.randn(cfg.width))
        self.decoder = Decoder(cfg, scd.decoder, scd.encoder_layers, normed=self.context_norm is not None)

    @property
    def chunk(self) -> int:
        return self.scd.chunk

    @property
    def needs_query(self) -> bool:
        return self.context_norm is None

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
        """Encoder once, decoder once on all K samples of all target chunks (``samples_in_turn``: K times)."""
        samples, batch, frames = x_t.shape[:3]
        num_chunks = check_chunks(frames, self.chunk)
        targets = list(range(num_chunks)) if targets is None else targets
        rows, told = (batch, samples, len(targets)), [c * self.chunk + i for c in targets for i in range(self.chunk)]
        text = self.encoder.text(cond.text_BLE)
        if self.context_norm is not None:
            x_query = pick_chunks(x_clean, targets, self.chunk, 1)  # only its shape matters
            t_query = self.encoder.clean_times(x_query.shape[:2], x_t)
            c_BLE = self.encode_previous(x_clean.to(x_t.dtype), text, cond, targets)
        elif query is None or query.x is None or query.t is None:
            raise UserError("SCD's teacher_forced on Wan needs the encoder's query frames")
        else:
            x_query = pick_chunks(query.x, targets, self.chunk, 1)
            t_query = pick_chunks(query.t, targets, self.chunk, 1)
            c_BLE = self.encode(x_clean, x_query, t_query, text, targets)

        c_rows = c_BLE.unflatten(1, (1, len(targets), -1)).expand(*rows, -1, -1).flatten(0, 2)
        if query is not None:
            c_rows = corrupt(c_rows, query.eta, query.rng)
        if self.context_norm is not None:
            temb = self.encoder.times(t_query, pick_frames(self.encoder.signal(cond), told)).temb
            c_rows = self.context_norm.modulated(c_rows, self._rows(temb[:, None].expand(-1, samples, -1, -1)))
        signal = pick_frames(self.decoder.trunk.signal(cond, True), told)
        x_BKF, t_BKF = (pick_chunks(x, targets, self.chunk, 2).transpose(0, 1) for x in (x_t, t))

        def decode(c_rows: Tensor, x_BKF: Tensor, t_BKF: Tensor) -> Tensor:
            """Rows (B, K, M) -> (K, B, M * n, C, H, W)."""
            count = x_BKF.shape[1]
            told_rows = None if signal is None else self._rows(signal[:, None].expand(-1, count, -1, -1))
            context = self.decoder.context(
                c_rows, self._rows(x_query[:, None]), self._rows(t_query[:, None]), text, count, told_rows
            )
            velocity: Tensor = self.decoder(context, self._rows(x_BKF), self._rows(t_BKF), text)
            return velocity.unflatten(0, (batch, count, -1)).flatten(2, 3).transpose(0, 1)

        if not self.samples_in_turn:
            return decode(c_rows, x_BKF, t_BKF)
        c_BK = c_rows.unflatten(0, (batch, samples, -1))
        parts = [(c_BK[:, k].flatten(0, 1), x_BKF[:, k : k + 1], t_BKF[:, k : k + 1]) for k in range(samples)]
        return torch.cat([checkpoint(decode, *part, use_reentrant=False) for part in parts])

    def _rows(self, x_BKF: Tensor) -> Tensor:
        """(B, K, M*n, ...) -> (B*K*M, n, ...): batch-major, so that rows of one clip share its prompt."""
        return x_BKF.unflatten(2, (-1, self.chunk)).flatten(0, 2)

    def encode_previous(self, x_clean: Tensor, text: Tensor, cond: Conditioning, targets: Sequence[int]) -> Tensor:
        """Normalised contexts of the target chunks, (B, M * n * tokens, E), of a model trained from scratch."""
        assert self.context_norm is not None
        slots, n = check_chunks(x_clean.shape[1], self.chunk), self.chunk  # one length, whichever are the targets
        batch, height, width = len(x_clean), *x_clean.shape[-2:]
        length, positions = n * self.cfg.tokens(height, width), range(slots * n)
        tokens = torch.cat([self._start(batch, length), self.encoder.embed(x_clean[:, : (slots - 1) * n])], 1)
        clean_t = self.encoder.clean_times((batch, slots * n), x_clean)
        attend = FullSequence(
            teacher_forcing_mask(Layout((CLEAN,) * slots, tuple(range(slots)), length), x_clean.device)
        )
        signal = pick_frames(self.encoder.signal(cond), positions)
        rotary = self.encoder.rope(positions, height, width, tokens)
        c_BLE = self.context_norm(self.encoder(tokens, clean_t, text, rotary, attend, signal_BFE=signal))
        return pick_chunks(c_BLE, targets, length, 1)

    def _start(self, batch: int, length: int) -> Tensor:
        """The learned token in place of the frames before the first."""
        assert self.start_token is not None
        return self.start_token.expand(batch, length, -1)

    def encode(self, x_clean: Tensor, x_query: Tensor, t_query: Tensor, text: Tensor, targets: Sequence[int]) -> Tensor:
        """Contexts of the target chunks, (B, M * n * tokens, E), under the teacher-forcing mask."""
        x_clean = x_clean[:, : -self.chunk]  # nobody looks at the last one; one length, whichever are the targets
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
        history = new_cache(cache, self.cfg.tokens(*latent), self.cfg.rope_axes, 2 * self.chunk)
        if self.replay is not None:
            self.replay.house(history, (cond.batch, latent, cache), places(cache, self.chunk), self)
        return self.switch(ScdStream((), (), None, None, history, latent), cond)

    def switch(self, stream: ScdStream, cond: Conditioning) -> ScdStream:
        text = self._text_kv(self.encoder, cond)
        return self.switch_decoder(replace(stream, encoder_text=text, encoder_signal=self.encoder.signal(cond)), cond)

    def switch_decoder(self, stream: ScdStream, cond: Conditioning) -> ScdStream:
        """The same stream, whose decoder alone is told these conditions; they may be of more rows (guidance)."""
        text = self._text_kv(self.decoder.trunk, cond)
        return replace(stream, decoder_text=text, decoder_signal=self.decoder.trunk.signal(cond, True))

    def _text_kv(self, trunk: Trunk, cond: Conditioning) -> Text:
        name = "encoder's text" if trunk is self.encoder else "decoder's text"
        return run_step(self.replay, name, (), lambda x: trunk.text_kv(self.encoder.text(x)), cond.text_BLE)

    def advance(self, stream: ScdStream, x_0: Tensor | None, query_noise: Tensor) -> ScdStream:
        """ONE fused encoder pass; ``query_noise`` (B, n, C, H, W) is pure noise (t = 1). x_0 is detached."""
        stream, c_BLE = self.encode_next(stream, x_0, query_noise)
        return self.with_context(stream, c_BLE, query_noise)

    def with_context(self, stream: ScdStream, c_RLE: Tensor, query_noise: Tensor) -> ScdStream:
        """The stream whose decoder reads the contexts ``c_RLE`` of these rows, one per row of its prompts."""
        t = query_noise.new_ones(query_noise.shape[:2])
        if self.context_norm is not None and stream.temb is not None:
            c_RLE = self.context_norm.modulated(c_RLE, stream.temb.repeat(len(c_RLE) // len(stream.temb), 1, 1))
            t = self.encoder.clean_times(t.shape, query_noise)
        signal = pick_frames(stream.decoder_signal, self._frames(stream.index))

        def step(c_RLE: Tensor, query: Tensor, t: Tensor, text: Text, signal: Tensor | None) -> Context:
            return self.decoder.context(c_RLE, query, t, text, 1, signal)

        context = run_step(self.replay, "context", (), step, c_RLE, query_noise, t, stream.decoder_text, signal)
        return replace(stream, context=context)

    def _frames(self, index: int) -> range:
        return range(index * self.chunk, (index + 1) * self.chunk)

    def encode_next(self, stream: ScdStream, x_0: Tensor | None, query_noise: Tensor) -> tuple[ScdStream, Tensor]:
        """The encoder's part of :meth:`advance`: the stream with x_0 in its history, and the next chunk's c."""
        if self.context_norm is not None:
            return self._encode_next_previous(stream, x_0, query_noise)
        index, n = stream.index + 1, query_noise.shape[1]
        length = n * self.cfg.tokens(*stream.latent)
        ones = query_noise.new_ones(query_noise.shape[:2])
        if x_0 is None:
            x, t, positions, groups = query_noise, ones, range(n), [length]
        else:
            x = torch.cat([x_0.detach().to(query_noise.dtype), query_noise], 1)
            t = torch.cat([torch.zeros_like(ones), ones], 1)
            positions, groups = range((index - 1) * n, (index + 1) * n), [length, length]

        def step(x: Tensor, t: Tensor, text: Text, rotary: Rotary) -> tuple[Tensor, Mapping[int, KV]]:
            attend = Streaming(stream.cache, tuple(groups), write=len(groups) - 1)
            c_BLE: Tensor = self.encoder(x, t, text, rotary, attend, keep=n)
            return c_BLE, stream.cache.write(attend.take())

        inputs = x, t, stream.encoder_text, self.encoder.rope(positions, *stream.latent, x)
        c_BLE, written = run_step(self.replay, "encode", stream.cache.place, step, *inputs)
        cache = stream.cache.grown(written, sum(groups[:-1]))
        return replace(stream, cache=cache, index=index, context=None), c_BLE

    def _encode_next_previous(self, stream: ScdStream, x_0: Tensor | None, like: Tensor) -> tuple[ScdStream, Tensor]:
        """From scratch: ONE pass of x_0 (or the start token) is the next chunk's c, and writes K/V."""
        assert self.context_norm is not None
        frames = self._frames(stream.index + 1)
        length = len(frames) * self.cfg.tokens(*stream.latent)
        x = self._start(len(like), length) if x_0 is None else x_0.detach().to(like.dtype)
        t = self.encoder.clean_times(like.shape[:2], like)
        norm = self.context_norm

        def step(
            x: Tensor, t: Tensor, text: Text, rotary: Rotary, signal: Tensor | None
        ) -> tuple[Tensor, Tensor, Mapping[int, KV]]:
            attend = Streaming(stream.cache, (length,), write=1)
            c_BLE: Tensor = norm(self.encoder(x, t, text, rotary, attend, signal_BFE=signal))
            return c_BLE, self.encoder.times(t, signal).temb, stream.cache.write(attend.take())

        rotary, signal = self.encoder.rope(frames, *stream.latent, like), pick_frames(stream.encoder_signal, frames)
        inputs = x, t, stream.encoder_text, rotary, signal
        c_BLE, temb, written = run_step(self.replay, "encode", stream.cache.place, step, *inputs)
        cache = stream.cache.grown(written, length)
        return replace(stream, cache=cache, index=stream.index + 1, context=None, temb=temb), c_BLE

    def denoise(self, stream: ScdStream, x_t: Tensor, t: Tensor) -> Tensor:
        """The decoder alone, on the coming chunk and its context."""
        assert stream.context is not None, "advance() comes before denoise()"
        times = t.unsqueeze(1).expand(-1, x_t.shape[1])
        velocity: Tensor = run_step(
            self.replay, "denoise", (), self.decoder, stream.context, x_t, times, stream.decoder_text
        )
        return velocity


def corrupt(c_RLE: Tensor, eta: float, rng: torch.Generator | None) -> Tensor:
    """c + eta * rms(c) * zeta: Eq. 7's corruption at c's own scale (spec/scd.md W10); every row its own noise."""
    if eta == 0.0:
        return c_RLE
    assert rng is not None, "context corruption needs a generator"
    rms = c_RLE.detach().pow(2).mean(-1, keepdim=True).sqrt()
    return c_RLE + eta * rms * local_noise(c_RLE, rng)
