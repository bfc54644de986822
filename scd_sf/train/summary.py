"""What a training says of itself, on rank 0: at the start what is trained, on what and where it
lands; at the end its last and best checkpoint and the next commands, to be copied.

    summary = Summary(checkpointer, start, title="Stage 2: ..", data=["70,000 clips .."])
    summary.begin()
    ...  # the loop
    summary.end({"sample": [..]})
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from scd_sf.distributed import Ranks
from scd_sf.train.base import EngineConfig, named_parameters
from scd_sf.train.checkpointing import Checkpointer
from scd_sf.train.run import clock, rank_zero_print
from scd_sf.types import VideoShape, plural

LABEL = 10  # columns of a line's first word


class Summary:
    """The lines at the start and at the end of one training.

    ``title``: what is trained from what. ``data``: lines about the clips. ``frozen``: further
    models with their engines' configs, by name. ``start``: the number of finished updates.
    ``longer``: how a finished run is trained on, where not by ``train.steps``.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        start: int,
        *,
        title: str,
        data: Sequence[str],
        frozen: Mapping[str, tuple[nn.Module, EngineConfig]] | None = None,
        longer: str = "",
    ) -> None:
        self.checkpointer = checkpointer
        self.start = start
        self.title = title
        self.data = data
        self.frozen = dict(frozen or {})
        self.longer = longer or (
            f"to train on, run the same command with train.steps={2 * max(1, start)}, or any number "
            f"above {start}"
        )
        self._begin_time = time.monotonic()

    @property
    def finished(self) -> bool:
        """Whether no update was left to do when this process began."""
        return self.start >= self.checkpointer.train.steps

    def begin(self) -> None:
        """Print what is trained; nothing for a run that has finished. All ranks may call it."""
        if self.finished:
            return
        run, train, ranks = self.checkpointer.run, self.checkpointer.train, self.checkpointer.ranks
        self._print(self.title)
        for text in self.data:
            self._line("data", text)
        for name, engine in self.checkpointer.engines.items():
            trained, fixed = parameter_counts(engine.module)
            counts = f"{millions(trained)} parameters trained, {millions(fixed)} frozen"
            self._line(name, f"{counts}; {describe_engine(engine.cfg)}")
        for name, (module, cfg) in self.frozen.items():
            count = sum(parameter_counts(module))
            self._line(name, f"{millions(count)} parameters, all frozen; {describe_engine(cfg)}")
        self._line("device", describe_device(ranks))
        micro_batches = train.global_batch // (train.micro_batch * ranks.world)
        self._line(
            "batch",
            f"{train.global_batch} = {plural(ranks.world, 'rank')} x micro-batch {train.micro_batch} "
            f"x accumulation {micro_batches}",
        )
        source = f"from step {self.start:,} of {run.dir}" if self.start else "new"
        self._line("steps", f"{train.steps:,}, {source}")
        self._line(
            "lands in",
            f"{run.dir}: metrics.jsonl, tensorboard/, checkpoints/ every {train.save_every:,} steps",
        )
        self._line("follow", command(["scd", "runs", "watch", str(run.dir)]))

    def end(self, next_commands: Mapping[str, Sequence[str]], best: str = "") -> None:
        """Print how it ended, the checkpoints, and ``next_commands`` by what they do. ``best``: what
        is said of the best checkpoint, where that is not the one of the least validation loss. All
        ranks may call it."""
        checkpointer, run = self.checkpointer, self.checkpointer.run
        steps, record = checkpointer.train.steps, checkpointer.record
        if self.finished:
            self._print(
                f"{run.dir}: finished before, at step {self.start} of {steps}; nothing was done: {self.longer}"
            )
        else:
            self._print(
                f"finished: {steps - self.start:,} steps in {clock(time.monotonic() - self._begin_time)}"
            )
        self._line("last", str(run.checkpoints.path(max(steps, self.start))))
        if not best and "best_saved" in record:
            path = run.checkpoints.path(int(record["best_saved"]))
            best = f"{path} (val/loss {record['best_value']:.4g})"
        if best:
            self._line("best", best)
        for name, words in next_commands.items():
            self._line(name, command(words))
        self._line("figures", command(["scd", "runs", "show", str(run.dir)]))

    def _line(self, name: str, text: str) -> None:
        self._print(f"  {name:<{LABEL}}{text}")

    def _print(self, text: str) -> None:
        rank_zero_print(self.checkpointer.ranks, text)


def parameter_counts(module: nn.Module) -> tuple[int, int]:
    """Numbers of trained and of frozen parameters, whole ones where ZeRO-3 has partitioned them."""
    trained = frozen = 0
    for _, parameter in named_parameters(module):
        count = int(getattr(parameter, "ds_numel", parameter.numel()))
        if parameter.requires_grad:
            trained += count
        else:
            frozen += count
    return trained, frozen


def millions(count: int) -> str:
    """A number of parameters, as 1,423.5 M."""
    return "0" if count == 0 else f"{count / 1e6:,.1f} M" if count >= 50_000 else f"{count:,}"


def describe_engine(cfg: EngineConfig) -> str:
    """Precision, engine and place in words."""
    engine = f"DeepSpeed ZeRO-{cfg.zero_stage}" if cfg.backend == "deepspeed" else "plain torch"
    return f"{cfg.dtype}, {engine}{', offload to the CPU' if cfg.offload else ''}"


def describe_device(ranks: Ranks) -> str:
    """Number of processes and what each computes on."""
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
    else:
        device = f"the CPU ({plural(torch.get_num_threads(), 'thread')} each)"
    return f"{plural(ranks.world, 'rank')} on {device}"


def describe_clips(count: int, shape: VideoShape, root: Path) -> str:
    """Number, size and place of clips in words."""
    latents = f"{shape.frames}x{shape.channels}x{shape.height}x{shape.width} latents"
    pixels = f"{shape.pixel_frames} frames of {shape.pixel_height}x{shape.pixel_width}"
    return f"{count:,} clips of {pixels} ({latents}) in {root}"


def launch(script: str, config: str, ranks: Ranks) -> list[str]:
    """The words that start another script beside the running one, with a file of ``configs/``, on
    as many processes of this machine."""
    folder = Path(sys.argv[0]).parent
    arguments = [str(folder / script), "--config", str(folder / "configs" / config)]
    if ranks.world == 1:
        return ["python", *arguments]
    processes = os.environ.get("LOCAL_WORLD_SIZE", str(ranks.world))
    return ["torchrun", "--nproc_per_node", processes, *arguments]


def sample_words(run_dir: Path, prompt: str, weights: str = "ema") -> list[str]:
    """The words that sample a checkpoint with one of its training's prompts."""
    words = ["scd", "sample", f"checkpoint={run_dir}", f"out=videos/{run_dir.name}"]
    words += [] if weights == "ema" else [f"weights={weights}"]
    return [*words, f"prompts={json.dumps([prompt], ensure_ascii=False)}"]


def command(words: Sequence[str]) -> str:
    """Words as a shell takes them."""
    return shlex.join(words)
