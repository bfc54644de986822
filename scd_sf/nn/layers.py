"""The two transformer blocks: Wan 2.1's, with parameter names equal to diffusers'
``WanTransformerBlock``, and the adaLN block of the models trained from scratch.

Modulation is per frame and broadcast to the frame's tokens, never computed per token. Norms,
modulation and residual sums run in at least fp32. Letters: B batch, F frames, L tokens, E width, N
heads, D head dim.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scd_sf.nn.attention import AttentionContext, attention
from scd_sf.nn.kv_cache import KV
from scd_sf.nn.rope import Rotary, rotate

M = TypeVar("M", bound=nn.Module)
# memory order by the number of dimensions of a convolution's weight
MEMORY_ORDER = {4: torch.channels_last, 5: torch.channels_last_3d}


def upcast(x: Tensor) -> Tensor:
    """x in fp32; fp64 stays fp64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class LayerNorm(nn.Module):
    """LayerNorm computed in at least fp32 and returned in it; the caller casts."""

    def __init__(self, width: int, eps: float, affine: bool) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        x = upcast(x)
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, (self.width,), weight, bias, self.eps)


class Attention(nn.Module):
    """Projections of one attention: q and k are RMS-normalised across all heads (Wan's qk norm), or
    ``per_head``."""

    def __init__(self, width: int, num_heads: int, eps: float, per_head: bool = False) -> None:
        super().__init__()
        self.num_heads, self.per_head = num_heads, per_head
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = (
            nn.RMSNorm(width // num_heads if per_head else width, eps=eps) for _ in range(2)
        )

    def heads(self, x_BLE: Tensor) -> Tensor:
        """(B, L, E) -> (B, N, L, D)."""
        return x_BLE.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def query(self, x_BLE: Tensor) -> Tensor:
        return self._normalise(self.norm_q, self.to_q(x_BLE))

    def kv(self, x_BLE: Tensor) -> KV:
        return self._normalise(self.norm_k, self.to_k(x_BLE)), self.heads(self.to_v(x_BLE))

    def _normalise(self, norm: nn.Module, x_BLE: Tensor) -> Tensor:
        heads: Tensor = norm(self.heads(x_BLE)) if self.per_head else self.heads(norm(x_BLE))
        return heads

    def out(self, x_BNLD: Tensor) -> Tensor:
        out: Tensor = self.to_out[0](x_BNLD.transpose(1, 2).flatten(2))
        return out


class Gelu(nn.Module):
    """Linear then tanh-GELU, under diffusers' name ``proj``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, tanh-GELU, linear, under diffusers' names ``net.0.proj`` and ``net.2``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([Gelu(width, hidden), nn.Identity(), nn.Linear(hidden, width)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


def _last(x: Tensor, count: int, dim: int) -> Tensor:
    return x.narrow(dim, x.shape[dim] - count, count)


class WanBlock(nn.Module):
    """Self-attention (modulated), text cross-attention, feed-forward (modulated)."""

    def __init__(
        self, width: int, ffn_dim: int, num_heads: int, cross_attn_norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps, affine=False)
        self.attn1 = Attention(width, num_heads, eps)
        self.attn2 = Attention(width, num_heads, eps)
        self.norm2 = LayerNorm(width, eps, affine=True) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(width, ffn_dim)
        self.norm3 = LayerNorm(width, eps, affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / math.sqrt(width))

    def forward(
        self,
        x_BLE: Tensor,
        mod_BF6E: Tensor,
        text: Tensor | KV,
        rotary: Rotary,
        attend: AttentionContext,
        layer: int,
        keep: int | None = None,
    ) -> Tensor:
        """x (B, L, E) with L = F * tokens per frame; mod (B, F, 6, E), F may be 1 for the whole
        sequence.

        ``text``: embedded prompt (Bt, Lt, E), or its K/V of this block. B may be a multiple of Bt:
        rows b*r..(b+1)*r-1 then share prompt b, without any copy. ``keep``: only the last ``keep``
        frames are returned, and of the others only keys and values are made (the last block of a
        stack whose earlier frames are not read).
        """
        frames = mod_BF6E.shape[1]
        table = (upcast(self.scale_shift_table) + upcast(mod_BF6E)).unsqueeze(3)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.unbind(2)

        h = modulate(self.norm1(x_BLE), scale_a, shift_a, frames).to(x_BLE.dtype)
        k, v = self.attn1.kv(h)
        k, query_rotary = rotate(k, rotary), rotary
        if keep is not None and keep < frames:
            tokens, frames = keep * (x_BLE.shape[1] // frames), keep
            x_BLE = _last(x_BLE, tokens, 1)
            h = _last(h, tokens, 1)
            query_rotary = rotary.last(tokens)
            gate_a, scale_f, shift_f, gate_f = (
                _last(m, keep, 1) for m in (gate_a, scale_f, shift_f, gate_f)
            )
        attention_out = attend(layer, rotate(self.attn1.query(h), query_rotary), k, v)
        if frames == 0:
            return x_BLE
        x_BLE = _add_gated(x_BLE, self.attn1.out(attention_out), gate_a, frames)

        x_BLE = x_BLE + self._cross(self.norm2(x_BLE).to(x_BLE.dtype), text)

        h = modulate(self.norm3(x_BLE), scale_f, shift_f, frames).to(x_BLE.dtype)
        return _add_gated(x_BLE, self.ffn(h), gate_f, frames)

    def _cross(self, h_BLE: Tensor, text: Tensor | KV) -> Tensor:
        k, v = self.attn2.kv(text) if isinstance(text, Tensor) else text
        rows, length, width = h_BLE.shape
        q = self.attn2.query(h_BLE.reshape(k.shape[0], -1, width))
        out = self.attn2.out(attention(q, k.to(q.dtype), v.to(q.dtype)))
        return out.reshape(rows, length, width)


class DitBlock(nn.Module):
    """Self-attention and feed-forward, each with an adaLN-zero projection of its own (supplement
    B.2).

    The projection runs on one vector per frame: on every token, as in the released code (P9), it
    would be a third of the block. ``18 D^2 + 15 D`` parameters and two norms.
    """

    def __init__(self, width: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps, affine=False)
        self.adaln1 = nn.Linear(width, 3 * width)
        self.attn = Attention(width, num_heads, eps, per_head=True)
        self.norm2 = LayerNorm(width, eps, affine=False)
        self.adaln2 = nn.Linear(width, 3 * width)
        self.ffn = FeedForward(width, ffn_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.adaln1.weight)
        nn.init.zeros_(self.adaln2.weight)

    def forward(
        self,
        x_BLE: Tensor,
        mod_BFE: Tensor,
        text: Tensor | KV,
        rotary: Rotary,
        attend: AttentionContext,
        layer: int,
        keep: int | None = None,
    ) -> Tensor:
        """The arguments and the result of :meth:`WanBlock.forward`, but mod (B, F, E) is the
        activated embedding, and ``text`` is not read."""
        frames = mod_BFE.shape[1]
        shift_a, scale_a, gate_a = upcast(self.adaln1(mod_BFE)).unsqueeze(2).chunk(3, -1)
        h = modulate(self.norm1(x_BLE), scale_a, shift_a, frames).to(x_BLE.dtype)
        k, v = self.attn.kv(h)
        k, query_rotary = rotate(k, rotary), rotary
        if keep is not None and keep < frames:
            tokens, frames = keep * (x_BLE.shape[1] // frames), keep
            x_BLE = _last(x_BLE, tokens, 1)
            h = _last(h, tokens, 1)
            query_rotary = rotary.last(tokens)
            gate_a, mod_BFE = _last(gate_a, keep, 1), _last(mod_BFE, keep, 1)
        attention_out = attend(layer, rotate(self.attn.query(h), query_rotary), k, v)
        if frames == 0:
            return x_BLE
        x_BLE = _add_gated(x_BLE, self.attn.out(attention_out), gate_a, frames)

        shift_f, scale_f, gate_f = upcast(self.adaln2(mod_BFE)).unsqueeze(2).chunk(3, -1)
        h = modulate(self.norm2(x_BLE), scale_f, shift_f, frames).to(x_BLE.dtype)
        return _add_gated(x_BLE, self.ffn(h), gate_f, frames)


def modulate(x_BLE: Tensor, scale_BF1E: Tensor, shift_BF1E: Tensor, frames: int) -> Tensor:
    """x (1 + scale) + shift, one scale and shift per frame."""
    return torch.addcmul(shift_BF1E, x_BLE.unflatten(1, (frames, -1)), 1 + scale_BF1E).flatten(1, 2)


def _add_gated(x_BLE: Tensor, y_BLE: Tensor, gate_BF1E: Tensor, frames: int) -> Tensor:
    x, y = upcast(x_BLE).unflatten(1, (frames, -1)), upcast(y_BLE).unflatten(1, (frames, -1))
    return torch.addcmul(x, y, gate_BF1E).flatten(1, 2).to(x_BLE.dtype)


def channels_last(model: M) -> M:
    """Convolution weights, of images and of video, in the memory order channels-last, in place.

    Faster on a CPU, and what tensor cores take; the same numbers to rounding.
    """
    for parameter in model.parameters():
        if parameter.ndim in MEMORY_ORDER:
            parameter.data = parameter.data.contiguous(memory_format=MEMORY_ORDER[parameter.ndim])
    return model
