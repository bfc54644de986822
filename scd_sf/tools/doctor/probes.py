"""Checks that do the thing itself: attention on this device, a video file, an all-reduce of two processes."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from scd_sf.tools.doctor.finding import FAIL, OK, WARN, Finding

BACKENDS: Mapping[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
OTHER_CODECS = ("h264_nvenc", "libx265", "libsvtav1", "libvpx-vp9")
SPAWN_SECONDS = 120.0


def attention() -> list[Finding]:
    """Which of torch's attention kernels run here, and whether FlexAttention can be compiled on a GPU."""
    cuda = torch.cuda.is_available()
    works = [name for name, backend in BACKENDS.items() if _attends(backend, cuda)]
    found = f"{', '.join(works) or 'none'} on {'cuda, bf16' if cuda else 'cpu, fp32'}"
    if not set(works) - {"math"}:
        return [Finding("attention", WARN, found, "only the slow kernel works: a current torch and driver have flash")]
    if cuda and importlib.util.find_spec("triton") is None:
        remedy = "training on a GPU compiles FlexAttention with it: pip install triton"
        return [Finding("attention", WARN, f"{found}; no triton", remedy)]
    return [Finding("attention", OK, found)]


def video() -> list[Finding]:
    """A few frames to H.264 and back through PyAV."""
    import av

    from scd_sf.data.clips import read_video, write_video

    frames = torch.arange(4 * 3 * 16 * 16, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(4, 3, 16, 16)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "probe.mp4")
        write_video(file, frames, fps=8)
        shape = tuple(read_video(file).shape)
    if shape != tuple(frames.shape):
        remedy = "pip install --force-reinstall av"
        return [Finding("video", FAIL, f"wrote {tuple(frames.shape)}, read {shape}", remedy)]
    more = [name for name in OTHER_CODECS if name in av.codecs_available]
    return [
        Finding("video", OK, f"libx264 written and read by PyAV {av.__version__}; also {', '.join(more) or 'none'}")
    ]


def all_reduce(seconds: float = SPAWN_SECONDS) -> list[Finding]:
    """Two new processes sum a tensor: over NCCL where there are two GPUs, else over gloo. At most ``seconds``."""
    backend = "nccl" if torch.cuda.device_count() >= 2 else "gloo"
    name, began, port = f"all-reduce, {backend}", time.monotonic(), _free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_start_rank(rank, backend, port, Path(folder)) for rank in range(2)]
        try:
            codes = _wait(ranks, began + seconds)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        said = [Path(folder, f"{rank}.txt").read_text(errors="replace").strip() for rank in range(2)]
    if codes == [0, 0]:
        return [Finding(name, OK, f"2 ranks agree ({time.monotonic() - began:.0f} s, most of it imports)")]
    rank = next((rank for rank, code in enumerate(codes) if code), codes.index(None) if None in codes else 0)
    end = f"rank {rank} " + (
        f"still waits after {seconds:.0f} s" if codes[rank] is None else f"exits with {codes[rank]}"
    )
    last = said[rank].splitlines()[-1][:300] if said[rank] else "nothing on stderr"
    return [Finding(name, FAIL, f"{end}: {last}", _all_reduce_remedy(backend))]


def _wait(ranks: list[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    """Exit codes; None: still running at the deadline, or 5 s after another rank failed."""
    while True:
        codes = [process.poll() for process in ranks]
        if None not in codes or time.monotonic() > deadline:
            return codes
        if any(codes):
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.05)


def _all_reduce_remedy(backend: str) -> str:
    if backend == "nccl":
        return "NCCL_DEBUG=INFO scd doctor; try NCCL_SOCKET_IFNAME, NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1"
    return "127.0.0.1 must be usable (firewall, container network); GLOO_SOCKET_IFNAME=lo"


def _start_rank(rank: int, backend: str, port: int, folder: Path) -> subprocess.Popen[bytes]:
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with (folder / f"{rank}.txt").open("wb") as errors:
        command = [sys.executable, "-m", "scd_sf.tools.doctor.rank", backend]
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors)


def _attends(backend: SDPBackend, cuda: bool) -> bool:
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    q = torch.ones(1, 2, 16, 64, device=device, dtype=dtype)
    try:
        with warnings.catch_warnings(), sdpa_kernel([backend]):
            warnings.simplefilter("ignore")
            return bool(torch.isfinite(F.scaled_dot_product_attention(q, q, q)).all())
    except RuntimeError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
