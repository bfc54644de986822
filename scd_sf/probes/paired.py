"""The same clips under the same noise, before and after something is changed in a model: flow losses and samples.

Every clip's noise depends on its number and the seed alone: what two measurements differ by is the change, and error
bars are those of the difference. Letters: B clips, F latent frames, C H W latent axes, T noise levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scd_sf.diffusion.flow import add_noise, shift_time, velocity_target
from scd_sf.diffusion.solvers import Sampler
from scd_sf.models.build import Student
from scd_sf.models.generator import Query
from scd_sf.models.wan import Wan
from scd_sf.rollout import row_noise, sample, sample_bidirectional
from scd_sf.types import Conditioning, UserError

SEED_STRIDE = 1_000_003  # between the seeds of a clip


def training_levels(count: int, shift: float) -> tuple[float, ...]:
    """``count`` noise levels at the middle of equal parts of the training density, t = shifted u, u uniform. Levels
    outside it give garbage (spec/scd.md 3, pitfall ii). UserError: none are asked for."""
    if count < 1:
        raise UserError(f"levels is {count}; it must be at least 1")
    return tuple(shift_time((index + 0.5) / count, shift) for index in range(count))


@torch.no_grad()
def clip_losses(
    model: Student | Wan, x_0: Tensor, cond: Conditioning, levels: Sequence[float], seed: int = 0, batch: int = 8
) -> Tensor:
    """Flow loss of every clip (B, F, C, H, W) at every level: (T, B), fp64 on the CPU.

    A bidirectional model denoises whole clips; a student is teacher-forced, with a query of pure noise as in sampling
    and no corruption of its context. ``batch``: clips in one forward.
    """
    device = next(model.parameters()).device
    table = torch.empty(len(levels), len(x_0), dtype=torch.float64)
    for start in range(0, len(x_0), batch):
        rows = slice(start, min(start + batch, len(x_0)))
        x, told = x_0[rows].to(device), cond.rows(rows).to(device)
        noise_like = row_noise(_seeds(rows, seed))
        eps, query = noise_like(x), noise_like(x)
        target = velocity_target(x, eps)
        for place, level in enumerate(levels):
            t = torch.full(x.shape[:2], level, device=device)
            x_t = add_noise(x, eps, t)
            if isinstance(model, Wan):
                velocity = model(x_t, t[:, 0], told)
            else:
                given = Query(query, torch.ones_like(t)) if model.needs_query else Query()
                velocity = model.teacher_forced(x_t[None], t[None], x, told, query=given)[0]
            errors = (velocity.float() - target.float()).pow(2).mean(dim=(1, 2, 3, 4))
            table[place, rows] = errors.double().cpu()
    return table


def losses_of_seeds(
    model: Student | Wan,
    x_0: Tensor,
    cond: Conditioning,
    levels: Sequence[float],
    seeds: Sequence[int],
    batch: int = 8,
) -> Tensor:
    """:func:`clip_losses`, mean over noise ``seeds``. UserError: fewer than 2 clips (error bars are over clips)."""
    if len(x_0) < 2 or not seeds:
        raise UserError(f"{len(x_0)} clips, {len(seeds)} seeds: error bars need at least 2 clips and 1 seed")
    return torch.stack([clip_losses(model, x_0, cond, levels, seed, batch) for seed in seeds]).mean(0)


def _seeds(rows: slice, seed: int) -> list[int]:
    return [SEED_STRIDE * seed + number for number in range(rows.start, rows.stop)]


@torch.no_grad()
def samples(
    model: Student | Wan, like: Tensor, cond: Conditioning, sampler: Sampler, seed: int = 0, batch: int = 8
) -> Tensor:
    """One clip of latents for each prompt, of the number and shape of ``like`` (B, F, C, H, W), on the CPU."""
    device, parts = next(model.parameters()).device, []
    for start in range(0, len(like), batch):
        rows = slice(start, min(start + batch, len(like)))
        told, (frames, channels, height, width) = cond.rows(rows).to(device), like.shape[1:]
        draw = sample_bidirectional if isinstance(model, Wan) else sample
        shape = (frames, channels, height, width)
        parts.append(draw(model, told, shape, sampler, _seeds(rows, seed), device).cpu())  # type: ignore[arg-type]
    return torch.cat(parts)


@dataclass(frozen=True)
class Change:
    """A relative change (0.5: by half), with its standard error over clips."""

    mean: float
    error: float


def moved(base: Tensor, other: Tensor) -> Change:
    """How far the clips ``other`` (B, ...) lie from ``base``: |other - base| / |base| of each, its mean and error."""
    distances = (other - base).flatten(1).double().norm(dim=1) / base.flatten(1).double().norm(dim=1)
    return Change(float(distances.mean()), float(distances.std() / len(distances) ** 0.5))


def increase(base_TB: Tensor, changed_TB: Tensor) -> Change:
    """Of the mean over levels and clips, mean(changed) / mean(base) - 1. The error is that of this ratio of means over
    paired clips (delta method): noise that both share falls out."""
    base, changed = base_TB.mean(0), changed_TB.mean(0)
    ratio = changed.mean() / base.mean()
    residual = changed - ratio * base
    error = residual.std() / (len(base) ** 0.5 * base.mean())
    return Change(float(ratio) - 1, float(error))
