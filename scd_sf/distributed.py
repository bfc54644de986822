"""This process among the others, under plain ``python``, ``torchrun`` or the ``deepspeed``
launcher, on CPU or GPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from scd_sf.checkpoint import find, vouch
from scd_sf.types import Logs, UserError, of_its_place, on_device

T = TypeVar("T")
_TIMEOUT_MINUTES = 60.0  # rank 0 may sample a validation video while the others wait


@dataclass(frozen=True)
class Ranks:
    """This process (``rank`` of ``world``; ``local_rank`` on its machine) and the device it
    uses."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        return bool(self.max(flag))

    def on_main(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 and return its result (a plain value) on every rank. Its
        UserErrors, and errors of a file's place (full, read-only), are raised on all ranks."""
        if self.world == 1:
            return work()
        outcome: list[object] = [None, ""]
        if self.is_main:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = str(error)
            except OSError as error:
                outcome[1] = str(of_its_place(error))
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1]:
            raise UserError(str(outcome[1]))
        return cast("T", outcome[0])

    def checkpoint(self, path: str | Path, weights: str) -> Path:
        """Path of the checkpoint that a person named. Rank 0 verifies the files that reading
        ``weights`` takes, and the others rely on it. An exported file is returned unchanged."""
        if Path(path).is_file():
            return Path(path)
        step = self.on_main(lambda: find(Path(path), weights))
        if not self.is_main:
            vouch(step)
        return step

    def max(self, number: int) -> int:
        """The largest of all ranks' small numbers, on every rank."""
        if self.world == 1:
            return number
        value = on_device(torch.tensor(float(number)), self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value.item())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors (one shape and type everywhere, on ``device``), on every
        rank."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, logs: Logs) -> Logs:
        """Average of each value over ranks; every rank gives the same keys."""
        if self.world == 1 or not logs:
            return dict(logs)
        names = sorted(logs)
        values = on_device(
            torch.tensor([logs[name] for name in names], dtype=torch.float64), self.device
        )
        dist.all_reduce(values)
        return dict(zip(names, (values / self.world).tolist(), strict=True))


def init_distributed(timeout_minutes: float = _TIMEOUT_MINUTES) -> Ranks:
    """Join the process group that the launcher describes (RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT).

    A process that keeps the others waiting for ``timeout_minutes`` ends the job.

    Without a launcher this is the only process and the same variables are set for it. Backend: nccl
    on GPU, else gloo. CPU threads: cores / processes per machine, fewer when OMP_NUM_THREADS says
    so. Raises UserError when the launcher's variables are incomplete or name a GPU that is not
    there.
    """
    environ = os.environ
    if "WORLD_SIZE" not in environ and "RANK" not in environ:
        environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="0",  # nobody is met there
        )
    missing_names = [
        k
        for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if k not in environ
    ]
    if missing_names:
        raise UserError(
            f"environment: {', '.join(missing_names)} missing although RANK or WORLD_SIZE is set; "
            "start with 'torchrun' or 'deepspeed', or unset them for one process"
        )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not environ[name].isdecimal():
            raise UserError(
                f"environment: {name} is {environ[name]!r}, which is no number; start with a launcher"
            )
    rank, world, local = (int(environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_gpu = torch.cuda.is_available()
    if on_gpu and local >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK is {local} but this machine has {torch.cuda.device_count()} GPUs; "
            "start at most one process per GPU"
        )
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not on_gpu:
        keep_freed_memory()
    _set_threads(int(environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", str(world)))))
    if world > 1 and not dist.is_initialized():
        limit = timedelta(minutes=timeout_minutes)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=limit, device_id=device if on_gpu else None
        )
    return Ranks(rank, world, local, device)


def rank_zero_first(ranks: Ranks, work: Callable[[], object]) -> None:
    """Rank 0 does ``work`` while the others wait. A UserError there, or an error of a file's place,
    ends all of them together."""
    problem: UserError | None = None
    if ranks.is_main:
        try:
            work()
        except UserError as error:
            problem = error
        except OSError as error:
            problem = of_its_place(error)
    if ranks.any(problem is not None):
        raise problem or UserError("rank 0 could not begin; see its message")


def ensure_process_group(ranks: Ranks) -> None:
    """A process group even for one process, which needs no port: DeepSpeed needs a group."""
    if not dist.is_initialized():
        assert ranks.world == 1, "several processes have met in init_distributed"
        dist.init_process_group(
            "nccl" if ranks.device.type == "cuda" else "gloo",
            timeout=timedelta(minutes=_TIMEOUT_MINUTES),
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=ranks.rank,
            world_size=ranks.world,
        )


def keep_freed_memory(*, one_heap: bool = False) -> None:
    """Let glibc keep what tensors free instead of returning it to the kernel. No effect on other C
    libraries.

    ``one_heap``: threads that begin later get no heap of their own. Such a heap is made of pieces of
    64 MiB, and a small block that stays in each of them keeps what large tensors left there.

    Megabyte tensors otherwise come from mmap and cost a page fault per 4 KiB at every allocation:
    forward + backward of a small linear layer took 16.5 ms with, 7.9 ms without (docs/log.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mmap_threshold, trim_threshold, top_pad, arena_max = -3, -1, -2, -8
    for name, value in (
        (mmap_threshold, 32 << 20),
        (trim_threshold, 2**31 - 1),
        (top_pad, 256 << 20),
    ):
        mallopt(name, value)
    if one_heap:
        mallopt(arena_max, 1)


def release_freed_memory() -> None:
    """Return to the kernel what glibc keeps (:func:`keep_freed_memory`). No effect on other C
    libraries."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _set_threads(processes: int) -> None:
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, processes))
    setting = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(
        min(threads, int(setting)) if setting.isdigit() and int(setting) > 0 else threads
    )
