"""The measured device: its facts, its data sheet's peak, and the speed it reaches."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from scd_sf.checkpoint import git_revision, versions
from scd_sf.evaluation.roofline import synchronize
from scd_sf.tools.gpu.parts import Figures, GpuRow
from scd_sf.types import UserError, say

# Dense bf16 with fp32 sums, TFLOP/s, from the makers' data sheets. Names without SAME's words.
PEAKS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "A100": 312.0,
    "A100 PCIe": 312.0,
    "A800": 312.0,
    "A800 PCIe": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "RTX 6000 Ada": 364.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "A40": 149.7,
    "RTX A6000": 154.8,
    "RTX 3090": 71.0,
    "A10": 125.0,
    "L4": 121.0,
}
# Words of a GPU's name that do not change its peak. All others do: Laptop, D, Ti, MIG 1g.10gb ..
SAME = re.compile(r"NVIDIA|Tesla|GeForce|Generation|SXM\d*|\d+GB|HBM\w*|Active", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """``gib`` of memory; ``peak_tflops`` 0 where :data:`PEAKS` does not have the GPU."""

    device: torch.device
    name: str
    gib: float
    peak_tflops: float

    @property
    def toy(self) -> bool:
        """Whether this is a CPU, on which everything runs at toy size to try the code."""
        return self.device.type == "cpu"


def open_card(device: str) -> Card:
    """The current GPU, or the CPU if ``device`` is cpu. Says where the GPU's peak is unknown.
    UserError where there is no GPU."""
    if device == "cpu":
        torch.set_num_threads(1)
        return Card(
            torch.device("cpu"), f"{platform.machine()}, {os.cpu_count()} cores", host_gib(), 0.0
        )
    if not torch.cuda.is_available():
        raise UserError(
            "no CUDA GPU here (nvidia-smi says why); --device cpu --out FILE tries the code at toy size"
        )
    facts = torch.cuda.get_device_properties(0)
    peak_tflops = peak_of(facts.name)
    if not peak_tflops:
        say(f"{facts.name}: its data sheet's peak is not in our list, so no MFU is computed")
    return Card(torch.device("cuda", 0), facts.name, facts.total_memory / 2**30, peak_tflops)


def peak_of(name: str) -> float:
    """TFLOP/s of a GPU by the name that its driver gives; 0 unless :data:`PEAKS` has that very
    name but for words in :data:`SAME`."""
    words = [word for word in re.split(r"[\s-]+", name) if word and not SAME.fullmatch(word)]
    peaks = {known.lower(): peak for known, peak in PEAKS.items()}
    return peaks.get(" ".join(words).lower(), 0.0)


def machine(card: Card) -> Figures:
    """The facts that decide the figures: device, memory, driver, versions, revision, date."""
    return {
        "device": card.name,
        "memory_gib": round(card.gib, 1),
        "host_memory_gib": round(host_gib(), 1),
        "peak_tflops_of_data_sheet": card.peak_tflops or None,
        "driver": "" if card.toy else _driver(),
        "cuda": None if card.toy else torch.version.cuda,
        "toy": card.toy,
        "versions": versions(),
        **run_stamp(),
    }


def run_stamp() -> Figures:
    """Date and revision of a measurement."""
    return {
        "revision": git_revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def host_gib() -> float:
    """Main memory of this machine in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.check_output(
            command, text=True, stderr=subprocess.DEVNULL, timeout=20
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def speed_row(card: Card) -> GpuRow:
    """A row with the card's own speed in bf16: a large matmul, attention over Wan's tokens,
    copying."""

    def measure() -> Figures:
        size, tokens, copy_bytes = (256, 128, 1 << 20) if card.toy else (8192, 16384, 1 << 30)
        a = torch.randn(size, size, dtype=torch.bfloat16, device=card.device)
        q = torch.randn(1, 12, tokens, 128, dtype=torch.bfloat16, device=card.device)
        bytes_ = torch.empty(copy_bytes, dtype=torch.uint8, device=card.device)
        attention_seconds = _seconds(card, lambda: scaled_dot_product_attention(q, q, q))
        figures = {
            "matmul TFLOP/s": 2 * size**3 / _seconds(card, lambda: a @ a) / 1e12,
            "attention TFLOP/s": 4 * 12 * tokens**2 * 128 / attention_seconds / 1e12,
            "copy GB/s": 2 * copy_bytes / _seconds(card, bytes_.clone) / 1e9,
        }
        line = {"of": "the card itself"}
        return figures | {
            "lines": [line | {name: float(f"{value:.3g}") for name, value in figures.items()}]
        }

    return GpuRow("the card itself", measure)


def _seconds(card: Card, work: object) -> float:
    """Seconds of one call: after a first call, the best mean of three groups of ten."""
    assert callable(work)
    work()
    best_seconds = float("inf")
    for _ in range(3):
        synchronize(card.device)
        start = time.perf_counter()
        for _ in range(10):
            work()
        synchronize(card.device)
        best_seconds = min(best_seconds, (time.perf_counter() - start) / 10)
    return best_seconds
