"""Flow losses and videos of the same clips under the same noise, before and after a change of the
model.

Every clip's noise depends on its number and the seed alone, so that two measurements differ by the
change of the model alone; error bars are those of the difference. Letters: B clips, F latent
frames, C H W latent axes, T noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.data.frames import FrameClips
from scd_sf.data.latents import LatentClips
from scd_sf.diffusion.flow import add_noise, shift_time, velocity_target
from scd_sf.diffusion.noise import row_noise
from scd_sf.evaluation.curves import Line, curve_figure
from scd_sf.models.build import Student
from scd_sf.models.interface import Query
from scd_sf.models.wan.transformer import Wan
from scd_sf.probes.subject import Subject
from scd_sf.types import Conditioning, UserError, check_within, on_device

SEED_STRIDE = 1_000_003  # between the seeds of a clip


@dataclass(frozen=True)
class LossConfig:
    """A loss whose differences between models are small: the same clips, noise levels and noise for
    all."""

    clips: int = 24
    """Number of clips; 2 or more, because error bars are over clips."""
    levels: int = 5
    """Noise levels, spread over the training density."""
    shift: float | None = None
    """Timestep shift of the levels; null: the checkpoint's."""
    seeds: tuple[int, ...] = (0,)
    """One draw of noise for each."""
    batch: int = 8
    """Clips in one forward."""

    def __post_init__(self) -> None:
        if min(self.levels, len(self.seeds), self.batch) < 1 or self.clips < 2:
            raise UserError(
                "loss: levels, seeds and batch must be at least 1, clips 2 (error bars are over clips)"
            )
        check_within(self, {"levels": (1, 10_000), "shift": (1e-3, 1e3)}, "loss.")


def training_levels(count: int, shift: float) -> tuple[float, ...]:
    """Noise levels at the middle of ``count`` equal parts of the training density, t = shifted u, u
    uniform."""
    return tuple(shift_time((index + 0.5) / count, shift) for index in range(count))


@dataclass(frozen=True)
class FlowLosses:
    """True clips ``x_0`` (B, F, C, H, W) of the prompts ``cond``, and how they are noised."""

    x_0: Tensor
    cond: Conditioning
    levels: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    batch: int = 8

    @staticmethod
    def chosen(subject: Subject, cfg: LossConfig) -> tuple[LatentClips | FrameClips, list[int]]:
        """The subject's clips and the indices of those to use, spread over all that are long
        enough. UserError: no clips, or fewer than 2."""
        clips, frames = subject.clips, subject.shape.frames
        if clips is None:
            raise UserError(
                f"{subject.name}: a flow loss needs encoded clips; give them with data="
            )
        usable = clips.at_least(frames) if isinstance(clips, FrameClips) else range(len(clips))
        count = min(cfg.clips, len(usable))
        if count < 2:
            raise UserError(
                f"{clips.root}: {count} clips of {frames} latent frames; error bars need at least 2"
            )
        return clips, [usable[index * len(usable) // count] for index in range(count)]

    @classmethod
    def of(cls, subject: Subject, cfg: LossConfig) -> FlowLosses:
        """The losses of clips spread over all of the subject's. UserError: no clips, or fewer than
        2."""
        clips, indices = cls.chosen(subject, cfg)
        levels = training_levels(
            cfg.levels, subject.training_shift if cfg.shift is None else cfg.shift
        )
        if isinstance(clips, FrameClips):
            frames = clips.batch(indices, [0] * len(indices), subject.shape.frames)
            return cls(frames.latents_BFCHW, frames.cond, levels, cfg.seeds, cfg.batch)
        batch = clips.batch(indices)
        return cls(batch.latents_BFCHW, batch.text, levels, cfg.seeds, cfg.batch)

    @torch.no_grad()
    def measure(self, model: Student | Wan) -> Tensor:
        """Flow loss of every clip at every level, mean over seeds: (T, B), fp64 on the CPU.

        A bidirectional model denoises whole clips; a student is teacher-forced, with a query of
        pure noise as in sampling and no corruption of its context.
        """
        table = torch.zeros(len(self.levels), len(self.x_0), dtype=torch.float64)
        for seed in self.seeds:
            for start in range(0, len(self.x_0), self.batch):
                rows = slice(start, min(start + self.batch, len(self.x_0)))
                table[:, rows] += self._of_rows(model, rows, seed) / len(self.seeds)
        return table

    def _of_rows(self, model: Student | Wan, rows: slice, seed: int) -> Tensor:
        """Flow loss (T, rows) of some clips under one seed."""
        device = next(model.parameters()).device
        errors: list[Tensor] = []
        x_0, cond = on_device(self.x_0[rows], device), self.cond.rows(rows).to(device)
        noise_like = row_noise(
            [SEED_STRIDE * seed + number for number in range(rows.start, rows.stop)]
        )
        eps, query = noise_like(x_0), noise_like(x_0)
        for level in self.levels:
            t = torch.full(x_0.shape[:2], level, device=device)
            x_t = add_noise(x_0, eps, t)
            if isinstance(model, Wan):
                velocity = model(x_t, t[:, 0], cond)
            else:
                encoder_query = Query(query, torch.ones_like(t)) if model.needs_query else None
                velocities = model.teacher_forced(
                    x_t[None], t[None], x_0, cond, query=encoder_query
                )
                velocity = velocities[0]
            difference = velocity.float() - velocity_target(x_0, eps).float()
            errors.append(difference.pow(2).mean(dim=(1, 2, 3, 4)).double().cpu())
        return torch.stack(errors)


@dataclass(frozen=True)
class Change:
    """A relative change (0.5: by half), with its standard error over clips."""

    mean: float
    error: float

    def __str__(self) -> str:
        """In percent."""
        return f"{100 * self.mean:+.1f} ± {100 * self.error:.1f} %"


NONE = Change(0.0, 0.0)


def increase(base_TB: Tensor, changed_TB: Tensor) -> Change:
    """Of the mean over levels and clips, mean(changed) / mean(base) - 1. The error is that of this
    ratio of means over paired clips (delta method), in which a change that all clips share
    cancels."""
    base, changed = base_TB.mean(0), changed_TB.mean(0)
    ratio = changed.mean() / base.mean()
    error = (changed - ratio * base).std() / (len(base) ** 0.5 * base.mean())
    return Change(float(ratio) - 1, float(error))


def increases(base_TB: Tensor, changed_TB: Tensor) -> tuple[Change, ...]:
    """:func:`increase` at each level."""
    return tuple(
        increase(base_TB[level : level + 1], changed_TB[level : level + 1])
        for level in range(len(base_TB))
    )


def moved(base: Tensor, other: Tensor) -> Change:
    """How far the clips ``other`` (B, ...) lie from ``base``: |other - base| / |base| of each, its
    mean and error. UserError: fewer than 2 clips."""
    if len(base) < 2:
        raise UserError("how far videos move has error bars over videos: give at least 2 prompts")
    norms = base.flatten(1).double().norm(dim=1)
    distances = (other - base).flatten(1).double().norm(dim=1) / norms
    return Change(float(distances.mean()), float(distances.std() / len(distances) ** 0.5))


def changes_figure(
    path: Path,
    lines: Mapping[str, Sequence[Change]],
    across: Sequence[float],
    x: str,
    y: str = "relative change, %",
) -> Path:
    """Changes in percent with their error bars against ``across``, as a PNG. ``x`` and ``y``: the
    axes' titles."""
    curves: dict[str, Line] = {
        name: (
            across,
            [100 * change.mean for change in changes],
            [100 * change.error for change in changes],
        )
        for name, changes in lines.items()
    }
    return curve_figure(path, curves, x, y)
