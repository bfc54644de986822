"""Building and loading models. The ``model`` section of a checkpoint's config.yaml decides the
family and the sizes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from scd_sf.checkpoint import (
    PROVENANCE,
    absolute,
    checked_origin,
    find,
    read_provenance,
    weights_file,
)
from scd_sf.config import from_yaml, to_yaml
from scd_sf.diffusion.samplers import Sampler, build_sampler
from scd_sf.files import Json, parse_json, refuse_lfs_pointer, write_tensors
from scd_sf.models.blocks import BlocksConfig, set_blocks
from scd_sf.models.causal import Causal
from scd_sf.models.dit import DitConfig
from scd_sf.models.interface import FrameGenerator
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.scratch import ScdScratch
from scd_sf.models.scd.wan import ScdWan
from scd_sf.models.skeleton import skeleton
from scd_sf.models.trunk import Trunk, TrunkConfig
from scd_sf.models.wan.hub import TEXT_PARTS, wan_folder
from scd_sf.models.wan.transformer import Wan, WanConfig
from scd_sf.tensor_files import PICKLES, open_tensors, read_all, read_metadata
from scd_sf.types import Conditioning, UserError

Scd = ScdWan | ScdScratch
Student = Scd | Causal
SINGLE = "scd_sf.model.1"  # the format of an exported file, in its metadata
MOST_CHUNK = 10_000  # latent frames at once: 40 minutes of video
MISMATCH = "weights and config do not belong together"
LICENCE = "Apache-2.0"  # of Wan 2.1 and of this project; the weights of others may have another


@dataclass(frozen=True)
class ModelConfig:
    """A model: its family and the sizes of its parts."""

    family: str = "scd"
    """scd, causal (the baseline) or wan (bidirectional)."""
    chunk: int = 1
    """Latent frames that the causal baseline generates together."""
    wan: WanConfig = field(default_factory=WanConfig)
    """Geometry with ``backbone=wan``."""
    scd: ScdConfig = field(default_factory=ScdConfig)
    """How SCD is cut and joined, with ``family=scd``."""
    backbone: str = "wan"
    """wan, or dit (from scratch; scd and causal)."""
    dit: DitConfig = field(default_factory=DitConfig)
    """Geometry with ``backbone=dit``."""
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    """Which blocks run, and which see the past."""

    def __post_init__(self) -> None:
        if self.family not in ("scd", "causal", "wan"):
            raise UserError(f"model.family is '{self.family}'; use scd, causal or wan")
        if self.backbone not in ("wan", "dit") or (self.family, self.backbone) == ("wan", "dit"):
            raise UserError(
                f"model.backbone is '{self.backbone}'; use wan, or dit with family scd or causal"
            )
        if not 1 <= self.chunk <= MOST_CHUNK:
            raise UserError(
                f"model.chunk is {self.chunk}; it must be at least 1 and at most {MOST_CHUNK}"
            )
        if self.family == "scd":
            self.scd.check(self.transformer.num_layers)
        self.blocks.check(self.family, self.transformer.num_layers)

    @property
    def transformer(self) -> WanConfig | DitConfig:
        """The geometry in use."""
        return self.wan if self.backbone == "wan" else self.dit

    def with_blocks(self, blocks: BlocksConfig | None) -> ModelConfig:
        """This config with other ``blocks`` (None: unchanged). UserError where the model cannot run
        them."""
        return self if blocks is None else replace(self, blocks=blocks)


@dataclass(frozen=True)
class SamplerConfig:
    """The sampler that a checkpoint was made for; it travels with the weights."""

    name: str = "euler"
    """euler, unipc, or renoise (distilled students)."""
    steps: int = 50
    """Denoising steps."""
    shift: float = 5.0
    """Timestep shift that warps even steps."""
    times: tuple[float, ...] = ()
    """The times of the steps (1 is noise) that a student was distilled at; empty: ``steps`` even
    ones, warped."""

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> Sampler:
        """The sampler. UserError for an unknown name and for times that do not fit."""
        return build_sampler(self.name, self.steps, self.shift, self.times)


@dataclass(frozen=True)
class CheckpointConfig:
    """config.yaml of every model checkpoint."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The sampler it was made for."""
    base: str = ""
    """Wan directory with its VAE and text encoder; empty: none."""


def build_model(config: ModelConfig) -> Student | Wan:
    """A freshly initialised model of the configured family."""
    cfg = config.transformer
    if config.family == "scd":
        return build_scd(cfg, config.scd)
    model = Wan(config.wan) if config.family == "wan" else Causal(cfg, config.chunk)
    set_blocks(model, config.blocks)
    return model


def build_scd(cfg: WanConfig | DitConfig, scd: ScdConfig) -> Scd:
    """SCD on Wan's layers, or on those of a model trained from scratch, as ``cfg`` says."""
    return ScdScratch(cfg, scd) if isinstance(cfg, DitConfig) else ScdWan(cfg, scd)


def family_of(model: Student | Wan) -> str:
    """The family's name in results: Scd, Causal or Wan."""
    return "Scd" if isinstance(model, Scd) else type(model).__name__


def build_student(config: ModelConfig) -> Student:
    """A freshly initialised student. UserError for a bidirectional model."""
    model = build_model(config)
    if isinstance(model, Wan):
        raise UserError("model.family is wan, a bidirectional model; this needs scd or causal")
    return model


def set_checkpointing(
    trunks: Iterable[Trunk], checkpointing: bool, recompute_attention: bool = True
) -> None:
    """What the ``trunks`` keep for the backward pass; see :class:`Trunk`."""
    for trunk in trunks:
        trunk.checkpointing, trunk.recompute_attention = checkpointing, recompute_attention


def load_state(model: nn.Module, state: Mapping[str, Tensor], origin: Path) -> None:
    """Load ``state`` into ``model``, strictly. UserError naming ``origin`` and the first tensor
    that does not fit."""
    _check_state(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, origin)
    model.load_state_dict(state)


def _check_state(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], origin: Path) -> None:
    model_shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong_names = [
        name for name in (*model_shapes, *shapes) if shapes.get(name) != model_shapes.get(name)
    ]
    if wrong_names:
        raise UserError(
            f"{origin}: tensor '{wrong_names[0]}' does not fit its config.yaml; {MISMATCH}"
        )


def _read_model(config: ModelConfig, file: Path, description: Path) -> Student | Wan:
    """The model of ``description`` with the weights of ``file``, in fp32. It is allocated only
    after the two were found to fit."""
    file_tensors = open_tensors(file, "use another checkpoint")
    outline = skeleton(lambda: build_model(config), file_tensors, description, MISMATCH)
    _check_state(outline, {name: tensor.shape for name, tensor in file_tensors.items()}, file)
    model = build_model(config)
    model.load_state_dict(
        {name: tensor.to(torch.float32) for name, tensor in read_all(file_tensors).items()}
    )
    return model


def load_checkpoint_model(
    path: Path, weights: str = "ema", blocks: BlocksConfig | None = None
) -> tuple[Student | Wan, CheckpointConfig]:
    """Build a checkpoint's model in fp32. ``path``: a step directory (verified), a run directory
    (newest verified), or an exported file (:func:`write_single`; it has one set of weights,
    ``weights`` does not matter).

    ``blocks``: how its blocks are run (None: as its config says), also in the returned config.
    ``weights``: "model", "ema" or "best" (stage 3's best EMA). A stage-1 checkpoint has only
    "model" and says so by holding no ema.safetensors: "ema" then means the transplanted weights.
    """
    if path.is_file():
        config = _with_blocks(read_single(path)[0], blocks)
        return _read_model(config.model, path, path), config
    path = find(path, weights)
    config = _with_blocks(from_yaml(CheckpointConfig, path / "config.yaml"), blocks)
    return _read_model(config.model, weights_file(path, weights), path / "config.yaml"), config


def _with_blocks(config: CheckpointConfig, blocks: BlocksConfig | None) -> CheckpointConfig:
    return replace(config, model=config.model.with_blocks(blocks))


def load_student(
    path: Path, weights: str = "ema", blocks: BlocksConfig | None = None
) -> tuple[Student, CheckpointConfig]:
    """:func:`load_checkpoint_model` for students on Wan. UserError for a bidirectional model, and
    for one trained from scratch."""
    model, config = load_checkpoint_model(path, weights, blocks)
    require_wan(config.model, path)
    if isinstance(model, Wan):
        raise UserError(
            f"{path}: holds a bidirectional Wan; this needs an SCD or causal student (run stage 1 first)"
        )
    return model, config


def require_wan(config: ModelConfig, where: Path) -> None:
    """UserError for a model trained from scratch, where prompts or Wan's own layouts are needed."""
    if config.backbone != "wan":
        raise UserError(
            f"{where}: trained from scratch, it knows no prompts; use recipes/evaluate_prediction.py"
        )


def write_single(
    path: Path,
    model: Student | Wan,
    config: CheckpointConfig,
    origin: Mapping[str, object],
    dtype: torch.dtype,
) -> None:
    """Write one safetensors file: weights in ``dtype``, with model, sampler and origin in its
    metadata.

    ``origin`` is the checkpoint's provenance. UserError if the file exists.
    """
    if path.exists():
        raise UserError(f"{path}: exists already, nothing is overwritten; choose another name")
    metadata = {
        "format": SINGLE,
        "config": to_yaml(replace(config, base=absolute(config.base))),
        "provenance": json.dumps(dict(origin)),
        "stage": str(origin.get("stage", "")),
        "step": str(origin.get("step", "")),
        "parents": json.dumps(origin.get("parents", [])),
        "sampler": json.dumps(asdict(config.sampler)),
        "licence": str(origin.get("licence", LICENCE)),
    }
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, metadata)


def base_of(recorded_base: str, override: str, where: Path | str) -> Path:
    """The Wan directory with VAE and text encoder: ``override``, else ``recorded_base`` of the
    checkpoint ``where``.

    The name of a repository on the hub: VAE, text encoder and tokenizer in its cache (wan/hub.py).
    UserError when it is not there.
    """
    base = override or recorded_base
    if not base:
        raise UserError(f"{where}: does not name its Wan directory; set base=")
    folder = wan_folder(base, ("vae", *TEXT_PARTS))
    if not folder.is_dir():
        source = "base" if override else f"{where}: its base"
        working_folder = "" if Path(base).is_absolute() else f" (seen from {Path.cwd()})"
        raise UserError(
            f"{source} is {base}{working_folder}, and no such directory is there; set base= to the Wan directory "
            "or to its name on the hub (Wan-AI/Wan2.1-T2V-1.3B-Diffusers)"
        )
    return folder


def is_single(path: Path) -> bool:
    """Whether a path is a file of :func:`write_single`."""
    return (
        path.is_file()
        and path.suffix == ".safetensors"
        and read_metadata(path).get("format") == SINGLE
    )


def read_single(path: Path) -> tuple[CheckpointConfig, Json]:
    """Configuration and provenance in the metadata of a file of :func:`write_single`. UserError for
    any other file."""
    if path.suffix in PICKLES:
        refuse_lfs_pointer(path)
        metadata: dict[str, str] = {}
    else:
        metadata = read_metadata(path)
    if metadata.get("format") != SINGLE:
        raise UserError(
            f"{path}: not a file of 'scd export'; for weights of others use 'scd transplant' first"
        )
    for part in ("provenance", "config"):
        if part not in metadata:
            raise UserError(
                f"{path}: its description is unreadable (it lacks '{part}'); export it again"
            )
    origin = parse_json(metadata["provenance"], f"{path}: provenance", "export it again")
    try:
        config = from_yaml(CheckpointConfig, metadata["config"])
    except UserError as error:
        raise UserError(
            f"{path}: its description is unreadable ({error}); export it again"
        ) from error
    return config, checked_origin(origin, f"{path}: provenance")


def describe_checkpoint(path: Path, weights: str = "ema") -> tuple[CheckpointConfig, Json]:
    """Configuration and provenance of what :func:`load_checkpoint_model` reads: a checkpoint
    directory, a run directory, or an exported file."""
    if path.is_file():
        return read_single(path)
    path = find(path, weights)
    origin = checked_origin(read_provenance(path), path / PROVENANCE)
    return from_yaml(CheckpointConfig, path / "config.yaml"), origin


@torch.no_grad()
def probe_output(model: Student | Wan) -> Tensor:
    """The model's output on a small fixed input, to compare a model with its copy. Of a student it
    is the second chunk."""
    cfg: TrunkConfig = model.cfg
    rng = torch.Generator().manual_seed(0)
    size = (2 * cfg.patch_height, 2 * cfg.patch_width)
    reference = next(model.parameters())

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(reference.device)

    cond = Conditioning(normal(1, 4, cfg.text_dim))
    if isinstance(cfg, DitConfig) and not isinstance(model, Wan):
        actions = torch.zeros(1, 2 * model.chunk, dtype=torch.long, device=reference.device)
        cond = Conditioning(cond.text_BLE, actions, actions[:, 0])
    if isinstance(model, Wan):
        velocity: Tensor = model(
            normal(1, 2, cfg.in_channels, *size),
            torch.full((1,), 0.7, device=reference.device),
            cond,
        )
        return velocity
    student: FrameGenerator = model
    chunk = (1, student.chunk, cfg.in_channels, *size)
    stream = student.advance(student.start(cond, size), None, normal(*chunk))
    stream = student.advance(stream, normal(*chunk), normal(*chunk))
    return student.denoise(stream, normal(*chunk), torch.full((1,), 0.7, device=reference.device))
