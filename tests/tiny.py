"""Tiny models and batches shared by the tests: both student families, every SCD variant, seconds on
one slow core.

Parameters are re-drawn from a seeded generator (``redraw``), so that no zero or one of an init
hides an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scd_sf.models import build
from scd_sf.models.blocks import BlocksConfig, SkipConfig, set_blocks
from scd_sf.models.build import Student, build_scd
from scd_sf.models.causal import Causal
from scd_sf.models.dit import DitConfig
from scd_sf.models.interface import Corruption, FrameStreamer, Query, Stream
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.trunk import Trunk
from scd_sf.models.wan.transformer import Wan, WanConfig
from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.types import Conditioning

torch.set_num_threads(1)

CHANNELS, HEIGHT, WIDTH, TEXT, TEXT_LENGTH = 4, 4, 6, 8, 5
TOLD = 64  # frames that actions are given for
CFG = WanConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    text_dim=TEXT,
    freq_dim=16,
    ffn_dim=32,
    num_layers=6,
)
DIT = DitConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    freq_dim=16,
    ffn_dim=64,
    num_layers=6,
    patch_height=2,
    patch_width=2,
    num_actions=3,
    num_labels=2,
)
ENCODER, DECODER = (0, 1, 2, 3), (0, 1, 4, 5)
SKIP = SkipConfig(prefix=2, suffix=2, full_steps=2, steps=4, shift=1.0)  # all blocks above t = 5/8


@dataclass(frozen=True)
class Variant:
    """One student: ``family`` "causal" or "scd"; how SCD's context meets the chunk; how the causal
    blocks are run."""

    family: str
    chunk: int
    fusion: str = ""
    rope: str = "identical"
    prefix: str = "full"
    backbone: str = "wan"
    blocks: BlocksConfig = field(default_factory=BlocksConfig)

    def __str__(self) -> str:
        parts = [
            self.family if self.backbone == "wan" else f"dit-{self.family}",
            f"chunk{self.chunk}",
        ]
        parts += [self.fusion] if self.fusion else []
        parts += [self.rope, self.prefix] if self.fusion in ("paper", "junction") else []
        parts += ["diagonal"] if self.blocks.frame_diagonal else []
        parts += ["skip"] if self.blocks.skip else []
        return "-".join(parts)


def _variants() -> list[Variant]:
    """delta and channel have no prefix, so its position and caching are no choice there."""
    found = []
    for chunk in (1, 3):
        found.append(Variant("causal", chunk))
        found += [Variant("scd", chunk, fusion) for fusion in ("delta", "channel")]
        for fusion in ("paper", "junction"):
            found += [
                Variant("scd", chunk, fusion, rope, prefix)
                for rope in ("temporal", "identical")
                for prefix in ("full", "cached")
            ]
        found.append(Variant("causal", chunk, backbone="dit"))
        found.append(Variant("scd", chunk, "channel", backbone="dit"))
        for rope, prefix in (("temporal", "full"), ("identical", "full"), ("temporal", "cached")):
            found.append(Variant("scd", chunk, "paper", rope, prefix, "dit"))
    return found


VARIANTS = _variants()
WAN_VARIANTS = [v for v in VARIANTS if v.backbone == "wan"]
DIT_VARIANTS = [v for v in VARIANTS if v.backbone == "dit"]
SCD_VARIANTS = [v for v in VARIANTS if v.family == "scd"]
# Every family, fusion, prefix position and prefix kind once, chunks of 1 and 3 in turn; and one of
# each DiT.
SOME = [v for i, v in enumerate(WAN_VARIANTS) if i in (0, 2, 3, 6, 8, 9, 11, 12, 15, 18, 21)]
SOME += [v for i, v in enumerate(DIT_VARIANTS) if i in (0, 2, 6, 9)]
DIAGONAL, SKIPPING = (
    Variant("causal", 1, blocks=blocks) for blocks in (BlocksConfig(2), BlocksConfig(0, SKIP))
)
BOTH = Variant("causal", 3, backbone="dit", blocks=BlocksConfig(1, SKIP))
BLOCKS = [DIAGONAL, SKIPPING, BOTH]
VARIANTS += BLOCKS
SOME += BLOCKS
# Where the prefix's details cannot matter.
FEW = [
    v for v in SOME if v.fusion in ("", "delta") or (v.fusion, v.prefix) == ("junction", "cached")
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def redraw(model: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Every parameter anew, in the order of names: N(0, 1/fan_in) matrices, norms near 1, biases
    near 0."""
    rng = generator(seed)
    model.to(dtype)
    for name, parameter in sorted(model.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        if name.endswith("weight") and parameter.ndim == 1:
            drawn = 1 + 0.2 * drawn
        else:
            drawn *= parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_(drawn)


def wan(seed: int = 0, dtype: torch.dtype = torch.float64, cfg: WanConfig = CFG) -> Wan:
    """A bidirectional model."""
    model = Wan(cfg)
    redraw(model, seed, dtype)
    return model


@contextmanager
def double() -> Iterator[None]:
    """New parameters are fp64 inside: for what builds models itself, such as the transplant."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def scd_config(variant: Variant) -> ScdConfig:
    """From scratch the decoder's layers are its own, and its context shares the time of the
    frame."""
    if variant.backbone == "dit":
        time = "query" if variant.prefix == "cached" else "step"
        decoder = DecoderConfig(
            (4, 5), variant.fusion, variant.rope, variant.prefix, prefix_time=time
        )
        return ScdConfig(ENCODER, decoder, variant.chunk)
    return ScdConfig(
        ENCODER, DecoderConfig(DECODER, variant.fusion, variant.rope, variant.prefix), variant.chunk
    )


def student(variant: Variant, seed: int = 0, dtype: torch.dtype = torch.float64) -> Student:
    """A student of the variant's family."""
    cfg = CFG if variant.backbone == "wan" else DIT
    model: Student = Causal(cfg, variant.chunk)
    if variant.family == "scd":
        model = build_scd(cfg, scd_config(variant))
    set_blocks(model, variant.blocks)
    redraw(model, seed, dtype)
    return model


def set_checkpointing(model: Student | Wan, on: bool, recompute_attention: bool = True) -> None:
    """Activation checkpointing of every trunk."""
    trunks = [module for module in model.modules() if isinstance(module, Trunk)]
    build.set_checkpointing(trunks, on, recompute_attention)


def prompts(
    batch: int, seed: int = 0, dtype: torch.dtype = torch.float64, length: int = TEXT_LENGTH
) -> Conditioning:
    """Random prompts, actions (one of them null) and labels; each prompt's last token is padding,
    hence zero."""
    text = torch.randn(batch, length, TEXT, generator=generator(1000 + seed), dtype=torch.float64)
    text[:, -1] = 0
    rng = generator(1500 + seed)
    actions = torch.randint(-1, DIT.num_actions, (batch, TOLD), generator=rng)
    return Conditioning(
        text.to(dtype), actions, torch.randint(0, DIT.num_labels, (batch,), generator=rng)
    )


def latents(batch: int, frames: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(B, F, C, H, W), standard normal."""
    shape = (batch, frames, CHANNELS, HEIGHT, WIDTH)
    return torch.randn(shape, generator=generator(2000 + seed), dtype=torch.float64).to(dtype)


@dataclass
class Clip:
    """What one teacher-forced call needs; ``t`` is constant within a chunk."""

    x: Tensor
    cond: Conditioning
    eps: Tensor
    t: Tensor
    x_t: Tensor
    query: Query
    corruption: Corruption | None = None


def clip(
    chunk: int,
    *,
    chunks: int = 3,
    batch: int = 2,
    samples: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Clip:
    """A random clip with K noisy samples and, as in sampling, a pure-noise query."""
    frames = chunks * chunk
    x = latents(batch, frames, seed)
    eps = torch.stack([latents(batch, frames, seed + 10 + k) for k in range(samples)])
    t = torch.rand((samples, batch, chunks), generator=generator(seed + 20), dtype=torch.float64)
    t = t.float().double().repeat_interleave(chunk, -1)
    s = t[..., None, None, None]
    x_t = (1 - s) * x + s * eps
    query = Query(eps[0].to(dtype), torch.ones(batch, frames, dtype=dtype))
    return Clip(
        x.to(dtype), prompts(batch, seed, dtype), eps.to(dtype), t.to(dtype), x_t.to(dtype), query
    )


def stream(
    model: FrameStreamer,
    cond: Conditioning,
    x: Tensor | None = None,
    cache: CacheConfig | None = None,
) -> Stream:
    """A new stream; with ``x`` (B, chunk, C, H, W) at its first chunk."""
    begun = model.start(cond, (HEIGHT, WIDTH), cache)
    return begun if x is None else model.advance(begun, None, x)


def teacher_forced(model: Student, data: Clip, targets: list[int] | None = None) -> Tensor:
    """The model's velocities (K, B, M*chunk, C, H, W) on a clip."""
    return model.teacher_forced(
        data.x_t,
        data.t,
        data.x,
        data.cond,
        query=data.query,
        corruption=data.corruption,
        targets=targets,
    )


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The parameters' gradients by name, which are then cleared."""
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(
    left: dict[str, Tensor | None], right: dict[str, Tensor | None], tolerance: float
) -> None:
    """Equal sets of reached parameters and equal gradients, relative to each tensor's largest
    entry."""
    for name, gradient in left.items():
        other = right[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            scale = max(1.0, float(other.abs().max()))
            assert float((gradient - other).abs().max()) <= tolerance * scale, name
