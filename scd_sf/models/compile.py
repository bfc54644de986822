"""A student's two steps as one graph each: the encoder's once per chunk, the decoder's once per denoising step.

For sampling. The decoder's shapes never change, so its graph is also what CUDA can replay (``cuda_graphs``); the
encoder's history grows until a window is full, so it is compiled for any length and is not replayed.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from scd_sf.models.build import Student
from scd_sf.models.scd import Scd
from scd_sf.types import UserError


@dataclass(frozen=True)
class CompileConfig:
    """``enabled``: ``torch.compile`` for every step, whole (a graph break is an error); the first chunks take minutes.
    ``cuda_graphs``: SCD's decoder step is replayed as a CUDA graph, which saves its launches (GPU only)."""

    enabled: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.cuda_graphs and not self.enabled:
            raise UserError("compile.cuda_graphs needs compile.enabled=true")


def compile_steps(student: Student, cfg: CompileConfig, device: torch.device, backend: str = "inductor") -> None:
    """Compile in place, as ``nn.Module.compile`` does, where ``cfg.enabled``. UserError: graphs without a GPU."""
    if not cfg.enabled:
        return
    if cfg.cuda_graphs and device.type != "cuda":
        raise UserError(f"compile.cuda_graphs: the device is {device.type}; CUDA graphs need a GPU")
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        raise UserError(
            f"compile.enabled needs torch 2.14 or newer (here {torch.__version__}); upgrade it, or leave it off"
        )
    # Isolated: encoder, decoder and other students share their code, and each has its own few shapes.
    whole: dict[str, Any] = {"fullgraph": True, "backend": backend, "isolate_recompiles": True}
    if not isinstance(student, Scd):
        if cfg.cuda_graphs:
            raise UserError(
                "compile.cuda_graphs: every step of the causal baseline reads the growing history; only SCD's decoder "
                "has fixed shapes"
            )
        if student.trunk.skip is not None:
            raise UserError("compile.enabled: which blocks run depends on the step (blocks.skip); leave it off")
        student.trunk.compile(**whole)
        return
    student.encoder.compile(**whole)
    student.decoder.trunk.compile(**whole)  # what the decoder does once per chunk, see Decoder.context
    student.decoder.compile(**whole, **({"mode": "reduce-overhead"} if cfg.cuda_graphs else {}))
