"""Checks, before anything is written or trained, that data, models and processes fit."""

from __future__ import annotations

from pathlib import Path

from scd_sf.data.prompts import Prompts, PromptTable
from scd_sf.distributed import Ranks
from scd_sf.train.base import accumulation
from scd_sf.train.batches import TrainConfig
from scd_sf.types import UserError, VideoShape


def check_batches(cfg: TrainConfig, ranks: Ranks, size: int, root: Path) -> None:
    """UserError before anything is written if ``size`` samples and these processes do not give
    whole batches."""
    accumulation(cfg.global_batch, cfg.micro_batch, ranks.world)
    if size < cfg.global_batch:
        problem = f"{root}: {size} samples, fewer than train.global_batch={cfg.global_batch}"
        micro_batch = min(cfg.micro_batch, size // ranks.world)
        if micro_batch == 0:
            raise UserError(f"{problem}; take more samples, or fewer processes than {ranks.world}")
        processes_batch = micro_batch * ranks.world
        remedy = f"train.global_batch={size // processes_batch * processes_batch}"
        if micro_batch < cfg.micro_batch:
            remedy += f" train.micro_batch={micro_batch}"
        raise UserError(f"{problem}; use {remedy}, or more samples")


def check_shape(
    shape: VideoShape, where: Path | str, channels: int, patch: tuple[int, int], chunk: int
) -> None:
    """UserError before any training if clips of this latent shape do not fit the model."""
    if shape.channels != channels:
        raise UserError(
            f"{where}: latents have {shape.channels} channels, the model takes {channels}: encode the clips "
            "with the model's own VAE"
        )
    if shape.height % patch[0] or shape.width % patch[1]:
        raise UserError(
            f"{where}: latents of {shape.height}x{shape.width} do not split into patches of {patch[0]}x{patch[1]}: "
            f"height and width in pixels must be multiples of {shape.spatial * patch[0]} and {shape.spatial * patch[1]}"
        )
    if shape.frames % chunk:
        raise UserError(
            f"{where}: clips have {shape.frames} latent frames, which chunk={chunk} does not divide"
        )


def check_same_size(train: VideoShape, val: VideoShape, train_root: Path, val_root: Path) -> None:
    """UserError before any training if validation clips are of another size than the training
    clips."""
    sizes = [f"{shape.pixel_height}x{shape.pixel_width}" for shape in (train, val)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{val_root}: validation clips are {sizes[1]} (height x width), those of {train_root} are {sizes[0]}: "
            "encode both at one size"
        )


def check_text(prompts: PromptTable | Prompts, width: int) -> None:
    """UserError before any training if the prompts are encoded by another text encoder than the
    model's."""
    if prompts.width != width:
        raise UserError(
            f"{prompts.where}: text states are {prompts.width} wide, the model takes {width}: encode the prompts with "
            "the model's own text encoder"
        )
