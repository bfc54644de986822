"""Stage 1: Wan's weights -> SCD (or the causal baseline), with a report of every source ->
destination tensor.

The encoder takes Wan's layers ``encoder_layers``; the decoder copies ``decoder.layers`` and gets
its own copies of the patch embedding, time embedding and head (the paper does not say). Copies
share no storage with each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from scd_sf.checkpoint import Checkpoints, provenance
from scd_sf.config import to_yaml
from scd_sf.files import new_folder, sha256_file, sha256_folder, write_text
from scd_sf.models.build import MOST_CHUNK, CheckpointConfig, ModelConfig, SamplerConfig, Scd
from scd_sf.models.causal import Causal
from scd_sf.models.export import must_be_new, require_same
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.scd.wan import ScdWan
from scd_sf.models.trunk import SIZES
from scd_sf.models.wan.hub import pinned
from scd_sf.models.wan.transformer import Wan
from scd_sf.models.wan.weights import load_wan, read_wan_config, transformer_dir
from scd_sf.types import UserError, check_within


@dataclass
class TransplantConfig:
    """Stage 1: which weights become which student."""

    base: str
    """A Wan directory: the transformer in diffusers or original layout, VAE and text encoder beside
    it; or a name on the Hugging Face hub, Wan-AI/Wan2.1-T2V-1.3B-Diffusers, with or without
    @REVISION."""
    out: str
    """Folder of the new checkpoint."""
    weights: str = ""
    """File or directory of a transformer to take instead of the base's own: original layout, or a
    Self-Forcing, Causal-Forcing or CausVid generator. Empty: the base's own."""
    section: str = ""
    """Part of a training checkpoint in ``weights``; plain: what has no section's name; empty:
    generator_ema, else generator."""
    heads: int = 0
    """Attention heads of a file alone that is neither as wide as the base's transformer nor as a
    released Wan; 0: as these."""
    family: str = "scd"
    """scd or causal (the baseline)."""
    scd: ScdConfig = field(default_factory=ScdConfig)
    """How SCD is cut and joined."""
    chunk: int = 1
    """Latent frames generated together (1 in the paper)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """What the student is sampled with: many steps for Wan's weights, the distilled steps for a
    generator."""
    seed: int = 0
    """Seed of the weights that are new."""

    def __post_init__(self) -> None:
        if self.scd.chunk not in (1, self.chunk):
            raise UserError(
                f"scd.chunk is {self.scd.chunk} and chunk {self.chunk}; set chunk= alone"
            )
        if self.family not in ("scd", "causal"):
            raise UserError(f"family is '{self.family}'; use scd or causal")
        check_within(
            self,
            {
                "chunk": (1, MOST_CHUNK),
                "heads": (0, SIZES["num_attention_heads"][1]),
                "seed": (0, 2**63 - 1),
            },
        )
        if not self.weights and (self.section or self.heads):
            raise UserError(
                "section and heads are of the file weights=, which is empty: name it, or leave them out"
            )
        if self.family == "causal" and self.scd != ScdConfig():
            raise UserError(
                "scd says how SCD is cut, and family is causal: leave it out, or set family=scd"
            )
        if message := self.scd.decoder.unread_field(DecoderConfig()):
            raise UserError(f"scd.{message}")


@dataclass(frozen=True)
class Transfer:
    """One line of the report: destination tensor and the Wan tensor it was copied from (None: newly
    initialised)."""

    destination: str
    source: str | None
    shape: tuple[int, ...]


def _source_name(name: str, layers: tuple[int, ...]) -> str:
    """Trunk-relative name with the block index replaced by the Wan layer it comes from."""
    parts = name.split(".")
    if parts[0] == "blocks":
        parts[1] = str(layers[int(parts[1])])
    return "trunk." + ".".join(parts)


def _name_pairs(scd: Scd) -> Iterator[tuple[str, str | None]]:
    """(destination, source) of every parameter; source None: it is new."""
    for name, _ in scd.encoder.named_parameters():
        yield f"encoder.{name}", _source_name(name, scd.encoder.layers)
    for name, _ in scd.decoder.trunk.named_parameters():
        yield f"decoder.trunk.{name}", _source_name(name, scd.decoder.trunk.layers)
    for name, _ in scd.decoder.named_parameters():
        if not name.startswith("trunk."):
            yield f"decoder.{name}", None


def _copy(
    destination: nn.Module, source: Wan, pairs: Iterator[tuple[str, str | None]]
) -> list[Transfer]:
    source_state = dict(source.named_parameters())
    target_state = dict(destination.named_parameters())
    report: list[Transfer] = []
    with torch.no_grad():
        for target_name, source_name in pairs:
            target = target_state.pop(target_name)
            if source_name is not None:
                target.copy_(source_state[source_name])
            report.append(Transfer(target_name, source_name, tuple(target.shape)))
    assert not target_state, f"untouched parameters: {sorted(target_state)}"
    return report


def transplant_scd(wan: Wan, config: ScdConfig) -> tuple[Scd, list[Transfer]]:
    """Wan -> SCD. UserError if a layer list names a layer Wan does not have."""
    scd = ScdWan(wan.cfg, config)
    return scd, _copy(scd, wan, _name_pairs(scd))


def transplant_causal(wan: Wan, chunk: int) -> tuple[Causal, list[Transfer]]:
    """Wan -> the causal baseline: the same tensors under a causal mask."""
    if chunk < 1:
        raise UserError(f"model.chunk is {chunk}; it must be at least 1")
    causal = Causal(wan.cfg, chunk)
    return causal, _copy(causal, wan, ((name, name) for name, _ in causal.named_parameters()))


def verify_transplant(model: nn.Module, wan: Wan, report: list[Transfer]) -> None:
    """Every copied tensor is bit-equal to its source, and no two tensors share storage.
    AssertionError otherwise."""
    source: dict[str, Tensor] = dict(wan.named_parameters(remove_duplicate=False))
    state = dict(model.named_parameters(remove_duplicate=False))
    for line in report:
        if line.source is not None:
            assert torch.equal(state[line.destination], source[line.source]), (
                f"{line.destination} != {line.source}"
            )
    storages = [
        p.untyped_storage().data_ptr() for p in [*state.values(), *source.values()] if p.numel()
    ]
    assert len(set(storages)) == len(storages), "two tensors share storage"


def report_lines(report: list[Transfer]) -> list[str]:
    """``destination <- source [shape]`` for people."""
    return [f"{r.destination} <- {r.source or '(new)'} {list(r.shape)}" for r in report]


def source_wan(cfg: TransplantConfig) -> tuple[Wan, dict[str, object]]:
    """The transformer to start from, and the provenance of its files."""
    base = Path(cfg.base)
    if not cfg.weights:
        return load_wan(base), {
            "base_sha256": sha256_folder(transformer_dir(base), "*.safetensors")
        }
    file = Path(cfg.weights)
    has_transformer = any(
        (folder / "config.json").is_file() for folder in (base / "transformer", base)
    )
    # without one, the base holds the VAE and the text encoder alone
    like = read_wan_config(base) if has_transformer else None
    wan = load_wan(file, section=cfg.section, heads=cfg.heads, like=like)
    digest = sha256_file(file) if file.is_file() else sha256_folder(transformer_dir(file))
    return wan, {"weights": pinned(file), "weights_sha256": digest, "section": cfg.section}


def run_transplant(cfg: TransplantConfig) -> str:
    """Run stage 1: read, copy, compare bit for bit, write a checkpoint and report.txt. Returns a
    one-line summary. Does nothing where ``out`` holds the same; UserError for another."""
    if not cfg.out:
        raise UserError("out is empty; name a new folder for the checkpoint")
    cfg = dataclasses.replace(cfg, base=pinned(cfg.base))
    out = Path(cfg.out)
    existing = Checkpoints(out).newest()
    if existing is None:
        must_be_new(out, Path(cfg.base), Path(cfg.weights or cfg.base))
    wan, origin = source_wan(cfg)
    scd = dataclasses.replace(cfg.scd, chunk=cfg.chunk)
    config = ModelConfig(cfg.family, cfg.chunk, wan.cfg, scd)
    description = CheckpointConfig(config, cfg.sampler, base=cfg.base)
    origin = {"base": cfg.base, **origin}
    record = provenance(stage="stage1_transplant", step=0, seed=cfg.seed, extra=origin)
    if existing is not None:
        require_same(existing, description, record)
        return f"{existing}: finished before, from the same weights; nothing was done"
    student: Scd | Causal
    if cfg.family == "scd":
        student, report = transplant_scd(wan, config.scd)
    else:
        student, report = transplant_causal(wan, cfg.chunk)
    verify_transplant(student, wan, report)
    with new_folder(out, "choose another out=") as part:
        tensors = {"model": student.state_dict()}
        path = Checkpoints(part).write(0, tensors, to_yaml(description), record)
        write_text(part / "report.txt", "\n".join(report_lines(report)) + "\n")
    num_copied = sum(line.source is not None for line in report)
    numbers = sum(p.numel() for p in student.parameters())
    return (
        f"{out / path.name}: {cfg.family}, {numbers:,} parameters, {num_copied} tensors copied "
        f"bit for bit, {len(report) - num_copied} new; every pair in {cfg.out}/report.txt"
    )
