"""Train Causal DiT or SCD from scratch on encoded frames (paper 3 and 5; TECO-Minecraft, UCF-101,
RealEstate10K).

    deepspeed recipes/pretrain.py --config recipes/configs/pretrain_scd_b.yaml \\
        data=D/train val=D/test run.dir=runs/scd_b

``data`` and ``val`` are directories of encoded frames (data_prep/teco_minecraft.py, ucf101.py,
realestate10k.py). Every update draws clips by epoch and a window of ``frames`` frames of each. Flow
matching with teacher forcing, Algorithm 1: the encoder once per clip on clean frames, the decoder
on ``loss.noise_samples`` noisy ones of every frame. Score the checkpoints with
recipes/evaluate_prediction.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.checkpoint import provenance
from scd_sf.config import from_command_line, to_yaml
from scd_sf.data.frames import FrameClips
from scd_sf.data.latents import epoch_order
from scd_sf.diffusion.noise import generator
from scd_sf.distributed import Ranks, init_distributed
from scd_sf.evaluation.prediction import PredictionPreview, PredictionPreviewConfig
from scd_sf.losses.flow_matching import (
    FlowMatchingConfig,
    flow_matching_loss,
    loss_by_time,
    validation_loss,
)
from scd_sf.models.build import (
    CheckpointConfig,
    ModelConfig,
    SamplerConfig,
    Scd,
    Student,
    build_student,
    set_checkpointing,
)
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.train.base import Engine, EngineConfig, StepInfo, StepModule
from scd_sf.train.batches import RESUMABLE, TrainConfig, add_to, micro_batches
from scd_sf.train.checkpointing import Checkpointer
from scd_sf.train.checks import check_batches, check_same_size, check_shape
from scd_sf.train.ema import Ema
from scd_sf.train.engine import build_engine
from scd_sf.train.loop import Loop
from scd_sf.train.run import Run, RunConfig
from scd_sf.train.skipped import MicroBatch, keeping
from scd_sf.train.stop import Request
from scd_sf.train.summary import Summary, describe_clips
from scd_sf.types import Conditioning, Logs, UserError, exit_on_user_error

SCD_B = ModelConfig(
    backbone="dit",
    scd=ScdConfig(
        tuple(range(8)), DecoderConfig((8, 9, 10, 11), "paper", "temporal", prefix_time="step")
    ),
)  # 8 + 4 layers of width 768 (Table 2)


@dataclass
class PretrainConfig:
    """Training from scratch on encoded frames with actions or labels. The default model is
    SCD-B."""

    data: str
    """Folder of encoded training clips (``scd_sf/data/frames.py``)."""
    val: str
    """Folder of encoded held-out clips."""
    run: RunConfig
    """Run directory, seed, log."""
    model: ModelConfig = field(default_factory=lambda: SCD_B)
    """The model to train."""
    loss: FlowMatchingConfig = field(default_factory=lambda: FlowMatchingConfig(shift=1.0))
    """Flow matching."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(shift=1.0))
    """The sampler that previews and checkpoints get."""
    frames: int = 16
    """Frames of the training window (Minecraft 300, UCF-101 16, RealEstate10K 64)."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batches, checkpoints. ``prefetch`` has no effect here: windows are small and read
    when needed."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Optimiser and precision."""
    checkpointing: bool = True
    """Compute the blocks again in the backward pass: less memory, more time."""
    recompute_attention: bool = True
    """With ``checkpointing``: attention, too; false keeps its outputs."""
    samples_in_turn: bool = False
    """Run the K noisy samples through the decoder one after the other, in the memory of one."""
    validation_clips: int = 32
    """Held-out clips of the validation loss, at fixed noise."""
    preview: PredictionPreviewConfig = field(default_factory=PredictionPreviewConfig)
    """Videos while training."""

    def __post_init__(self) -> None:
        if self.model.backbone != "dit":
            raise UserError(
                "model.backbone must be dit; Wan's own small teacher is trained by pretrain_teacher.py"
            )
        check_consistent(self.model)
        if self.frames < 1 or self.validation_clips < 1:
            raise UserError(
                f"frames {self.frames} and validation_clips {self.validation_clips} must be at least 1"
            )


def check_consistent(model: ModelConfig) -> None:
    """UserError for fields that contradict each other or that the model does not read; a checkpoint
    would state them wrongly."""
    layers, scd = model.dit.num_layers, model.scd
    if model.family == "scd" and layers != len(scd.encoder_layers) + len(scd.decoder.layers):
        raise UserError(
            f"model.dit.num_layers is {layers}, but model.scd has {len(scd.encoder_layers)} encoder_layers and "
            f"{len(scd.decoder.layers)} decoder.layers: set them together"
        )
    if model.family == "scd" and (
        message := scd.decoder.unread_field(DecoderConfig(), SCD_B.scd.decoder)
    ):
        raise UserError(f"model.scd.{message}")
    ignored_fields: dict[str, object] = (
        {"chunk": scd.chunk} if model.family == "scd" else {"scd": SCD_B.scd}
    )
    ignored_fields |= {"wan": SCD_B.wan}
    for name, default in ignored_fields.items():
        if vars(model)[name] not in (vars(SCD_B)[name], default):
            hint = " (SCD's is model.scd.chunk)" if name == "chunk" else ""
            raise UserError(
                f"model.{name} is set, but family {model.family} from scratch does not read it{hint}: remove it"
            )


def model_engine(cfg: PretrainConfig, ranks: Ranks, model: Student) -> Engine:
    """The model's engine; its forward pass is the whole loss."""
    set_checkpointing(model.trunks(), cfg.checkpointing, cfg.recompute_attention)
    if isinstance(model, Scd):
        model.samples_in_turn = cfg.samples_in_turn

    def loss_fn(
        model: Student, x_0: Tensor, cond: Conditioning, rng: torch.Generator
    ) -> tuple[Tensor, Logs]:
        return flow_matching_loss(model, x_0, cond, Conditioning.of_frames(1), cfg.loss, rng)

    return build_engine(
        StepModule(model, loss_fn),
        cfg.engine,
        ranks,
        global_batch=cfg.train.global_batch,
        micro_batch=cfg.train.micro_batch,
        total_updates=cfg.train.steps,
    )


def starts_of(
    clips: FrameClips, indices: Sequence[int], frames: int, rng: torch.Generator
) -> list[int]:
    """The first frame of each clip's window, uniformly random."""
    choices = [clips.clips[index].frames - frames + 1 for index in indices]
    return [int(torch.randint(count, (), generator=rng)) for count in choices]


def update(
    cfg: PretrainConfig,
    run: Run,
    engine: Engine,
    clips: FrameClips,
    long_clips: Sequence[int],
    position: int,
) -> tuple[StepInfo, Logs]:
    """One update over all micro-batches, of the clips ``long_clips``; returns the mean logs of all
    ranks."""
    sums: Logs = {}
    samples = epoch_order(cfg.run.seed, position - 1, cfg.train.global_batch, len(long_clips))
    with keeping(run, position, engine, [long_clips[place] for place in samples]) as records:
        for number, places in micro_batches(
            cfg.train, cfg.run.seed, run.ranks, position - 1, len(long_clips)
        ):
            indices = [long_clips[place] for place in places]
            starts = starts_of(
                clips, indices, cfg.frames, generator(cfg.run.seed, "window", position, number)
            )
            host_batch = clips.batch(indices, starts, cfg.frames)
            batch = host_batch.to(run.ranks.device)
            loss, logs = engine(
                batch.latents_BFCHW, batch.cond, generator(cfg.run.seed, "loss", position, number)
            )
            records.append(
                MicroBatch(
                    number,
                    indices,
                    [clips.clips[i].id for i in indices],
                    loss.detach(),
                    host_batch.tensors(),
                )
            )
            engine.backward(loss)
            info = engine.step()
            add_to(sums, logs, engine.micro_batches)
    return info, loss_by_time(run.ranks.mean(sums)) | {"grad_norm": info.grad_norm, "lr": info.lr}


@torch.no_grad()
def validate(model: Student, clips: FrameClips, cfg: PretrainConfig, ranks: Ranks) -> Logs:
    """Mean flow loss of the clips' first windows at fixed noise, without dropout and corruption; the
    ranks share the clips."""
    long_clips = clips.at_least(cfg.frames)
    indices = long_clips[:: max(1, len(long_clips) // cfg.validation_clips)][: cfg.validation_clips]
    total, null = 0.0, Conditioning.of_frames(1)
    model.to(ranks.device)
    for index in indices[ranks.rank :: ranks.world]:
        batch = clips.batch([index], [0], cfg.frames).to(ranks.device)
        rng = generator(0, "validation", index)
        total += float(validation_loss(model, batch.latents_BFCHW, batch.cond, null, cfg.loss, rng))
    model.to("cpu")
    return {"val/loss": ranks.mean({"sum": total})["sum"] * ranks.world / len(indices)}


def checked(cfg: PretrainConfig, ranks: Ranks) -> tuple[FrameClips, FrameClips, list[int]]:
    """Training clips, validation clips, and the indices of the training clips that are long enough.
    UserError: they do not fit the model."""
    clips, val = FrameClips(cfg.data), FrameClips(cfg.val)
    dit = cfg.model.dit
    chunk = cfg.model.scd.chunk if cfg.model.family == "scd" else cfg.model.chunk
    for data in (clips, val):
        patch = (dit.patch_height, dit.patch_width)
        check_shape(data.info.shape(cfg.frames), data.root, dit.in_channels, patch, chunk)
        for name, count, size in (
            ("actions", data.info.num_actions, dit.num_actions),
            ("labels", len(data.info.labels), dit.num_labels),
        ):
            if size and count != size:
                raise UserError(
                    f"{data.root}: has {count} {name}, model.dit.num_{name} is {size}: set it to {count}"
                )
        data.at_least(cfg.frames)
    check_same_size(clips.info.shape(cfg.frames), val.info.shape(cfg.frames), clips.root, val.root)
    long_clips = clips.at_least(cfg.frames)
    check_batches(cfg.train, ranks, len(long_clips), clips.root)
    return clips, val, long_clips


def main() -> None:
    cfg = from_command_line(PretrainConfig, __doc__ or "")
    ranks = init_distributed(cfg.run.timeout_minutes)
    clips, val, long_clips = checked(cfg, ranks)
    preview = PredictionPreview(cfg.preview, val, cfg.sampler.build())
    run = Run(cfg.run, ranks, config=cfg, may_change=(*RESUMABLE, "validation_clips", "preview"))
    run.tokens_per_step = cfg.train.global_batch * cfg.model.dit.clip_tokens(
        clips.info.shape(cfg.frames)
    )
    torch.manual_seed(cfg.run.seed)
    engine = model_engine(cfg, ranks, build_student(cfg.model))
    description = to_yaml(CheckpointConfig(cfg.model, cfg.sampler))
    latent = [cfg.frames, clips.info.channels, clips.info.height, clips.info.width]
    record = {"latent": latent, "fps": clips.info.fps}
    origin = partial(
        provenance, stage="pretrain", seed=cfg.run.seed, data_hash=clips.hash, extra=record
    )
    ema, ema_model = Ema(cfg.train.ema, ranks), build_student(cfg.model)
    checkpointer = Checkpointer(run, cfg.train, {"model": engine}, ema, description, origin)
    start = checkpointer.resume()
    shape = clips.info.shape(cfg.frames)
    summary = Summary(
        checkpointer,
        start,
        title=f"Training from scratch: {cfg.model.family} on frames, new weights",
        data=[
            describe_clips(len(long_clips), shape, clips.root),
            f"held out: {describe_clips(len(val), shape, val.root)}",
            f"{clips.info.num_actions} actions, {len(clips.info.labels)} labels",
        ],
    )
    summary.begin()
    if start == 0:
        ema_model.load_state_dict(engine.fp32_masters())
        preview.show(run, ema_model, 0)
    with Loop(run, checkpointer, start) as loop:
        for step in loop:
            info, logs = update(cfg, run, engine, clips, long_clips, loop.position(step))
            if info.stepped:
                ema.update(engine.owned())
            if step % cfg.train.validate_every == 0 or step == cfg.train.steps:
                ema.copy_to(ema_model)
                logs |= validate(ema_model, val, cfg, ranks)
                checkpointer.note_best(step, logs["val/loss"])
                preview.show(run, ema_model, step)
            run.log(step, logs)
            last, request = step == cfg.train.steps, loop.request()
            if last or request or step % cfg.train.save_every == 0:
                checkpointer.save(step, required=last or request is Request.STOP)
            if request is Request.STOP and not last:
                loop.leave(step)
    score = [
        *("python", str(Path(sys.argv[0]).parent / "evaluate_prediction.py")),
        *(f"checkpoint={cfg.run.dir}", "tokenizer=TOKENIZER", "pixels.kind=KIND"),
        *("pixels.root=CLIPS", "pixels.split=test", f"out={cfg.run.dir}/prediction"),
    ]
    summary.end({"score": score})
    run.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
