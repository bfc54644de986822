"""The parts that all models share: patches, conditioning, the stack of blocks, the velocity head.

A config makes the parts: ``WanConfig`` (wan/transformer.py), or ``DitConfig`` (dit.py) for the
models trained from scratch. Letters: B batch, F latent frames, C channels, H W latent height and
width, L tokens, E width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from scd_sf.nn.attention import AttentionContext
from scd_sf.nn.kv_cache import KV
from scd_sf.nn.layers import WanBlock, upcast
from scd_sf.nn.rope import Axes, Rotary, rope_table
from scd_sf.types import Conditioning, UserError, VideoShape

Text = Tensor | Sequence[KV]  # the embedded prompt, or its K/V in every block


class Conditioner(Protocol):
    """Embeddings of time, text, actions and labels."""

    def time(self, t_BF: Tensor, signal_BFE: Tensor | None) -> tuple[Tensor, Tensor]:
        """t in [0, 1] (or the config's ``clean_time``) -> (embedding (B, F, E), what the blocks are
        modulated by)."""
        ...

    def text(self, text_BLE: Tensor) -> Tensor: ...

    def signal(self, cond: Conditioning, decoder: bool) -> Tensor | None:
        """Actions and labels, (B, F, E) or (B, 1, E) to be added to the time's embedding; None:
        there are none."""
        ...


class TrunkConfig(Protocol):
    """Geometry of a transformer, and the maker of its parts."""

    @property
    def in_channels(self) -> int: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def patch_height(self) -> int: ...
    @property
    def patch_width(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def text_dim(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def rope_axes(self) -> Axes: ...
    @property
    def clean_time(self) -> float:
        """The time that marks finished frames."""
        ...

    def tokens(self, height: int, width: int) -> int: ...
    def clip_tokens(self, shape: VideoShape) -> int: ...
    def block(self) -> nn.Module: ...
    def conditioner(self, with_text: bool) -> nn.Module: ...
    def head(self) -> nn.Module: ...


# Limits of every transformer: above any published one, and low enough to compute sizes.
SIZES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("num_attention_heads", "num_layers", "patch_height", "patch_width"), (1, 2**12)
    ),
    **dict.fromkeys(("attention_head_dim", "in_channels", "out_channels", "freq_dim"), (1, 2**16)),
    "ffn_dim": (1, 2**20),
    "eps": (0, 1),
}


def num_patches(height: int, width: int, patch_height: int, patch_width: int) -> int:
    """Number of patches of a latent frame. UserError if they do not divide it."""
    if height % patch_height or width % patch_width:
        raise UserError(
            f"latent frame {height}x{width} is not divisible by the patch {patch_height}x{patch_width}: "
            f"choose pixel sizes whose latents are multiples of {patch_height}x{patch_width}"
        )
    return (height // patch_height) * (width // patch_width)


class PatchEmbedding(nn.Module):
    """Non-overlapping 1 x ph x pw patches -> width; the weight has diffusers' Conv3d shape (E, C,
    1, ph, pw)."""

    def __init__(self, cfg: TrunkConfig) -> None:
        super().__init__()
        self.patch = (cfg.patch_height, cfg.patch_width)
        conv = nn.Conv3d(cfg.in_channels, cfg.width, (1, *self.patch))
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x_BFCHW: Tensor) -> Tensor:
        """-> (B, F * tokens per frame, E)."""
        ph, pw = self.patch
        b, f, c, h, w = x_BFCHW.shape
        x = (
            x_BFCHW.reshape(b, f, c, h // ph, ph, w // pw, pw)
            .permute(0, 1, 3, 5, 2, 4, 6)
            .reshape(b, -1, c * ph * pw)
        )
        return F.linear(x.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class TwoLinears(nn.Module):
    """Two linear layers. The caller applies the activation between them."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)


def sinusoid(t_BF: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """cos and sin of 1000 t at ``dim`` / 2 frequencies, computed in at least fp32: (B, F) -> (B, F,
    dim)."""
    half, t = dim // 2, upcast(t_BF)
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, device=t.device, dtype=t.dtype) / half
    )
    angles = (1000 * t).unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def unpatchify(
    out_BLP: Tensor, patch: tuple[int, int], channels: int, height: int, width: int
) -> Tensor:
    """Patches, channels fastest, of frames of height x width -> (B, F, C, H, W)."""
    ph, pw = patch
    out = out_BLP.unflatten(-1, (ph, pw, channels)).unflatten(1, (-1, height // ph, width // pw))
    return out.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class Times(NamedTuple):
    """Per-frame conditioning: the times t (B, F), their embedding temb (B, F, E) for the head, and
    what modulates the blocks: (B, F, 6, E) for Wan's, (B, F, E) for blocks with projections of
    their own."""

    t: Tensor
    temb: Tensor
    mod: Tensor


class Trunk(nn.Module):
    """A stack of blocks with its own embeddings. ``layers`` are the layers of the base model its
    blocks come from.

    ``checkpointing`` keeps of each block its input alone and computes the rest again for the
    backward pass; without ``recompute_attention`` attention outputs are kept too (SDPA's;
    FlexAttention is computed again all the same).
    """

    def __init__(
        self,
        cfg: TrunkConfig,
        layers: Sequence[int],
        *,
        with_text: bool = True,
        with_head: bool = True,
    ) -> None:
        super().__init__()
        self.cfg, self.layers = cfg, tuple(layers)
        self.checkpointing, self.recompute_attention = False, True
        self.patch_embedding = PatchEmbedding(cfg)
        self.condition_embedder = cfg.conditioner(with_text)
        self.blocks = nn.ModuleList(cfg.block() for _ in layers)
        self.head = cfg.head() if with_head else None

    def embed(self, x_BFCHW: Tensor) -> Tensor:
        """Latents -> tokens (B, L, E)."""
        tokens: Tensor = self.patch_embedding(x_BFCHW)
        return tokens

    @property
    def conditioner(self) -> Conditioner:
        return self.condition_embedder  # type: ignore[return-value]  # a module that the config made

    def times(self, t_BF: Tensor, signal_BFE: Tensor | None = None) -> Times:
        """:class:`Times` of frames at t in [0, 1] (or the config's ``clean_time``). ``signal`` is
        the :meth:`signal` of these frames."""
        return Times(t_BF, *self.conditioner.time(t_BF, signal_BFE))

    def clean_times(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """The time of finished frames, (rows, frames), in at least fp32."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.full(tuple(shape), self.cfg.clean_time, device=like.device, dtype=dtype)

    def signal(self, cond: Conditioning, decoder: bool = False) -> Tensor | None:
        """Actions and labels as (B, F, E), one vector per frame; None: the model has none."""
        return self.conditioner.signal(cond, decoder)

    def text(self, text_BLE: Tensor) -> Tensor:
        """Token states of a prompt (B, L, text_dim) -> embedded (B, L, E)."""
        return self.conditioner.text(text_BLE)

    def text_kv(self, embedded_BLE: Tensor) -> Text:
        """Cross-attention K/V of every block, once per prompt; without such blocks the (empty) text
        itself."""
        kv = tuple(
            block.attn2.kv(embedded_BLE) for block in self.blocks if isinstance(block, WanBlock)
        )
        return kv or embedded_BLE

    def rope(self, frames: Sequence[int], height: int, width: int, like: Tensor) -> Rotary:
        """Positions of whole frames, as a table on ``like``'s device."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        grid = (height // self.cfg.patch_height, width // self.cfg.patch_width)
        return rope_table(tuple(frames), *grid, self.cfg.rope_axes, like.device, dtype)

    def run(
        self,
        x_BLE: Tensor,
        mod_BF6E: Tensor,
        text: Text,
        rotary: Rotary,
        attend: AttentionContext,
        span: slice = slice(None),
        keep: int | None = None,
    ) -> Tensor:
        """Tokens through the blocks of ``span`` in order -> tokens.

        ``mod``: :class:`Times`. ``text``: the embedded prompt, or the K/V of all blocks. ``keep``:
        return the last ``keep`` frames (of mod's F) alone; the last block computes no more than
        that needs.
        """
        indices = range(len(self.blocks))[span]
        context = noop_context_fn if self.recompute_attention else _keep_attention
        for index in indices:
            block_text = text if isinstance(text, Tensor) else text[index]
            block_keep = keep if index == indices[-1] else None
            arguments = (x_BLE, mod_BF6E, block_text, rotary, attend, index, block_keep)
            if self.checkpointing and torch.is_grad_enabled():
                x_BLE = checkpoint(
                    self.blocks[index], *arguments, use_reentrant=False, context_fn=context
                )
            else:
                x_BLE = self.blocks[index](*arguments)
        return x_BLE

    def forward(
        self,
        x_BFCHW: Tensor,
        t_BF: Tensor,
        text: Text,
        rotary: Rotary,
        attend: AttentionContext,
        span: slice = slice(None),
        keep: int | None = None,
        signal_BFE: Tensor | None = None,
    ) -> Tensor:
        """Latents at their times through the blocks -> tokens: :meth:`embed`, :meth:`times` and
        :meth:`run`."""
        mod = self.times(t_BF, signal_BFE).mod
        return self.run(self.embed(x_BFCHW), mod, text, rotary, attend, span, keep)

    def velocity(self, x_BLE: Tensor, temb_BFE: Tensor, height: int, width: int) -> Tensor:
        """Tokens of frames of (height, width) -> their velocity (B, F, C, H, W), at least fp32."""
        assert self.head is not None, "this trunk was built without a head"
        out: Tensor = self.head(x_BLE, temb_BFE, height, width)
        return out


class RunBlocks(Protocol):
    """How a whole model runs the blocks of its trunk: :func:`run_all`, or by a schedule
    (blocks.py)."""

    def __call__(
        self,
        trunk: Trunk,
        x_BLE: Tensor,
        times: Times,
        text: Text,
        rotary: Rotary,
        attend: AttentionContext,
        span: slice,
    ) -> Tensor: ...


def run_all(
    trunk: Trunk,
    x_BLE: Tensor,
    times: Times,
    text: Text,
    rotary: Rotary,
    attend: AttentionContext,
    span: slice,
) -> Tensor:
    """Every block on every frame."""
    return trunk.run(x_BLE, times.mod, text, rotary, attend, span)


_SDPA = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def _keep_attention() -> Any:
    """Checkpointing's policy: save what these return, compute everything else again."""
    return create_selective_checkpoint_contexts(_SDPA)
