"""P4: attention mass by temporal distance (paper Figure 4, supplement Figure 4).

The softmax mass that queries of frame i put on the keys of a frame j, by distance d = \\|i - j\\|,
per block, head and step, averaged over queries, clips and the frames i that have a past; beside it
what uniform attention over the visible tokens would put there. Logits are computed for a few
queries at a time, so that nothing is as large as tokens x tokens. Models of several frames per
chunk also attend within it, so their mass on earlier chunks is reported separately (supplement
Figure 4).

A bidirectional model sees frames on both sides. SCD's encoder runs once per chunk, not at steps.
Letters as watch.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scd_sf.models.build import Scd
from scd_sf.probes.figures import map_figure, panels_figure
from scd_sf.probes.result import ProbeResult, rounded
from scd_sf.probes.similarity import evenly_spaced
from scd_sf.probes.subject import Subject
from scd_sf.probes.watch import Place, watch_attention
from scd_sf.types import UserError, check_within, on_device


@dataclass(frozen=True)
class AttentionProbe:
    """Probe P4: where attention goes in time."""

    queries: int = 64
    """Queries of a frame that are measured, spread evenly; 0: all."""
    first_frame: int = 1
    """Frames before it are left out (the paper's i >= 2, counted from 1)."""

    def __post_init__(self) -> None:
        check_within(self, {"queries": (0, 2**24), "first_frame": (0, 10**6)}, "attention.")

    def check(self, subject: Subject) -> None:
        """UserError: the clip is too short, or some blocks do not run at every step."""
        subject.check_whole()
        frames = subject.shape.frames
        if frames < 2:
            raise UserError(
                f"{subject.name}: attention needs clips of two latent frames and more; give frames="
            )
        if not 0 <= self.first_frame < frames:
            raise UserError(
                f"attention.first_frame is {self.first_frame}: the clip has latent frames 0..{frames - 1}; make it "
                "longer or first_frame smaller"
            )


def frame_mass(q_BNLD: Tensor, k_BNLD: Tensor, tokens: int, rows: int = 64) -> Tensor:
    """Softmax mass of every query on every frame of the keys, fp32 (B, N, L, frames), ``rows``
    queries at a time."""
    mass_parts = []
    keys = k_BNLD.float().transpose(-1, -2) * k_BNLD.shape[-1] ** -0.5
    for q in q_BNLD.float().split(rows, dim=2):
        mass_parts.append((q @ keys).softmax(-1).unflatten(-1, (-1, tokens)).sum(-1))
    return torch.cat(mass_parts, dim=2)


class Mass:
    """Sums of mass by (block, head, step, distance), and of what goes to earlier chunks by (block,
    head, step)."""

    def __init__(self, subject: Subject, cfg: AttentionProbe) -> None:
        self.subject = subject
        self.cfg = cfg
        self.steps = 1
        if subject.history_blocks[0] is subject.step_blocks[0]:
            self.steps = subject.sampler.steps
        self.query_indices = on_device(
            torch.tensor(evenly_spaced(subject.tokens, cfg.queries)), subject.device
        )
        self.frames = range(cfg.first_frame, subject.shape.frames)
        self.frames_with_past = [frame for frame in self.frames if frame >= subject.chunk]
        blocks, heads = len(subject.history_blocks), subject.model.cfg.num_attention_heads
        shape = (blocks, heads, self.steps, subject.shape.frames)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=subject.device)
        self.earlier_chunks = torch.zeros(shape[:3], dtype=torch.float64, device=subject.device)

    def add(self, place: Place, block: int, q_BNLD: Tensor, k_BNLD: Tensor) -> None:
        """Add the mass of a block's queries q (B, N, L, D) on its keys k (B, N, L', D). The chunk's
        own frames are the last in both."""
        tokens, chunk = self.subject.tokens, self.subject.chunk
        step, visible = place.step or 0, k_BNLD.shape[2] // tokens
        frame_offsets = [frame % chunk for frame in self.frames if frame // chunk == place.chunk]
        if not frame_offsets:
            return
        offsets = on_device(torch.tensor(frame_offsets), q_BNLD.device)
        queries = q_BNLD.shape[2] - (chunk - offsets[:, None]) * tokens + self.query_indices
        mass = frame_mass(q_BNLD[:, :, queries.flatten()], k_BNLD, tokens)
        # (heads, frames with queries, visible frames)
        mass = mass.unflatten(2, queries.shape).double().mean((0, 3))
        keys = torch.arange(visible, device=q_BNLD.device)
        distance = (keys - (visible - chunk + offsets[:, None])).abs()
        self.sums[block, :, step].index_add_(1, distance.flatten(), mass.flatten(1))
        self.earlier_chunks[block, :, step] += mass[..., : visible - chunk].sum((1, 2))

    def mean(self) -> tuple[Tensor, Tensor]:
        """Mass by (block, head, step, distance), which adds up to 1, and mass on earlier chunks of
        the frames that have some, by (block, head, step)."""
        mass_on_earlier = self.earlier_chunks.cpu() / max(1, len(self.frames_with_past))
        return self.sums.cpu() / len(self.frames), mass_on_earlier

    def uniform(self) -> tuple[Tensor, float]:
        """Mass by distance, and on earlier chunks, of attention that is uniform over all frames of
        the earlier chunks and the own one."""
        chunk = self.subject.chunk
        by_distance = torch.zeros(self.subject.shape.frames).double()
        mass_on_earlier = 0.0
        for frame in self.frames:
            start = frame // chunk * chunk
            visible = torch.arange(start + chunk)
            shares = torch.full(visible.shape, 1 / len(visible), dtype=torch.float64)
            by_distance.index_add_(0, (visible - frame).abs(), shares)
            mass_on_earlier += start / len(visible)
        return by_distance / len(self.frames), mass_on_earlier / max(1, len(self.frames_with_past))


def attention_mass(subject: Subject, cfg: AttentionProbe) -> ProbeResult:
    """Mass by block, head, step and distance, with its means, beside uniform attention's.
    UserError: the clip is too short."""
    cfg.check(subject)
    mass = Mass(subject, cfg)
    watch_attention(subject, mass.add)
    mean_mass, mass_on_earlier = mass.mean()
    uniform, uniform_earlier = mass.uniform()
    mass_on_others = 1 - mean_mass[..., 0]  # on other frames, (blocks, heads, steps)
    lines = {"other frames": mass_on_others.mean((1, 2)).tolist()}
    baseline = {"other frames": float(1 - uniform[0])}
    if 1 < subject.chunk < subject.shape.frames:
        lines["earlier chunks"] = mass_on_earlier.mean((1, 2)).tolist()
        baseline["earlier chunks"] = uniform_earlier
    data: dict[str, object] = {
        "steps": mass.steps,
        "queries": len(mass.query_indices),
        "first_frame": cfg.first_frame,
        "uniform_by_distance": rounded(uniform),
        "by_distance": rounded(mean_mass.mean((1, 2))),
        "other_frames": rounded(mass_on_others.mean((1, 2))),
        "other_frames_by_step": rounded(mass_on_others.mean(1)),
        "other_frames_by_head": rounded(mass_on_others.mean(2)),
        "earlier_chunks": rounded(mass_on_earlier.mean((1, 2))),
        "uniform_earlier_chunks": uniform_earlier,
        "by_block_head_step_distance": rounded(mean_mass, 4),
    }
    maps = {
        "by distance": (mean_mass.mean((1, 2)), "latent frames"),
        "other frames, by head": (mass_on_others.mean(2), "head"),
    }
    if mass.steps > 1:
        maps["other frames, by step"] = (mass_on_others.mean(1), "step")
    figures = {
        "blocks": partial(
            panels_figure,
            panels={f"mass on {name}": {"model": line} for name, line in lines.items()},
            x="block",
            baseline={f"mass on {name}": height for name, height in baseline.items()},
        ),
        "maps": partial(map_figure, maps=maps, y="block"),
    }
    text = " ".join(
        mass_sentence(name, line, baseline[name], mass.steps) for name, line in lines.items()
    )
    return ProbeResult(
        "attention", "Attention to other frames (P4)", text + distance_note(subject), data, figures
    )


def mass_sentence(name: str, line: list[float], baseline: float, steps: int) -> str:
    """The mass of every block (``line``) as a sentence for people."""
    half = len(line) // 2
    early, late = sum(line[:half]) / max(1, half), sum(line[half:]) / (len(line) - half)
    return (
        f"Mass on {name}, mean over heads and {steps} step(s): {early:.3f} in the first half of the blocks, {late:.3f} "
        f"in the second, from {min(line):.3f} (block {line.index(min(line))}) to {max(line):.3f} (block "
        f"{line.index(max(line))}); uniform attention has {baseline:.3f}."
    )


def distance_note(subject: Subject) -> str:
    """A note for SCD, where the frame at distance 0 is not the one that is denoised; empty for
    other models."""
    if not isinstance(subject.model, Scd):
        return ""
    if subject.model.needs_query:
        return " The blocks are the encoder's; the query of pure noise asks, in the place of the coming frame."
    return " The blocks are the encoder's; the previous frame asks (at first the start token), and is at distance 0."
