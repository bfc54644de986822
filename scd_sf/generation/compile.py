"""A student's two steps as one graph each: the encoder's once per chunk, the decoder's once per
denoising step.

For sampling. The decoder's shapes never change; the encoder's history grows until a window is full,
so it is compiled for any length. With ``cuda_graphs`` every step is recorded too, those that read
the history once for each of its places (replay.py).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scd_sf.models.blocks import blocks_of
from scd_sf.models.build import Student
from scd_sf.models.causal import Causal
from scd_sf.models.replay import Replayed, cuda_recorder
from scd_sf.models.scd.wan import ScdWan
from scd_sf.types import UserError


@dataclass(frozen=True)
class CompileConfig:
    """How a step is made fast."""

    enabled: bool = False
    """``torch.compile`` for every step, whole (a graph break is an error); the first chunks take
    minutes."""
    cuda_graphs: bool = False
    """Replay every step, compiled or not, as a CUDA graph, which saves its launches (GPU only)."""


# graphs of one student: torch's own limit of 8 for each of three parts (5 or 6 in all are usual)
GRAPHS = 24


def _isolation_options() -> dict[str, bool]:
    """Options of ``torch.compile`` that give each module a graph limit of its own (torch 2.14).
    Older versions count the graphs of all modules together, so their limit is raised for every
    student. The steps are compiled whole, so graphs beyond a limit are an error, never eager."""
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return {"isolate_recompiles": True}
    torch._dynamo.config.recompile_limit += GRAPHS
    torch._dynamo.config.accumulated_recompile_limit += GRAPHS
    return {}


def compile_steps(
    student: Student, cfg: CompileConfig, device: torch.device, backend: str = "inductor"
) -> None:
    """Compile or record the student's steps in place. UserError: CUDA graphs without a GPU, or
    blocks that are bypassed by step."""
    if cfg.cuda_graphs and device.type != "cuda":
        raise UserError(f"compile.cuda_graphs: the device is {device.type}; CUDA graphs need a GPU")
    if blocks_of(student).skip is not None and (cfg.enabled or cfg.cuda_graphs):
        raise UserError("compile: which blocks run depends on the step (blocks.skip); leave it off")
    if cfg.cuda_graphs:
        student.replay = Replayed(cuda_recorder(device))
    if not cfg.enabled:
        return
    options: dict[str, Any] = {"fullgraph": True, "backend": backend, **_isolation_options()}
    for module in _step_modules(student):
        module.compile(**options)


def _step_modules(student: Student) -> list[nn.Module]:
    """The modules whose ``forward`` is a step, or the larger part of one."""
    if isinstance(student, Causal):
        return [student, student.trunk]  # a denoising step; the pass that writes the history
    encoder = student.encoder if isinstance(student, ScdWan) else student
    # the second: once per chunk, Decoder.context
    return [encoder, student.decoder.trunk, student.decoder]
