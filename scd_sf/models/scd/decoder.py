"""SCD's light frame-wise decoder: how the context c_i meets the noisy chunk (paper Table 3; spec/scd.md W7-W9, W13).

Presets of ``fusion``:
  paper     prefix [adapter(c); x] in front of all decoder blocks (paper Table 3, "frame concat").
  junction  x alone through the early copies, then prefix [c; x] in front of the late copies, which were trained on
            exactly what c is.
  delta     no prefix: D = c - early(query) once per chunk; per step late(early(x_t) + D).
  channel   Linear([x; c]) per token at the decoder's input (paper Table 3, "channel concat").
``prefix_rope``: "temporal" gives c the frames before x, "identical" the same frames. ``prefix``: "full" runs c through
the blocks with x at every step; "cached" lets c attend only to itself, so its K/V are computed once per chunk.
``prefix_time``: c's time is that of the encoder's "query", or (as in the released code) the "step" x is at.

Letters: R rows (batch x chunks), n frames per chunk, C H W latent axes, L tokens of a chunk, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scd_sf.models.trunk import Text, Times, Trunk, TrunkConfig
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
    """How many of the layers come before the junction; null: those that the encoder also has."""
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
            raise UserError("decoder.prefix=cached computes c once per chunk: it needs decoder.prefix_time=query")
        if self.split is not None and not 0 <= self.split <= len(self.layers):
            raise UserError(f"decoder.split is {self.split}; it must lie in 0..{len(self.layers)} (number of layers)")

    def unread(self, *defaults: DecoderConfig) -> str:
        """What differs from all ``defaults`` and has no effect, as the message of an error; '' for nothing."""
        for name in ("prefix_rope", "prefix", "prefix_time"):
            value = getattr(self, name)
            if self.fusion in ("delta", "channel") and value not in [getattr(plain, name) for plain in defaults]:
                return f"decoder.{name} is {value}, but fusion {self.fusion} has no prefix: leave it out"
        return ""

    def junction(self, encoder_layers: Sequence[int]) -> int:
        """Number of early blocks, which see the noisy chunk alone ('paper' and 'channel' have none)."""
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
    """What the decoder keeps of one chunk's c for all S steps: the positions of chunk and prefix, the signal of its
    frames, and what the fusion needs of the other fields."""

    rotary_x: Rotary
    rotary_c: Rotary
    signal: Tensor | None = None
    prefix: Tensor | None = None
    prefix_times: Times | None = None
    past: Past | None = None
    residual: Tensor | None = None
    channels: Tensor | None = None


class Decoder(nn.Module):
    """Blocks on one chunk of noisy frames and its context; other chunks are invisible."""

    def __init__(
        self, cfg: TrunkConfig, config: DecoderConfig, encoder_layers: Sequence[int], *, normed: bool = False
    ) -> None:
        """``normed``: the context arrives normalised and modulated, as that of a model trained from scratch."""
        super().__init__()
        self.cfg, self.config, self.normed = cfg, config, normed
        self.split = config.junction(encoder_layers)
        self.trunk = Trunk(cfg, config.layers, with_text=False)
        inputs = {"paper": 0 if normed else cfg.width, "channel": 2 * cfg.width}.get(config.fusion)
        self.adapter = nn.Linear(inputs, cfg.width) if inputs else None
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """paper: identity after a LayerNorm. channel: x + LayerNorm(c), the [I|I] of the released code."""
        if self.adapter is not None:
            eye = torch.eye(self.cfg.width)
            self.adapter.weight.copy_(eye if self.config.fusion == "paper" else torch.cat([eye, eye], dim=1))
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
        """c of R rows, their query frames (R/K, n, C, H, W), its times (R/K, n) and signal (R, n, E) -> what all steps
        share.

        Rows are (B, K, M): the K = ``samples`` rows of one query differ in c's corruption only.
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
            early = trunk(query, t_query, text, rotary_x, FullSequence(), slice(0, self.split))
            return Context(rotary_x, rotary_c, signal, residual=c_RLE - per_sample(early))
        if fusion == "paper" and self.adapter is not None:
            c_RLE = self.adapter(c_RLE)
        if self.config.prefix_time == "step":
            return Context(rotary_x, rotary_c, signal, prefix=c_RLE)
        times = trunk.times(per_sample(t_query), signal)
        if self.config.prefix == "full":
            return Context(rotary_x, rotary_c, signal, prefix=c_RLE, prefix_times=times)
        attend = Streaming(KVCache.empty(), (c_RLE.shape[1],), write=1)
        trunk.run(c_RLE, times.mod, text, rotary_c, attend, slice(self.split, None), keep=0)
        return Context(rotary_x, rotary_c, signal, past=LivePast(attend.staged))

    def forward(self, context: Context, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """x_t (R, n, C, H, W) at times t (R, n) -> velocity of the same shape."""
        trunk = self.trunk
        times, rotary_x = trunk.times(t, context.signal), context.rotary_x
        late = slice(self.split, None)
        x = trunk.run(trunk.embed(x_t), times.mod, text, rotary_x, FullSequence(), slice(0, self.split))
        if context.residual is not None:
            x = trunk.run(x + context.residual, times.mod, text, rotary_x, FullSequence(), late)
        elif context.channels is not None:
            assert self.adapter is not None
            x = self.adapter(torch.cat([x, context.channels.to(x.dtype)], dim=-1))
            x = trunk.run(x, times.mod, text, rotary_x, FullSequence(), late)
        elif context.past is not None:
            x = trunk.run(x, times.mod, text, rotary_x, Streaming(context.past, (x.shape[1],)), late)
        else:
            assert context.prefix is not None
            both = torch.cat([context.prefix.to(x.dtype), x], dim=1)
            mod = (context.prefix_times or times).join(times).mod
            positions = join(context.rotary_c, rotary_x)
            x = trunk.run(both, mod, text, positions, FullSequence(), late, keep=x_t.shape[1])
        return trunk.velocity(x, times.temb, *x_t.shape[-2:])

    def _rotary(self, x: Tensor) -> tuple[Rotary, Rotary]:
        """Positions of (context, chunk). Attention is relative, so constants do for every chunk of the video."""
        frames, (height, width) = x.shape[1], x.shape[-2:]
        own = self.trunk.rope(range(frames, 2 * frames), height, width, x)
        if self.config.prefix_rope == "identical":
            return own, own
        return self.trunk.rope(range(frames), height, width, x), own
