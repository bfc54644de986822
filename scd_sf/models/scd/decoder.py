"""SCD's light frame-wise decoder: velocity of one noisy chunk, given its context c_i (paper, Table
3).

It runs S times per chunk and sees no other chunk. How c_i enters is ``fusion``, of which all is in
this file.

Presets of ``fusion`` (paper, Table 3 and supplement; docs/adr/0003):
  paper     prefix [adapter(c); x] in front of all decoder blocks (Table 3, "frame concat").
  junction  x alone through the early copies, then prefix [c; x] in front of the late copies,
            which were trained on exactly what c is.
  delta     no prefix: D = c - early(query) once per chunk; per step late(early(x_t) + D).
  channel   Linear([x; c]) per token at the decoder's input (Table 3, "channel concat").
``prefix_rope``: "temporal" gives c the frames before x, "identical" the same frames.
``prefix``: "full" runs c through the blocks with x at every step. "cached" lets c attend only to
itself, so its K/V are computed once per chunk.
``prefix_time``: c's time is that of the encoder's "query", or (as in the released code) that of
the "step" x is at.

Letters: B clips, K noisy samples, M target chunks, R = B*K*M rows in this order, n frames per
chunk, C H W latent axes, L tokens of a chunk, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scd_sf.diffusion.noise import Noise, local_noise
from scd_sf.models.interface import Corruption
from scd_sf.models.replay import Replayed, run_step
from scd_sf.models.trunk import Text, Trunk, TrunkConfig
from scd_sf.nn.attention import FullSequence, Streaming
from scd_sf.nn.kv_cache import KVCache, LivePast, Past
from scd_sf.nn.rope import Rotary, join
from scd_sf.types import UserError

FUSIONS = ("paper", "junction", "delta", "channel")


@dataclass(frozen=True)
class DecoderConfig:
    """Which layers the decoder copies, and how the context enters."""

    layers: tuple[int, ...] = (0, 1, 2, 3, 4, 25, 26, 27, 28, 29)
    """Layers of the base model that the decoder copies, in order."""
    fusion: str = "delta"
    """How the context enters: paper, junction, delta or channel (docs/adr/0003)."""
    prefix_rope: str = "identical"
    """Positions of a prefix: temporal, the frames before; identical, the same frames."""
    prefix: str = "full"
    """full: the prefix runs through the blocks at every step; cached: once per chunk."""
    split: int | None = None
    """How many of the layers come before the context enters; null: those up to the first that the
    encoder does not have."""
    prefix_time: str = "query"
    """Time that a prefix is given: query, that of the encoder; step, that of the step (the released
    code's)."""

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("fusion", self.fusion, FUSIONS),
            ("prefix_rope", self.prefix_rope, ("temporal", "identical")),
            ("prefix", self.prefix, ("full", "cached")),
            ("prefix_time", self.prefix_time, ("query", "step")),
        ):
            if value not in choices:
                raise UserError(f"decoder.{name} is '{value}'; use one of {', '.join(choices)}")
        if self.prefix == "cached" and self.prefix_time == "step":
            raise UserError(
                "decoder.prefix=cached computes c once per chunk: it needs decoder.prefix_time=query"
            )
        if self.split is not None and not 0 <= self.split <= len(self.layers):
            raise UserError(
                f"decoder.split is {self.split}; it must lie in 0..{len(self.layers)} (number of layers)"
            )

    def unread_field(self, *defaults: DecoderConfig) -> str:
        """An error message for the first field that is set (other than in all ``defaults``) but not
        read by this fusion; '' if there is none."""
        for name in ("prefix_rope", "prefix", "prefix_time"):
            value = getattr(self, name)
            if self.fusion in ("delta", "channel") and value not in [
                getattr(plain, name) for plain in defaults
            ]:
                return f"decoder.{name} is {value}, but fusion {self.fusion} has no prefix: leave it out"
        return ""

    def num_early_blocks(self, encoder_layers: Sequence[int]) -> int:
        """Number of blocks before the context enters, which see the noisy chunk alone ('paper' and
        'channel' have none). UserError: all blocks are early."""
        if self.fusion in ("paper", "channel"):
            if self.split not in (None, 0):
                raise UserError(
                    f"decoder.split is {self.split}, but fusion '{self.fusion}' has no early blocks: leave it out"
                )
            return 0
        late = (i for i, layer in enumerate(self.layers) if layer not in encoder_layers)
        split = self.split if self.split is not None else next(late, len(self.layers))
        if split == len(self.layers):
            raise UserError(
                f"decoder.layers {list(self.layers)}: no block comes after the junction, so the context would never be "
                "read; end the list with layers that the encoder does not have, or set decoder.split"
            )
        return split


@dataclass(frozen=True)
class Context:
    """Inputs that the S steps of one chunk share: positions, the signal of its frames, and the
    fusion's tensors.

    ``rotary_x``, ``rotary_c``: positions of chunk and context. ``signal`` (R, n, E): embedded
    actions and labels (None: the model has none). One of the others is set, as the fusion says:
    ``prefix`` (R, L, E) with its modulation ``prefix_mod`` (None: that of the step), the ``past``
    of a cached prefix, the ``residual`` D of delta, or ``channels`` (R, L, E).
    """

    rotary_x: Rotary
    rotary_c: Rotary
    signal: Tensor | None = None
    prefix: Tensor | None = None
    prefix_mod: Tensor | None = None
    past: Past | None = None
    residual: Tensor | None = None
    channels: Tensor | None = None


class Decoder(nn.Module):
    """Blocks on one chunk of noisy frames and its context; other chunks are invisible."""

    def __init__(
        self,
        cfg: TrunkConfig,
        config: DecoderConfig,
        encoder_layers: Sequence[int],
        *,
        normed: bool = False,
    ) -> None:
        """``normed``: the context arrives normalised and modulated, as from scratch
        (scratch.py)."""
        super().__init__()
        self.cfg, self.config, self.normed = cfg, config, normed
        self.split = config.num_early_blocks(encoder_layers)
        self.trunk = Trunk(cfg, config.layers, with_text=False)
        self.adapter: nn.Linear | None = None
        if config.fusion == "channel":
            self.adapter = nn.Linear(2 * cfg.width, cfg.width)
        elif config.fusion == "paper" and not normed:
            self.adapter = nn.Linear(cfg.width, cfg.width)
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """paper: identity after a LayerNorm. channel: x + LayerNorm(c), the [I|I] of the released
        code."""
        if self.adapter is not None:
            eye = torch.eye(self.cfg.width)
            start = eye if self.config.fusion == "paper" else torch.cat([eye, eye], dim=1)
            self.adapter.weight.copy_(start)
            self.adapter.bias.zero_()

    def context(
        self,
        c_RLE: Tensor,
        query: Tensor,
        t_query: Tensor,
        text: Text,
        samples: int = 1,
        signal: Tensor | None = None,
    ) -> Context:
        """The shared inputs of all steps, from the contexts c (R, L, E).

        ``query`` (B*M, n, C, H, W): the encoder's query frames, ``t_query`` (B*M, n): their times.
        The K = ``samples`` rows of one query differ in c's corruption only. ``signal``: (R, n, E).
        """
        fusion, trunk = self.config.fusion, self.trunk
        rotary_c, rotary_x = self._rotary(query)
        if fusion in ("paper", "channel") and not self.normed:
            c_RLE = F.layer_norm(c_RLE, c_RLE.shape[-1:])
        if fusion == "channel":
            return Context(rotary_x, rotary_c, signal, channels=c_RLE)
        clips = text.shape[0] if isinstance(text, Tensor) else text[0][0].shape[0]

        def per_sample(x: Tensor) -> Tensor:
            """(B*M, ...) -> (B*K*M, ...)."""
            if samples == 1:
                return x
            x = x.unflatten(0, (clips, 1, -1))
            return x.expand(-1, samples, *x.shape[2:]).flatten(0, 2)

        if fusion == "delta":
            early = trunk(query, t_query, text, rotary_x, FullSequence(), span=slice(0, self.split))
            return Context(rotary_x, rotary_c, signal, residual=c_RLE - per_sample(early))
        if fusion == "paper" and self.adapter is not None:
            c_RLE = self.adapter(c_RLE)
        if self.config.prefix_time == "step":
            return Context(rotary_x, rotary_c, signal, prefix=c_RLE)
        mod = trunk.times(per_sample(t_query), signal).mod
        if self.config.prefix == "full":
            return Context(rotary_x, rotary_c, signal, prefix=c_RLE, prefix_mod=mod)
        attend = Streaming(KVCache.empty(), (c_RLE.shape[1],), write=1)
        trunk.run(c_RLE, mod, text, rotary_c, attend, slice(self.split, None), keep=0)
        return Context(rotary_x, rotary_c, signal, past=LivePast(attend.staged))

    def forward(self, context: Context, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """One denoising step: x_t (R, n, C, H, W) at times t (R, n) -> velocity of the same
        shape."""
        trunk = self.trunk
        times, rotary_x = trunk.times(t, context.signal), context.rotary_x
        late = slice(self.split, None)
        x = trunk.embed(x_t)
        x = trunk.run(x, times.mod, text, rotary_x, FullSequence(), slice(0, self.split))
        if context.residual is not None:
            x = trunk.run(x + context.residual, times.mod, text, rotary_x, FullSequence(), late)
        elif context.channels is not None:
            assert self.adapter is not None
            x = self.adapter(torch.cat([x, context.channels.to(x.dtype)], dim=-1))
            x = trunk.run(x, times.mod, text, rotary_x, FullSequence(), late)
        elif context.past is not None:
            attend = Streaming(context.past, (x.shape[1],))
            x = trunk.run(x, times.mod, text, rotary_x, attend, late)
        else:
            assert context.prefix is not None
            tokens = torch.cat([context.prefix.to(x.dtype), x], dim=1)
            mod_c = times.mod if context.prefix_mod is None else context.prefix_mod
            mod = torch.cat([mod_c, times.mod], dim=1)
            positions = join(context.rotary_c, rotary_x)
            x = trunk.run(tokens, mod, text, positions, FullSequence(), late, keep=x_t.shape[1])
        return trunk.velocity(x, times.temb, *x_t.shape[-2:])

    def _rotary(self, x: Tensor) -> tuple[Rotary, Rotary]:
        """Positions of (context, chunk). Attention is relative: constants do for every chunk."""
        frames, (height, width) = x.shape[1], x.shape[-2:]
        rotary_x = self.trunk.rope(range(frames, 2 * frames), height, width, x)
        if self.config.prefix_rope == "identical":
            return rotary_x, rotary_x
        return self.trunk.rope(range(frames), height, width, x), rotary_x


def corrupt(c_RLE: Tensor, strength: float, noise_like: Noise) -> Tensor:
    """c + strength * rms(c) * noise: the corruption of Eq. 7 at c's own scale; every row has
    its own noise."""
    rms = c_RLE.detach().pow(2).mean(-1, keepdim=True).sqrt()
    return c_RLE + strength * rms * noise_like(c_RLE)


def rows_per_chunk(x_BKF: Tensor, chunk: int) -> Tensor:
    """(B, K, M*n, ...) -> (B*K*M, n, ...): by clip first, so that rows of one clip share its
    prompt."""
    return x_BKF.unflatten(2, (-1, chunk)).flatten(0, 2)


def contexts_per_sample(
    c_BLE: Tensor, samples: int, chunks: int, corruption: Corruption | None
) -> Tensor:
    """Contexts (B, M*L, E) of M = ``chunks`` chunks -> (B*K*M, L, E) for K noisy samples, each with
    a ``corruption`` of its own."""
    c_RLE = c_BLE.unflatten(1, (1, chunks, -1)).expand(-1, samples, -1, -1, -1).flatten(0, 2)
    if corruption is None:
        return c_RLE
    return corrupt(c_RLE, corruption.strength, partial(local_noise, rng=corruption.rng))


def decode_samples(
    decoder: Decoder,
    c_RLE: Tensor,
    query: Tensor,
    t_query: Tensor,
    text: Text,
    x_t: Tensor,
    t: Tensor,
    signal: Tensor | None = None,
    *,
    chunk: int,
    in_turn: bool,
) -> Tensor:
    """Training's use of the decoder: K noisy samples of M chunks of B clips -> velocity like x_t.

    ``c`` (B*K*M, L, E): :func:`contexts_per_sample`. ``query`` (B, M*n, C, H, W) at ``t_query`` (B,
    M*n): the encoder's. ``x_t`` (K, B, M*n, C, H, W), ``t`` (K, B, M*n). ``signal``: (B, M*n, E).
    ``in_turn``: the samples one after the other, each computed again for the backward pass, so that
    memory does not grow with K.
    """
    samples, batch = t.shape[:2]
    query_rows, t_query_rows = (rows_per_chunk(x.unsqueeze(1), chunk) for x in (query, t_query))
    x_BKF, t_BKF = x_t.transpose(0, 1), t.transpose(0, 1)

    def decode(c_RLE: Tensor, x_BKF: Tensor, t_BKF: Tensor) -> Tensor:
        count = x_BKF.shape[1]
        signal_rows = None
        if signal is not None:
            signal_rows = rows_per_chunk(signal.unsqueeze(1).expand(-1, count, -1, -1), chunk)
        context = decoder.context(c_RLE, query_rows, t_query_rows, text, count, signal_rows)
        x_rows, t_rows = rows_per_chunk(x_BKF, chunk), rows_per_chunk(t_BKF, chunk)
        velocity: Tensor = decoder(context, x_rows, t_rows, text)
        return velocity.unflatten(0, (batch, count, -1)).flatten(2, 3).transpose(0, 1)

    if not in_turn:
        return decode(c_RLE, x_BKF, t_BKF)
    c_BK = c_RLE.unflatten(0, (batch, samples, -1))
    parts = []
    for k in range(samples):
        sample = (c_BK[:, k].flatten(0, 1), x_BKF[:, k : k + 1], t_BKF[:, k : k + 1])
        parts.append(checkpoint(decode, *sample, use_reentrant=False))
    return torch.cat(parts)


def denoise_chunk(
    decoder: Decoder,
    replay: Replayed | None,
    context: Context | None,
    x_t: Tensor,
    t_B: Tensor,
    text: Text,
) -> Tensor:
    """Sampling's use of the decoder: the coming chunk x_t (B, n, C, H, W) at times t (B,) ->
    velocity."""
    assert context is not None, "advance() comes before denoise()"
    t_Bn = t_B.unsqueeze(1).expand(-1, x_t.shape[1])
    velocity: Tensor = run_step(replay, "denoise", (), decoder, context, x_t, t_Bn, text)
    return velocity
