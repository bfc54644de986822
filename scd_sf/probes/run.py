"""``scd probe``: open a model, run the requested probes on it, and write JSON, PNG and one page.

    scd probe checkpoint=runs/stage2 prompts='["a red fox in snow"]' out=probes
    scd probe checkpoint=assets/wan_doom data=DIR probes='[similarity,attention]' out=probes

``checkpoint``: any of ours (bidirectional, causal, SCD, distilled, from scratch), or a Wan
directory of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from scd_sf.checkpoint import git_revision, versions
from scd_sf.data.frames import FrameClips
from scd_sf.data.latents import LatentClips
from scd_sf.data.prompt_files import read_prompt_file
from scd_sf.files import locked, read_json, require_own_folder, write_json
from scd_sf.generation.request import SIZES_ASKED, choose_sampler
from scd_sf.models.blocks import BlocksConfig, blocks_of
from scd_sf.models.build import (
    CheckpointConfig,
    ModelConfig,
    SamplerConfig,
    Scd,
    Student,
    base_of,
    describe_checkpoint,
    family_of,
    load_checkpoint_model,
)
from scd_sf.models.causal import Causal
from scd_sf.models.wan.text_cache import open_text_encoder
from scd_sf.models.wan.transformer import Wan
from scd_sf.models.wan.vae import load_vae
from scd_sf.models.wan.weights import is_wan_directory, load_wan
from scd_sf.probes.attention_mass import AttentionProbe, attention_mass
from scd_sf.probes.frame_diagonal import DiagonalProbe, frame_diagonal
from scd_sf.probes.leave_one_out import LeaveOneOut, leave_one_out
from scd_sf.probes.pca import PcaProbe, pca
from scd_sf.probes.report import write_probe_report
from scd_sf.probes.result import ProbeResult
from scd_sf.probes.similarity import SimilarityProbe, similarity
from scd_sf.probes.skip_layer import SkipProbe, skip_layer
from scd_sf.probes.subject import Subject
from scd_sf.types import Conditioning, UserError, VideoShape, check_within, say

PROBES: dict[str, Callable[[Subject, Any], ProbeResult]] = {
    "similarity": similarity,
    "pca": pca,
    "attention": attention_mass,
    "skip": skip_layer,
    "diagonal": frame_diagonal,
    "leave_one_out": leave_one_out,
}


class Settings(Protocol):
    """A probe's part of the configuration."""

    def check(self, subject: Subject) -> None:
        """UserError: these settings do not fit the subject."""
        ...


@dataclass
class ProbeConfig:
    """Which probes run, and on what."""

    checkpoint: str
    """A run directory, a step_N, an exported file, or a Wan directory."""
    out: str
    """Folder for JSON, PNG and the page."""
    probes: tuple[str, ...] = ()
    """Which probes; empty: all that the model and the inputs allow."""
    prompts: tuple[str, ...] = ()
    """Prompts; or give ``prompt_file`` or ``data``."""
    prompt_file: str = ""
    """Prompts in a txt, csv or jsonl file."""
    data: str = ""
    """Folder of encoded clips, which leave_one_out needs; it also gives prompts (or actions,
    labels) and the size."""
    clips: int = 2
    """Number of first clips of ``data`` that give the prompts."""
    base: str = ""
    """Directory with text encoder and VAE; empty: the one that the checkpoint was made from."""
    weights: str = "ema"
    """Which weights of the checkpoint: ema, model or best."""
    seed: int = 0
    """Seed of the noise."""
    frames: int = 0
    """Video frames (without ``data``); 0: as trained."""
    height: int = 0
    """Pixels (without ``data``); 0: as trained."""
    width: int = 0
    """Pixels (without ``data``); 0: as trained."""
    sampler: SamplerConfig | None = None
    """Sampler; null: the checkpoint's own, 50 steps of Euler for a Wan directory."""
    force: bool = False
    """Allow another sampler on a distilled student."""
    whole: bool = False
    """Run a checkpoint with a skip-layer schedule or frame-diagonal blocks without them."""
    similarity: SimilarityProbe = field(default_factory=SimilarityProbe)
    """P1, P2: similarity of features between steps."""
    pca: PcaProbe = field(default_factory=PcaProbe)
    """P3: principal components as pictures."""
    attention: AttentionProbe = field(default_factory=AttentionProbe)
    """P4: where attention goes in time."""
    skip: SkipProbe = field(default_factory=SkipProbe)
    """P5: blocks left out at later steps."""
    diagonal: DiagonalProbe = field(default_factory=DiagonalProbe)
    """P6: last blocks that see their own frame alone."""
    leave_one_out: LeaveOneOut = field(default_factory=LeaveOneOut)
    """P7: the loss without each block."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.probes if name not in PROBES]:
            raise UserError(f"probes: {unknown} are none; choose from {', '.join(PROBES)}")
        if self.clips < 1 or min(self.frames, self.height, self.width) < 0:
            raise UserError(f"clips is {self.clips} (at least 1), sizes must not be negative")
        check_within(self, {**SIZES_ASKED, "seed": (0, 2**63 - 1)})


def open_model(cfg: ProbeConfig) -> tuple[Student | Wan, CheckpointConfig, dict[str, object]]:
    """The model, its checkpoint's configuration, and its provenance (a Wan directory has none)."""
    path = Path(cfg.checkpoint)
    if is_wan_directory(path):
        wan = load_wan(path)
        model_config = ModelConfig(family="wan", wan=wan.cfg)
        return wan, CheckpointConfig(model_config, cfg.sampler or SamplerConfig()), {}
    model, config = load_checkpoint_model(path, cfg.weights, BlocksConfig() if cfg.whole else None)
    return model, config, describe_checkpoint(path)[1]


def open_subject(cfg: ProbeConfig, device: torch.device) -> Subject:
    """The model with sampler, conditions, clips and device. UserError: an input that is missing or
    does not fit the model."""
    model, config, origin = open_model(cfg)
    sampler = choose_sampler(config.sampler, cfg.sampler, cfg.checkpoint, force=cfg.force).build()
    base = Path(cfg.base or config.base or (cfg.checkpoint if isinstance(model, Wan) else ""))
    clips, cond, shape = open_inputs(cfg, config, base, origin)
    if shape.channels != model.cfg.in_channels:
        raise UserError(
            f"{cfg.checkpoint}: takes {model.cfg.in_channels} latent channels, the clips {shape.channels}"
        )
    seeds = tuple(cfg.seed + number for number in range(cond.batch))
    model.requires_grad_(False).to(device)
    own_sampler = config.sampler
    shifts = ((cfg.sampler or own_sampler).shift, own_sampler.shift)
    return Subject(
        Path(cfg.checkpoint).name, model, shape, cond, sampler, seeds, clips, device, *shifts
    )


def open_inputs(
    cfg: ProbeConfig, config: CheckpointConfig, base: Path, origin: dict[str, object]
) -> tuple[LatentClips | FrameClips | None, Conditioning, VideoShape]:
    """Clips (None: no data), conditions and the size, from ``data`` or from prompts. UserError: an
    input is missing."""
    if config.model.backbone == "dit":
        if not cfg.data:
            raise UserError(
                f"{cfg.checkpoint}: was trained on encoded frames; set data= to such a directory"
            )
        frames = FrameClips(cfg.data)
        trained = origin.get("latent")
        frame_count = cfg.frames or (int(trained[0]) if isinstance(trained, list) else 0)
        if not frame_count:
            raise UserError(f"{cfg.checkpoint}: does not say what it was trained on; set frames=")
        clip_indices = frames.at_least(frame_count)[: cfg.clips]
        batch = frames.batch(clip_indices, [0] * len(clip_indices), frame_count)
        return frames, batch.cond, frames.info.shape(frame_count)
    prompts = list(cfg.prompts)
    if cfg.prompt_file:
        prompts += [row.prompt for row in read_prompt_file(Path(cfg.prompt_file), "prompt")]
    clips = LatentClips(cfg.data) if cfg.data else None
    if clips is not None and not prompts:
        return clips, clips.batch(list(range(min(cfg.clips, len(clips))))).text, clips.shape
    if not prompts or not base.name:
        raise UserError(
            "set data= to encoded clips, or prompts= (or prompt_file=) and base= to encode them with"
        )
    base = base_of(str(base), cfg.base, cfg.checkpoint)
    cond = open_text_encoder(base, "").encode(prompts)
    return clips, cond, clips.shape if clips is not None else video_shape(cfg, base, origin)


def video_shape(cfg: ProbeConfig, base: Path, origin: dict[str, object]) -> VideoShape:
    """The requested size in pixels, or that of the training videos, as latent size by the VAE of
    ``base``. UserError: neither is known."""
    trained = origin.get("video")
    trained_sizes = trained if isinstance(trained, dict) else {}
    requested_sizes = {"frames": cfg.frames, "height": cfg.height, "width": cfg.width}
    size = {
        name: int(value or trained_sizes.get(name) or 0) for name, value in requested_sizes.items()
    }
    if missing_fields := [f"{name}=" for name, value in size.items() if not value]:
        raise UserError(
            f"{cfg.checkpoint}: does not say what it was trained on; set {', '.join(missing_fields)}, or data="
        )
    return load_vae(base).geometry.shape(size["frames"], size["height"], size["width"])


def unfit_probes(cfg: ProbeConfig, subject: Subject) -> dict[str, str]:
    """Probes that cannot run on this subject, each with the reason."""
    model = subject.model
    reasons: dict[str, str] = {}
    if isinstance(model, Scd):
        reasons["skip"] = "SCD's decoder is short already; probe the model that it was made from"
    if not isinstance(model, Causal):
        reasons["diagonal"] = "is for the causal baseline"
    if len(subject.seeds) < 2:
        reasons |= {
            name: "compares videos of at least two prompts"
            for name in ("skip", "diagonal")
            if name not in reasons
        }
    if subject.clips is None:
        reasons["leave_one_out"] = "needs encoded clips; give them with data="
    if subject.shape.frames < 2:
        reasons["attention"] = "needs two latent frames and more; give frames="
    if blocks := subject.bypassed:
        bypass_reason = f"blocks {blocks.start}..{blocks.stop - 1} do not run at every step; whole=true runs them all"
        names = ["similarity", "pca", "attention"]
        if not cfg.diagonal.counts:
            names.append("diagonal")
        reasons = dict.fromkeys(names, bypass_reason) | reasons
    return reasons


def runnable(cfg: ProbeConfig, subject: Subject) -> list[str]:
    """The requested probes, or by default all that this model and data allow, with a line printed
    for each of the others. UserError: a requested probe cannot run, or not with its settings."""
    reasons = unfit_probes(cfg, subject)
    if unfit_requests := [f"{name}: {reasons[name]}" for name in cfg.probes if name in reasons]:
        raise UserError(f"{cfg.checkpoint}: {'; '.join(unfit_requests)}")
    names = list(cfg.probes) or [name for name in PROBES if name not in reasons]
    if not names:
        raise UserError(
            f"{cfg.checkpoint}: no probe fits: {'; '.join(f'{name}: {reasons[name]}' for name in reasons)}"
        )
    for name in names:
        settings: Settings = getattr(cfg, name)
        settings.check(subject)
    for name, reason in reasons.items():
        if not cfg.probes:
            say(f"without {name}: {reason}")
    return names


def run_probes(cfg: ProbeConfig, device: torch.device) -> Path:
    """Run the probes and write their files into ``out``, beside those of earlier probes of the same
    model; returns the page, which is written again after each. UserError: ``out`` has probes of
    other inputs."""
    subject = open_subject(cfg, device)
    out = Path(cfg.out)
    names = runnable(cfg, subject)
    blocks = blocks_of(subject.model)
    facts: dict[str, object] = {
        "checkpoint": cfg.checkpoint,
        "family": family_of(subject.model),
        "weights": cfg.weights,
        "blocks": "whole" if blocks == BlocksConfig() else str(blocks),
        "prompts": "; ".join(cfg.prompts) or cfg.prompt_file or f"those of {cfg.data}",
        "clips": len(subject.seeds),
        "latent": list(subject.shape.latent(len(subject.seeds))),
        "sampler": f"{subject.sampler.name}, {subject.sampler.steps} steps",
        "seed": cfg.seed,
    }
    record_path = out / "probe.json"
    require_own_folder(out, [record_path.name], "choose another out=")
    with locked(out, "these probes"):
        if record_path.is_file():
            earlier_record = read_json(record_path, "choose another out=")
            if changed_facts := [
                name for name, value in facts.items() if earlier_record.get(name) != value
            ]:
                raise UserError(
                    f"{out}: holds probes of another {', '.join(changed_facts)}; choose another out="
                )
        write_json(
            record_path,
            {**facts, "config": asdict(cfg), "git": git_revision(), "versions": versions()},
        )
        for number, name in enumerate(names, 1):
            result = PROBES[name](subject, getattr(cfg, name))
            result.write(out)
            page = write_probe_report(out, f"Probes of {subject.name}", facts)
            say(f"[{number}/{len(names)}] {result.title}: {result.text}")
    return page
