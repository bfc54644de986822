"""What page faults cost a CPU training step: one Wan block forward + backward, with glibc's
defaults and with ``keep_freed_memory``, interleaved in fresh processes; medians and their ratio.

    python benchmarks/cpu_allocator.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

from scd_sf.config import HelpFormatter
from scd_sf.distributed import keep_freed_memory
from scd_sf.nn.attention import FullSequence
from scd_sf.nn.layers import WanBlock
from scd_sf.nn.rope import axis_dims, rope_table
from scd_sf.types import exit_on_user_error

REPEATS = 20


def measure(keep_memory: bool) -> float:
    """Milliseconds of one forward + backward: 8 clips of 144 tokens, width 128, one thread."""
    torch.set_num_threads(1)
    if keep_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    block = WanBlock(128, 512, 4, True, 1e-6)
    x = torch.randn(8, 144, 128, requires_grad=True)
    mod = torch.randn(8, 1, 6, 128)
    text = torch.randn(8, 24, 128)
    rotary = rope_table(tuple(range(9)), 4, 4, axis_dims(32), torch.device("cpu"))
    times = []
    for repeat in range(REPEATS + 5):
        start = time.perf_counter()
        block(x, mod, text, rotary, FullSequence(), 0).sum().backward()
        if repeat >= 5:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of either kind")
    parser.add_argument("--child", choices=("keep", "default"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(measure(args.child == "keep"))
        return
    results: dict[str, list[float]] = {"default": [], "keep": []}
    for _ in range(args.rounds):
        for name, values in results.items():
            command = [sys.executable, __file__, "--child", name]
            process = subprocess.run(command, check=True, capture_output=True, text=True)
            values.append(float(process.stdout))
    medians = {name: round(statistics.median(values), 2) for name, values in results.items()}
    ratio = round(medians["default"] / medians["keep"], 3)
    print(json.dumps({"ms": medians, "ratio": ratio, "rounds": args.rounds}))


if __name__ == "__main__":
    exit_on_user_error(main)
