"""How long LPIPS, SSIM, I3D and the Frechet distance take on this machine.

    scd weights metrics && python benchmarks/metrics.py --out docs/results/metrics.json

Medians over ``--rounds`` (after one unmeasured) on random frames of ``--side`` pixels: seconds per
clip of 16 and 64 frames for I3D, pairs of frames per second for LPIPS and SSIM, seconds for the
distance of 256 x 400 features.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import torch
import typer

from scd_sf.evaluation.bench import in_rounds
from scd_sf.evaluation.frames import ssim_frames
from scd_sf.evaluation.fvd import frechet_distance
from scd_sf.evaluation.i3d import I3dFeatures
from scd_sf.evaluation.lpips import Lpips, Trunk
from scd_sf.files import write_json
from scd_sf.types import UserError, exit_on_user_error

CLIPS, DIMENSIONS = 256, 400
TRUNKS: tuple[Trunk, ...] = ("alex", "vgg")


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of 'scd weights metrics'; default: its own.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    side: Annotated[int, typer.Option(help="Pixels along a side of a frame.")] = 128,
    batch: Annotated[int, typer.Option(help="Pairs of frames per LPIPS pass.")] = 16,
    rounds: Annotated[int, typer.Option(help="Measured calls.")] = 5,
    threads: Annotated[int, typer.Option(help="Torch's threads on the CPU.")] = 1,
) -> None:
    """Print one line per network; see the top of this file."""
    if rounds < 1 or threads < 1 or batch < 1:
        raise UserError("--rounds, --threads and --batch must be at least 1")
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    pairs = torch.rand(2, 1, batch, 3, side, side, generator=generator)
    alex, vgg = (Lpips.load(trunk, weights, device) for trunk in TRUNKS)
    i3d = I3dFeatures.load(weights, device)
    features = torch.randn(2, CLIPS, DIMENSIONS, generator=generator, dtype=torch.float64)
    clips = {
        frames: torch.rand(1, frames, 3, side, side, generator=generator) for frames in (16, 64)
    }
    rows = in_rounds(
        {
            "16": lambda: i3d(clips[16]),
            "64": lambda: i3d(clips[64]),
            "alex": lambda: alex(pairs[0], pairs[1]),
            "vgg": lambda: vgg(pairs[0], pairs[1]),
            "ssim": lambda: ssim_frames(pairs[0], pairs[1]),
            "frechet": lambda: frechet_distance(features[0], features[1]),
        },
        rounds,
    )
    seconds = {str(row["name"]): float(str(row["seconds"])) for row in rows}
    figures = {f"i3d_seconds_per_{frames}_frames": seconds[str(frames)] for frames in clips}
    figures |= {f"lpips_{trunk}_pairs_per_second": batch / seconds[trunk] for trunk in TRUNKS}
    figures["ssim_pairs_per_second"] = batch / seconds["ssim"]
    figures[f"frechet_seconds_{CLIPS}_clips"] = seconds["frechet"]
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    if out is not None:
        machine = {
            "device": device,
            "threads": threads,
            "torch": torch.__version__,
            "cpu": platform.processor(),
        }
        write_json(
            out,
            {
                "side": side,
                "batch": batch,
                "rounds": rounds,
                "machine": machine,
                "figures": figures,
            },
        )


if __name__ == "__main__":
    exit_on_user_error(lambda: typer.run(main))
