"""How fast are own videos encoded, and how much memory does that take?

    python benchmarks/own_videos.py --scratch /tmp/own --out own_videos.json

Makes videos below ``--scratch``: one of a single clip, ``--clips`` of a single clip each, one as
long as all of these together, and one of ten times that length. Each folder is encoded by
data_prep/encode_latents.py in a process of its own, and looked at with ``--check``. The figures are
clips per second (without what the run of the single clip takes, which is mostly imports and
loading) and the largest resident set of the process. Needs an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scd_sf.config import HelpFormatter
from scd_sf.files import write_json
from scd_sf.types import UserError, exit_on_user_error, say

ROOT = Path(__file__).resolve().parents[1]
FPS, WIDTH, HEIGHT = 30, 640, 360
# In a process of its own, so that this one stays small: a child inherits its parent's peak memory.
WRITE = """
import sys
from pathlib import Path
import torch
from scd_sf.data.clips import video_writer
path, frames, seed, fps, height, width = Path(sys.argv[1]), *map(int, sys.argv[2:7])
base = torch.randint(0, 256, (3, height // 8, width // 8), generator=torch.Generator().manual_seed(seed))
base = torch.nn.functional.interpolate(base[None].float(), (height, width), mode="bicubic")[0]
base = base.clamp(0, 255).to(torch.uint8)
path.parent.mkdir(parents=True, exist_ok=True)
with video_writer(path, fps) as append:
    for number in range(frames):
        append(base.roll(3 * number, 2)[None])
path.with_suffix(".txt").write_text(f"a pattern that moves, number {seed}")
"""


def write_videos(folder: Path, count: int, frames: int, seed: int) -> None:
    """Videos of 640x360 at 30 frames per second with captions, once."""
    for number in range(count):
        path = folder / f"{number:04d}.mp4"
        if not path.with_suffix(".txt").is_file():
            sizes = (str(value) for value in (frames, seed + number, FPS, HEIGHT, WIDTH))
            subprocess.run([sys.executable, "-c", WRITE, str(path), *sizes], cwd=ROOT, check=True)


def measured(arguments: list[str]) -> dict[str, Any]:
    """Wall seconds and peak memory in MiB of one run of encode_latents.py. UserError: it failed."""
    script = ROOT / "data_prep" / "encode_latents.py"
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, str(script), *arguments], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{script} {' '.join(arguments)}: failed; see above")
    return {
        "seconds": round(time.monotonic() - start, 2),
        "peak_mib": round(usage.ru_maxrss / 1024, 1),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures by name of the folder."""
    scratch = Path(options.scratch)
    clip = -(-options.frames * FPS // 16) + 1  # frames at 30 per second for a clip at 16
    folders = {
        "single": (1, clip),
        "short": (options.clips, clip),
        "long": (1, clip * options.clips),
        "longest": (1, 10 * clip * options.clips),
    }
    figures: dict[str, Any] = {}
    for number, (name, (count, frames)) in enumerate(folders.items()):
        write_videos(scratch / name, count, frames, 1000 * number)
    for name in folders:
        out = scratch / f"{name}-out"
        shutil.rmtree(out, ignore_errors=True)
        given = ["--clips", str(scratch / name), "--frames", str(options.frames)]
        given += ["--size", options.size, "--val", "0"]
        row = measured(
            [*given, "--model", options.model, "--out", str(out), "--device", options.device]
        )
        row["clips"] = json.loads((out / "report.json").read_text())["clips"]
        row["check_seconds"] = measured([*given, "--check"])["seconds"]
        if figures:
            more = row["clips"] - figures["single"]["clips"]
            row["clips_per_second"] = round(
                more / (row["seconds"] - figures["single"]["seconds"]), 2
            )
        figures[name] = row
        say(f"{name}: {row}")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--scratch", required=True, help="folder for videos and their encodings")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    parser.add_argument("--model", default="assets/wan_doom", help="VAE and text encoder")
    parser.add_argument("--size", default="64x64", help="WIDTHxHEIGHT of the clips")
    parser.add_argument("--frames", type=int, default=33, help="frames of a clip")
    parser.add_argument("--clips", type=int, default=40, help="clips of the sets short and long")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    figures = measure(options)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
    write_json(
        options.out,
        {
            "options": {k: str(v) for k, v in vars(options).items() if k not in ("scratch", "out")},
            **machine,
            **figures,
        },
    )


if __name__ == "__main__":
    exit_on_user_error(main)
