"""Train a small ``AutoencoderKLWan`` on a clip directory, and write it in diffusers layout.

    torchrun --nproc_per_node 2 recipes/pretrain_vae.py --config recipes/configs/vae_doom.yaml \\
        data=data/doom out=runs/vae

Plain reconstruction losses do not train such a network in minutes (they stop at fog). So two runs
follow each other. ``distil`` teaches the encoder the principal components of 8x8 patches of single
frames, and the decoder to read them. Then the temporal taps are set to copy the newest frame, and
``video`` trains everything end to end, the components kept as a gentle anchor.

Writes ``out/vae/`` (config.json with latents_mean/latents_std, fp16 weights, evaluation.json),
``out/config.yaml``, and the runs ``out/distil`` and ``out/video``. The same command continues after
an interruption. Works under ``torchrun``, ``deepspeed`` and plain ``python``; on a CPU one thread a
process is best, as the tensors are small.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from scd_sf.checkpoint import provenance
from scd_sf.config import from_command_line, to_yaml
from scd_sf.data.clips import ClipSet
from scd_sf.data.sources.pixel_frames import to_unit
from scd_sf.distributed import Ranks, init_distributed
from scd_sf.files import require_own_folder, write_json, write_text
from scd_sf.models.tokenizers.vae_training import (
    PATCH,
    SmallVaeConfig,
    build_vae,
    inflate,
    patch_components,
    psnr_of_error,
    reconstruction,
    whole_decode,
    whole_encode,
)
from scd_sf.models.wan.vae import FRAME_GROUP as GROUP
from scd_sf.models.wan.vae import WEIGHTS, load_vae, save_vae
from scd_sf.train.base import Engine, EngineConfig, StepInfo, StepModule
from scd_sf.train.batches import TrainConfig
from scd_sf.train.checkpointing import Checkpointer
from scd_sf.train.ema import Ema, EmaConfig
from scd_sf.train.engine import build_engine
from scd_sf.train.loop import Loop
from scd_sf.train.run import Run, RunConfig
from scd_sf.train.skipped import MicroBatch, keeping
from scd_sf.train.stop import Request
from scd_sf.train.summary import Summary
from scd_sf.types import Logs, UserError, check_within, exit_on_user_error, on_device, say

# fields that may differ when a run goes on
FROM_OUTSIDE = ("eval_clips", "eval_every", "log_every", "save_every")


@dataclass
class StageSection:
    """One part of the training. The learning rate warms up, then falls along a cosine."""

    steps: int = 100
    """Optimiser steps."""
    batch: int = 4
    """Clips per step on all processes together; a multiple of their number."""
    frames: tuple[int, ...] = (1,)
    """Lengths of the clips in frames, each 1 + 4 k; they take turns."""
    lr: float = 1e-3
    """Highest learning rate."""
    warmup: int = 20
    """Steps until it is reached."""
    final_lr: float = 0.0
    """Learning rate at the end."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.frames:
            raise ValueError("steps and batch must be at least 1 and frames must not be empty")
        check_within(
            self, {"batch": (1, 2**16), "lr": (0, 1e3), "warmup": (0, 2**31), "final_lr": (0, 1e3)}
        )
        if any(count < 1 or (count - 1) % GROUP for count in self.frames):
            raise ValueError(f"frames is {self.frames}; each must be 1 + {GROUP}*k")

    def at(self, update: int) -> float:
        """The learning rate of an update (0 is the first): warm-up to ``lr``, then a cosine to
        ``final_lr``."""
        if update < self.warmup:
            return self.lr * (update + 1) / self.warmup
        progress = (update - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_lr + (self.lr - self.final_lr) * 0.5 * (
            1 + math.cos(math.pi * min(1.0, progress))
        )


@dataclass
class LossSection:
    """Weights of the losses; pixels are in [-1, 1]."""

    mse: float = 10.0
    """Squared error."""
    l1: float = 0.5
    """Absolute error."""
    gradient: float = 0.2
    """Absolute error of the differences between neighbouring pixels."""
    anchor: float = 0.05
    """Squared distance of the latents from the principal components of 8x8 patches."""
    noise: float = 0.05
    """Standard deviation of noise on the latents before the decoder (their scale is about 1)."""

    def __post_init__(self) -> None:
        check_within(
            self,
            {**dict.fromkeys(("mse", "l1", "gradient", "anchor"), (0.0, 1e6)), "noise": (0, 100)},
        )
        if self.mse + self.l1 <= 0:
            raise ValueError("mse and l1 are both 0: nothing says what the pixels should be")


@dataclass
class PretrainVae:
    """The data, the network and both parts of the training."""

    data: Path
    """Folder of clips (mp4) with train and val."""
    out: Path
    """Folder for the VAE and the two runs, ``distil`` and ``video``."""
    model: SmallVaeConfig = field(default_factory=SmallVaeConfig)
    """Sizes of the network."""
    distil: StageSection = field(default_factory=StageSection)
    """First part: single frames, the encoder learns principal components."""
    video: StageSection = field(default_factory=lambda: StageSection(frames=(5, 9)))
    """Second part: clips, end to end."""
    loss: LossSection = field(default_factory=LossSection)
    """Weights of the losses."""
    pca_floor: float = 0.2
    """Least deviation of a component, as a share of the strongest one's."""
    ema: float = 0.995
    """Decay of the average of the weights, per step."""
    seed: int = 0
    """Seed of weights, order and noise."""
    max_clips: int = 2400
    """At most so many clips of a split are read into memory, by every process."""
    eval_clips: int = 8
    """Held-out clips that are measured."""
    eval_every: int = 200
    """Steps between measurements."""
    log_every: int = 50
    """Steps between printed lines."""
    save_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        check_within(self, {"pca_floor": (1e-6, 1), "ema": (0, 1 - 1e-9), "seed": (0, 2**63 - 1)})
        counts = ("max_clips", "eval_clips", "eval_every", "log_every", "save_every")
        check_within(self, dict.fromkeys(counts, (1, 2**31)))


@dataclass(frozen=True)
class Videos:
    """uint8 (U, F, 3, H, W) of both splits, and the principal components of the training frames."""

    train: Tensor
    val: Tensor
    components: dict[str, Tensor]


# ----------------------------------------------------------------------------------------- training


def windows(
    video_UF3HW: Tensor, frames: int, batch: int, rng: torch.Generator
) -> tuple[list[int], Tensor]:
    """The indices of ``batch`` random clips, and a random window of each, (B, 3, T, H, W) in
    [-1, 1]."""
    clips: list[int] = torch.randint(len(video_UF3HW), (batch,), generator=rng).tolist()
    starts = torch.randint(video_UF3HW.shape[1] - frames + 1, (batch,), generator=rng).tolist()
    crops = [
        video_UF3HW[clip, start : start + frames] for clip, start in zip(clips, starts, strict=True)
    ]
    return clips, channels_last_3d(torch.stack(crops))


def channels_last_3d(video_BF3HW: Tensor) -> Tensor:
    """uint8 -> (B, 3, F, H, W) in [-1, 1], in the memory order of the network's convolutions."""
    return to_unit(video_BF3HW).transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)


def distil_loss(
    cfg: LossSection, model: AutoencoderKLWan, pixels: Tensor, target: Tensor, noise: Tensor
) -> Tensor:
    """Loss of ``distil``: the encoder learns the components ``target`` (B, C, 1+k, H', W'), and the
    decoder learns to decode them with noise."""
    output = whole_decode(model, target + cfg.noise * noise)
    return cfg.mse * F.mse_loss(output, pixels) + F.mse_loss(whole_encode(model, pixels), target)


def video_loss(
    cfg: LossSection, model: AutoencoderKLWan, pixels: Tensor, target: Tensor, noise: Tensor
) -> Tensor:
    """Loss of ``video``: reconstruction end to end, and the latents' distance from the components
    of the key frames."""
    latents = whole_encode(model, pixels)
    error = whole_decode(model, latents + cfg.noise * noise) - pixels
    edges = torch.stack([error.diff(dim=dim).abs().mean() for dim in (2, 3, 4)]).sum()
    pixel = cfg.mse * error.square().mean() + cfg.l1 * error.abs().mean() + cfg.gradient * edges
    return pixel + cfg.anchor * F.mse_loss(latents, target)


def components_of(pixels_BCTHW: Tensor, components: dict[str, Tensor]) -> Tensor:
    """Principal components (B, C, 1+k, H', W') of the key frames."""
    keys = pixels_BCTHW[:, :, ::GROUP].transpose(1, 2).flatten(0, 1)
    flat = F.conv2d(keys, components["weight"], components["bias"], stride=PATCH)
    return flat.unflatten(0, (len(pixels_BCTHW), -1)).transpose(1, 2)


def update(
    cfg: PretrainVae, stage: StageSection, run: Run, engine: Engine, videos: Videos, position: int
) -> tuple[StepInfo, Logs]:
    """One update on this rank's part of the batch, which depends on seed and position alone; returns
    the mean logs of all ranks."""
    ranks = run.ranks
    first_update = 0 if stage is cfg.distil else cfg.distil.steps
    rng = torch.Generator().manual_seed(cfg.seed * 1_000_003 + first_update + position - 1)
    clips, pixels = windows(
        videos.train, stage.frames[(position - 1) % len(stage.frames)], stage.batch, rng
    )
    B, _, T, H, W = pixels.shape
    noise = torch.randn(
        B, cfg.model.channels, 1 + (T - 1) // GROUP, H // PATCH, W // PATCH, generator=rng
    )
    share = slice(ranks.rank * B // ranks.world, (ranks.rank + 1) * B // ranks.world)
    pixels, noise = (on_device(part[share], ranks.device) for part in (pixels, noise))
    with keeping(run, position, engine, clips) as records:
        loss = engine(pixels, components_of(pixels, videos.components), noise)
        records.append(MicroBatch(ranks.rank, clips[share], [], loss.detach(), {"pixels": pixels}))
        engine.backward(loss)
        info = engine.step()
    return info, ranks.mean({"loss": float(loss.detach())}) | {
        "grad_norm": info.grad_norm,
        "lr": info.lr,
    }


def train(
    cfg: PretrainVae,
    name: str,
    model: AutoencoderKLWan,
    ranks: Ranks,
    clips: ClipSet,
    videos: Videos,
) -> AutoencoderKLWan:
    """Train ``model`` in the run ``out/<name>``; returns a network with the average of its
    weights."""
    distil = name == "distil"
    stage, loss = (cfg.distil, distil_loss) if distil else (cfg.video, video_loss)
    if stage.batch % ranks.world:
        raise UserError(
            f"{name}.batch is {stage.batch}; it must be a multiple of the {ranks.world} processes"
        )
    plan = TrainConfig(
        steps=stage.steps,
        global_batch=stage.batch,
        micro_batch=stage.batch // ranks.world,
        save_every=cfg.save_every,
        ema=EmaConfig(cfg.ema),
    )
    run = Run(
        RunConfig(str(cfg.out / name), cfg.seed, cfg.log_every),
        ranks,
        config=cfg,
        may_change=FROM_OUTSIDE,
    )
    adam = EngineConfig("torch", betas=(0.9, 0.99), weight_decay=0.0, grad_clip=1.0)
    engine = build_engine(
        StepModule(model, partial(loss, cfg.loss)),
        adam,
        ranks,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        total_updates=plan.steps,
        schedule=stage,
    )
    ema, ema_model = Ema(plan.ema, ranks), build_vae(cfg.model)
    origin = partial(provenance, stage=f"vae_{name}", seed=cfg.seed, data_hash=clips.hash)
    checkpointer = Checkpointer(run, plan, {"model": engine}, ema, to_yaml(cfg), origin)
    start = checkpointer.resume()
    size = "x".join(map(str, videos.train.shape[-2:]))
    summary = Summary(
        checkpointer,
        start,
        title="Training of a video autoencoder, "
        + ("part 1 of 2: single frames" if distil else "part 2 of 2: clips"),
        data=[f"{len(videos.train):,} of {len(clips):,} clips of {size} in {cfg.data}"],
        longer="for a longer training use a new out=",
    )
    summary.begin()
    with Loop(run, checkpointer, start) as loop:
        for step in loop:
            info, logs = update(cfg, stage, run, engine, videos, loop.position(step))
            if info.stepped:
                ema.update(engine.owned())
            if step % cfg.eval_every == 0 or step in (1, stage.steps):
                ema.copy_to(ema_model)
                if ranks.is_main:
                    logs |= quick_psnr(ema_model, cfg.eval_clips, videos.val, stills=distil)
            run.log(step, logs)
            last, request = step == stage.steps, loop.request()
            if last or request or step % cfg.save_every == 0:
                checkpointer.save(step, required=last or request is Request.STOP)
            if request is Request.STOP and (distil or not last):
                loop.leave(step)
    summary.end({})
    run.finish()
    ema.copy_to(ema_model)
    return ema_model


# --------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def quick_psnr(model: AutoencoderKLWan, count: int, video_UF3HW: Tensor, *, stills: bool) -> Logs:
    """PSNR in dB of ``count`` clips, or of their key frames as single frames."""
    sample = video_UF3HW[torch.linspace(0, len(video_UF3HW) - 1, count).long()]
    parts = []
    for clips in (sample[:, ::GROUP].flatten(0, 1).unsqueeze(1) if stills else sample).split(4):
        pixels = channels_last_3d(clips)
        output = whole_decode(model, whole_encode(model, pixels)).clamp(-1, 1)
        parts.append((output - pixels).square().mean((1, 3, 4)))
    error = torch.cat(parts)
    return {"val/psnr": psnr_of_error(error), "val/psnr_first_frame": psnr_of_error(error[:, 0])}


@torch.no_grad()
def evaluate(folder: Path, clips: ClipSet, video_UF3HW: Tensor) -> dict[str, object]:
    """Figures of the written VAE: PSNR by frame, motion and place, and how much detail and change
    it keeps."""
    vae = load_vae(folder)
    rows: list[tuple[Tensor, Tensor]] = []
    start_time = time.perf_counter()
    for start in range(0, len(video_UF3HW), 8):
        real = to_unit(video_UF3HW[start : start + 8])
        rows.append((real, vae.decode(vae.encode(real))))
    seconds = time.perf_counter() - start_time
    real, output = (torch.cat(parts) for parts in zip(*rows, strict=True))
    report = reconstruction(real, output)
    report |= {
        "clips": len(real),
        "milliseconds_per_frame": round(1000 * seconds / (len(real) * real.shape[1]), 2),
    }
    for kind, names in (("motion", clips.motions), ("place", clips.places)):
        for name in names:
            indices = torch.tensor(
                [i for i in range(len(real)) if getattr(clips[i], kind) == name], dtype=torch.long
            )
            if len(indices):
                report[f"{kind}:{name}"] = reconstruction(real[indices], output[indices])
    return report


@torch.no_grad()
def export(model: AutoencoderKLWan, video_UF3HW: Tensor, folder: Path) -> None:
    """Measure latents_mean per channel and one latents_std for all channels; write config and fp16
    weights in diffusers layout.

    With a std per channel, the diffusion model learns texture before layout.
    """
    sample = video_UF3HW[torch.linspace(0, len(video_UF3HW) - 1, min(96, len(video_UF3HW))).long()]
    parts = [whole_encode(model, to_unit(part).transpose(1, 2)) for part in sample.split(8)]
    latents = torch.cat(parts).transpose(0, 1).flatten(1)
    mean = latents.mean(1)
    std = float((latents - mean.unsqueeze(1)).square().mean().sqrt())
    model.register_to_config(
        latents_mean=[round(float(value), 6) for value in mean],
        latents_std=[round(std, 6)] * len(mean),
    )
    save_vae(model.half(), folder)


# ---------------------------------------------------------------------------------------------- run


def load_videos(clips: ClipSet, limit: int) -> Tensor:
    """uint8 (U, F, 3, H, W): at most ``limit`` clips, evenly spread over the set."""
    count = min(limit, len(clips))
    return clips.videos([index * len(clips) // count for index in range(count)])


def claim(cfg: PretrainVae) -> None:
    """Make ``out`` and write its config.yaml. UserError: it holds other files, or those of an
    earlier version of this script."""
    require_own_folder(cfg.out, ["config.yaml"], "choose another out=")
    if (cfg.out / "state.pt").exists():
        raise UserError(
            f"{cfg.out}/state.pt: of an earlier version, which cannot be continued; choose another out="
        )
    cfg.out.mkdir(parents=True, exist_ok=True)
    write_text(cfg.out / "config.yaml", to_yaml(cfg))


def main() -> None:
    cfg = from_command_line(PretrainVae, __doc__ or "")
    ranks = init_distributed()
    clips = {split: ClipSet(cfg.data, split) for split in ("train", "val")}
    if (longest := max(cfg.video.frames)) > clips["train"].frames:
        raise UserError(
            f"video.frames asks for {longest} frames; the clips in {cfg.data} have {clips['train'].frames}"
        )
    ranks.on_main(lambda: claim(cfg))
    splits = {
        split: load_videos(split_clips, cfg.max_clips) for split, split_clips in clips.items()
    }
    torch.manual_seed(cfg.seed)
    model = build_vae(cfg.model)
    _, stills = windows(splits["train"], 1, 1024, torch.Generator().manual_seed(cfg.seed))
    components = patch_components(stills.squeeze(2), cfg.model.channels, cfg.pca_floor)
    videos = Videos(
        **splits,
        components={name: on_device(tensor, ranks.device) for name, tensor in components.items()},
    )
    model = train(cfg, "distil", model, ranks, clips["train"], videos)
    inflate(model)
    model = train(cfg, "video", model, ranks, clips["train"], videos)
    if ranks.is_main:
        folder = cfg.out / "vae"
        export(model, videos.train, folder)
        report = evaluate(folder, clips["val"], videos.val)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        report |= {
            "parameters": parameters,
            "megabytes": round((folder / WEIGHTS).stat().st_size / 1e6, 3),
        }
        report |= {"steps": cfg.distil.steps + cfg.video.steps, "data_sha256": clips["train"].hash}
        write_json(folder / "evaluation.json", report)
        say(json.dumps(report, indent=1))
    ranks.barrier()


if __name__ == "__main__":
    exit_on_user_error(main)
