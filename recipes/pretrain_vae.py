"""Train a small ``AutoencoderKLWan`` on a clip directory, on CPU, and write it in diffusers layout.

    python recipes/pretrain_vae.py --config recipes/configs/vae_doom.yaml data=data/doom out=runs/vae

Plain reconstruction losses do not train such a network in minutes (they stop at fog). So two stages: *distil* teaches
the encoder the principal components of 8x8 patches of single frames, and the decoder to read them; then the temporal
taps are set to copy the newest frame and *video* trains everything end to end, the components kept as a gentle anchor.

Writes ``out/vae/`` (config.json with latents_mean/latents_std, fp16 weights, evaluation.json), ``out/config.yaml``,
``out/log.jsonl`` and ``out/state.pt``. The same command continues after an interruption. Prints PSNR and time left.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from scd_sf.config import from_command_line, from_yaml, to_yaml
from scd_sf.data.clips import ClipSet
from scd_sf.files import foreign, locked, new_file, require_own_folder, write_json, write_text
from scd_sf.models.tokenizers.vae_training import (
    PATCH,
    SmallVaeConfig,
    build_vae,
    inflate,
    patch_components,
    psnr,
    reconstruction,
    whole_decode,
    whole_encode,
)
from scd_sf.models.wan.vae import FRAME_GROUP as GROUP
from scd_sf.models.wan.vae import WEIGHTS, load_vae, save_vae
from scd_sf.types import UserError, check_within, exit_on_user_error, say

Grads = tuple[Tensor, ...]


@dataclass
class StageSection:
    """One part of the training. The learning rate warms up, then falls along a cosine."""

    steps: int = 100
    """Optimiser steps."""
    batch: int = 4
    """Clips per step; a multiple of ``workers``."""
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
        check_within(self, {"batch": (1, 2**16), "lr": (0, 1e3), "warmup": (0, 2**31), "final_lr": (0, 1e3)})
        if any(count < 1 or (count - 1) % GROUP for count in self.frames):
            raise ValueError(f"frames is {self.frames}; each must be 1 + {GROUP}*k")


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
        check_within(self, {**dict.fromkeys(("mse", "l1", "gradient", "anchor"), (0.0, 1e6)), "noise": (0, 100)})
        if self.mse + self.l1 <= 0:
            raise ValueError("mse and l1 are both 0: nothing says what the pixels should be")


@dataclass
class PretrainVae:
    """Everything that the run depends on."""

    data: Path
    """Folder of clips (mp4) with train and val."""
    out: Path
    """Folder for the VAE, its log and its state."""
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
    workers: int = 2
    """Processes; each computes the gradient of an equal part of the batch."""
    max_clips: int = 2400
    """At most so many clips are read into memory."""
    eval_clips: int = 8
    """Held-out clips that are measured."""
    eval_every: int = 200
    """Steps between measurements."""
    log_every: int = 50
    """Steps between printed lines."""
    save_seconds: float = 60.0
    """Seconds between two saved states."""

    def __post_init__(self) -> None:
        check_within(self, {"pca_floor": (1e-6, 1), "ema": (0, 1 - 1e-9), "seed": (0, 2**63 - 1), "workers": (1, 1024)})
        counts = ("max_clips", "eval_clips", "eval_every", "log_every")
        check_within(self, {**dict.fromkeys(counts, (1, 2**31)), "save_seconds": (0, 1e9)})
        for name in ("distil", "video"):
            if (batch := getattr(self, name).batch) % self.workers:
                raise ValueError(f"{name}.batch is {batch}; it must be a multiple of workers = {self.workers}")


class State:
    """What training changes: weights, their moving average, the optimiser, the components, the step. One file."""

    def __init__(self, cfg: PretrainVae, video_UF3HW: Tensor) -> None:
        torch.manual_seed(cfg.seed)
        self.model = build_vae(cfg.model)
        self.params = list(self.model.parameters())
        generator = torch.Generator().manual_seed(cfg.seed)
        frames = sample(video_UF3HW, 1, 1024, generator).squeeze(2)
        self.pca = patch_components(frames, cfg.model.channels, cfg.pca_floor)
        self.step, self.seconds = 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Moving average = weights; a fresh optimiser (at the start of each stage)."""
        self.ema = [parameter.detach().clone() for parameter in self.params]
        self.optimizer = torch.optim.AdamW(self.params, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)

    def save(self, path: Path, config: str) -> None:
        state = {"model": self.model.state_dict(), "ema": self.ema, "optimizer": self.optimizer.state_dict()}
        state |= {"pca": self.pca, "step": self.step, "seconds": self.seconds, "config": config}
        with new_file(path) as part, part.open("wb") as file:
            torch.save(state, file)

    def load(self, path: Path, config: str) -> None:
        with foreign(f"{path}: cannot be read", "delete it to start again"):
            state = torch.load(path, weights_only=True)
        if from_yaml(PretrainVae, state["config"]) != from_yaml(PretrainVae, config):
            raise UserError(f"{path}: was written with another config; use that config, another out=, or delete it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema, self.pca, self.step, self.seconds = (state[key] for key in ("ema", "pca", "step", "seconds"))

    def averaged(self, cfg: PretrainVae) -> AutoencoderKLWan:
        model = build_vae(cfg.model)
        for target, source in zip(model.parameters(), self.ema, strict=True):
            target.data.copy_(source)
        return model


def to_unit(video_uint8: Tensor) -> Tensor:
    return video_uint8.float() / 127.5 - 1.0


# ------------------------------------------------------------------------------------------------------------- training


def learning_rate(stage: StageSection, step: int) -> float:
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.final_lr + (stage.lr - stage.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def stage_of(cfg: PretrainVae, step: int) -> tuple[StageSection, int]:
    """The stage that ``step`` belongs to, and the step inside it."""
    return (cfg.distil, step) if step < cfg.distil.steps else (cfg.video, step - cfg.distil.steps)


def sample(video_UF3HW: Tensor, frames: int, batch: int, generator: torch.Generator) -> Tensor:
    """Random windows (B, 3, T, H, W) in [-1, 1]."""
    clips = torch.randint(len(video_UF3HW), (batch,), generator=generator).tolist()
    starts = torch.randint(video_UF3HW.shape[1] - frames + 1, (batch,), generator=generator).tolist()
    windows = [video_UF3HW[clip, start : start + frames] for clip, start in zip(clips, starts, strict=True)]
    return to_unit(torch.stack(windows)).transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)


def loss_of(state: State, cfg: PretrainVae, pixels_BCTHW: Tensor, noise: Tensor, distil: bool) -> Tensor:
    """Distil: the decoder reads the true components. Video: end to end, components of the key frames as an anchor."""
    weights = cfg.loss
    keys = pixels_BCTHW[:, :, ::GROUP]
    flat = F.conv2d(keys.transpose(1, 2).flatten(0, 1), state.pca["weight"], state.pca["bias"], stride=PATCH)
    target = flat.unflatten(0, (len(pixels_BCTHW), -1)).transpose(1, 2)
    latents = whole_encode(state.model, pixels_BCTHW)
    anchor = F.mse_loss(latents, target)
    output = whole_decode(state.model, (target if distil else latents) + weights.noise * noise)
    error = output - pixels_BCTHW
    if distil:
        return weights.mse * error.square().mean() + anchor
    edges = [error.diff(dim=dim).abs().mean() for dim in (2, 3, 4)]
    loss = weights.mse * error.square().mean() + weights.l1 * error.abs().mean() + weights.anchor * anchor
    return loss + weights.gradient * torch.stack(edges).sum()


def shard_gradient(state: State, cfg: PretrainVae, video_UF3HW: Tensor, step: int, rank: int) -> tuple[float, Grads]:
    """Loss and gradient of part ``rank`` of the batch of ``step``; everything random is a function of (seed, step)."""
    stage, local = stage_of(cfg, step)
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    pixels = sample(video_UF3HW, stage.frames[local % len(stage.frames)], stage.batch, generator)
    B, _, T, H, W = pixels.shape
    noise = torch.randn(B, cfg.model.channels, 1 + (T - 1) // GROUP, H // PATCH, W // PATCH, generator=generator)
    shard = (pixels.chunk(cfg.workers)[rank], noise.chunk(cfg.workers)[rank])
    loss = loss_of(state, cfg, *shard, distil=stage is cfg.distil)
    grads = torch.autograd.grad(loss, state.params, allow_unused=True)
    return float(loss.detach()), tuple(
        torch.zeros_like(p) if grad is None else grad for p, grad in zip(state.params, grads, strict=True)
    )


class Workers:
    """Data parallelism in processes: parameters and gradients in shared memory, one message per step and worker.

    Threads inside each convolution would cost more than they give on small tensors, worst on a busy machine.
    """

    def __init__(self, state: State, cfg: PretrainVae, video_UF3HW: Tensor) -> None:
        self.state, self.cfg, self.video = state, cfg, video_UF3HW
        for parameter in state.params:
            parameter.data.share_memory_()
        self.grads = [[torch.zeros_like(p.data).share_memory_() for p in state.params] for _ in range(cfg.workers)]
        self.pipes: list[Connection] = []
        context = multiprocessing.get_context("fork")
        for rank in range(1, cfg.workers):
            ours, theirs = context.Pipe()
            context.Process(target=self._serve, args=(rank, theirs, [*self.pipes, ours]), daemon=True).start()
            theirs.close()
            self.pipes.append(ours)

    def _serve(self, rank: int, pipe: Connection, others: list[Connection]) -> None:
        for other in others:  # inherited by the fork: closed, so that the parent's death ends this process
            other.close()
        with contextlib.suppress(EOFError):
            while True:
                pipe.send(self._work(pipe.recv(), rank))

    def _work(self, step: int, rank: int) -> float:
        loss, grads = shard_gradient(self.state, self.cfg, self.video, step, rank)
        for shared, grad in zip(self.grads[rank], grads, strict=True):
            shared.copy_(grad)
        return loss

    def gradient(self, step: int) -> float:
        """Mean loss of the step; sets every parameter's ``.grad`` to the mean over the workers."""
        for pipe in self.pipes:
            pipe.send(step)
        losses = [self._work(step, 0), *(pipe.recv() for pipe in self.pipes)]
        for index, parameter in enumerate(self.state.params):
            parameter.grad = torch.stack([grads[index] for grads in self.grads]).mean(0)
        return sum(losses) / len(losses)


def train_step(state: State, cfg: PretrainVae, workers: Workers) -> tuple[float, float]:
    """One optimiser step. Returns (loss, gradient norm before clipping to 1)."""
    stage, local = stage_of(cfg, state.step)
    loss = workers.gradient(state.step)
    norm = float(nn.utils.clip_grad_norm_(state.params, 1.0))
    if not math.isfinite(loss + norm):
        raise UserError(f"{cfg.out}: loss {loss} at step {state.step}; lower the stage's lr = {stage.lr}")
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(stage, local)
    state.optimizer.step()
    torch._foreach_lerp_(state.ema, [p.detach() for p in state.params], 1 - min(cfg.ema, (local + 1) / (local + 10)))
    state.step += 1
    return loss, norm


# ----------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def quick_psnr(state: State, cfg: PretrainVae, video_UF3HW: Tensor) -> dict[str, float]:
    """PSNR in dB of the averaged weights; single frames while distilling, whole clips after."""
    model = state.averaged(cfg)
    distil = state.step < cfg.distil.steps
    chosen = torch.linspace(0, len(video_UF3HW) - 1, cfg.eval_clips).long()
    video = video_UF3HW[chosen, ::GROUP].flatten(0, 1).unsqueeze(1) if distil else video_UF3HW[chosen]

    parts = []
    for clips in video.split(4):
        pixels = to_unit(clips).transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
        made = whole_decode(model, whole_encode(model, pixels)).clamp(-1, 1)
        parts.append((made - pixels).square().mean((1, 3, 4)))
    error = torch.cat(parts)
    return {"psnr": psnr(error), "psnr_first_frame": psnr(error[:, 0])}


@torch.no_grad()
def evaluate(folder: Path, clips: ClipSet, video_UF3HW: Tensor) -> dict[str, object]:
    """The written files, through :func:`load_vae`: PSNR by frame and by motion, detail and change that survive."""
    vae = load_vae(folder)
    rows, began = [], time.perf_counter()
    for start in range(0, len(video_UF3HW), 8):
        real = to_unit(video_UF3HW[start : start + 8])
        rows.append((real, vae.decode(vae.encode(real))))
    seconds = time.perf_counter() - began
    real, made = (torch.cat(parts) for parts in zip(*rows, strict=True))
    report = reconstruction(real, made)
    report |= {"clips": len(real), "milliseconds_per_frame": round(1000 * seconds / (len(real) * real.shape[1]), 2)}
    for kind, names in (("motion", clips.motions), ("place", clips.places)):
        for name in names:
            chosen = torch.tensor([i for i in range(len(real)) if getattr(clips[i], kind) == name], dtype=torch.long)
            if len(chosen):
                report[f"{kind}:{name}"] = reconstruction(real[chosen], made[chosen])
    return report


@torch.no_grad()
def export(model: AutoencoderKLWan, video_UF3HW: Tensor, folder: Path) -> None:
    """Measure latents_mean per channel and ONE latents_std for all; write config and fp16 weights in diffusers layout.

    One std keeps the strong channels strong: with a std per channel the diffusion model learns texture before layout.
    """
    chosen = video_UF3HW[torch.linspace(0, len(video_UF3HW) - 1, min(96, len(video_UF3HW))).long()]
    means = [whole_encode(model, to_unit(part).transpose(1, 2)) for part in chosen.split(8)]
    latents = torch.cat(means).transpose(0, 1).flatten(1)
    mean = latents.mean(1)
    std = float((latents - mean.unsqueeze(1)).square().mean().sqrt())
    model.register_to_config(latents_mean=[round(float(m), 6) for m in mean], latents_std=[round(std, 6)] * len(mean))
    save_vae(model.half(), folder)


# ------------------------------------------------------------------------------------------------------------------ run


def load_videos(clips: ClipSet, limit: int) -> Tensor:
    """uint8 (U, F, 3, H, W): at most ``limit`` clips, evenly spread over the set."""
    count = min(limit, len(clips))
    return clips.videos([index * len(clips) // count for index in range(count)])


def train(state: State, cfg: PretrainVae, train_video: Tensor, val_video: Tensor, save: Callable[[], None]) -> None:
    total, saved = cfg.distil.steps + cfg.video.steps, time.monotonic()
    recent: list[float] = []
    workers = Workers(state, cfg, train_video)
    while state.step < total:
        began = time.monotonic()
        if state.step == cfg.distil.steps:
            for target, source in zip(state.params, state.ema, strict=True):
                target.data.copy_(source)
            inflate(state.model)
            state.restart()
        loss, norm = train_step(state, cfg, workers)
        recent = [*recent[-199:], time.monotonic() - began]
        state.seconds += recent[-1]
        row: dict[str, float] = {"step": state.step, "loss": loss, "grad_norm": norm, "seconds": state.seconds}
        if state.step % cfg.eval_every == 0 or state.step in (cfg.distil.steps, cfg.distil.steps + 1, total):
            row |= quick_psnr(state, cfg, val_video)
        if state.step % cfg.log_every == 0 or "psnr" in row:
            left = (total - state.step) * sum(recent) / len(recent)
            words = " ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "step")
            say(f"step {state.step}/{total} {words} left {left / 60:.1f} min")
            with (cfg.out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if time.monotonic() - saved > cfg.save_seconds or state.step == total:
            save()
            saved = time.monotonic()


def run(cfg: PretrainVae) -> None:
    torch.set_num_threads(1)
    clips = {split: ClipSet(cfg.data, split) for split in ("train", "val")}
    if (longest := max(cfg.video.frames)) > clips["train"].frames:
        raise UserError(f"video.frames asks for {longest} frames; the clips in {cfg.data} have {clips['train'].frames}")
    require_own_folder(cfg.out, ["config.yaml"], "choose another out=")
    with locked(cfg.out, "this training"):
        train_in(cfg, clips)


def train_in(cfg: PretrainVae, clips: dict[str, ClipSet]) -> None:
    """Everything that is written: config, state, log, the VAE and its evaluation."""
    config, path, described = to_yaml(cfg), cfg.out / "state.pt", cfg.out / "config.yaml"
    if described.is_file() and from_yaml(PretrainVae, described) != cfg:
        raise UserError(f"{described}: of another config; use that config, or another out=")
    write_text(described, config)
    videos = {split: load_videos(chosen, cfg.max_clips) for split, chosen in clips.items()}
    say(f"{len(videos['train'])} train and {len(videos['val'])} val clips in memory")
    state = State(cfg, videos["train"])
    if path.is_file():
        state.load(path, config)
        say(f"continues {path} at step {state.step}")
    parameters = sum(parameter.numel() for parameter in state.params)
    say(f"{parameters} parameters, {cfg.distil.steps} + {cfg.video.steps} steps")
    train(state, cfg, videos["train"], videos["val"], lambda: state.save(path, config))
    folder = cfg.out / "vae"
    export(state.averaged(cfg), videos["train"], folder)
    report = evaluate(folder, clips["val"], videos["val"])
    report |= {"parameters": parameters, "megabytes": round((folder / WEIGHTS).stat().st_size / 1e6, 3)}
    report |= {"steps": state.step, "train_seconds": round(state.seconds, 1), "data_sha256": clips["train"].hash}
    write_json(folder / "evaluation.json", report)
    print(json.dumps(report, indent=1))


def main(argv: Sequence[str] | None = None) -> None:
    run(from_command_line(PretrainVae, __doc__ or "", argv))


if __name__ == "__main__":
    exit_on_user_error(main)
