"""RealEstate10K in pixelSplat's chunks to a directory of encoded frames, without conditions.

    python data_prep/realestate10k.py --root data/re10k --split train --tokenizer models/vavae \\
        --out data/re_enc/train

``--root`` holds ``train/`` and ``test/`` with ``000000.torch`` .. and ``index.json``. Frames are
resized (short side) and cropped to ``--size``; of every clip the first ``--frames`` are taken,
shorter clips count as malformed (0: all frames of all clips). Cameras are ignored, or checked with
``--cameras``.

Each split is encoded by a run of its own. ``<out>`` gets frames-00000.safetensors .., clips.jsonl
and manifest.json; ``recipes/pretrain.py`` takes the two as ``data=`` and ``val=``.

Malformed clips are left out and listed in ``<out>/report.json``; more than ``--max-bad`` of them is
an error. ``--check`` only reads everything and reports. An interrupted run goes on where it
stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scd_sf.config import paragraphs
from scd_sf.data.sources.pixel_sources import PixelsConfig, open_pixels
from scd_sf.tools.data.encode_frames import EncodeConfig, Task, run_pixels
from scd_sf.types import exit_on_user_error


def main(
    root: Annotated[Path, typer.Option(help="Folder of the data set; see above.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory for the encoded frames (made if missing).")
    ] = None,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    tokenizer: Annotated[Path | None, typer.Option(help="Directory of the tokenizer.")] = None,
    size: Annotated[int, typer.Option(help="Pixels along a side.")] = 256,
    frames: Annotated[int, typer.Option(help="The first so many frames of a clip; 0: all.")] = 64,
    cameras: Annotated[bool, typer.Option("--cameras", help="Check the cameras, too.")] = False,
    first: Annotated[int, typer.Option(help="At most so many clips; 0: all.")] = 0,
    batch: Annotated[int, typer.Option(help="Frames per call of the tokenizer.")] = 16,
    workers: Annotated[int, typer.Option(help="Threads that decode.")] = 2,
    max_bad: Annotated[
        float, typer.Option(help="Largest allowed share of malformed clips.")
    ] = 0.01,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    check: Annotated[
        bool, typer.Option("--check", help="Only read everything and report.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="With --check: also write the report to this file.")
    ] = None,
) -> None:
    """Encode clips without conditions. Run again to resume."""
    pixels = PixelsConfig(
        kind="realestate10k",
        root=str(root),
        split=split,
        size=size,
        frames=frames,
        cameras=cameras,
        first=first,
    )
    config = EncodeConfig(batch=batch, workers=workers, max_bad=max_bad, device=device)
    source: dict[str, object] = {
        "source": "realestate10k",
        "split": split,
        "size": size,
        "frames": frames,
    }
    run_pixels(open_pixels(pixels), source, Task(out, tokenizer, check, report, config))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=paragraphs(__doc__))(main)
    exit_on_user_error(app)
