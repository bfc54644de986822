"""Small nets, fitted on real clips, that judge whether a video's latents show the place and the
motion of its prompt.

Latents (V, F, C, H, W) come from the VAE (real clips) or from a sampler (generated ones). The
judges see latents and not pixels, so that soft reconstructions by the VAE do not count against a
model.

- *place*: each latent frame -> place logits, averaged over the clip;
- *motion*: inverse dynamics: each pair of consecutive latent frames -> motion logits, averaged over
  the clip.

Quote an adherence with the judges' own accuracy on real clips they were
not fitted on (the ceiling, :func:`adherence` on those clips) and with :func:`shuffled_floor` (the
same videos under permuted prompts). Label names come from the data; a motion whose name holds
"left" and the one named the same with "right" are opposites.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from scd_sf.evaluation.table import Adherence
from scd_sf.files import parse_json, typed, write_tensors
from scd_sf.models.skeleton import check_fit, skeleton
from scd_sf.tensor_files import open_tensors, read_all, read_metadata
from scd_sf.types import UserError

LATENT_DIMENSIONS = 5
PAIR = 2
FORMAT = "scd_sf.judges.1"


class JudgeNet(nn.Module):
    """Three 3x3 convolutions (the second halves the grid), a 4x4 average grid, one linear layer."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(2 * width * 16, classes),
        )

    def forward(self, x_NIHW: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, classes)."""
        result: Tensor = self.layers(x_NIHW)
        return result


class Judges(nn.Module):
    """A place net and a motion net with their label names and the latent statistics they were
    fitted under."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, channels: int, places: Sequence[str], motions: Sequence[str], width: int = 48
    ) -> None:
        super().__init__()
        self.channels = channels
        self.width = width
        self.places = tuple(places)
        self.motions = tuple(motions)
        self.place_net = JudgeNet(channels, width // 2, len(self.places))
        self.motion_net = JudgeNet(2 * channels, width, len(self.motions))
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def standardised(self, latents: Tensor) -> Tensor:
        """Latents (V, F, C, H, W) per channel at mean 0, std 1 of the clips the judges were fitted
        on."""
        if latents.ndim != LATENT_DIMENSIONS or latents.shape[2] != self.channels:
            raise UserError(
                f"judges: latents have shape {tuple(latents.shape)}; not (videos, frames, {self.channels}, h, w)"
            )
        return (latents.float() - self.mean) / self.std

    def place_logits(self, standardised: Tensor) -> Tensor:
        """(V, F, C, H, W) -> (V, places), the mean over frames."""
        count, frames = standardised.shape[:2]
        logits: Tensor = self.place_net(standardised.flatten(0, 1))
        return logits.view(count, frames, -1).mean(1)

    def motion_logits(self, standardised: Tensor) -> Tensor:
        """(V, F >= 2, C, H, W) -> (V, motions), the mean over pairs of consecutive frames [mean,
        difference]."""
        if standardised.shape[1] < PAIR:
            raise UserError(
                "judges: one latent frame shows no motion; judge clips of at least 2 latent frames"
            )
        earlier, later = standardised[:, :-1], standardised[:, 1:]
        pairs = torch.cat([(later + earlier) / 2, later - earlier], dim=2)
        count, steps = pairs.shape[:2]
        logits: Tensor = self.motion_net(pairs.flatten(0, 1))
        return logits.view(count, steps, -1).mean(1)

    @torch.no_grad()
    def logits(self, latents: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
        """Place logits (V, places) and motion logits (V, motions), dropout off."""
        was_training = self.training
        self.eval()
        chunks = [self.standardised(chunk) for chunk in torch.split(latents, batch)]
        place = torch.cat([self.place_logits(chunk) for chunk in chunks])
        motion = torch.cat([self.motion_logits(chunk) for chunk in chunks])
        self.train(was_training)
        return place, motion

    def judge(self, latents: Tensor) -> tuple[list[str], list[str]]:
        """The place and the motion each video shows, by name."""
        place, motion = self.logits(latents)
        places = [self.places[i] for i in place.argmax(1)]
        return places, [self.motions[i] for i in motion.argmax(1)]


@dataclass(frozen=True)
class JudgesConfig:
    """How the judges are fitted. Steps, not a clock, end the fit: the same seed gives the same
    judges."""

    steps: int = 250
    """Optimiser steps."""
    batch: int = 48
    """Clips per step."""
    lr: float = 2e-3
    """Learning rate."""
    weight_decay: float = 0.02
    """AdamW's weight decay."""
    noise: float = 0.1
    """Deviation of noise on the standardised latents, so that a sampler's residue does not fool the
    judges."""
    width: int = 48
    """Channels; a multiple of 8."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width < 8 or self.width % 8:  # GroupNorm(4) on width / 2
            raise ValueError(f"width is {self.width}; it must be a multiple of 8")


def fit_judges(
    latents: Tensor,
    places: Sequence[str],
    motions: Sequence[str],
    *,
    seed: int,
    config: JudgesConfig | None = None,
) -> Judges:
    """Fit both nets on real clips: latents (V, F, C, H, W), one place name and one motion name per
    clip.

    Global random state is left unchanged. Raises UserError for labels that do not match the
    clips.
    """
    cfg = JudgesConfig() if config is None else config
    if len(places) != latents.shape[0] or len(motions) != latents.shape[0]:
        raise UserError(
            f"judges: {latents.shape[0]} clips but {len(places)} places and {len(motions)} motions given"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judges = Judges(latents.shape[2], sorted(set(places)), sorted(set(motions)), cfg.width)
        with torch.no_grad():
            judges.mean.copy_(latents.float().mean(dim=(0, 1, 3, 4)).view(-1, 1, 1))
            judges.std.copy_(latents.float().std(dim=(0, 1, 3, 4)).clamp_min(1e-4).view(-1, 1, 1))
        place_ids = torch.tensor([judges.places.index(name) for name in places])
        motion_ids = torch.tensor([judges.motions.index(name) for name in motions])
        _fit(judges, latents, place_ids, motion_ids, cfg)
    return judges.eval()


def _fit(
    judges: Judges, latents: Tensor, place_ids: Tensor, motion_ids: Tensor, cfg: JudgesConfig
) -> None:
    """Cross-entropy on logits averaged over a random contiguous half of the clip (the place: every
    second step)."""
    optimizer = torch.optim.AdamW(judges.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, cfg.lr, total_steps=cfg.steps, pct_start=0.1
    )
    frames = latents.shape[1]
    window = max(2, (frames + 1) // 2)
    judges.train()
    for step in range(cfg.steps):
        index = torch.randint(0, latents.shape[0], (cfg.batch,))
        start = int(torch.randint(0, frames - window + 1, ()).item()) if frames >= window else 0
        clip = judges.standardised(latents[index, start : start + window])
        clip = clip + cfg.noise * torch.randn_like(clip)
        loss = functional.cross_entropy(judges.motion_logits(clip), motion_ids[index])
        if step % 2 == 0:  # the place is the easy half: every second step is enough
            loss = loss + functional.cross_entropy(judges.place_logits(clip), place_ids[index])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()


def opposites(motions: Sequence[str]) -> list[tuple[str, str]]:
    """(left, right) pairs of names that are equal but for the words left and right."""
    pairs = [(name, name.replace("left", "right")) for name in motions if "left" in name]
    return [(left, right) for left, right in pairs if right in motions]


def adherence(
    judges: Judges, latents: Tensor, places: Sequence[str], motions: Sequence[str]
) -> Adherence:
    """Share of videos judged to show their prompt's place and motion.

    ``left_right``: among videos prompted with one of two opposite motions, the share where the
    prompted one of the two has the larger logit (logits of other motions do not count); None when
    the prompts hold no such motion.
    """
    return _adherence(judges, judges.logits(latents), places, motions)


def shuffled_floor(
    judges: Judges,
    latents: Tensor,
    places: Sequence[str],
    motions: Sequence[str],
    *,
    permutations: int = 200,
    seed: int,
) -> Adherence:
    """Mean adherence of the same videos under randomly permuted prompts: the score of a model deaf
    to its prompt."""
    logits = judges.logits(latents)
    generator = torch.Generator().manual_seed(seed)
    draws: list[Adherence] = []
    for _ in range(permutations):
        order = torch.randperm(len(places), generator=generator).tolist()
        draws.append(
            _adherence(judges, logits, [places[i] for i in order], [motions[i] for i in order])
        )
    left_right_shares = [draw.left_right for draw in draws if draw.left_right is not None]
    return Adherence(
        sum(draw.place for draw in draws) / permutations,
        sum(draw.motion for draw in draws) / permutations,
        sum(left_right_shares) / len(left_right_shares) if left_right_shares else None,
    )


def _adherence(
    judges: Judges, logits: tuple[Tensor, Tensor], places: Sequence[str], motions: Sequence[str]
) -> Adherence:
    place, motion = logits
    for kind, names, label_names in (
        ("place", places, judges.places),
        ("motion", motions, judges.motions),
    ):
        if len(names) != place.shape[0] or not names:
            raise UserError(
                f"adherence: {len(names)} {kind} labels for {place.shape[0]} videos; give one per video"
            )
        unknown = sorted(set(names) - set(label_names))
        if unknown:
            raise UserError(
                f"adherence: the judges never saw {kind} '{unknown[0]}'; they know {', '.join(label_names)}"
            )
    place_ids = torch.tensor([judges.places.index(name) for name in places])
    motion_ids = torch.tensor([judges.motions.index(name) for name in motions])
    hits: list[bool] = []
    for left, right in opposites(judges.motions):
        prefers_left = (
            motion[:, judges.motions.index(left)] > motion[:, judges.motions.index(right)]
        )
        hits += [
            bool(prefers_left[i]) == (name == left)
            for i, name in enumerate(motions)
            if name in (left, right)
        ]
    return Adherence(
        float((place.argmax(1).cpu() == place_ids).double().mean()),
        float((motion.argmax(1).cpu() == motion_ids).double().mean()),
        sum(hits) / len(hits) if hits else None,
    )


def save_judges(judges: Judges, path: Path) -> None:
    """One safetensors file; label names and sizes are in its metadata."""
    facts = {
        "places": judges.places,
        "motions": judges.motions,
        "channels": judges.channels,
        "width": judges.width,
    }
    tensors = {name: tensor.contiguous().cpu() for name, tensor in judges.state_dict().items()}
    write_tensors(path, tensors, {"format": FORMAT, "judges": json.dumps(facts)})


def load_judges(path: Path) -> Judges:
    """The judges of a file that :func:`save_judges` wrote. UserError (naming the file) for any
    other file."""
    remedy = "fit the judges again"
    metadata = read_metadata(path, remedy)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: metadata field 'format' is not {FORMAT}; {remedy}")
    facts = typed(parse_json(metadata.get("judges", ""), path, remedy), _Facts, path, remedy)
    tensors = open_tensors(path, remedy)

    def build() -> Judges:
        return Judges(facts.channels, facts.places, facts.motions, facts.width)

    check_fit(skeleton(build, tensors, path, remedy), tensors, path, "its description", remedy)
    judges = build()
    judges.load_state_dict(read_all(tensors))
    return judges.eval()


@dataclass
class _Facts:
    channels: int
    places: list[str]
    motions: list[str]
    width: int
