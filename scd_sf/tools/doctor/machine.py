"""Devices, compiler, memory, limits, disks and tokens: what can be asked without doing anything."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from scd_sf.tools.doctor.finding import FAIL, GIB, OK, WARN, Finding

FILES_WANTED = 4096


def torch_build() -> list[Finding]:
    """The libraries torch was built with, and the one known bad pair among them."""
    if torch.version.cuda is None:
        return [Finding("torch build", OK, f"{torch.__version__}, without CUDA")]
    cudnn = torch.backends.cudnn.version() or 0
    found = f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {_cudnn_text(cudnn)}"
    if torch.cuda.is_available():
        found += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    if conv3d_is_slow(str(torch.__version__), cudnn):
        remedy = "bf16 Conv3d (Wan's VAE) is 10-20x slower and takes 17x the memory: torch >= 2.10, or cuDNN >= 9.15"
        return [Finding("torch build", WARN, found, remedy)]
    return [Finding("torch build", OK, found)]


def conv3d_is_slow(version: str, cudnn: int) -> bool:
    """torch 2.9 with cuDNN below 9.15 (github.com/pytorch/pytorch/issues/166643); ``cudnn`` as torch gives it."""
    return version.split(".")[:2] == ["2", "9"] and cudnn < 91500


def devices() -> list[Finding]:
    """Each GPU with its memory; none is worth a word, not a failure."""
    if not torch.cuda.is_available():
        found = f"none; CPU only (torch {torch.__version__})"
        return [Finding("cuda", WARN, found, "fine for the demo and the tests; the 1.3B recipes need NVIDIA GPUs")]
    findings = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found = f"{device.name}, {device.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
        if device.major < 8:
            findings.append(Finding(f"cuda:{index}", WARN, found, "no fast bf16 before compute capability 8.0"))
        else:
            findings.append(Finding(f"cuda:{index}", OK, found))
    return findings


def compiler() -> list[Finding]:
    """DeepSpeed compiles its CPU collectives at the first start on Linux; it finds g++ and ninja on PATH only."""
    wanted = {
        os.environ.get("CXX", "g++"): "apt-get install g++",
        "ninja": f"put {Path(sys.executable).parent} on PATH",
    }
    missing = {name: remedy for name, remedy in wanted.items() if shutil.which(name) is None}
    if not missing:
        return [Finding("C++ compiler", OK, ", ".join(str(shutil.which(name)) for name in wanted))]
    remedy = f"DeepSpeed compiles its CPU collectives at the first start: {'; '.join(missing.values())}"
    status = WARN if torch.cuda.is_available() else FAIL
    return [Finding("C++ compiler", status, f"{', '.join(missing)} not on PATH", remedy)]


def threads() -> list[Finding]:
    """Cores, and whether several CPU ranks would fight for them."""
    cores, asked = os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS")
    found = f"{cores} cores, OMP_NUM_THREADS={asked or 'unset'}"
    if asked is None and not torch.cuda.is_available():
        remedy = "the deepspeed launcher does not set it: export OMP_NUM_THREADS=cores/ranks for several CPU ranks"
        return [Finding("threads", WARN, found, remedy)]
    return [Finding("threads", OK, found)]


def memory() -> list[Finding]:
    """Main memory, and the shared memory that data workers and NCCL use."""
    findings = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        remedy = "close other programs before training" if total < 6 else ""
        findings.append(Finding("memory", WARN if remedy else OK, f"{total:.0f} GiB", remedy))
    else:
        findings.append(Finding("memory", OK, "unknown on this system"))
    shm = Path("/dev/shm")  # noqa: S108
    if shm.is_dir():
        size = shutil.disk_usage(shm).total / GIB
        remedy = "containers start with 64 MB: docker run --shm-size=8g (or --ipc=host)" if size < 1 else ""
        findings.append(Finding("shared memory", WARN if remedy else OK, f"{size:.1f} GiB in {shm}", remedy))
    return findings


def limits() -> list[Finding]:
    """Open files, and locked memory where there is InfiniBand, which needs it."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = files == resource.RLIM_INFINITY or files >= FILES_WANTED
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    free = locked == resource.RLIM_INFINITY
    infiniband = any(Path("/sys/class/infiniband").glob("*"))
    return [
        Finding("open files", OK if many else WARN, _limit(files, ""), "" if many else "ulimit -n 65536"),
        Finding(
            "locked memory",
            WARN if infiniband and not free else OK,
            _limit(locked, " bytes") + ("" if infiniband else "; no InfiniBand here"),
            "InfiniBand needs it: ulimit -l unlimited (or memlock in limits.conf)" if infiniband and not free else "",
        ),
    ]


def disks() -> list[Finding]:
    """Free space where runs, temporary files and downloads go."""
    cache = hugging_face_home()
    return [
        _disk("disk", Path.cwd(), 5, "runs keep several checkpoints: free some, or run elsewhere"),
        _disk("disk, temporary", Path(tempfile.gettempdir()), 2, "free some, or set TMPDIR to another disk"),
        _disk(
            "disk, Hugging Face", cache, 5, "weights are downloaded there: free some, or set HF_HOME to another disk"
        ),
    ]


def tokens() -> list[Finding]:
    """Whether tokens are there; both are optional, and no value is ever read into the report."""
    file = hugging_face_home() / "token"
    hub = "set" if os.environ.get("HF_TOKEN") else f"unset; {'in a file' if file.is_file() else 'no file'}"
    wandb = "set" if os.environ.get("WANDB_API_KEY") else "unset; run.wandb=online would write offline"
    return [Finding("HF_TOKEN", OK, hub), Finding("WANDB_API_KEY", OK, wandb)]


def hugging_face_home() -> Path:
    """Where huggingface_hub keeps its files (its own rules: HF_HOME, XDG_CACHE_HOME)."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface").expanduser()


def _disk(name: str, place: Path, wanted_gib: float, remedy: str) -> Finding:
    existing = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free / GIB
    short = free < wanted_gib
    return Finding(name, WARN if short else OK, f"{free:.0f} GiB free in {place}", remedy if short else "")


def _limit(value: int, unit: str) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"at most {value}{unit}"


def _cudnn_text(version: int) -> str:
    """91501 -> 9.15.1."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
