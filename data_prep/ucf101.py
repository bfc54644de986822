"""UCF-101 with its official lists to a directory of encoded frames with labels.

    python data_prep/ucf101.py --root data/ucf101 --split train --tokenizer models/dcae \\
        --out data/ucf/train

``--root`` holds ``UCF-101/<Class>/v_*.avi`` and ``ucfTrainTestlist/`` (classInd, trainlist0N,
testlist0N). Frames are resized (short side) and cropped to ``--size``. ``--split test --every 10
--first 256 --as-coded`` are the clips of FAR's and MCVD's evaluation. With ``--list`` the clips are
those of FAR's JSON list, its paths relative to ``--root``.

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
    fold: Annotated[int, typer.Option(help="Which of the three official splits.")] = 3,
    tokenizer: Annotated[Path | None, typer.Option(help="Directory of the tokenizer.")] = None,
    data_list: Annotated[
        Path | None, typer.Option("--list", help="FAR's JSON list of clips instead.")
    ] = None,
    list_prefix: Annotated[
        str, typer.Option(help="Beginning of the list's paths to cut off.")
    ] = "",
    size: Annotated[int, typer.Option(help="Pixels along a side.")] = 64,
    fps: Annotated[float, typer.Option(help="Videos of another rate are resampled to it.")] = 25.0,
    as_coded: Annotated[
        bool, typer.Option("--as-coded", help="Take frames one by one, as FAR and MCVD do.")
    ] = False,
    every: Annotated[int, typer.Option(help="Only every n-th clip.")] = 1,
    first: Annotated[int, typer.Option(help="At most so many clips; 0: all.")] = 0,
    batch: Annotated[int, typer.Option(help="Frames per call of the tokenizer.")] = 64,
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
    """Encode clips with labels. Run again to resume."""
    pixels = PixelsConfig(
        kind="far" if data_list else "ucf101",
        root=str(root),
        split=split,
        list=str(data_list or ""),
        list_prefix=list_prefix,
        fold=fold,
        size=size,
        fps=fps,
        as_coded=as_coded,
        every=every,
        first=first,
    )
    config = EncodeConfig(batch=batch, workers=workers, max_bad=max_bad, device=device)
    source: dict[str, object] = {"source": "ucf101", "split": split, "fold": fold, "size": size} | (
        {"as_coded": True} if as_coded else {}
    )
    run_pixels(open_pixels(pixels), source, Task(out, tokenizer, check, report, config))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=paragraphs(__doc__))(main)
    exit_on_user_error(app)
