"""Minecraft (or DMLab) clips with actions, as TECO or FAR distribute them, to a directory of
encoded frames.

    python data_prep/teco_minecraft.py --root data/minecraft --split train --tokenizer models/dcae \\
        --out data/mc/train

``--root``: the folder with ``train/`` and ``test/``, a tar, or a folder of tars or of the parts of
one (``minecraft.tar.partaa`` .., as the Internet Archive has them); nothing is extracted. With
``--list`` it is FAR's working folder and the clips are those of FAR's JSON list. Latents that FAR
computed already (``.pt`` in a folder or in ``shard-*.tar``) are imported with ``--latents``,
multiplied by ``--scaling-factor``; then no tokenizer is needed.

A set of your own: ``ROOT/train/ANY/NAME.mp4`` and ``ROOT/test/ANY/NAME.mp4``, each with
``NAME.npz`` beside it, whose array ``actions`` has one whole number 0 .. N-1 per frame, the action
that led to it (``--num-actions N``). All videos are square, of one size (or ``--size``) and of
``--fps`` frames per second.

Each split is encoded by a run of its own. ``<out>`` gets frames-00000.safetensors .., clips.jsonl
and manifest.json; ``recipes/pretrain.py`` takes the two as ``data=`` and ``val=``. With a trained
model ``recipes/play.py`` makes videos by actions that you choose.

Malformed clips are left out and listed in ``<out>/report.json``; more than ``--max-bad`` of them is
an error. ``--check`` only reads everything and reports. An interrupted run goes on where it
stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scd_sf.config import paragraphs
from scd_sf.data.sources.far import SCALING_FACTOR, FarLatents
from scd_sf.data.sources.pixel_sources import PixelsConfig, open_pixels
from scd_sf.tools.data.encode_frames import EncodeConfig, Task, run_latents, run_pixels
from scd_sf.types import exit_on_user_error


def main(
    root: Annotated[Path, typer.Option(help="Folder or tar of the data set; see above.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory for the encoded frames (made if missing).")
    ] = None,
    split: Annotated[str, typer.Option(help="train or test (not with a list).")] = "train",
    tokenizer: Annotated[Path | None, typer.Option(help="Directory of the tokenizer.")] = None,
    data_list: Annotated[
        Path | None, typer.Option("--list", help="FAR's JSON list of clips.")
    ] = None,
    list_prefix: Annotated[
        str, typer.Option(help="Beginning of the list's paths to cut off.")
    ] = "",
    latents: Annotated[
        bool, typer.Option("--latents", help="Import latents instead of encoding videos.")
    ] = False,
    scaling_factor: Annotated[float, typer.Option(help="Factor of the latents.")] = SCALING_FACTOR,
    spatial: Annotated[
        int, typer.Option(help="With --latents: pixels per latent along a side.")
    ] = 16,
    num_actions: Annotated[
        int, typer.Option(help="Actions are 0..N-1; every clip is checked.")
    ] = 3,
    size: Annotated[
        int, typer.Option(help="Resize to a square of so many pixels; 0: as it is.")
    ] = 0,
    fps: Annotated[
        float, typer.Option(help="Frames per second; videos of another rate are malformed.")
    ] = 20.0,
    as_coded: Annotated[
        bool, typer.Option("--as-coded", help="Take frames one by one, whatever their times.")
    ] = False,
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
    """Encode clips with actions. Run again to resume."""
    config = EncodeConfig(batch=batch, workers=workers, max_bad=max_bad, device=device)
    task = Task(out, tokenizer, check, report, config)
    source: dict[str, object] = {
        "source": "minecraft",
        "list": data_list.name if data_list else "",
        "split": split,
    }
    if latents:
        clips = FarLatents(
            root,
            data_list,
            prefix=list_prefix,
            num_actions=num_actions,
            scaling_factor=scaling_factor,
            fps=fps,
        )
        run_latents(clips, spatial, {**source, "scaling_factor": scaling_factor}, task)
        return
    pixels = PixelsConfig(
        kind="far" if data_list else "teco",
        root=str(root),
        split=split,
        list=str(data_list or ""),
        list_prefix=list_prefix,
        num_actions=num_actions,
        size=size,
        fps=fps,
        as_coded=as_coded,
        first=first,
    )
    run_pixels(
        open_pixels(pixels),
        {**source, "size": size} | ({"as_coded": True} if as_coded else {}),
        task,
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=paragraphs(__doc__))(main)
    exit_on_user_error(app)
