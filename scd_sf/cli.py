"""The `scd` console script: what is installed (`doctor`), what is in a checkpoint (`inspect`).

Every command prints plain sentences. Exit codes: 0 fine, 1 a check failed, 2 bad input (one line on stderr).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scd_sf import __version__
from scd_sf.checkpoint import find, read_provenance
from scd_sf.doctor import FAIL, STYLE, examine
from scd_sf.types import exit_on_user_error

app = typer.Typer(
    name="scd",
    help="Separable Causal Diffusion on Wan 2.1: look after an installation and its checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"scd-sf {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Separable Causal Diffusion on Wan 2.1: look after an installation and its checkpoints."""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead of a table.")] = False,
) -> None:
    """Check packages, devices, compiler and disk, with a remedy for each problem. Exit code 1 on a failure."""
    findings = examine()
    if as_json:
        print(json.dumps([finding.__dict__ for finding in findings], indent=2))
    else:
        table = Table("check", "", "found", "what to do", box=None, pad_edge=False)
        for finding in findings:
            style = STYLE[finding.status]
            table.add_row(finding.name, Text(finding.status, style), Text(finding.found), Text(finding.remedy))
        Console().print(table)
    raise typer.Exit(1 if any(finding.status == FAIL for finding in findings) else 0)


@app.command()
def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(help="A step_N directory, or a run directory (its newest verified step).")
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, not only the sums.")] = False,
) -> None:
    """Verify a checkpoint's files, then print where it came from and what it holds. Exit code 2 if it is damaged."""
    path = find(checkpoint)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{path}: verified", markup=False)
    for key, value in read_provenance(path).items():
        console.print(f"  {key}: {value if isinstance(value, str | int | float) else json.dumps(value)}", markup=False)
    for file in sorted(path.glob("*.safetensors")):
        _print_tensors(console, file, every=tensors)


def _print_tensors(console: Console, file: Path, *, every: bool) -> None:
    """One line for the file, one for each tensor when asked; only the header is read."""
    from safetensors import safe_open

    total, count, dtypes = 0, 0, set()
    rows: list[str] = []
    with safe_open(file, framework="pt") as content:
        for name in sorted(content.keys()):
            view = content.get_slice(name)
            size = 1
            for length in view.get_shape():
                size *= length
            total, count = total + size, count + 1
            dtypes.add(view.get_dtype())
            rows.append(f"    {name}  {view.get_dtype()} {list(view.get_shape())}")
    console.print(f"  {file.name}: {count} tensors, {total:,} numbers, {', '.join(sorted(dtypes))}", markup=False)
    for row in rows if every else []:
        console.print(row, markup=False)


def main() -> None:
    """Entry point of the console script."""
    exit_on_user_error(app)


if __name__ == "__main__":
    main()
