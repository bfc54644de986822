"""Models of the real sizes on the rehearsal's device, built once; the clip is Wan's at 832x480, 81
frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from rehearsal.fake_cuda import DEVICE, FakeCuda
from torch import Tensor, nn

from scd_sf.config import load_config
from scd_sf.diffusion.noise import generator
from scd_sf.distributed import Ranks
from scd_sf.models.build import ModelConfig, Student, build_model, build_student
from scd_sf.models.scd.transplant import TransplantConfig
from scd_sf.models.wan.transformer import WAN_14B, Wan, WanConfig
from scd_sf.nn import masks, rope
from scd_sf.train.base import StepInfo
from scd_sf.types import Conditioning, VideoShape

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs"
CLIP = VideoShape.from_pixels(81, 480, 832)
SHORT = replace(CLIP, frames=6)  # what streams repeats itself from the third chunk on
TEXT = 512  # tokens of a prompt
RANKS = Ranks(0, 1, 0, DEVICE)
CUDA = FakeCuda()
M = TypeVar("M", bound=nn.Module)


def forget_tables() -> None:
    """What steps share, so that no count depends on what ran before, and no other test meets a
    tensor of here."""
    for kept in (rope.rope_table, masks.block_mask, masks.dense_mask, masks.row_mask):
        kept.clear()
    rope._axis.cache_clear()


@cache
def student(config: str = "stage1_wan_1.3b", *changes: str) -> Student:
    """Wan 1.3B's student of a stage-1 configuration in bf16, as its engine runs it. Built inside
    the rehearsal."""
    with DEVICE:
        return in_bf16(build_student(model_config(config, *changes)))


def model_config(config: str = "stage1_wan_1.3b", *changes: str) -> ModelConfig:
    read = load_config(TransplantConfig, CONFIGS / f"{config}.yaml", ["base=x", "out=x", *changes])
    return ModelConfig(
        family=read.family, chunk=read.chunk, scd=replace(read.scd, chunk=read.chunk)
    )


@cache
def wan(config: WanConfig = WAN_14B) -> Wan:
    """The bidirectional model in bf16."""
    with DEVICE:
        model = build_model(ModelConfig(family="wan", wan=config))
    assert isinstance(model, Wan)
    return in_bf16(model)


def in_bf16(model: M) -> M:
    """As engines run it; made on the device, so that nothing is ever allocated."""
    return model.to(torch.bfloat16)


def prompts(batch: int = 1, width: int = 4096, length: int = TEXT) -> Conditioning:
    """On the host, as they are read."""
    return Conditioning(
        torch.randn(batch, 1, width, generator=generator(batch)).expand(batch, length, width)
    )


def clips(batch: int = 1, shape: VideoShape = CLIP) -> Tensor:
    """Noise-like latents on the device."""
    return torch.zeros(shape.latent(batch), device=DEVICE)


class Forward:
    """An engine without its backward pass."""

    micro_batches, skipped = 1, 0

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: Tensor) -> None:
        assert loss.requires_grad and loss.shape == () and loss.dtype == torch.float32

    def step(self) -> StepInfo:
        return StepInfo(stepped=True, grad_norm=1.0, finite=True, lr=0.0)


class Texts:
    """Prompts in words, and what is encoded of them, on the host."""

    negative = property(lambda self: prompts())

    def __len__(self) -> int:
        return 8

    def texts(self, indices: Sequence[int]) -> list[str]:
        return ["a red fox"] * len(indices)

    def conditioning(self, indices: Sequence[int]) -> Conditioning:
        return prompts(len(indices))
