"""The diffusion transformer of the models trained from scratch: Causal DiT and SCD, sizes B and M
(paper C.1, Table 2).

What differs from Wan: adaLN-zero projections in every block, q and k normalised per head, FLUX's
three-axis RoPE (a quarter of a head for time), actions and labels added to the time's embedding, no
text. Finished frames are marked by a timestep of about -1. The models are
:class:`~scd_sf.models.causal.Causal` and :class:`~scd_sf.models.scd.scratch.ScdScratch`. Letters: B
batch, F frames, L tokens, E width, R decoder rows, n frames of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scd_sf.models.trunk import SIZES, TwoLinears, num_patches, sinusoid, unpatchify
from scd_sf.nn.layers import DitBlock, LayerNorm, modulate, upcast
from scd_sf.nn.rope import Axes
from scd_sf.types import Conditioning, UserError, VideoShape, check_within

INIT_STD = 0.02


@dataclass(frozen=True)
class DitConfig:
    """Geometry; the defaults are size B on Minecraft's latents (8x8x32, 64 tokens a frame)."""

    num_attention_heads: int = 12
    """Attention heads."""
    attention_head_dim: int = 64
    """Width of a head; a multiple of 16."""
    in_channels: int = 32
    """Channels of the latents."""
    out_channels: int = 32
    """The same as ``in_channels``."""
    freq_dim: int = 256
    """Width of the sinusoidal embedding of the time."""
    ffn_dim: int = 3072
    """Width of the feed-forward layers."""
    num_layers: int = 12
    """Layers; of SCD, those of encoder and decoder together."""
    patch_height: int = 1
    """Latent rows of a token."""
    patch_width: int = 1
    """Latent columns of a token."""
    num_actions: int = 0
    """Actions of each frame; the null action comes on top; 0: no actions."""
    num_labels: int = 0
    """Labels of a clip; the null label comes on top; 0: no labels."""
    eps: float = 1e-6
    """Added to variances in the norms."""

    def __post_init__(self) -> None:
        small_fields = [
            n
            for n in ("num_attention_heads", "ffn_dim", "num_layers", "in_channels")
            if getattr(self, n) < 1
        ]
        if small_fields:
            raise UserError(
                f"dit.{small_fields[0]} is {getattr(self, small_fields[0])}; it must be at least 1"
            )
        check_within(self, {**SIZES, "num_actions": (0, 2**20), "num_labels": (0, 2**20)}, "dit.")
        if self.attention_head_dim % 16:
            raise UserError(
                f"dit.attention_head_dim is {self.attention_head_dim}; its RoPE needs a multiple of 16"
            )
        if self.in_channels != self.out_channels:
            raise UserError(
                f"dit.out_channels is {self.out_channels}; it must be in_channels, {self.in_channels}"
            )
        if min(self.num_actions, self.num_labels) < 0:
            raise UserError("dit.num_actions and dit.num_labels must be at least 0")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def text_dim(self) -> int:
        return 0

    @property
    def rope_axes(self) -> Axes:
        """FLUX's split: 64 -> (16, 24, 24)."""
        part = self.attention_head_dim // 8
        return 2 * part, 3 * part, 3 * part

    @property
    def clean_time(self) -> float:
        """Timestep -0.98 of 1000: the released code's -1, as a number that is exact in every
        dtype."""
        return -(2.0**-10)

    def tokens(self, height: int, width: int) -> int:
        """Tokens of one latent frame; UserError if the patch does not divide the frame."""
        return num_patches(height, width, self.patch_height, self.patch_width)

    def clip_tokens(self, shape: VideoShape) -> int:
        """Tokens of a whole clip of latents."""
        return shape.frames * self.tokens(shape.height, shape.width)

    def block(self) -> nn.Module:
        return DitBlock(self.width, self.ffn_dim, self.num_attention_heads, self.eps)

    def conditioner(self, with_text: bool) -> nn.Module:
        return DitConditioner(self)

    def head(self) -> nn.Module:
        return DitHead(self)


class DitConditioner(nn.Module):
    """Embeddings of time, action and label; their sum modulates the blocks."""

    def __init__(self, cfg: DitConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.time_embedder = TwoLinears(cfg.freq_dim, cfg.width)
        self.action_embedding = (
            nn.Embedding(cfg.num_actions + 1, cfg.width) if cfg.num_actions else None
        )
        self.label_embedding = (
            nn.Embedding(cfg.num_labels + 1, cfg.width) if cfg.num_labels else None
        )
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=INIT_STD)

    def time(self, t_BF: Tensor, signal_BFE: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> (temb, silu(temb)), both (B, F, E)."""
        embedder = self.time_embedder
        angles = sinusoid(t_BF.double(), self.cfg.freq_dim, embedder.linear_1.weight.dtype)
        temb = embedder.linear_2(F.silu(embedder.linear_1(angles)))
        if signal_BFE is not None:
            temb = temb + signal_BFE
        return temb, F.silu(temb)

    def text(self, text_BLE: Tensor) -> Tensor:
        """The text itself: these models are given none, and their blocks ignore it."""
        return text_BLE

    def signal(self, cond: Conditioning, decoder: bool) -> Tensor | None:
        """Embedded actions (B, F, E) plus labels (B, 1, E); -1 is the null action or label.
        UserError: missing ones."""
        actions = cond.actions_BF
        if decoder and cond.decoder_actions_BF is not None:
            actions = cond.decoder_actions_BF
        parts = []
        for name, table, indices in (
            ("action", self.action_embedding, actions),
            (
                "label",
                self.label_embedding,
                None if cond.labels_B is None else cond.labels_B.unsqueeze(1),
            ),
        ):
            if table is None:
                continue
            if indices is None:
                raise UserError(
                    f"the model is told {name}s and none were given; use -1 for the null {name}"
                )
            null = table.num_embeddings - 1
            parts.append(table(torch.where(indices < 0, null, indices)))
        return sum(parts[1:], parts[0]) if parts else None


class DitHead(nn.Module):
    """adaLN and the projection to velocity patches, both starting at zero."""

    def __init__(self, cfg: DitConfig) -> None:
        super().__init__()
        self.patch, self.channels = (cfg.patch_height, cfg.patch_width), cfg.out_channels
        self.norm_out = LayerNorm(cfg.width, cfg.eps, affine=False)
        self.adaln = nn.Linear(cfg.width, 2 * cfg.width)
        self.proj_out = nn.Linear(cfg.width, cfg.out_channels * math.prod(self.patch))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BLE: Tensor, temb_BFE: Tensor, height: int, width: int) -> Tensor:
        """-> velocity (B, F, C, H, W), at least fp32."""
        shift, scale = upcast(self.adaln(F.silu(temb_BFE))).unsqueeze(2).chunk(2, -1)
        x = modulate(self.norm_out(x_BLE), scale, shift, temb_BFE.shape[1])
        return unpatchify(
            upcast(self.proj_out(x.to(x_BLE.dtype))), self.patch, self.channels, height, width
        )
