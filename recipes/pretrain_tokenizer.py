"""Train an image tokenizer (``AutoencoderDC``) on the frames of pixel clips, and write it for
``load_tokenizer``.

    python recipes/pretrain_tokenizer.py --config recipes/configs/tokenizer_doom.yaml \\
        data.root=data/doom_actions run.dir=runs/tokenizer

Works under ``deepspeed`` and ``torchrun`` too. The same command goes on after an interruption. At
the end ``RUN/tokenizer/`` holds config.json with the measured mean and deviation of the latents,
fp16 weights, provenance.json and evaluation.json (PSNR, SSIM, time per frame, of the written files,
on held-out clips); ``RUN/reconstructions.png`` shows pairs. Losses:
``scd_sf/losses/reconstruction.py``. Source: DC-AE (arXiv:2410.10733), FAR's settings.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderDC
from torch import Tensor

from scd_sf.checkpoint import Checkpoints, provenance
from scd_sf.config import from_command_line, to_yaml
from scd_sf.data.latents import epoch_order
from scd_sf.data.prefetch import Prefetch
from scd_sf.data.sources.pixel_frames import PixelFrames, to_unit
from scd_sf.data.sources.pixel_sources import PixelsConfig, open_pixels
from scd_sf.diffusion.noise import generator
from scd_sf.distributed import init_distributed
from scd_sf.evaluation.frames import reconstruction_figures, write_sheet
from scd_sf.evaluation.lpips import load_perceptual
from scd_sf.files import write_json
from scd_sf.losses.reconstruction import GanConfig, ReconstructionConfig, TokenizerObjective, judge
from scd_sf.models.tokenizers.start import first_channels, linear_start
from scd_sf.models.tokenizers.tokenizer import (
    FrameTokenizer,
    Normalisation,
    load_tokenizer,
    save_tokenizer,
)
from scd_sf.models.tokenizers.training import (
    Components,
    DiscriminatorConfig,
    TokenizerConfig,
    build_discriminator,
    build_tokenizer,
)
from scd_sf.models.tokenizers.vae_training import patch_components
from scd_sf.nn.layers import channels_last
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

RESUMABLE_HERE = (
    *RESUMABLE,
    "gan_engine.backend",
    "gan_engine.zero_stage",
    "gan_engine.bucket",
    "evaluation",
)

MicroKey = tuple[int, int, tuple[int, ...]]


@dataclass
class FramesConfig:
    """Which frames of the clips a tokenizer is trained on."""

    per_clip: int = 1
    """Frames of each clip of a batch."""
    step: int = 1
    """Distance between them, in frames (in kept ones with ``keep_every``)."""
    keep_every: int = 0
    """Each n-th frame of all clips is decoded once and kept in memory; 0: clips are decoded
    anew."""
    clips: int = 0
    """At most so many clips; 0: all."""

    def __post_init__(self) -> None:
        if self.per_clip < 1 or self.step < 1 or self.keep_every < 0 or self.clips < 0:
            raise ValueError(
                "per_clip and step must be at least 1, keep_every and clips at least 0"
            )


@dataclass
class EvaluationConfig:
    """What is measured on held-out clips."""

    clips: int = 64
    """Held-out clips that are read."""
    frames: int = 256
    """Frames that PSNR and SSIM are measured on."""
    statistics_frames: int = 2048
    """Frames that the latents' mean and deviation are measured on."""
    statistics: Literal["channel", "one"] = "channel"
    """channel: a deviation for each channel; one: the same for all."""
    sheet: int = 24
    """Pairs of true and decoded frames in the picture."""

    def __post_init__(self) -> None:
        check_within(
            self,
            {
                "clips": (1, 2**20),
                "frames": (1, 2**20),
                "statistics_frames": (2, 2**20),
                "sheet": (1, 1000),
            },
        )


@dataclass
class PretrainTokenizerConfig:
    """``global_batch`` and ``micro_batch`` of ``train`` count clips."""

    data: PixelsConfig
    """The training clips."""
    run: RunConfig
    """Run directory, seed, log."""
    val: PixelsConfig = field(default_factory=lambda: PixelsConfig(split="test"))
    """The held-out clips; without a root: that split of the training data."""
    frames: FramesConfig = field(default_factory=FramesConfig)
    """Which frames of the clips are trained on."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Sizes of the network."""
    loss: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    """Weights of the reconstruction losses."""
    gan: GanConfig = field(default_factory=GanConfig)
    """The adversarial loss."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """Sizes of the discriminator."""
    lpips_weights: str = ""
    """File of the network of LPIPS, for ``loss.perceptual``; empty: none."""
    init: str = ""
    """Directory of a tokenizer of this architecture to go on from; without ``tokenizer.shortcuts``
    it may have more channels, of which the first are kept. Empty: new weights."""
    start: Literal["random", "linear"] = "random"
    """New weights: random, or linear: least squares on ``start_frames`` frames."""
    start_frames: int = 256
    """Frames of the linear start, and of the components of ``loss.anchor``."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured on held-out clips."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batches, checkpoints."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Optimiser of the tokenizer."""
    gan_engine: EngineConfig = field(default_factory=EngineConfig)
    """Optimiser of the discriminator."""

    def __post_init__(self) -> None:
        check_within(self, {"start_frames": (1, 2**20)})
        if (self.loss.perceptual > 0) != bool(self.lpips_weights):
            raise ValueError(
                "loss.perceptual and lpips_weights go together: set both, or neither (loss.gradient then)"
            )
        if self.gan.weight > 0 and 3 in (self.engine.zero_stage, self.gan_engine.zero_stage):
            raise ValueError(
                "a GAN needs zero_stage 2 or less: the decoder asks for the discriminator's weights"
            )


def fine_tuned(cfg: PretrainTokenizerConfig) -> AutoencoderDC:
    """A copy of the network of ``cfg.init``, or of its first channels. UserError: it is another
    architecture."""
    model = build_tokenizer(cfg.tokenizer, cfg.run.seed)
    parent = load_tokenizer(Path(cfg.init))
    weights = parent.model.state_dict()
    if isinstance(parent.model, AutoencoderDC) and not cfg.tokenizer.shortcuts:
        weights = first_channels(parent.model, cfg.tokenizer.channels, parent.normalisation.mean)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if differences := sorted(
        shapes.items() ^ {name: tensor.shape for name, tensor in weights.items()}.items()
    ):
        raise UserError(
            f"{cfg.init}: its '{differences[0][0]}' is not that of the config's tokenizer; set the same sizes"
        )
    model.load_state_dict(weights)
    return model


def prepare(
    cfg: PretrainTokenizerConfig, frames: PixelFrames
) -> tuple[AutoencoderDC, Components | None]:
    """The model before the first step, and the anchor's components (None: neither an anchor nor a
    linear start). Both depend on config and data alone. UserError: the linear start fails."""
    model = fine_tuned(cfg) if cfg.init else build_tokenizer(cfg.tokenizer, cfg.run.seed)
    linear = cfg.start == "linear" and not cfg.init
    if not linear and not cfg.loss.anchor:
        return model, None
    pixels = to_unit(frames.spread(cfg.start_frames))
    has_checkpoints = cfg.run.resume != "never" and bool(
        Checkpoints(Path(cfg.run.dir) / "checkpoints").steps()
    )
    if linear and not has_checkpoints:
        try:
            return model, linear_start(model, pixels, cfg.loss.anchor_floor)
        except ValueError as error:
            raise UserError(
                f"start=linear: {error}; widen tokenizer.widths, or start=random"
            ) from error
    components = patch_components(
        pixels, cfg.tokenizer.channels, cfg.loss.anchor_floor, cfg.tokenizer.spatial
    )
    return model, Components(**components)


class Training:
    """The frames, the tokenizer's engine, and with a GAN the discriminator's engine."""

    def __init__(self, cfg: PretrainTokenizerConfig, run: Run, frames: PixelFrames) -> None:
        self.cfg = cfg
        self.run = run
        self.frames = frames
        ranks = run.ranks
        model, components = prepare(cfg, frames)
        if cfg.engine.backend == "torch":  # DeepSpeed orders the memory itself
            channels_last(model)
        if components is not None:
            components = Components(
                components.weight.to(ranks.device), components.bias.to(ranks.device)
            )
        perceptual = (
            load_perceptual(Path(cfg.lpips_weights), ranks.device) if cfg.lpips_weights else None
        )
        prefetch = cfg.train.prefetch if not cfg.frames.keep_every else 0
        self.pixels = Prefetch(self.read, prefetch, threads=prefetch)
        self.discriminator: Engine | None = None
        network = build_discriminator(cfg.discriminator, cfg.run.seed) if cfg.gan.weight else None
        objective = TokenizerObjective(cfg.loss, cfg.gan, components, perceptual, network)
        engine = partial(
            build_engine,
            ranks=ranks,
            global_batch=cfg.train.global_batch,
            micro_batch=cfg.train.micro_batch,
        )
        self.engine = engine(
            StepModule(model, objective), cfg.engine, total_updates=cfg.train.steps
        )
        if network is not None:
            updates = max(1, cfg.train.steps - cfg.gan.start)
            self.discriminator = engine(
                StepModule(network, judge), cfg.gan_engine, total_updates=updates
            )

    @property
    def engines(self) -> dict[str, Engine]:
        """The engines by their names in checkpoints."""
        if self.discriminator is None:
            return {"model": self.engine}
        return {"model": self.engine, "discriminator": self.discriminator}

    def micro_batches(self, position: int) -> list[MicroKey]:
        """This rank's micro-batches of one update: (position, number, clips) each."""
        cfg = self.cfg
        batches = micro_batches(
            cfg.train, cfg.run.seed, self.run.ranks, position - 1, len(self.frames)
        )
        return [(position, number, tuple(clips)) for number, clips in batches]

    def read(self, key: MicroKey) -> Tensor:
        """The frames of a micro-batch, uint8 (N, 3, H, W)."""
        position, number, clips = key
        rng = generator(self.cfg.run.seed, "frames", position, number)
        return self.frames.batch(clips, self.cfg.frames.per_clip, self.cfg.frames.step, rng)

    def update(self, step: int, position: int) -> tuple[StepInfo, Logs]:
        """One update of the tokenizer, and while the GAN is on one of the discriminator on the same
        frames; returns the mean logs of all ranks."""
        cfg, seed, device = self.cfg, self.cfg.run.seed, self.run.ranks.device
        samples = epoch_order(seed, position - 1, cfg.train.global_batch, len(self.frames))
        sums: Logs = {}
        adversarial = cfg.gan.on(step)
        with keeping(self.run, position, self.engine, samples) as records:
            keys = [*self.micro_batches(position), *self.micro_batches(position + 1)]
            self.pixels.expect(keys)
            for key in keys[: self.engine.micro_batches]:
                _, number, clips = key
                host_pixels = self.pixels.batch(key)
                pixels = to_unit(on_device(host_pixels, device))
                size = tuple(side // cfg.tokenizer.spatial for side in pixels.shape[2:])
                rng = generator(seed, "noise", position, number)
                noise = on_device(
                    torch.randn(len(pixels), cfg.tokenizer.channels, *size, generator=rng), device
                )
                loss, output, logs = self.engine(pixels, noise, adversarial)
                records.append(
                    MicroBatch(number, clips, [], loss.detach(), {"pixels": host_pixels})
                )
                self.engine.backward(loss)
                info = self.engine.step()
                logs |= {"loss": float(loss.detach())}
                if adversarial and self.discriminator is not None:
                    discriminator_loss = self.discriminator(pixels, output)
                    self.discriminator.backward(discriminator_loss)
                    self.discriminator.step()
                    logs["discriminator"] = float(discriminator_loss.detach())
                add_to(sums, logs, self.engine.micro_batches)
        return info, self.run.ranks.mean(sums) | {"grad_norm": info.grad_norm, "lr": info.lr}


def reconstructed(tokenizer: FrameTokenizer, pixels_N3HW: Tensor) -> Tensor:
    """Frames (N, 3, H, W) in [-1, 1], encoded and decoded, in [0, 1]."""
    output = tokenizer.decode(tokenizer.encode(pixels_N3HW.unsqueeze(0)))[0]
    return (output.clamp(-1, 1) / 2 + 0.5).cpu()


def as_tokenizer(
    model: AutoencoderDC, normalisation: Normalisation | None = None
) -> FrameTokenizer:
    """The model as a tokenizer; without ``normalisation`` latents stay as they are."""
    channels = int(model.config["latent_channels"])
    return FrameTokenizer(
        model, normalisation or Normalisation((0.0,) * channels, (1.0,) * channels)
    )


def measured(model: AutoencoderDC, cfg: EvaluationConfig, frames: PixelFrames) -> Normalisation:
    """Mean and deviation of each latent channel, over ``statistics_frames`` training frames."""
    pixels = to_unit(frames.spread(cfg.statistics_frames))
    latents = as_tokenizer(model).encode(pixels.unsqueeze(0))[0].transpose(0, 1).flatten(1).double()
    mean = latents.mean(1, keepdim=True)  # (C, 1)
    variance = (latents - mean).square().mean(1)
    std = (variance if cfg.statistics == "channel" else variance.mean().expand_as(variance)).sqrt()
    return Normalisation(
        tuple(round(float(value), 6) for value in mean[:, 0]),
        tuple(round(float(value), 6) for value in std),
    )


def milliseconds(tokenizer: FrameTokenizer, pixels_N3HW: Tensor) -> dict[str, float]:
    """Milliseconds per frame of encoding and of decoding, the medians of five batches."""
    batch = pixels_N3HW[: tokenizer.batch].unsqueeze(0)
    latents = tokenizer.encode(batch)
    figures = {}
    for name, function, argument in (
        ("encode", tokenizer.encode, batch),
        ("decode", tokenizer.decode, latents),
    ):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            function(argument).cpu()  # waits for the device
            times.append(time.perf_counter() - start)
        figures[f"{name}_ms_per_frame"] = round(1000 * sorted(times)[2] / batch.shape[1], 3)
    return figures


def write(
    cfg: PretrainTokenizerConfig, model: AutoencoderDC, frames: PixelFrames, val: Tensor
) -> dict[str, object]:
    """Write ``RUN/tokenizer``, and measure the written files on the frames ``val``; returns the
    report."""
    folder = Path(cfg.run.dir) / "tokenizer"
    evaluation = cfg.evaluation
    save_tokenizer(model, measured(model, evaluation, frames), folder)
    tokenizer = load_tokenizer(folder, device=next(model.parameters()).device)
    output, real = reconstructed(tokenizer, val), val / 2 + 0.5
    report: dict[str, object] = {
        name: round(value, 4) for name, value in reconstruction_figures(output, real).items()
    }
    latents = tokenizer.encode(val.unsqueeze(0))[0]
    report |= {
        "frames": len(val),
        "latent_mean": float(latents.mean()),
        "latent_std": float(latents.std()),
    }
    report |= milliseconds(tokenizer, val)
    report |= {"parameters": sum(p.numel() for p in model.parameters()), "sha256": tokenizer.sha256}
    columns = min(8, evaluation.sheet, len(val))
    count = max(columns, evaluation.sheet)
    indices = [index * len(val) // count for index in range(count)]
    write_sheet(
        Path(cfg.run.dir) / "reconstructions.png", real[indices], output[indices], columns=columns
    )
    origin = provenance(
        stage="tokenizer", step=cfg.train.steps, seed=cfg.run.seed, data_hash=frames.hash
    )
    write_json(
        folder / "provenance.json",
        {**origin, "command": " ".join(sys.argv), "config": to_yaml(cfg)},
    )
    write_json(folder / "evaluation.json", report)
    return report


def main() -> None:
    cfg = from_command_line(PretrainTokenizerConfig, __doc__ or "")
    ranks = init_distributed(cfg.run.timeout_minutes)
    root, spatial = cfg.data.root, cfg.tokenizer.spatial
    val_clips = open_pixels(replace(cfg.val, root=cfg.val.root or root))
    frames = PixelFrames(
        open_pixels(cfg.data), root, spatial, every=cfg.frames.keep_every, limit=cfg.frames.clips
    )
    check_batches(cfg.train, ranks, len(frames), Path(root))
    val_frames = PixelFrames(
        val_clips, f"{cfg.val.root or root} ({cfg.val.split})", spatial, limit=cfg.evaluation.clips
    )
    val = to_unit(val_frames.spread(cfg.evaluation.frames))
    run = Run(cfg.run, ranks, config=cfg, may_change=RESUMABLE_HERE)
    training = Training(cfg, run, frames)
    origin = partial(provenance, stage="tokenizer", seed=cfg.run.seed, data_hash=frames.hash)
    ema, engine = Ema(cfg.train.ema, ranks), training.engine
    checkpointer = Checkpointer(run, cfg.train, training.engines, ema, to_yaml(cfg), origin)
    ema_model = build_tokenizer(cfg.tokenizer, cfg.run.seed).to(ranks.device)
    start = checkpointer.resume()
    summary = Summary(
        checkpointer,
        start,
        title=f"Training of an image tokenizer, {f'from {cfg.init}' if cfg.init else 'new weights'}",
        data=[f"frames of {len(frames):,} clips in {root}; {len(val)} held-out frames"],
    )
    summary.begin()
    with Loop(run, checkpointer, start) as loop:
        for step in loop:
            info, logs = training.update(step, loop.position(step))
            if info.stepped:
                ema.update(engine.owned())
            if step % cfg.train.validate_every == 0 or step == cfg.train.steps:
                ema.copy_to(ema_model)
                figures = reconstruction_figures(
                    reconstructed(as_tokenizer(ema_model), val), val / 2 + 0.5
                )
                logs |= {f"val/{name}": value for name, value in figures.items()}
            run.log(step, logs)
            last, request = step == cfg.train.steps, loop.request()
            if last or request or step % cfg.train.save_every == 0:
                checkpointer.save(step, required=last or request is Request.STOP)
            if request is Request.STOP and not last:
                loop.leave(step)
    ema.copy_to(ema_model)
    if ranks.is_main:
        for name, value in write(cfg, ema_model, frames, val).items():
            say(f"{name}: {value}")
    ranks.barrier()
    script = {"realestate10k": "realestate10k.py", "ucf101": "ucf101.py"}
    encode = [
        *("python", f"data_prep/{script.get(cfg.data.kind, 'teco_minecraft.py')}"),
        *("--root", root, "--split", "train", "--tokenizer", f"{cfg.run.dir}/tokenizer"),
        *("--out", f"{cfg.run.dir}-frames/train"),
    ]
    summary.end({"encode": encode})
    run.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
