"""Train a tiny decoder (scd_sf/models/wan/tiny_vae.py) to decode the latents of a VAE as its own
decoder does.

    torchrun --nproc_per_node 2 recipes/pretrain_tiny_vae.py --config recipes/configs/tiny_vae_doom.yaml \\
        data=data/doom run.dir=runs/tiny_vae

The VAE of ``base`` encodes and decodes the training clips once (``RUN/targets``); its decodings are
what the tiny decoder is to give: absolute, squared and edge errors, no other network. It learns on
whole clips from their beginning, so it also learns how a video begins. The same command goes on
after an interruption. At the end ``RUN/decoder/`` holds decoder.safetensors (fp16) for
``decoder=``, provenance.json and evaluation.json: PSNR against the VAE's decodings of held-out
clips, that of both against the clips themselves, and milliseconds per frame of both.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.checkpoint import provenance
from scd_sf.config import from_command_line, to_yaml
from scd_sf.data.clips import ClipSet
from scd_sf.data.latents import epoch_order
from scd_sf.data.sources.pixel_frames import to_unit
from scd_sf.distributed import Ranks, init_distributed
from scd_sf.files import sha256_file, sha256_folder, write_json, write_tensors
from scd_sf.models.tokenizers.vae_training import psnr_of_error, reconstruction
from scd_sf.models.wan.tiny_vae import (
    TinyDecoder,
    TinyVae,
    TinyVaeConfig,
    latents_of,
    load_decoder,
    save_decoder,
)
from scd_sf.models.wan.vae import WEIGHTS, PixelDecoder, Vae, load_vae, vae_source
from scd_sf.nn.layers import channels_last
from scd_sf.tensor_files import read_metadata, read_tensors
from scd_sf.train.base import Engine, EngineConfig, StepInfo, StepModule
from scd_sf.train.batches import RESUMABLE, TrainConfig, add_to, micro_batches
from scd_sf.train.checkpointing import Checkpointer
from scd_sf.train.checks import check_batches
from scd_sf.train.ema import Ema
from scd_sf.train.engine import build_engine
from scd_sf.train.loop import Loop
from scd_sf.train.run import Run, RunConfig
from scd_sf.train.skipped import MicroBatch, keeping
from scd_sf.train.stop import Request
from scd_sf.train.summary import Summary
from scd_sf.types import Logs, UserError, check_within, exit_on_user_error, on_device, say


@dataclass
class LossSection:
    """Weights of the losses; pixels are in [-1, 1]."""

    l1: float = 1.0
    """Absolute error."""
    mse: float = 2.0
    """Squared error."""
    gradient: float = 0.5
    """Absolute error of the differences between neighbours in time, height and width."""

    def __post_init__(self) -> None:
        check_within(self, dict.fromkeys(("l1", "mse", "gradient"), (0.0, 1e6)))
        if self.mse + self.l1 <= 0:
            raise ValueError("mse and l1 are both 0: nothing says what the pixels should be")


@dataclass
class PretrainTinyVaeConfig:
    """``global_batch`` and ``micro_batch`` of ``train`` count clips."""

    base: Path
    """The VAE whose decoder is imitated: a Wan directory, or its vae folder."""
    data: Path
    """Folder of clips (mp4) with train and val."""
    run: RunConfig
    """Run directory, seed, log."""
    model: TinyVaeConfig = field(default_factory=TinyVaeConfig)
    """Sizes of the tiny decoder."""
    loss: LossSection = field(default_factory=LossSection)
    """Weights of the losses."""
    max_clips: int = 300
    """At most so many training clips, evenly spread; every process has them in memory."""
    eval_clips: int = 24
    """Held-out clips that are measured."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batches, checkpoints."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Optimiser of the tiny decoder."""

    def __post_init__(self) -> None:
        check_within(self, dict.fromkeys(("max_clips", "eval_clips"), (1, 2**31)))


@dataclass(frozen=True)
class Targets:
    """Clips as the VAE has them: normalised latents (U, F', C, H', W') and its decodings, uint8 (U,
    F, 3, H, W)."""

    latents: Tensor
    pixels: Tensor


# ----------------------------------------------------------------------------------------- targets


def chosen_clips(clips: ClipSet, limit: int) -> list[int]:
    """At most ``limit`` clips, evenly spread over the set."""
    count = min(limit, len(clips))
    return [index * len(clips) // count for index in range(count)]


def make_targets(
    folder: Path, clips: ClipSet, indices: list[int], vae: Vae, sha256: str, ranks: Ranks
) -> Targets:
    """The targets of the clips at ``indices``, one file each below ``folder``: those that are there
    are read, this rank makes its share of the others. ``sha256``: of the VAE's weights."""
    origin = {"vae": sha256, "clips": clips.hash}
    files = {index: folder / f"{index:06d}.safetensors" for index in indices}
    waiting = [
        index
        for index, file in files.items()
        if not file.is_file() or read_metadata(file, "delete it") != origin
    ]
    ranks.barrier()  # no rank writes before all have counted
    own = waiting[ranks.rank :: ranks.world]
    folder.mkdir(parents=True, exist_ok=True)
    for number, index in enumerate(own):
        latents = vae.encode(to_unit(clips.video(index))[None])
        pixels = as_uint8(vae.decode(latents))
        write_tensors(
            files[index], {"latents": latents[0].cpu(), "pixels": pixels[0].cpu()}, origin
        )
        if ranks.is_main and number % 10 == 0:
            say(f"{folder}: {number + 1}/{len(own)} clips encoded and decoded by the VAE")
    ranks.barrier()
    tensors = [read_tensors(file, "delete it") for file in files.values()]
    return Targets(*(torch.stack([row[name] for row in tensors]) for name in ("latents", "pixels")))


def as_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] -> uint8, the inverse of :func:`to_unit`."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ----------------------------------------------------------------------------------------- training


def build_model(cfg: TinyVaeConfig, seed: int) -> TinyDecoder:
    """Random weights of ``seed``; the picture begins as grey."""
    torch.manual_seed(seed)
    model = TinyDecoder(cfg)
    torch.nn.init.constant_(model.get_parameter("decoder.22.bias"), 0.5)
    return channels_last(model)


def distil_loss(cfg: LossSection, model: TinyDecoder, latents: Tensor, target: Tensor) -> Tensor:
    """Distance of the tiny decoder's pixels, not clipped, from ``target`` (B, F, 3, H, W) in [-1,
    1]."""
    error = model(latents)[0] * 2 - 1 - target
    edges = torch.stack(
        [error.diff(dim=dim).abs().mean() for dim in (1, 3, 4) if error.shape[dim] > 1]
    )
    return (
        cfg.l1 * error.abs().mean() + cfg.mse * error.square().mean() + cfg.gradient * edges.sum()
    )


def update(
    cfg: PretrainTinyVaeConfig, run: Run, engine: Engine, targets: Targets, position: int
) -> tuple[StepInfo, Logs]:
    """One update on the clips that seed and ``position`` choose; the mean logs of all ranks."""
    ranks, seed, count = run.ranks, cfg.run.seed, len(targets.latents)
    samples = epoch_order(seed, position - 1, cfg.train.global_batch, count)
    sums: Logs = {}
    with keeping(run, position, engine, samples) as records:
        for number, clips in micro_batches(cfg.train, seed, ranks, position - 1, count):
            latents = on_device(targets.latents[clips], ranks.device)
            pixels = to_unit(on_device(targets.pixels[clips], ranks.device))
            loss = engine(latents, pixels)
            records.append(MicroBatch(number, clips, [], loss.detach(), {"latents": latents}))
            engine.backward(loss)
            info = engine.step()
            add_to(sums, {"loss": float(loss.detach())}, engine.micro_batches)
    return info, ranks.mean(sums) | {"grad_norm": info.grad_norm, "lr": info.lr}


# --------------------------------------------------------------------------------------- evaluation


def quick_psnr(model: TinyDecoder, val: Targets) -> Logs:
    """PSNR in dB against the VAE's decodings."""
    device = next(model.parameters()).device
    output = TinyVae(model).decode(on_device(val.latents, device)).cpu()
    error = (output - to_unit(val.pixels)).square()
    return {"val/psnr": psnr_of_error(error), "val/psnr_first_frame": psnr_of_error(error[:, 0])}


def milliseconds(decoder: PixelDecoder, latents: Tensor) -> float:
    """Per pixel frame of one clip (1, F', C, H', W') that comes a latent frame at a time; the median
    of five."""

    def play() -> int:
        stream = decoder.stream()
        return sum(stream.push(frame).cpu().shape[1] for frame in latents.split(1, dim=1))

    play()
    times = [clock(play) for _ in range(5)]
    return round(1000 * sorted(times)[2], 3)


def clock(play: Callable[[], int]) -> float:
    """Seconds per frame that ``play`` makes."""
    start = time.perf_counter()
    frames = play()
    return (time.perf_counter() - start) / frames


def write(
    cfg: PretrainTinyVaeConfig,
    model: TinyDecoder,
    vae: Vae,
    clips: ClipSet,
    val: Targets,
    data_hash: str,
) -> dict[str, object]:
    """Write ``RUN/decoder``, and measure the written file on held-out clips; the report."""
    folder = Path(cfg.run.dir) / "decoder"
    file = save_decoder(model, folder, latents_of(vae))
    decoder = load_decoder(folder, device=vae.device, vae=vae)
    own = decoder.decode(on_device(val.latents, vae.device)).cpu()
    theirs = to_unit(val.pixels)
    real = torch.stack(
        [to_unit(clips.video(index)) for index in chosen_clips(clips, cfg.eval_clips)]
    )
    report: dict[str, object] = {
        "against_the_vae": reconstruction(theirs, own),
        "against_the_clips": reconstruction(real, own),
        "vae_against_the_clips": reconstruction(real, theirs),
        "clips": len(real),
        "milliseconds_per_frame": milliseconds(decoder, val.latents[:1]),
        "vae_milliseconds_per_frame": milliseconds(vae, val.latents[:1]),
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "megabytes": round(file.stat().st_size / 1e6, 3),
        "sha256": sha256_file(file),
    }
    origin = provenance(
        stage="tiny_vae", step=cfg.train.steps, seed=cfg.run.seed, data_hash=data_hash
    )
    command = {"command": " ".join(sys.argv), "config": to_yaml(cfg)}
    write_json(folder / "provenance.json", {**origin, **command})
    write_json(folder / "evaluation.json", report)
    return report


# ---------------------------------------------------------------------------------------------- run


def main() -> None:
    cfg = from_command_line(PretrainTinyVaeConfig, __doc__ or "")
    ranks = init_distributed(cfg.run.timeout_minutes)
    vae = load_vae(cfg.base, device=ranks.device)
    if cfg.model.geometry != vae.geometry:
        raise UserError(
            f"model makes {cfg.model.geometry}, the VAE of {cfg.base} {vae.geometry}; set model to match"
        )
    clips = {split: ClipSet(cfg.data, split) for split in ("train", "val")}
    for split_clips in clips.values():
        vae.geometry.shape(split_clips.frames, split_clips.height, split_clips.width)
    indices = {
        "train": chosen_clips(clips["train"], cfg.max_clips),
        "val": chosen_clips(clips["val"], cfg.eval_clips),
    }
    check_batches(cfg.train, ranks, len(indices["train"]), cfg.data)
    run = Run(cfg.run, ranks, config=cfg, may_change=(*RESUMABLE, "eval_clips"))
    source = vae_source(cfg.base)
    file = source if source.is_file() else source / WEIGHTS
    sha256 = sha256_file(file) if file.is_file() else sha256_folder(source)
    targets = {
        split: make_targets(
            Path(cfg.run.dir) / "targets" / split, clips[split], indices[split], vae, sha256, ranks
        )
        for split in indices
    }
    engine = build_engine(
        StepModule(build_model(cfg.model, cfg.run.seed), partial(distil_loss, cfg.loss)),
        cfg.engine,
        ranks,
        global_batch=cfg.train.global_batch,
        micro_batch=cfg.train.micro_batch,
        total_updates=cfg.train.steps,
    )
    data_hash = clips["train"].hash
    origin = partial(provenance, stage="tiny_vae", seed=cfg.run.seed, data_hash=data_hash)
    ema, ema_model = Ema(cfg.train.ema, ranks), build_model(cfg.model, 0).to(ranks.device)
    checkpointer = Checkpointer(run, cfg.train, {"model": engine}, ema, to_yaml(cfg), origin)
    start = checkpointer.resume()
    summary = Summary(
        checkpointer,
        start,
        title=f"Training of a tiny decoder for the VAE of {cfg.base}",
        data=[f"{len(indices['train']):,} of {len(clips['train']):,} clips in {cfg.data}"],
    )
    summary.begin()
    with Loop(run, checkpointer, start) as loop:
        for step in loop:
            info, logs = update(cfg, run, engine, targets["train"], loop.position(step))
            if info.stepped:
                ema.update(engine.owned())
            if step % cfg.train.validate_every == 0 or step == cfg.train.steps:
                ema.copy_to(ema_model)
                logs |= quick_psnr(ema_model, targets["val"]) if ranks.is_main else {}
            run.log(step, logs)
            last, request = step == cfg.train.steps, loop.request()
            if last or request or step % cfg.train.save_every == 0:
                checkpointer.save(step, required=last or request is Request.STOP)
            if request is Request.STOP and not last:
                loop.leave(step)
    ema.copy_to(ema_model)
    if ranks.is_main:
        report = write(cfg, ema_model, vae, clips["val"], targets["val"], data_hash)
        for name, value in report.items():
            say(f"{name}: {value}")
    ranks.barrier()
    summary.end({})
    run.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
