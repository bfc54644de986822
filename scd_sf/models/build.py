"""From a checkpoint's own words to a model: the ``model`` section of its config.yaml decides the family."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from scd_sf.checkpoint import find, load_tensors
from scd_sf.config import from_yaml
from scd_sf.models.causal import CausalWan
from scd_sf.models.scd import Scd, ScdConfig
from scd_sf.models.trunk import WanConfig
from scd_sf.models.wan import Wan
from scd_sf.types import UserError

Student = Scd | CausalWan


@dataclass(frozen=True)
class ModelConfig:
    """``family``: "scd", "causal" or "wan" (bidirectional). ``chunk`` is the causal baseline's frames per chunk."""

    family: str = "scd"
    chunk: int = 1
    wan: WanConfig = field(default_factory=WanConfig)
    scd: ScdConfig = field(default_factory=ScdConfig)

    def __post_init__(self) -> None:
        if self.family not in ("scd", "causal", "wan"):
            raise UserError(f"model.family is '{self.family}'; use scd, causal or wan")
        if self.chunk < 1:
            raise UserError(f"model.chunk is {self.chunk}; it must be at least 1")
        if self.family == "scd":
            self.scd.check(self.wan.num_layers)


@dataclass(frozen=True)
class SamplerConfig:
    """The sampler a checkpoint was made for; it travels with the weights."""

    name: str = "euler"
    steps: int = 50
    shift: float = 5.0


@dataclass(frozen=True)
class CheckpointConfig:
    """config.yaml of every model checkpoint."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    base: str = ""


def build_model(config: ModelConfig) -> Student | Wan:
    """A freshly initialised model of the configured family."""
    if config.family == "wan":
        return Wan(config.wan)
    return CausalWan(config.wan, config.chunk) if config.family == "causal" else Scd(config.wan, config.scd)


def load_state(model: nn.Module, state: dict[str, Tensor], origin: Path) -> None:
    """Strict load with one line for people."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = [n for n in expected if n not in state or tuple(state[n].shape) != expected[n]]
    extra = [n for n in state if n not in expected]
    if wrong or extra:
        first = (wrong or extra)[0]
        raise UserError(
            f"{origin}: tensor '{first}' does not fit its config.yaml; weights and config do not belong together"
        )
    model.load_state_dict(state)


def load_checkpoint_model(path: Path, weights: str = "ema") -> tuple[Student | Wan, CheckpointConfig]:
    """Build a checkpoint's model in fp32. ``path``: a step directory (verified), or a run directory (newest verified).

    ``weights``: "model", "ema" or "best" (stage 3's best EMA). A stage-1 checkpoint has only "model" and says so by
    holding no ema.safetensors: "ema" then means the transplanted weights.
    """
    path = find(path)
    config = from_yaml(CheckpointConfig, path / "config.yaml")
    file = path / f"{weights}.safetensors"
    if weights == "ema" and not file.is_file():
        file = path / "model.safetensors"
    if weights not in ("model", "ema", "best") or not file.is_file():
        raise UserError(f"{path}: no weights '{weights}' there; use one of model, ema, best")
    model = build_model(config.model)
    load_state(model, {k: v.to(torch.float32) for k, v in load_tensors(file).items()}, file)
    return model, config


def load_student(path: Path, weights: str = "ema") -> tuple[Student, CheckpointConfig]:
    """As :func:`load_checkpoint_model`, refusing a bidirectional model."""
    model, config = load_checkpoint_model(path, weights)
    if isinstance(model, Wan):
        raise UserError(f"{path}: holds a bidirectional Wan; this needs an SCD or causal student (run stage 1 first)")
    return model, config
