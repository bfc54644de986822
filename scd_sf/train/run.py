"""One run: its directory, seeds, metrics and progress. The only module that imports wandb.

    run = Run(cfg.run, ranks, config=cfg, may_change=("steps",))
    for step in run.progress(total=cfg.steps, start=start):
        run.log(step, {"loss": 0.1})
    run.finish()

The directory holds ``config.yaml``, ``metrics.jsonl``, ``tensorboard/`` and ``checkpoints/``.
Metrics always go to JSONL and TensorBoard; wandb is optional, offline when no key is configured.
Only rank 0 writes. Starting the same command again continues in the same directory; a different
configuration there is refused, and so is a folder that holds anything and is no run.
"""

from __future__ import annotations

import json
import logging
import math
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from scd_sf.checkpoint import Checkpoints, problem_of
from scd_sf.config import differences, stored_settings, to_yaml
from scd_sf.distributed import Ranks
from scd_sf.files import (
    locked,
    parse_json,
    read_bytes,
    require_own_folder,
    sha256_bytes,
    write_text,
)
from scd_sf.types import Logs, UserError, say

YEAR_MINUTES = 525_600.0
METRICS_BYTES = 2**40  # of a curve: a hundred million lines
_log = logging.getLogger(__name__)


@dataclass
class RunConfig:
    """Where a run lies, how it starts and what it logs."""

    dir: str
    """The run directory."""
    seed: int = 0
    """Seed of weights, order and noise."""
    log_every: int = 10
    """Steps between printed lines."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on if the directory has a checkpoint; must: require one; never: refuse one."""
    wandb: Literal["off", "offline", "online"] = "off"
    """off, offline or online."""
    project: str = "scd-sf"
    """Project in wandb."""
    heartbeat_seconds: float = 10.0
    """Seconds between two signs of life of every process."""
    timeout_minutes: float = 60.0
    """How long one process may keep the others waiting before the job ends."""
    peak_tflops: float = 0.0
    """Dense peak of one device in the type it computes in (989 for bf16 on an H100); above 0,
    perf/mfu is logged, after counting a step at the start (stage 3: half a minute). 0: no MFU."""

    def __post_init__(self) -> None:
        if not self.dir.strip():
            raise ValueError(
                "dir is empty, which would be the current folder; name a new one, as run.dir=runs/mine"
            )
        if self.log_every < 1:
            raise ValueError(f"log_every is {self.log_every}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more")
        for name, least, most in (
            ("heartbeat_seconds", 0.01, 3600.0),
            ("timeout_minutes", 0.01, YEAR_MINUTES),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be between {least:g} and {most:g}"
                )
        if not 0 <= self.peak_tflops <= 1e9:
            raise ValueError(
                f"peak_tflops is {self.peak_tflops}; it must be 0 (no MFU) or more, and at most 1e9"
            )


# the seed decides the order of the data and all noise: with another one it is another run
_MAY_CHANGE = tuple(f"run.{field.name}" for field in fields(RunConfig) if field.name != "seed")


class Run:
    """A run directory in use. Build it on every rank, before anything slow; raises UserError when
    it cannot be used."""

    def __init__(
        self, cfg: RunConfig, ranks: Ranks, *, config: object, may_change: Sequence[str] = ()
    ) -> None:
        """``config`` is the whole recipe config, ``may_change`` holds dotted prefixes of fields
        that may differ on resume; those of ``cfg`` may, but for its seed."""
        self.cfg, self.ranks, self.dir = cfg, ranks, Path(cfg.dir)
        self.checkpoints = Checkpoints(self.dir / "checkpoints")
        self._metrics: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._bar: _Bar | None = None
        self._lock = ExitStack()
        self.tokens_per_step, self.flops_per_step = 0, 0.0
        self._last_log_time = math.nan
        self._config = config
        problem = ""
        if ranks.is_main:
            problem = problem_of(lambda: self._claim(config, (*_MAY_CHANGE, *may_change)))
        if ranks.any(bool(problem)):
            self._lock.close()
            raise UserError(
                problem or f"{self.dir}: rank 0 could not use the run directory; see its message"
            )
        seed_everything(cfg.seed)

    def resume_from(self) -> Path | None:
        """The verified checkpoint to continue from, or None for a fresh start. Raises UserError as
        ``resume`` says."""
        newest = self.ranks.on_main(
            lambda: self.checkpoints.newest(required=self.cfg.resume == "must")
        )
        if newest is not None and self.cfg.resume == "never":
            raise UserError(
                f"{self.dir}: resume is 'never' but {newest.name} is there; use a new run.dir"
            )
        return newest

    def start(self, step: int = 0) -> None:
        """Open the metric writers at ``step``; records of later steps, from before a crash, are
        dropped."""
        if not self.ranks.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        _drop_after(self.dir / "metrics.jsonl", step)
        write_text(self.dir / "config.yaml", to_yaml(self._config))
        self._metrics = (self.dir / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._tensorboard = SummaryWriter(str(self.dir / "tensorboard"), purge_step=step)
        if self.cfg.wandb != "off" and self._wandb is None:
            self._wandb = _start_wandb(self.cfg, self.dir)

    def log(self, step: int, logs: Logs) -> None:
        """Record the scalars of one step on rank 0, with its duration and memory. Non-finite values
        are written as null."""
        if not self.ranks.is_main:
            return
        if self._metrics is None:
            self.start(step)
        assert self._metrics is not None
        all_logs = {**logs, **self._performance()}
        values = {name: value if math.isfinite(value) else None for name, value in all_logs.items()}
        self._metrics.write(
            json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n"
        )
        for name, value in all_logs.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(all_logs, step=step)
        if self._bar is not None:
            self._bar.show(step, logs)

    def _performance(self) -> Logs:
        """Seconds since the step before (from the second one of this process on), latent tokens per
        second of all ranks and model FLOP utilisation (``tokens_per_step`` and ``flops_per_step``,
        set by the recipe), and rank 0's peak memory: the GPU's, else the process's."""
        now = time.monotonic()
        seconds, self._last_log_time = now - self._last_log_time, now
        if self.ranks.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.ranks.device) / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        logs = {"perf/peak_gib": round(peak, 3)}
        if math.isfinite(seconds):
            logs["perf/seconds"] = round(seconds, 4)
            if self.tokens_per_step:
                logs["perf/tokens_per_second"] = round(self.tokens_per_step / seconds, 1)
            if self.flops_per_step:
                peak_flops = self.ranks.world * self.cfg.peak_tflops * 1e12
                logs["perf/mfu"] = round(self.flops_per_step / (seconds * peak_flops), 5)
        return logs

    def progress(self, total: int, start: int = 0) -> Iterator[int]:
        """Steps start+1 .. total, with a bar and the time left on a terminal, else one line per
        ``log_every`` steps."""
        steps = range(start + 1, total + 1)
        if not self.ranks.is_main:
            yield from steps
            return
        with _Bar(total, start, self.cfg.log_every) as bar:
            self._bar = bar
            try:
                for step in steps:
                    yield step
                    bar.advance(step)
            finally:
                self._bar = None

    def video(self, step: int, name: str, frames_FHWC: torch.Tensor, file: Path) -> None:
        """Log a uint8 clip to TensorBoard as single frames, and its mp4 ``file`` to wandb."""
        if not self.ranks.is_main or self._tensorboard is None:
            return
        self._tensorboard.add_images(
            name, frames_FHWC[:: max(1, len(frames_FHWC) // 8)], step, dataformats="NHWC"
        )
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Video(str(file), format="mp4")}, step=step)

    def finish(self) -> None:
        """Flush and close the writers; every rank may call it."""
        if self._metrics is not None:
            self._metrics.close()
            self._tensorboard.close()
            self._metrics = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        self._lock.close()

    def _claim(self, config: object, may_change: Sequence[str]) -> None:
        """Create the directory, or check that it holds this configuration. UserError if it cannot
        be written, is locked, or holds another configuration."""
        file = self.dir / "config.yaml"
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            if not file.is_file():
                require_own_folder(self.dir, [file.name], "set run.dir to a new folder")
            self._lock.enter_context(locked(self.dir, "this training"))
        except OSError as error:
            remedy = "set run.dir to a writable place"
            raise UserError(
                f"{self.dir}: cannot write the run directory ({error.strerror}); {remedy}"
            ) from error
        changes = {}
        if file.is_file():
            stored = stored_settings(type(config), file, str(file))
            changes = {
                key: values
                for key, values in differences(stored, config).items()
                if not any(key == prefix or key.startswith(f"{prefix}.") for prefix in may_change)
            }
        if changes:
            key, (old, new) = next(iter(changes.items()))
            raise UserError(
                f"{file}: {key} is {old!r} there but {new!r} now; nothing is overwritten: use a new run.dir, "
                f"or {key}={old} to continue that run"
            )
        if not file.is_file():
            write_text(file, to_yaml(config))


class _Bar:
    """Progress of one loop: rich on a terminal, plain lines elsewhere."""

    def __init__(self, total: int, start: int, every: int) -> None:
        self.total = total
        self.start = start
        self.every = every
        self.start_time = time.monotonic()
        self._last_step, self._rich = start, None
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._rich = Progress(*columns, console=console)
            self._task = self._rich.add_task("step", total=total, completed=start)

    def __enter__(self) -> _Bar:
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._rich is not None:
            self._rich.stop()

    def advance(self, step: int) -> None:
        self._last_step = step
        if self._rich is not None:
            self._rich.update(self._task, completed=step)

    def show(self, step: int, logs: Logs) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in logs.items())
        if self._rich is not None:
            self._rich.update(self._task, description=text[:100])
        elif step % self.every == 0 or step == self.start + 1 or step == self.total:
            seconds = (time.monotonic() - self.start_time) / max(1, step - self.start)
            remaining = clock(seconds * (self.total - step))
            say(f"step {step}/{self.total}  {text}  {seconds:.3g} s/step  left {remaining}")


def seed_everything(seed: int) -> None:
    """Seed the global generators, equally on all ranks. Steps draw from
    ``diffusion.noise.generator`` instead."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rank_zero_print(ranks: Ranks, text: str) -> None:
    """Print on the main rank only, at once."""
    if ranks.is_main:
        say(text)


def _start_wandb(cfg: RunConfig, directory: Path) -> Any:
    """Start a wandb run. Without a configured key it is written offline, with a message."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "run.wandb: wandb is not installed; 'pip install wandb' or set run.wandb=off"
        ) from error
    online = cfg.wandb == "online" and wandb.api.api_key is not None
    if cfg.wandb == "online" and not online:
        say(
            "wandb: no key is configured, so this run is written offline; upload it later with 'wandb sync'",
            file=sys.stderr,
        )
    return wandb.init(
        project=cfg.project,
        name=directory.name,
        dir=str(directory),
        id=_run_id(directory),
        resume="allow",
        mode="online" if online else "offline",
    )


def _run_id(directory: Path) -> str:
    """Id of the wandb run, a function of the directory alone, so that a resumed run continues
    it."""
    return sha256_bytes(str(directory.resolve()).encode())[:12]


def _drop_after(file: Path, step: int) -> None:
    """Remove records of steps after ``step``, and lines that are no records (cut short by a crash),
    atomically."""
    if not file.exists():
        return
    lines = [
        line
        for line in read_bytes(file, "move it away", METRICS_BYTES).split(b"\n")
        if line.strip()
    ]
    steps = [_step_of(line) for line in lines]
    if bad_lines := steps.count(None):
        _log.warning("%s: %d lines are no records and are left out", file, bad_lines)
    remaining_lines = [
        line
        for line, line_step in zip(lines, steps, strict=True)
        if line_step is not None and line_step <= step
    ]
    write_text(file, "".join(f"{line.decode()}\n" for line in remaining_lines))


def _step_of(line: bytes) -> int | None:
    """The step of a record; None: not a record."""
    try:
        record = parse_json(line.decode(), "metrics", "none")
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int else None


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, remaining_seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{remaining_seconds:02d}"
