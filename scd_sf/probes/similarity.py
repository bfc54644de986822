"""P1, P2: similarity of a block's features of one frame between denoising steps (paper Figure 2a,
supplement Figures 2a, 2b, 3a).

For steps s and s', f the features of a frame (tokens x width), and means over the frame's tokens and the clips:
  cosine      of f_s and f_s' per token
  centred     the same after subtracting each step's mean over tokens, because residual streams have a large common
              part that makes unrelated features similar
  mse         of f_s - f_s' (the supplement's squared distance, per number)
  relative    |f_s - f_s'| / sqrt((|f_s|^2 + |f_s'|^2) / 2): 0 equal, 1.41 unrelated
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.probes.figures import matrices_figure, panels_figure
from scd_sf.probes.result import ProbeResult, rounded
from scd_sf.probes.store import FLOAT, FeatureStore
from scd_sf.probes.subject import Subject
from scd_sf.probes.watch import Place, watch_features
from scd_sf.types import UserError, check_within, on_device

GB = 1e9
MEASURES = ("cosine", "centred", "mse", "relative")


@dataclass(frozen=True)
class SimilarityProbe:
    """Probes P1 and P2: how alike a block's outputs are at two denoising steps.

    While it runs, steps x tokens x width x 4 bytes per block, frame and clip lie under TMPDIR (2.4
    GB for Wan 1.3B, 50 steps, 256 tokens).
    """

    frames: tuple[int, ...] = (-1,)
    """Latent frames to compare; negative: from the end."""
    tokens: int = 256
    """Tokens of a frame, spread evenly; 0: all."""
    shown: tuple[int, ...] = ()
    """Blocks whose matrices are drawn; empty: seven, spread evenly, as in the supplement."""

    def __post_init__(self) -> None:
        check_within(self, {"tokens": (0, 2**24)}, "similarity.")

    def check(self, subject: Subject) -> None:
        """UserError: a frame or block that does not exist, or blocks that do not run at every
        step."""
        subject.check_whole()
        chosen_frames(self.frames, subject.shape.frames)
        check_blocks("similarity.shown", self.shown, subject)


def chosen_frames(frames: tuple[int, ...], total: int) -> list[int]:
    """The frames as sorted indices from 0, each once. UserError: none, or one outside the clip."""
    invalid_frames = [frame for frame in frames if not -total <= frame < total]
    if invalid_frames or not frames:
        raise UserError(
            f"frames is {list(frames)}: the clip has latent frames 0..{total - 1}; choose some of them"
        )
    return sorted({frame % total for frame in frames})


def evenly_spaced(total: int, count: int) -> list[int]:
    """``count`` of ``total`` indices, evenly spaced from the first to the last; all of them for a
    ``count`` of 0 or beyond ``total``."""
    if count <= 0 or count >= total:
        return list(range(total))
    return sorted({round(place * (total - 1) / max(1, count - 1)) for place in range(count)})


def check_blocks(field: str, blocks: Sequence[int], subject: Subject) -> None:
    """UserError: one of the blocks is not a step block."""
    total = len(subject.step_blocks)
    if invalid_blocks := [block for block in blocks if not 0 <= block < total]:
        raise UserError(f"{field}: {invalid_blocks}; the model has step blocks 0..{total - 1}")


def similarity(subject: Subject, cfg: SimilarityProbe) -> ProbeResult:
    """Matrices S x S of every step block, averaged over clips and frames, and their means by block.
    UserError: as :meth:`SimilarityProbe.check`, or no space on disk."""
    cfg.check(subject)
    frames = chosen_frames(cfg.frames, subject.shape.frames)
    blocks = list(range(len(subject.step_blocks)))
    tokens = evenly_spaced(subject.tokens, cfg.tokens)
    drawn_blocks = cfg.shown or evenly_spaced(len(blocks), 7)
    with collected(subject, blocks, frames, tokens) as store:
        matrices = {block: step_matrices(store, block, frames) for block in blocks}
    means = {
        measure: [round(float(matrices[b][measure].mean()), 6) for b in blocks]
        for measure in MEASURES
    }
    common_shares = [round(float(matrices[block]["common"]), 6) for block in blocks]
    data: dict[str, object] = {
        "steps": subject.sampler.steps,
        "frames": frames,
        "tokens": len(tokens),
        "clips": len(subject.seeds),
        "mean": means,
        "common_share": common_shares,
        "matrices": {str(b): {m: rounded(matrices[b][m]) for m in MEASURES} for b in blocks},
    }
    low = min(range(len(blocks)), key=lambda b: means["relative"][b])
    high = max(range(len(blocks)), key=lambda b: means["relative"][b])
    text = (
        f"Features of {len(frames)} latent frame(s), {len(subject.seeds)} clip(s), {subject.sampler.steps} steps of "
        f"{subject.sampler.name}. Mean over all pairs of steps: the cosine lies between {min(means['cosine']):.3f} and "
        f"{max(means['cosine']):.3f} over the blocks, the mean-centred cosine between {min(means['centred']):.3f} and "
        f"{max(means['centred']):.3f}; relative distance is least in block {low} ({means['relative'][low]:.3f}) and "
        f"largest in block {high} ({means['relative'][high]:.3f}). The mean token, common to all and the reason for "
        f"the second measure, holds {100 * min(common_shares):.0f} to {100 * max(common_shares):.0f} % of the "
        "mean square."
    )
    figures = {
        "matrices": partial(
            matrices_figure,
            rows={m: [matrices[b][m] for b in drawn_blocks] for m in MEASURES},
            names=[f"block {b}" for b in drawn_blocks],
            axes_title="denoising step against denoising step, 0: from pure noise",
        ),
        "mean": partial(
            panels_figure,
            panels={m: {"mean over pairs of steps": means[m]} for m in MEASURES},
            x="block",
        ),
    }
    return ProbeResult("similarity", "Step-step similarity (P1, P2)", text, data, figures)


@contextmanager
def collected(
    subject: Subject, blocks: list[int], frames: list[int], tokens: list[int]
) -> Iterator[FeatureStore]:
    """The features of one rollout, on disk until the end of the context. UserError: the disk
    has no space for them."""
    steps, width = subject.sampler.steps, subject.model.cfg.width
    needed_bytes = (
        len(blocks) * len(frames) * steps * len(subject.seeds) * len(tokens) * width * FLOAT
    )
    with tempfile.TemporaryDirectory(prefix="scd-probe-") as folder:
        if (free_bytes := shutil.disk_usage(folder).free) < needed_bytes:
            raise UserError(
                f"{folder}: the features take {needed_bytes / GB:.1f} GB, {free_bytes / GB:.1f} are free; "
                "set TMPDIR to another disk, or look at fewer tokens, frames, blocks or clips"
            )
        with FeatureStore(Path(folder), steps) as store:
            collect_features(subject, blocks, frames, tokens, store)
            yield store


def collect_features(
    subject: Subject, blocks: list[int], frames: list[int], tokens: list[int], store: FeatureStore
) -> None:
    """Run one rollout and write the features of these blocks, frames and tokens to ``store``."""
    per_frame, token_indices = subject.tokens, on_device(torch.tensor(tokens), subject.device)

    def write_tokens(place: Place, block: int, x_BLE: Tensor) -> None:
        assert place.step is not None
        for frame in frames:
            if frame // subject.chunk == place.chunk:
                start = frame % subject.chunk * per_frame
                store.write(
                    block,
                    frame,
                    place.step,
                    x_BLE[:, start : start + per_frame].index_select(1, token_indices),
                )

    watch_features(subject, blocks, write_tokens)


def step_matrices(store: FeatureStore, block: int, frames: list[int]) -> dict[str, Tensor]:
    """The four measures as fp64 (S, S), and ``common``: the share of the mean token in the mean
    square."""
    sums: dict[str, Tensor] = {}
    for frame in frames:
        mean = store.means[block, frame].unsqueeze(2)  # (clips, S, 1, E)
        cosine, centred, product = torch.zeros(3, store.steps, store.steps, dtype=torch.float64)
        tokens = 0
        width = 0
        for features in store.tokens(block, frame):  # (clips, S, t, E)
            cosine += _products(_unit(features))
            centred += _products(_unit(features - mean))
            product += _products(features)
            tokens += features.shape[2]
            width = features.shape[3]
        count = len(mean) * tokens
        power = product.diagonal()
        pairs = (power.unsqueeze(0) + power.unsqueeze(1)) / 2
        square = (2 * (pairs - product)).clamp(min=0)
        measures = {
            "cosine": cosine / count,
            "centred": centred / count,
            "mse": square / (count * width),
        }
        measures["relative"] = (square / pairs.clamp(min=1e-300)).sqrt()
        measures["common"] = mean.square().sum() * tokens / power.sum().clamp(min=1e-300)
        for name, value in measures.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value / len(frames)
    return sums


def _unit(x: Tensor) -> Tensor:
    """Vectors scaled to length 1; a vector of zeros stays zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)


def _products(x_BSTE: Tensor) -> Tensor:
    """Inner products between steps, summed over clips and tokens: (S, S)."""
    rows = x_BSTE.transpose(0, 1).flatten(1)
    return rows @ rows.T
