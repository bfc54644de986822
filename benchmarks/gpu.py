"""What one CUDA GPU shows of this project in about ten minutes; random weights, no network, no
installation.

    make gpu                    # all parts; the same as python benchmarks/gpu.py
    make gpu PART=2             # one part; the same as python benchmarks/gpu.py --part 2
    # the same code at toy size, without a GPU
    make gpu ARGS='--device cpu --out /tmp/toy.json --budget 20'

 1. every path on CUDA against the CPU at tiny size
 2. Wan 1.3B's size: frames per second of SCD and of Self-Forcing, eager, compiled, as CUDA graphs
 3. a stage-2 update and a stage-3 cycle at full size: seconds, MFU, memory against `scd plan`
 4. the demo's chain on the GPU: the CPU's curves?

Every part runs in a process of its own. What is in the JSON is not measured again; what failed or
was left out is (see docs/gpu.md). The budgets are for an H100 and are estimates: nobody has run
this on one yet. Exit code: 0 where nothing failed, 1 where something did (the tables say what), 2
where it could not begin.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results" / "gpu.json"
BUDGETS = {1: 120.0, 2: 180.0, 3: 200.0, 4: 100.0}
# Module: its package, where that has another name.
NEEDED = {
    "torch": "",
    "numpy": "",
    "safetensors": "",
    "transformers": "",
    "diffusers": "",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "typer": "",
    "tensorboard": "",
    "msgspec": "",
    "ftfy": "",
    "wcwidth": "",
    "rich": "",
    "deepspeed": "",
    "hjson": "",
    "psutil": "",
    "einops": "",
    "msgpack": "",
    "pydantic": "",
    "tqdm": "",
}


def missing() -> list[str]:
    """Names of the packages that are not installed."""
    return [
        package or module
        for module, package in NEEDED.items()
        if importlib.util.find_spec(module) is None
    ]


def older() -> list[str]:
    """Name, version and lower bound of each package that is older than pyproject.toml allows."""
    import tomllib
    from importlib import metadata

    from packaging.requirements import Requirement

    texts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = {requirement.name: requirement.specifier for requirement in map(Requirement, texts)}
    names = [
        package or module for module, package in NEEDED.items() if (package or module) in bounds
    ]
    versions = {name: metadata.version(name) for name in names}
    return [
        f"{name} {versions[name]} ({bounds[name]})"
        for name in names
        if not bounds[name].contains(versions[name], True)
    ]


def factor(text: str) -> float:
    """The number that ``text`` says. ArgumentTypeError: it is not between 0 and 1000."""
    value = float(text)
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1000")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line. ``--inside`` is for the processes that a call starts."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = list(BUDGETS)
    arguments.add_argument(
        "--part",
        type=int,
        nargs="*",
        choices=parts,
        default=parts,
        metavar="N",
        help="parts to run: 1 2 3 4 (default: all)",
    )
    arguments.add_argument(
        "--out",
        type=Path,
        default=OUT,
        help="JSON; tables in Markdown beside it (default: %(default)s)",
    )
    arguments.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: toy size (default: %(default)s)",
    )
    arguments.add_argument("--again", action="store_true", help="measure what is in the JSON again")
    arguments.add_argument("--only", default="", help="rows whose name contains this text")
    arguments.add_argument(
        "--budget", type=factor, default=1.0, help="multiply all budgets by this"
    )
    arguments.add_argument(
        "--latents",
        type=Path,
        default=ROOT / "runs" / "demo" / "latents",
        help="encoded clips of the demo, for part 4",
    )
    # for the process of one part: its seconds
    arguments.add_argument("--inside", type=float, help=argparse.SUPPRESS)
    return arguments


def part_of(number: int, args: argparse.Namespace, card: Any) -> Any:
    """The part of this number; the modules that it needs are imported when its rows are made."""
    from scd_sf.tools.gpu.parts import Part

    def speed() -> Any:
        from scd_sf.tools.gpu.speed import speed_rows

        return speed_rows(card)

    def training() -> Any:
        from scd_sf.tools.gpu.training import training_rows

        return training_rows(card)

    def equality() -> Any:
        from scd_sf.tools.gpu.equality import equality_rows

        checks = runpy.run_path(
            str(ROOT / "tests" / "tools" / "gpu" / "checks.py"), run_name="checks"
        )
        return equality_rows(checks["CHECKS"], checks["compared"])

    def chain() -> Any:
        from scd_sf.tools.gpu.chain import GpuChain

        return GpuChain(card, work_folder(args), args.latents).rows()

    parts = {
        1: ("every path at tiny size, against the CPU", equality),
        2: ("Wan 1.3B's geometry: frames per second", speed),
        3: ("Wan 1.3B's size, teacher 14B: training", training),
        4: ("the demo's chain, beside the CPU's curves", chain),
    }
    title, rows = parts[number]
    return Part(number, title, args.budget * BUDGETS[number], rows)


def work_folder(args: argparse.Namespace) -> Path:
    """The folder that part 4 works in. It is locked during a call, so that two calls do not
    disturb each other."""
    return ROOT / "runs" / "gpu" if args.out == OUT else Path(args.out.with_suffix(".work"))


def inside(args: argparse.Namespace) -> None:
    """Measure one part, or without a part write the machine's facts; in a process of its own, as
    the calling process never takes the GPU."""
    from scd_sf.tools.gpu.card import machine, open_card, run_stamp
    from scd_sf.tools.gpu.parts import GpuRecord, end_with_the_caller, measure_rows

    card, record = open_card(args.device), GpuRecord(args.out)
    if not args.part:
        return record.on(machine(card) | {"older_than_tested": older()})
    end_with_the_caller()
    sys.exit(
        measure_rows(part_of(args.part[0], args, card), record, run_stamp(), args.inside, args.only)
    )


def main() -> None:
    args = parser().parse_args()
    args.out = args.out.absolute()
    args.latents = args.latents.absolute()
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
    )
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if args.inside is not None:
        return inside(args)
    from scd_sf.types import UserError

    if not args.part:
        raise UserError("--part: name parts, or leave it out for all")
    if args.device == "cpu" and args.out == OUT:
        raise UserError(
            f"--device cpu: figures of toy size do not belong into {OUT}; name another file with --out"
        )
    from rich.console import Console

    from scd_sf.files import locked
    from scd_sf.tools.gpu.report import failures, tables

    with locked(work_folder(args), "make gpu"):
        document = measured(args)
    for item in tables(document):
        Console(width=None if Console().is_terminal else 180).print(item)
    sys.exit(1 if any(failures(document["parts"][str(number)]) for number in args.part) else 0)


def measured(args: argparse.Namespace) -> Any:
    """Run the parts; returns the whole document. UserError: ``--only`` names no row."""
    from scd_sf.files import write_text
    from scd_sf.tools.gpu.parts import GpuRecord, run_part
    from scd_sf.tools.gpu.report import gpu_markdown
    from scd_sf.tools.steps import python_command
    from scd_sf.types import UserError

    record = GpuRecord(args.out)
    options = [
        "--out",
        str(args.out),
        "--device",
        args.device,
        "--only",
        args.only,
        "--latents",
        str(args.latents),
    ]
    command = [*python_command(__file__), *options, "--budget", str(args.budget)]
    exit_code = subprocess.run([*command, "--inside", "0", "--part"], check=False).returncode
    if exit_code:
        sys.exit(exit_code)
    for number in args.part:
        part = part_of(number, args, None)
        part_command = [*command, "--part", str(number), "--inside"]
        run_part(part, record, part_command, args.again, args.only)
        write_text(record.path.with_suffix(".md"), gpu_markdown(record.read()))
    parts = [record.part(part_of(number, args, None)) for number in args.part]
    if args.only and not any(
        args.only in row for part in parts for row in [*part["rows"], *part["left_out"]]
    ):
        raise UserError(
            f"--only {args.only}: no row of these parts is called so; leave it out to see them all"
        )
    return record.read()


def begin() -> None:
    """Check Python and the packages before any module of this project is imported, then run
    ``main``."""
    sys.path.insert(0, str(ROOT))
    if sys.version_info < (3, 11):  # noqa: UP036  # a rented machine's own Python
        sys.exit(
            f"error: python is {sys.version.split()[0]}; scd-sf needs 3.11 or newer: make gpu PYTHON=python3.12"
        )
    packages = missing()
    if packages:
        install = f"{shlex.quote(sys.executable)} -m pip install {' '.join(packages)}"
        sys.exit(f"error: missing {', '.join(packages)}: {install} (without network: docs/gpu.md)")
    from scd_sf.types import exit_on_user_error

    exit_on_user_error(main)


if __name__ == "__main__":
    begin()
