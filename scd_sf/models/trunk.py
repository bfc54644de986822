"""The parts every Wan family shares: patches, time and text conditioning, the stack of blocks, the velocity head.

Parameter names map 1:1 on ``diffusers.WanTransformer3DModel`` (``head.`` is the one prefix of ours: weights.py).
Letters: B batch, F latent frames, C channels, H W latent height and width, L tokens, E width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from scd_sf.nn.attention import AttentionContext
from scd_sf.nn.kv_cache import KV
from scd_sf.nn.layers import LayerNorm, WanBlock, upcast
from scd_sf.nn.rope import Rotary, rope_table
from scd_sf.types import UserError, VideoShape


@dataclass(frozen=True)
class WanConfig:
    """Geometry of a Wan 2.1 text-to-video transformer; the defaults are T2V-1.3B (30 layers, width 1536)."""

    num_attention_heads: int = 12
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 8960
    num_layers: int = 30
    patch_height: int = 2
    patch_width: int = 2
    cross_attn_norm: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        small = [n for n in ("num_attention_heads", "ffn_dim", "num_layers", "text_dim") if getattr(self, n) < 1]
        if small:
            raise UserError(f"{small[0]} is {getattr(self, small[0])}; it must be at least 1")
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise UserError(f"attention_head_dim is {self.attention_head_dim}; 3-axis RoPE needs an even number >= 6")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def tokens(self, height: int, width: int) -> int:
        """Tokens of one latent frame; UserError if the patch does not divide the frame."""
        if height % self.patch_height or width % self.patch_width:
            raise UserError(
                f"latent frame {height}x{width} is not divisible by the patch {self.patch_height}x{self.patch_width}: "
                f"choose pixel sizes that are multiples of {8 * self.patch_height}"
            )
        return (height // self.patch_height) * (width // self.patch_width)

    def clip_tokens(self, shape: VideoShape) -> int:
        """Tokens of a whole clip of latents."""
        return shape.frames * self.tokens(shape.height, shape.width)


WAN_14B = WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40)  # Wan 2.1 T2V-14B


class PatchEmbedding(nn.Module):
    """Non-overlapping 1 x ph x pw patches -> width; the weight has diffusers' Conv3d shape (E, C, 1, ph, pw)."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.patch = (cfg.patch_height, cfg.patch_width)
        conv = nn.Conv3d(cfg.in_channels, cfg.width, (1, *self.patch))
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x_BFCHW: Tensor) -> Tensor:
        """-> (B, F * tokens per frame, E)."""
        ph, pw = self.patch
        b, f, c, h, w = x_BFCHW.shape
        x = x_BFCHW.reshape(b, f, c, h // ph, ph, w // pw, pw).permute(0, 1, 3, 5, 2, 4, 6).reshape(b, -1, c * ph * pw)
        return F.linear(x.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class _TwoLinears(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)


class ConditionEmbedder(nn.Module):
    """Time (one vector per frame, sinusoid of 1000 t) and, where asked for, text."""

    def __init__(self, cfg: WanConfig, with_text: bool) -> None:
        super().__init__()
        self.freq_dim = cfg.freq_dim
        self.time_embedder = _TwoLinears(cfg.freq_dim, cfg.width)
        self.time_proj = nn.Linear(cfg.width, 6 * cfg.width)
        self.text_embedder = _TwoLinears(cfg.text_dim, cfg.width) if with_text else None

    def time(self, t_BF: Tensor) -> tuple[Tensor, Tensor]:
        """t in [0,1] (B, F) -> temb (B, F, E) and modulation (B, F, 6, E)."""
        half = self.freq_dim // 2
        t = upcast(t_BF)
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=t.dtype) / half)
        angles = (1000 * t).unsqueeze(-1) * frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.time_proj.weight.dtype)
        embedder = self.time_embedder
        temb = embedder.linear_2(F.silu(embedder.linear_1(sinusoid)))
        return temb, self.time_proj(F.silu(temb)).unflatten(-1, (6, -1))

    def text(self, text_BLE: Tensor) -> Tensor:
        """Token states (B, L, text_dim) -> (B, L, E). Padding rows are zeros and are attended to, as in Wan."""
        embedder = self.text_embedder
        assert embedder is not None, "this trunk was built without a text embedder"
        x = text_BLE.to(embedder.linear_1.weight.dtype)
        embedded: Tensor = embedder.linear_2(F.gelu(embedder.linear_1(x), approximate="tanh"))
        return embedded


class Head(nn.Module):
    """Modulated norm and projection back to velocity patches."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.patch, self.channels = (cfg.patch_height, cfg.patch_width), cfg.out_channels
        self.norm_out = LayerNorm(cfg.width, cfg.eps, affine=False)
        self.proj_out = nn.Linear(cfg.width, cfg.out_channels * math.prod(self.patch))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, cfg.width) / math.sqrt(cfg.width))

    def forward(self, x_BLE: Tensor, temb_BFE: Tensor, height: int, width: int) -> Tensor:
        """-> velocity (B, F, C, H, W), at least fp32."""
        table = (upcast(self.scale_shift_table) + upcast(temb_BFE).unsqueeze(2)).unsqueeze(3)
        shift, scale = table.unbind(2)
        frames = temb_BFE.shape[1]
        x = torch.addcmul(shift, self.norm_out(x_BLE).unflatten(1, (frames, -1)), 1 + scale).flatten(1, 2)
        out = upcast(self.proj_out(x.to(x_BLE.dtype)))
        ph, pw = self.patch
        h, w = height // ph, width // pw
        out = out.unflatten(-1, (ph, pw, self.channels)).unflatten(1, (-1, h, w))
        return out.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class Times(NamedTuple):
    """Per-frame time conditioning: temb (B, F, E) for the head, modulation (B, F, 6, E) for the blocks."""

    temb: Tensor
    mod: Tensor

    def join(self, other: Times) -> Times:
        """Frames after frames."""
        return Times(torch.cat([self.temb, other.temb], 1), torch.cat([self.mod, other.mod], 1))


class Trunk(nn.Module):
    """A stack of Wan blocks with its own embeddings. ``layers`` are the Wan layers its blocks come from.

    ``checkpointing`` keeps of each block its input alone and computes the rest again for the backward pass; without
    ``recompute_attention`` attention outputs are kept too (SDPA's; FlexAttention is computed again all the same).
    """

    def __init__(
        self, cfg: WanConfig, layers: Sequence[int], *, with_text: bool = True, with_head: bool = True
    ) -> None:
        super().__init__()
        self.cfg, self.layers = cfg, tuple(layers)
        self.checkpointing, self.recompute_attention = False, True
        self.patch_embedding = PatchEmbedding(cfg)
        self.condition_embedder = ConditionEmbedder(cfg, with_text)
        self.blocks = nn.ModuleList(
            WanBlock(cfg.width, cfg.ffn_dim, cfg.num_attention_heads, cfg.cross_attn_norm, cfg.eps) for _ in layers
        )
        self.head = Head(cfg) if with_head else None

    def embed(self, x_BFCHW: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embedding(x_BFCHW)
        return tokens

    def times(self, t_BF: Tensor) -> Times:
        return Times(*self.condition_embedder.time(t_BF))

    def text(self, text_BLE: Tensor) -> Tensor:
        return self.condition_embedder.text(text_BLE)

    def text_kv(self, embedded_BLE: Tensor) -> tuple[KV, ...]:
        """Cross-attention K/V of every block: once per prompt."""
        return tuple(block.attn2.kv(embedded_BLE) for block in self.blocks if isinstance(block, WanBlock))

    def rope(self, frames: Sequence[int], height: int, width: int, like: Tensor) -> Rotary:
        """Positions of whole frames, as a table on ``like``'s device."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        grid = (height // self.cfg.patch_height, width // self.cfg.patch_width)
        return rope_table(tuple(frames), *grid, self.cfg.attention_head_dim, like.device, dtype)

    def run(
        self,
        x_BLE: Tensor,
        mod_BF6E: Tensor,
        text: Tensor | Sequence[KV],
        rotary: Rotary,
        attend: AttentionContext,
        span: slice = slice(None),
        keep: int | None = None,
    ) -> Tensor:
        """The blocks of ``span`` in order. ``text`` is the embedded prompt, or the K/V of all blocks. ``keep``: return
        the last ``keep`` frames (of mod's F) alone; the last block computes no more than that needs."""
        chosen = range(*span.indices(len(self.blocks)))
        context = noop_context_fn if self.recompute_attention else _keep_attention
        for index in chosen:
            block_text = text if isinstance(text, Tensor) else text[index]
            kept = keep if index == chosen[-1] else None
            arguments = (x_BLE, mod_BF6E, block_text, rotary, attend, index, kept)
            if self.checkpointing and torch.is_grad_enabled():
                x_BLE = checkpoint(self.blocks[index], *arguments, use_reentrant=False, context_fn=context)
            else:
                x_BLE = self.blocks[index](*arguments)
        return x_BLE

    def forward(
        self,
        x_BFCHW: Tensor,
        t_BF: Tensor,
        text: Tensor | Sequence[KV],
        rotary: Rotary,
        attend: AttentionContext,
        span: slice = slice(None),
        keep: int | None = None,
    ) -> Tensor:
        """Frames at their times through the blocks of ``span``: velocity (B, keep or F, C, H, W) if the stack has a
        head and the span reaches it, else tokens. See :meth:`run`."""
        times = self.times(t_BF)
        x = self.run(self.embed(x_BFCHW), times.mod, text, rotary, attend, span, keep)
        frames = times.temb.shape[1] if keep is None else min(keep, times.temb.shape[1])
        if self.head is None or frames == 0 or span.indices(len(self.blocks))[1] < len(self.blocks):
            return x
        return self.velocity(x, times.temb[:, times.temb.shape[1] - frames :], *x_BFCHW.shape[-2:])

    def velocity(self, x_BLE: Tensor, temb_BFE: Tensor, height: int, width: int) -> Tensor:
        assert self.head is not None, "this trunk was built without a head"
        out: Tensor = self.head(x_BLE, temb_BFE, height, width)
        return out


_SDPA = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def _keep_attention() -> Any:
    """Checkpointing's policy: save what these return, compute everything else again."""
    return create_selective_checkpoint_contexts(_SDPA)
