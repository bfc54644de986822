"""P4: where attention goes in time (paper Figure 4, supplement Figure 4; spec/scd.md 3).

The softmax mass that queries of frame i put on the keys of a frame j, by distance d = \\|i - j\\|, per block, head and
step, averaged over queries, clips and the frames i that have a past; beside it what uniform attention over the visible
tokens would put there. Logits are made for a few queries at a time: nothing is as large as tokens x tokens.

A bidirectional model sees frames on both sides. SCD's encoder runs once per chunk, not at steps. Letters as watch.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scd_sf.probes.figures import map_figure, panels_figure
from scd_sf.probes.result import ProbeResult
from scd_sf.probes.similarity import rounded, spread
from scd_sf.probes.subject import Subject
from scd_sf.probes.watch import Place, watch_attention
from scd_sf.types import UserError


@dataclass(frozen=True)
class AttentionProbe:
    """``queries``: of a frame, spread evenly (0: all). ``first_frame``: frames before it are left out (the paper's
    i >= 2, counted from 1)."""

    queries: int = 64
    first_frame: int = 1


def frame_mass(q_BNLD: Tensor, k_BNLD: Tensor, tokens: int, rows: int = 64) -> Tensor:
    """Softmax mass of every query on every frame of the keys, fp32 (B, N, L, frames), ``rows`` queries at a time."""
    parts = []
    keys = k_BNLD.float().transpose(-1, -2) * k_BNLD.shape[-1] ** -0.5
    for q in q_BNLD.float().split(rows, dim=2):
        parts.append((q @ keys).softmax(-1).unflatten(-1, (-1, tokens)).sum(-1))
    return torch.cat(parts, dim=2)


class Mass:
    """Sums of mass by (block, head, step, distance)."""

    def __init__(self, subject: Subject, cfg: AttentionProbe) -> None:
        self.subject, self.cfg, self.steps = subject, cfg, 1
        if subject.history_blocks[0] is subject.step_blocks[0]:
            self.steps = subject.sampler.steps
        self.picked = torch.tensor(spread(subject.tokens, cfg.queries), device=subject.device)
        self.sums: Tensor | None = None  # (blocks, heads, steps, distances)
        self.uniform = torch.zeros(subject.shape.frames, dtype=torch.float64)
        self.count = torch.zeros(len(subject.history_blocks), self.steps, dtype=torch.float64)

    def add(self, place: Place, block: int, q_BNLD: Tensor, k_BNLD: Tensor) -> None:
        """The chunk's own queries are the last ones; its frames are the last of the keys."""
        tokens, chunk, frames = self.subject.tokens, self.subject.chunk, self.subject.shape.frames
        visible = k_BNLD.shape[2] // tokens
        step = 0 if place.step is None else place.step
        if self.sums is None:
            shape = (len(self.subject.history_blocks), q_BNLD.shape[1], self.steps, frames)
            self.sums = torch.zeros(shape, dtype=torch.float64)
        for offset in range(chunk):
            frame, place_in_keys = place.chunk * chunk + offset, visible - chunk + offset
            if frame < self.cfg.first_frame:
                continue
            start = q_BNLD.shape[2] - (chunk - offset) * tokens
            mass = frame_mass(q_BNLD[:, :, start + self.picked], k_BNLD, tokens)
            by_frame = mass.mean((0, 2)).double().cpu()  # (heads, visible)
            distance = (torch.arange(visible) - place_in_keys).abs()
            self.sums[block, :, step].index_add_(1, distance, by_frame)
            self.count[block, step] += 1
            if block == 0:
                self.uniform.index_add_(0, distance, torch.full((visible,), 1 / visible, dtype=torch.float64))

    def mean(self) -> tuple[Tensor, Tensor]:
        """((blocks, heads, steps, distances), uniform attention's (distances,)), each adding up to 1."""
        if self.sums is None or not bool(self.count.any()):
            raise UserError(
                f"attention.first_frame is {self.cfg.first_frame}: no frame of {self.subject.shape.frames} is left; "
                "make the clip longer or first_frame smaller"
            )
        return self.sums / self.count[:, None, :, None].clamp(min=1), self.uniform / self.uniform.sum()


def attention_mass(subject: Subject, cfg: AttentionProbe) -> ProbeResult:
    """Mass by block and distance, by block and step, by block and head."""
    if subject.shape.frames < 2:
        raise UserError("attention needs clips of two latent frames and more; give frames=")
    mass = Mass(subject, cfg)
    watch_attention(subject, mass.add)
    found, uniform = mass.mean()
    other = 1 - found[..., 0]  # on other frames, (blocks, heads, steps)
    past, baseline = other.mean((1, 2)).tolist(), float(1 - uniform[0])
    data: dict[str, object] = {
        "steps": mass.steps, "queries": len(mass.picked), "first_frame": cfg.first_frame,
        "uniform_by_distance": [round(value, 6) for value in uniform.tolist()],
        "by_distance": rounded(found.mean((1, 2))), "other_frames": [round(value, 6) for value in past],
        "other_frames_by_step": rounded(other.mean(1)), "other_frames_by_head": rounded(other.mean(2)),
    }  # fmt: skip
    half = len(past) // 2
    early, late = sum(past[:half]) / max(1, half), sum(past[half:]) / (len(past) - half)
    text = (
        f"Mass on other frames, mean over heads and {mass.steps} step(s): {early:.3f} in the first half of the blocks, "
        f"{late:.3f} in the second, from {min(past):.3f} (block {past.index(min(past))}) to {max(past):.3f} (block "
        f"{past.index(max(past))}); uniform attention has {baseline:.3f}."
    )
    figures = {
        "blocks": partial(
            panels_figure, panels={"mass on other frames": {"model": past}}, x="block",
            baseline={"mass on other frames": baseline},
        ),
        "maps": partial(
            map_figure, maps={"by distance": found.mean((1, 2)), "other frames, by head": other.mean(2)},
            x="distance in latent frames; head", y="block",
        ),
    }  # fmt: skip
    return ProbeResult("attention", "Attention to other frames (P4)", text, data, figures)
