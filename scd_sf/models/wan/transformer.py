"""The bidirectional Wan 2.1 transformer: teacher, critic, and what stage 1 starts from.

Its parameter names map 1:1 on ``diffusers.WanTransformer3DModel`` (``head.`` is the one prefix of
ours: weights.py). Letters: B batch, F latent frames, C channels, H W latent height and width, L
tokens, E width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scd_sf.models.trunk import (
    SIZES,
    RunBlocks,
    Trunk,
    TwoLinears,
    num_patches,
    run_all,
    sinusoid,
    unpatchify,
)
from scd_sf.nn.attention import FullSequence
from scd_sf.nn.layers import LayerNorm, WanBlock, modulate, upcast
from scd_sf.nn.rope import Axes, axis_dims
from scd_sf.types import Conditioning, UserError, VideoShape, check_within


@dataclass(frozen=True)
class WanConfig:
    """Geometry of a Wan 2.1 text-to-video transformer; the defaults are T2V-1.3B (30 layers, width
    1536)."""

    num_attention_heads: int = 12
    """Attention heads."""
    attention_head_dim: int = 128
    """Width of a head; an even number, 6 or more."""
    in_channels: int = 16
    """Channels of the latents."""
    out_channels: int = 16
    """Channels of the velocity."""
    text_dim: int = 4096
    """Width of the text encoder's states."""
    freq_dim: int = 256
    """Width of the sinusoidal embedding of the time."""
    ffn_dim: int = 8960
    """Width of the feed-forward layers."""
    num_layers: int = 30
    """Layers."""
    patch_height: int = 2
    """Latent rows of a token."""
    patch_width: int = 2
    """Latent columns of a token."""
    cross_attn_norm: bool = True
    """A norm with weights before the attention to the text."""
    eps: float = 1e-6
    """Added to variances in the norms."""

    def __post_init__(self) -> None:
        small_fields = [
            n
            for n in ("num_attention_heads", "ffn_dim", "num_layers", "text_dim")
            if getattr(self, n) < 1
        ]
        if small_fields:
            raise UserError(
                f"{small_fields[0]} is {getattr(self, small_fields[0])}; it must be at least 1"
            )
        check_within(self, SIZES)
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise UserError(
                f"attention_head_dim is {self.attention_head_dim}; 3-axis RoPE needs an even number >= 6"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def rope_axes(self) -> Axes:
        return axis_dims(self.attention_head_dim)

    @property
    def clean_time(self) -> float:
        return 0.0

    def tokens(self, height: int, width: int) -> int:
        """Tokens of one latent frame; UserError if the patch does not divide the frame."""
        return num_patches(height, width, self.patch_height, self.patch_width)

    def clip_tokens(self, shape: VideoShape) -> int:
        """Tokens of a whole clip of latents."""
        return shape.frames * self.tokens(shape.height, shape.width)

    def block(self) -> nn.Module:
        return WanBlock(
            self.width, self.ffn_dim, self.num_attention_heads, self.cross_attn_norm, self.eps
        )

    def conditioner(self, with_text: bool) -> nn.Module:
        return ConditionEmbedder(self, with_text)

    def head(self) -> nn.Module:
        return Head(self)


WAN_14B = WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40)  # Wan 2.1 T2V-14B


class ConditionEmbedder(nn.Module):
    """Embeddings of the time (one vector per frame, sinusoid of 1000 t) and, with ``with_text``, of
    the text."""

    def __init__(self, cfg: WanConfig, with_text: bool) -> None:
        super().__init__()
        self.freq_dim = cfg.freq_dim
        self.time_embedder = TwoLinears(cfg.freq_dim, cfg.width)
        self.time_proj = nn.Linear(cfg.width, 6 * cfg.width)
        self.text_embedder = TwoLinears(cfg.text_dim, cfg.width) if with_text else None

    def time(self, t_BF: Tensor, signal_BFE: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """t in [0,1] (B, F) -> temb (B, F, E) and modulation (B, F, 6, E)."""
        embedder = self.time_embedder
        angles = sinusoid(t_BF, self.freq_dim, self.time_proj.weight.dtype)
        temb = embedder.linear_2(F.silu(embedder.linear_1(angles)))
        return temb, self.time_proj(F.silu(temb)).unflatten(-1, (6, -1))

    def signal(self, cond: Conditioning, decoder: bool) -> Tensor | None:
        """None: Wan has no actions and labels."""
        return None

    def text(self, text_BLE: Tensor) -> Tensor:
        """Token states (B, L, text_dim) -> (B, L, E). Padding rows are zeros and are attended to,
        as in Wan."""
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
        x = modulate(self.norm_out(x_BLE), scale, shift, temb_BFE.shape[1])
        return unpatchify(
            upcast(self.proj_out(x.to(x_BLE.dtype))), self.patch, self.channels, height, width
        )


class Wan(nn.Module):
    """Every frame sees every frame. Equal to ``diffusers.WanTransformer3DModel`` (tests/parity)."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.trunk = Trunk(cfg, range(cfg.num_layers))
        self.run_blocks: RunBlocks = run_all

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t (B, F, C, H, W), t (B,) or (B, F) in [0,1] -> velocity (B, F, C, H, W)."""
        trunk, (frames, _, height, width) = self.trunk, x_t.shape[1:]
        self.cfg.tokens(height, width)  # UserError unless patches divide the frame
        rotary = trunk.rope(range(frames), height, width, x_t)
        times, text = trunk.times(t.unsqueeze(1) if t.ndim == 1 else t), trunk.text(cond.text_BLE)
        tokens = trunk.embed(x_t)
        tokens = self.run_blocks(trunk, tokens, times, text, rotary, FullSequence(), slice(None))
        return trunk.velocity(tokens, times.temb, height, width)
