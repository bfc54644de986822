"""P3: a block's tokens at every step as colours (paper Figure 2b, supplement Figure 3b).

The colours are three principal components of one frame's tokens. Each block has ONE basis, fitted
on all steps together, so that equal colours mean equal features at any step. Components become red,
green and blue between their 1st and 99th percentile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scd_sf.probes.figures import pictures_figure
from scd_sf.probes.result import ProbeResult
from scd_sf.probes.similarity import check_blocks, chosen_frames, collected, evenly_spaced
from scd_sf.probes.store import FeatureStore
from scd_sf.probes.subject import Subject
from scd_sf.types import check_within


@dataclass(frozen=True)
class PcaProbe:
    """Probe P3: principal components of the blocks' outputs as pictures."""

    frame: int = -1
    """Latent frame of the first clip; negative: from the end."""
    blocks: tuple[int, ...] = ()
    """Blocks that are drawn; empty: four, spread evenly."""
    steps: int = 8
    """Denoising steps that are drawn, as columns."""

    def __post_init__(self) -> None:
        check_within(self, {"steps": (1, 1000)}, "pca.")

    def check(self, subject: Subject) -> None:
        """UserError: a frame or block that does not exist, or blocks that do not run at every
        step."""
        subject.check_whole()
        chosen_frames((self.frame,), subject.shape.frames)
        check_blocks("pca.blocks", self.blocks, subject)


def pca(subject: Subject, cfg: PcaProbe) -> ProbeResult:
    """Pictures of the chosen blocks and steps, and how much of the variance the three components
    hold."""
    cfg.check(subject)
    subject = subject.first(1)
    frames = chosen_frames((cfg.frame,), subject.shape.frames)
    blocks = list(cfg.blocks) or evenly_spaced(len(subject.step_blocks), 4)
    steps = subject.sampler.steps
    columns = evenly_spaced(steps, cfg.steps)
    cfg_model = subject.model.cfg
    grid = (
        subject.shape.height // cfg_model.patch_height,
        subject.shape.width // cfg_model.patch_width,
    )
    with collected(subject, blocks, frames, list(range(subject.tokens))) as store:
        bases = {block: components(store, block, frames[0]) for block in blocks}
        pictures = {
            b: component_pictures(store, b, frames[0], bases[b][0], bases[b][1], grid)
            for b in blocks
        }
    shares = {str(block): [round(float(share), 6) for share in bases[block][2]] for block in blocks}
    colour_changes = {
        str(b): round(float((pictures[b][0] - pictures[b][-1]).abs().mean()), 6) for b in blocks
    }  # of colours in [0, 1], first against last step
    text = (
        f"Latent frame {frames[0]} of the first clip at {steps} steps, one basis per block over all of them. The "
        f"three components hold {100 * min(sum(s) for s in shares.values()):.0f} to "
        f"{100 * max(sum(s) for s in shares.values()):.0f} % of the variance; from the first to the last step the "
        "colours move by "
        + ", ".join(f"{value:.3f} (block {block})" for block, value in colour_changes.items())
        + " on average."
    )
    rows = [[pictures[block][step] for step in columns] for block in blocks]
    figures = {
        "frames": partial(
            pictures_figure,
            pictures=rows,
            rows=[f"block {b}" for b in blocks],
            columns=[f"step {s}" for s in columns],
        )
    }
    data: dict[str, object] = {
        "frame": frames[0],
        "steps": steps,
        "variance_share": shares,
        "first_to_last": colour_changes,
    }
    return ProbeResult("pca", "Principal components over all steps (P3)", text, data, figures)


def components(store: FeatureStore, block: int, frame: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean (E,), basis (E, 3), shares of the variance (3,)) of the first clip's tokens at all
    steps; the largest entry of a component is positive."""
    total: Tensor | None = None
    square: Tensor | None = None
    count = 0
    for tokens in store.tokens(block, frame):
        rows = tokens[0].flatten(0, 1)
        total = rows.sum(0) if total is None else total + rows.sum(0)
        square = rows.T @ rows if square is None else square + rows.T @ rows
        count += len(rows)
    assert total is not None and square is not None
    mean = total / count
    values, vectors = torch.linalg.eigh(square / count - torch.outer(mean, mean))
    basis = vectors[:, -3:].flip(1)
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    shares = values[-3:].flip(0).clamp(min=0) / values.clamp(min=0).sum().clamp(min=1e-300)
    return mean, basis * signs, shares


def component_pictures(
    store: FeatureStore, block: int, frame: int, mean: Tensor, basis: Tensor, grid: tuple[int, int]
) -> list[Tensor]:
    """One picture (h, w, 3) in [0, 1] per step, on one scale for all steps."""
    points = torch.stack(
        [(store.step(block, frame, step)[0] - mean) @ basis for step in range(store.steps)]
    )
    low, high = (torch.quantile(points.flatten(0, 1), q, dim=0) for q in (0.01, 0.99))
    scaled = ((points - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return [picture.reshape(*grid, -1).float() for picture in scaled]
