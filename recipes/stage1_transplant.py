"""Stage 1: a pretrained Wan 2.1 (diffusers layout) becomes a student: SCD, or the causal baseline.

    python recipes/stage1_transplant.py base=Wan-AI/Wan2.1-T2V-1.3B-Diffusers out=runs/stage1

No training: tensors are copied, checked bit for bit, and every source -> destination pair is written to report.txt.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path

from scd_sf.checkpoint import Checkpoints, provenance
from scd_sf.config import to_yaml
from scd_sf.data.manifest import sha256_folder
from scd_sf.models.build import CheckpointConfig, ModelConfig, SamplerConfig
from scd_sf.models.scd import ScdConfig
from scd_sf.models.transplant import report_lines, transplant_causal, transplant_scd, verify_transplant
from scd_sf.models.weights import load_wan, transformer_dir
from scd_sf.train.recipe import from_command_line
from scd_sf.types import UserError, exit_on_user_error


@dataclass
class Stage1Config:
    """``base``: a local Wan directory in diffusers layout. ``family``: scd or causal. ``chunk``: latent frames
    generated together (1 in the paper). ``sampler`` is what the many-step student is sampled with."""

    base: str
    out: str
    family: str = "scd"
    scd: ScdConfig = field(default_factory=ScdConfig)
    chunk: int = 1
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    seed: int = 0


def main() -> None:
    cfg = from_command_line(Stage1Config, __doc__ or "")
    if os.environ.get("RANK", "0") != "0":
        return  # a launcher may start several processes; one does the work
    if cfg.family not in ("scd", "causal"):
        raise UserError(f"family is '{cfg.family}'; use scd or causal")
    checkpoints = Checkpoints(Path(cfg.out))
    if checkpoints.newest() is not None:
        raise UserError(f"{cfg.out}: already holds a checkpoint, which is never overwritten; choose another out=")
    base = Path(cfg.base)
    wan = load_wan(base)
    model_config = ModelConfig(cfg.family, cfg.chunk, wan.cfg, dataclasses.replace(cfg.scd, chunk=cfg.chunk))
    if cfg.family == "scd":
        student, report = transplant_scd(wan, model_config.scd)
    else:
        student, report = transplant_causal(wan, cfg.chunk)
    verify_transplant(student, wan, report)
    path = checkpoints.write(
        0,
        {"model": student.state_dict()},
        to_yaml(CheckpointConfig(model_config, cfg.sampler, base=str(base))),
        provenance(
            stage="stage1_transplant",
            step=0,
            seed=cfg.seed,
            extra={"base": str(base), "base_sha256": sha256_folder(transformer_dir(base), "*.safetensors")},
        ),
    )
    lines = report_lines(report)
    (Path(cfg.out) / "report.txt").write_text("\n".join(lines) + "\n")
    copied = sum(line.source is not None for line in report)
    params = sum(p.numel() for p in student.parameters())
    print(
        f"{path}: {cfg.family}, {params:,} parameters, {copied} tensors copied bit for bit, "
        f"{len(report) - copied} new; every pair in {cfg.out}/report.txt"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
