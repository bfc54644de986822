"""SCD from scratch: the encoder reads finished frames alone, shifted by one (paper, section 3).

Slot i of the encoder holds the frame x_{i-1} and the action a_i, and its output is the context c_i.
A learned start token stands before the first frame. The last block is followed by a norm without
parameters (Eq. 7 corrupts its output) and by adaLN. Finished frames are marked by a time of their
own (``DitConfig.clean_time``). No pass of clean frames is needed beside this one: it writes the
history.

Letters: B clips, K noisy samples, F latent frames, M target chunks, n frames per chunk,
C H W latent axes, L tokens of a chunk, E width, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scd_sf.models.dit import DitConfig
from scd_sf.models.interface import (
    Corruption,
    Query,
    check_chunks,
    chunk_frames,
    pick_chunks,
    pick_frames,
)
from scd_sf.models.replay import Replayed, new_history, run_step
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import (
    Context,
    Decoder,
    contexts_per_sample,
    decode_samples,
    denoise_chunk,
    rows_per_chunk,
)
from scd_sf.models.trunk import Text, Trunk
from scd_sf.nn.attention import AttentionContext, FullSequence, Streaming
from scd_sf.nn.kv_cache import KV, Cache, CacheConfig
from scd_sf.nn.layers import LayerNorm, modulate, upcast
from scd_sf.nn.masks import Layout, teacher_forcing_mask
from scd_sf.nn.rope import Rotary
from scd_sf.types import Conditioning


class ContextNorm(nn.Module):
    """The end of the encoder: a norm without parameters, which the corruption of Eq. 7 follows,
    then adaLN."""

    def __init__(self, cfg: DitConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(cfg.width, cfg.eps, affine=False)
        self.adaln = nn.Linear(cfg.width, 2 * cfg.width)
        nn.init.zeros_(self.adaln.weight)
        nn.init.zeros_(self.adaln.bias)

    def forward(self, x_BLE: Tensor) -> Tensor:
        """Encoder tokens to unit variance."""
        c_BLE: Tensor = self.norm(x_BLE)
        return c_BLE.to(x_BLE.dtype)

    def modulated(self, c_RLE: Tensor, temb_RnE: Tensor) -> Tensor:
        """The (perhaps corrupted) context as the decoder reads it; ``temb``: the encoder's, of
        these frames."""
        shift, scale = upcast(self.adaln(F.silu(temb_RnE))).unsqueeze(2).chunk(2, -1)
        return modulate(upcast(c_RLE), scale, shift, temb_RnE.shape[1]).to(c_RLE.dtype)


@dataclass(frozen=True)
class ScratchStream:
    """State of a video that is being generated: embedded actions and labels for both nets, the
    encoder's history, the size (H, W) of a latent frame, the index of the coming chunk, the time
    embedding of the encoder's last pass and the coming chunk's context. ``text``: (B, 0, 0), for
    blocks take a prompt and these ignore it."""

    text: Tensor
    encoder_signal: Tensor | None
    decoder_signal: Tensor | None
    cache: Cache
    latent_size: tuple[int, int]
    index: int = -1
    temb: Tensor | None = None
    context: Context | None = None


class ScdScratch(nn.Module):
    """A :class:`~scd_sf.models.interface.FrameGenerator`.

    ``samples_in_turn``: teacher forcing decodes the K noisy samples one after the other and
    computes each again for the backward pass, so that memory does not grow with K.
    """

    def __init__(self, cfg: DitConfig, scd: ScdConfig) -> None:
        """UserError if ``scd`` names a layer that ``cfg`` does not have."""
        super().__init__()
        scd.check(cfg.num_layers)
        self.cfg, self.scd = cfg, scd
        self.samples_in_turn = False
        self.replay: Replayed | None = None
        self.encoder = Trunk(cfg, scd.encoder_layers, with_head=False)
        self.context_norm = ContextNorm(cfg)
        self.start_token = nn.Parameter(0.02 * torch.randn(cfg.width))
        self.decoder = Decoder(cfg, scd.decoder, scd.encoder_layers, normed=True)

    @property
    def chunk(self) -> int:
        return self.scd.chunk

    @property
    def needs_query(self) -> bool:
        return False

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
        times). ``query`` is not read."""
        samples, chunk = len(x_t), self.chunk
        num_chunks = check_chunks(x_t.shape[2], chunk)
        targets = range(num_chunks) if targets is None else targets
        frames = chunk_frames(targets, chunk)
        text = self.encoder.text(cond.text_BLE)
        x_target = pick_chunks(x_clean, targets, chunk, 1)  # only its shape is read
        t_clean = self.encoder.clean_times(x_target.shape[:2], x_t)
        c_BLE = self.encode(x_clean.to(x_t.dtype), text, cond, targets)
        c_RLE = contexts_per_sample(c_BLE, samples, len(targets), corruption)
        temb = self.encoder.times(t_clean, pick_frames(self.encoder.signal(cond), frames)).temb
        temb_rows = rows_per_chunk(temb.unsqueeze(1).expand(-1, samples, -1, -1), chunk)
        return decode_samples(
            self.decoder,
            self.context_norm.modulated(c_RLE, temb_rows),
            x_target,
            t_clean,
            text,
            pick_chunks(x_t, targets, chunk, 2),
            pick_chunks(t, targets, chunk, 2),
            pick_frames(self.decoder.trunk.signal(cond, True), frames),
            chunk=chunk,
            in_turn=self.samples_in_turn,
        )

    def encode(
        self, x_clean: Tensor, text: Tensor, cond: Conditioning, targets: Sequence[int]
    ) -> Tensor:
        """Normalised contexts (B, M*L, E) of the target chunks, from one causal pass over x_clean
        (B, F, C, H, W)."""
        num_chunks, n = check_chunks(x_clean.shape[1], self.chunk), self.chunk
        batch, height, width = len(x_clean), *x_clean.shape[-2:]
        length, positions = n * self.cfg.tokens(height, width), range(num_chunks * n)
        previous = self.encoder.embed(x_clean[:, : (num_chunks - 1) * n])
        tokens = torch.cat([self._start_tokens(batch, length), previous], 1)
        clean_t = self.encoder.clean_times((batch, num_chunks * n), x_clean)
        layout = Layout.teacher_forced(num_chunks, (), 0, length)
        attend = FullSequence(teacher_forcing_mask(layout, x_clean.device))
        signal = pick_frames(self.encoder.signal(cond), positions)
        rotary = self.encoder.rope(positions, height, width, tokens)
        c_BLE, _ = self(tokens, clean_t, text, rotary, attend, signal)
        return pick_chunks(c_BLE, targets, length, 1)

    def forward(
        self,
        tokens_BLE: Tensor,
        t_BF: Tensor,
        text: Text,
        rotary: Rotary,
        attend: AttentionContext,
        signal_BFE: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """One encoder pass: tokens of the frames before -> normalised contexts, and the time
        embedding (B, F, E)."""
        times = self.encoder.times(t_BF, signal_BFE)
        c_BLE: Tensor = self.encoder.run(tokens_BLE, times.mod, text, rotary, attend)
        return self.context_norm(c_BLE), times.temb

    def _start_tokens(self, batch: int, length: int) -> Tensor:
        """The learned token in place of the frames before the first."""
        return self.start_token.expand(batch, length, -1)

    def start(
        self, cond: Conditioning, latent_size: tuple[int, int], cache: CacheConfig | None = None
    ) -> ScratchStream:
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
        return self.switch(ScratchStream(cond.text_BLE, None, None, history, latent_size), cond)

    def switch(self, stream: ScratchStream, cond: Conditioning) -> ScratchStream:
        signal = self.encoder.signal(cond)
        return self.switch_decoder(replace(stream, encoder_signal=signal), cond)

    def switch_decoder(self, stream: ScratchStream, cond: Conditioning) -> ScratchStream:
        """The decoder's conditions alone; they may be of more rows than the encoder's
        (guidance)."""
        signal = self.decoder.trunk.signal(cond, True)
        return replace(stream, text=cond.text_BLE, decoder_signal=signal)

    def advance(
        self, stream: ScratchStream, x_0: Tensor | None, query_noise: Tensor
    ) -> ScratchStream:
        """ONE encoder pass over x_0 or, before the first chunk, the start token."""
        stream, c_BLE = self.encode_next(stream, x_0, query_noise)
        return self.with_context(stream, c_BLE, query_noise)

    def encode_next(
        self, stream: ScratchStream, x_0: Tensor | None, query_noise: Tensor
    ) -> tuple[ScratchStream, Tensor]:
        """The encoder's part of :meth:`advance`: x_0 joins the history; the next chunk's c (B, L,
        E).

        Of ``query_noise`` (B, n, C, H, W) only shape and dtype are read.
        """
        frames = chunk_frames([stream.index + 1], self.chunk)
        length = len(frames) * self.cfg.tokens(*stream.latent_size)
        t = self.encoder.clean_times(query_noise.shape[:2], query_noise)
        start = self._start_tokens(len(query_noise), length)
        x = start if x_0 is None else x_0.detach().to(query_noise.dtype)

        def step(
            x: Tensor, t: Tensor, text: Text, rotary: Rotary, signal: Tensor | None
        ) -> tuple[Tensor, Tensor, Mapping[int, KV]]:
            attend = Streaming(stream.cache, (length,), write=1)
            tokens = x if x_0 is None else self.encoder.embed(x)
            c_BLE, temb = self(tokens, t, text, rotary, attend, signal)
            return c_BLE, temb, stream.cache.write(attend.take())

        rotary = self.encoder.rope(frames, *stream.latent_size, query_noise)
        inputs = x, t, stream.text, rotary, pick_frames(stream.encoder_signal, frames)
        c_BLE, temb, new_kv = run_step(self.replay, "encode", stream.cache.place, step, *inputs)
        cache = stream.cache.grown(new_kv, length)
        return replace(stream, cache=cache, index=stream.index + 1, context=None, temb=temb), c_BLE

    def with_context(
        self, stream: ScratchStream, c_RLE: Tensor, query_noise: Tensor
    ) -> ScratchStream:
        """The decoder's part of :meth:`advance`: contexts c (R, L, E), one per row of its
        conditions."""
        assert stream.temb is not None, "encode_next() comes before with_context()"
        temb = stream.temb.repeat(len(c_RLE) // len(stream.temb), 1, 1)
        c_RLE = self.context_norm.modulated(c_RLE, temb)
        t = self.encoder.clean_times(query_noise.shape[:2], query_noise)
        signal = pick_frames(stream.decoder_signal, chunk_frames([stream.index], self.chunk))
        inputs = c_RLE, query_noise, t, stream.text, 1, signal
        context = run_step(self.replay, "context", (), self.decoder.context, *inputs)
        return replace(stream, context=context)

    def denoise(self, stream: ScratchStream, x_t: Tensor, t: Tensor) -> Tensor:
        """The decoder alone, on the coming chunk and its context."""
        return denoise_chunk(self.decoder, self.replay, stream.context, x_t, t, stream.text)
