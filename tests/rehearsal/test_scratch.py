"""The models trained from scratch (SCD-B, Causal DiT-B; TECO-Minecraft's 300 frames, UCF-101's
labels) and the image tokenizer, on the rehearsal's device: a micro-batch of training, prediction,
the tokenizer both ways."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import recipe_runner
import torch
from rehearsal import world
from rehearsal.budgets import BUDGETS
from rehearsal.fake_cuda import DEVICE, FakeCuda
from torch import Tensor

from scd_sf.config import load_config
from scd_sf.data.frames import FrameBatch
from scd_sf.diffusion.samplers import Euler
from scd_sf.evaluation.prediction import PredictionConfig, predict
from scd_sf.generation.generate import clips_of
from scd_sf.losses.flow_matching import flow_matching_loss
from scd_sf.losses.reconstruction import TokenizerObjective
from scd_sf.models.build import Scd, Student, build_student, set_checkpointing
from scd_sf.models.tokenizers.tokenizer import FrameTokenizer, Normalisation
from scd_sf.models.tokenizers.training import TokenizerConfig, build_tokenizer
from scd_sf.train.base import StepModule
from scd_sf.types import Conditioning, Logs

BLANKS = ["data=x", "val=x", "run.dir=x", "train.global_batch=2", "train.micro_batch=2"]


def config(file: str, *changes: str) -> Any:
    schema = recipe_runner.load_script("recipes/pretrain.py").PretrainConfig
    return load_config(schema, world.CONFIGS / f"pretrain_{file}.yaml", [*BLANKS, *changes])


@cache
def student(file: str, *changes: str) -> Student:
    with DEVICE:
        return world.in_bf16(build_student(config(file, *changes).model))


class Clips:
    """Encoded frames, as a directory gives them: on the host."""

    def __init__(self, cfg: Any) -> None:
        self.dit, self.clips = cfg.model.dit, [SimpleNamespace(id="a", frames=cfg.frames)] * 4

    def batch(self, indices: list[int], starts: list[int], frames: int) -> FrameBatch:
        rows, dit = len(indices), self.dit
        actions = torch.zeros(rows, frames, dtype=torch.long) if dit.num_actions else None
        labels = torch.zeros(rows, dtype=torch.long) if dit.num_labels else None
        latents = torch.zeros(rows, frames, dit.in_channels, 8, 8)
        return FrameBatch(latents, Conditioning.of_frames(rows, actions, labels))


CASES = {
    "SCD-B, actions": ("scd_b",),
    "Causal DiT-B, actions": ("causal_b",),
    "SCD-B, labels, sample by sample": (
        "ucf101",
        "model.dit.num_labels=101",
        "samples_in_turn=true",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_micro_batch(cuda: FakeCuda, name: str) -> None:
    script: Any = recipe_runner.load_script("recipes/pretrain.py")
    cfg, model = config(*CASES[name]), student(*CASES[name])
    set_checkpointing(model.trunks(), cfg.checkpointing, cfg.recompute_attention)
    if isinstance(model, Scd):
        model.samples_in_turn = cfg.samples_in_turn

    def loss_fn(
        model: Student, x_0: Tensor, cond: Conditioning, rng: torch.Generator
    ) -> tuple[Tensor, Logs]:
        return flow_matching_loss(model, x_0, cond, Conditioning.of_frames(1), cfg.loss, rng)

    run, engine = SimpleNamespace(ranks=world.RANKS), world.Forward(StepModule(model, loss_fn))
    with cuda.budget(BUDGETS[f"from scratch, {name}"]):
        _, logs = script.update(cfg, run, engine, Clips(cfg), range(4), 1)
    assert logs["loss"] == 1.0


@pytest.mark.parametrize("name", ["SCD-B, actions", "Causal DiT-B, actions"])
def test_prediction(cuda: FakeCuda, name: str) -> None:
    """Two frames after three, within a window, SCD guided by the null action."""
    cfg, model = config(*CASES[name]), student(*CASES[name])
    batch = Clips(cfg).batch([0, 1], [0, 0], 5)
    rules = PredictionConfig(window=2)
    context = batch.latents_BFCHW[:, :3].to(cuda.device)
    with cuda.budget(BUDGETS[f"two frames predicted, {name.split(',', maxsplit=1)[0]}"]):
        made = clips_of(predict(model, context, batch.cond, 2, Euler(4, 1.0), [0, 1], rules))
    assert made.shape == (2, 2, 32, 8, 8) and made.device == cuda.device


@cache
def tokenizer() -> FrameTokenizer:
    """DC-AE f16c32."""
    with DEVICE:
        model = build_tokenizer(TokenizerConfig(), 0)
    return FrameTokenizer(world.in_bf16(model), Normalisation((0.0,) * 32, (1.0,) * 32))


def test_tokenizer(cuda: FakeCuda) -> None:
    frames, ours = torch.zeros(2, 4, 3, 128, 128), tokenizer()
    with cuda.budget(BUDGETS["frames of the host through the tokenizer"]):
        latents = ours.encode(frames)
        pixels = ours.decode(latents)
    assert (
        latents.shape == (2, 4, 32, 8, 8)
        and pixels.shape == frames.shape
        and pixels.device == cuda.device
    )


def test_training_a_tokenizer(cuda: FakeCuda) -> None:
    """The recipe's update of a micro-batch of uint8 frames; the GAN needs a backward pass."""
    script: Any = recipe_runner.load_script("recipes/pretrain_tokenizer.py")
    blanks = [
        "data.root=x",
        "loss.perceptual=0",
        "loss.gradient=1",
        "lpips_weights=",
        "run.dir=x",
        "train.global_batch=4",
        "train.micro_batch=4",
    ]
    cfg = load_config(
        script.PretrainTokenizerConfig, world.CONFIGS / "tokenizer_minecraft.yaml", blanks
    )
    model = tokenizer().model.requires_grad_(True)
    training = object.__new__(script.Training)
    training.cfg, training.run, training.frames = cfg, SimpleNamespace(ranks=world.RANKS), range(8)
    pictures = torch.zeros(4, 3, 128, 128, dtype=torch.uint8)
    training.pixels = SimpleNamespace(expect=lambda keys: None, batch=lambda key: pictures)
    training.engine, training.discriminator = (
        world.Forward(StepModule(model, TokenizerObjective(cfg.loss, cfg.gan))),
        None,
    )
    with cuda.budget(BUDGETS["a micro-batch of the tokenizer's training"]):
        training.update(1, 1)
    model.requires_grad_(False)
