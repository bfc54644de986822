"""``scd data``: encode, check, repair, manifest, export-webdataset, import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from scd_sf.config import paragraphs
from scd_sf.data.clip_index import read_folder_job
from scd_sf.data.prompts import index_clips
from scd_sf.files import locked
from scd_sf.tools.data.check import check, repair
from scd_sf.tools.data.encode import encode
from scd_sf.tools.data.export import export_webdataset
from scd_sf.tools.data.progress import progress_of
from scd_sf.types import plural, say

SHOWN = 20
app = typer.Typer(
    help="Folders of clips: encode videos, check, repair, index, export, import.",
    no_args_is_help=True,
)
app.command(help=paragraphs(encode.__doc__))(encode)
Folder = Annotated[
    Path,
    typer.Argument(help="A folder of encode, import or generate_clips.py, as data/clips/train."),
]
Full = Annotated[bool, typer.Option("--full", help="Read everything and compare its sha256, too.")]


@app.command("check")
def check_command(folder: Folder, full: Full = False) -> None:
    """Compare headers, file sizes, shapes and the index; exit code 1 when something is wrong.
    Changes nothing."""
    with progress_of("files") as progress:
        report = check(folder, full=full, progress=progress)
    for line in report.problems[:SHOWN]:
        say(line)
    if len(report.problems) > SHOWN:
        say(f"... and {len(report.problems) - SHOWN} more")
    stray = (
        f", {plural(len(report.temporary_files), 'temporary file')}"
        if report.temporary_files
        else ""
    )
    say(
        f"{folder}: {plural(report.clips, 'clip')} whole, {report.bytes / 1e9:.3g} GB, "
        f"{plural(len(report.problems), 'problem')}{stray}"
    )
    sys.exit(1 if report.problems else 0)


@app.command("repair")
def repair_command(folder: Folder, full: Full = False) -> None:
    """Move damaged files to quarantine/, so that the next run makes them again; remove old
    temporary files; index."""
    with progress_of("files") as progress:
        report, count = repair(folder, full=full, progress=progress)
    for fault in report.faults.values():
        say(f"moved to quarantine: {fault}")
    say(f"{folder}: {len(report.faults)} files moved, {count} clips in the index")


@app.command()
def manifest(folder: Folder) -> None:
    """Write clips.jsonl and manifest.json again, from the files' headers."""
    read_folder_job(folder)
    with locked(folder, "scd data manifest"):
        say(f"{folder}: {index_clips(folder)} clips in the index")


@app.command("export-webdataset")
def export_tars(
    folder: Folder,
    out: Annotated[
        Path, typer.Argument(help="A new folder, or one of an export that was interrupted.")
    ],
    per_tar: Annotated[int, typer.Option(help="Clips per tar.")] = 256,
    videos: Annotated[bool, typer.Option(help="Also the mp4 files.")] = True,
) -> None:
    """Tar shards without pickles: ID.safetensors, ID.prompt.txt, ID.mp4 per clip."""
    with progress_of("tars") as progress:
        count = export_webdataset(folder, out, per_tar=per_tar, videos=videos, progress=progress)
    say(f"{out}: {count} tars")


@app.command("import")
def import_source(
    source: Annotated[
        Path,
        typer.Argument(help="Tars of rCM or ours, LMDB of Self-Forcing, parquet of FastVideo."),
    ],
    out: Annotated[
        Path, typer.Argument(help="A new folder, or one of an import that was interrupted.")
    ],
    model: Annotated[
        Path, typer.Option(help="The Wan directory (VAE, text encoder) that the clips are of.")
    ],
    store: Annotated[str, typer.Option(help="bf16, fp16 or fp32 on disk.")] = "bf16",
    negative_prompt: Annotated[
        str, typer.Option(help="Of stage 3's teacher; 'wan' is Wan's own, '' none.")
    ] = "wan",
    text_cache: Annotated[
        str, typer.Option(help="Where encoded prompts are kept; 'off': nowhere.")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda, for the text encoder.")] = "cpu",
) -> None:
    """Other projects' clips as a folder that stage 2 reads. Archives are read in place; pickled
    code is refused."""
    from scd_sf.tools.data.importer import ImportOptions, import_clips

    options = ImportOptions(source, out, model, store, negative_prompt, text_cache, device)
    with progress_of("clips") as progress:
        say(import_clips(options, progress))
