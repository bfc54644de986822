"""A budget for people, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from scd_sf.tools.plan.budget import CONTEXT_GIB, GIB, SLACK, TABLES_GIB, TEXT, Budget
from scd_sf.tools.stages import Stage3Config

_COLUMNS = ("weights", "masters", "moments", "average", "accumulated", "buffers", "update")


def print_budget(console: Console, found: Budget, advised: list[tuple[str, Budget]]) -> None:
    """Print it."""
    console.print(
        Group(_roles(found), _phases(found), *(Text(line) for line in lines(found, advised)))
    )


def lines(found: Budget, advised: list[tuple[str, Budget]]) -> Iterator[str]:
    """The sums, in words."""
    job, cluster = found.job, found.cluster
    latents, text = found.clip_bytes()
    yield from (f"assumed: {line}" for line in job.assumed)
    yield (
        f"per GPU: {found.peak / GIB:.1f} GiB at the worst moment; with {TABLES_GIB:g} GiB of tables, {SLACK:.0%} of "
        f"allocator slack and {CONTEXT_GIB} GiB of CUDA (estimates) {found.needed_gib:.1f} of {cluster.gpu_mem:g} GiB: "
        f"{'fits' if found.fits else 'DOES NOT FIT'}"
    )
    if job.stage == 3:
        yield f"of these the rollout's K/V: {found.cache_bytes() / GIB:.2f} GiB per GPU"
    if TEXT in found.held:
        yield (
            f"of these the text encoder: {found.held[TEXT].weights / GIB:.1f} GiB on every GPU, as the prompts are "
            "a list; prompts that were encoded before (data_prep/encode_prompts.py) need none"
        )
    per_node = found.host * cluster.gpus_per_node / GIB
    yield f"host memory: {found.host / GIB:.1f} GiB per process, {per_node:.0f} GiB per node, while starting or saving"
    keep = job.cfg.train.keep
    yield f"checkpoints: {found.checkpoint / GIB:.1f} GiB each; {found.disk / GIB:.0f} GiB for {keep} and the next one"
    if job.stage == 2:
        yield (
            f"data: {latents / 2**20:.1f} MiB of latents a clip and up to {text / 2**20:.1f} MiB of text states; "
            f"{latents * 70_000 / 1e9:.0f} GB of latents for the paper's 70,000 clips"
        )
    hours = found.seconds * job.cfg.train.steps / 3600
    yield (
        f"compute: {found.flops / 1e15:,.1f} PFLOP a step; at {cluster.mfu:.0%} MFU of {cluster.peak_tflops:g} TFLOP/s "
        f"on {cluster.world} GPUs {found.seconds:.3g} s a step, {hours:,.1f} h for {job.cfg.train.steps:,} steps: "
        "an estimate, in which recomputation counts as work"
    )
    drawn = ", ".join(f"{phase.name} {phase.drawn / 1e6:.1f} million" for phase in found.phases)
    yield f"normal numbers that the host draws for a micro-batch, ahead of the GPU: {drawn}"
    yield (
        f"while validating: {found.validation / GIB:.1f} GiB per GPU with the averaged student in fp32, and what "
        "sampling and the VAE's decoder need on top"
    )
    for change, then in advised:
        yield f"to change: {change} -> {then.needed_gib:.1f} GiB{', fits' if then.fits else ''}"
    if not found.fits and not (advised and advised[-1][1].fits):
        yield "no change of the configuration is enough: more GPUs (--nodes), or GPUs with more memory"


def as_json(found: Budget, advised: list[tuple[str, Budget]]) -> dict[str, object]:
    """Bytes, FLOPs and seconds as numbers; estimates are named so."""
    job, cluster = found.job, found.cluster
    latents, text = found.clip_bytes()
    return {
        "stage": job.stage,
        "world": cluster.world,
        "assumed": list(job.assumed),
        "parameters": found.counts,
        "bytes": {role: held.as_json() for role, held in found.held.items()},
        "phases": {
            phase.name: {
                "times": phase.times,
                "flops_per_clip": phase.flops,
                "parts": phase.parts,
                "activations": phase.peak,
                "device": found.at(phase),
                "host_normal_numbers": phase.drawn,
            }
            for phase in found.phases
        },
        "device_peak": found.peak,
        "device_while_validating_at_least": found.validation,
        "device_needed_gib_estimate": round(found.needed_gib, 2),
        "fits": found.fits,
        "cache": found.cache_bytes() if job.stage == 3 else 0,
        "host_per_process": found.host,
        "checkpoint": found.checkpoint,
        "disk": found.disk,
        "clip": {"latents": latents, "text_at_most": text},
        "flops_per_step": found.flops,
        "seconds_per_step_estimate": found.seconds,
        "hours_estimate": found.seconds * job.cfg.train.steps / 3600,
        "advice": [
            {"change": change, "gib_estimate": round(then.needed_gib, 2), "fits": then.fits}
            for change, then in advised
        ],
    }


def _roles(found: Budget) -> Table:
    table = Table(
        title=f"stage {found.job.stage} on {found.cluster.world} GPUs: GiB per GPU",
        title_justify="left",
    )
    for column in ("role", "parameters", "engine", *_COLUMNS):
        table.add_column(column, justify="left" if column in ("role", "engine") else "right")
    for role, held in found.held.items():
        sizes = (f"{vars(held)[column] / GIB:.2f}" for column in _COLUMNS)
        if role == TEXT and isinstance(cfg := found.job.cfg, Stage3Config):
            table.add_row(
                role, f"{found.counts[role] / 1e9:.3f} B", f"whole {cfg.text.dtype}", *sizes
            )
            continue
        engine = found.job.engines()[role]
        stage = 3 if role == "teacher" else engine.zero_stage
        kind = "local" if engine.backend == "torch" else f"ZeRO-{stage}"
        words = f"{kind} {engine.dtype}{' offload' if engine.offload else ''}"
        table.add_row(role, f"{found.counts[role] / 1e9:.3f} B", words, *sizes)
    return table


def _phases(found: Budget) -> Table:
    table = Table(title="parts of a step", title_justify="left")
    for column in ("part", "times", "PFLOP a clip", "of it", "activations GiB", "GiB per GPU"):
        table.add_column(column, justify="left" if column in ("part", "of it") else "right")
    for phase in found.phases:
        shares = ", ".join(
            f"{name} {flops / phase.flops:.0%}" for name, flops in phase.parts.items()
        )
        sizes = (f"{size / GIB:.2f}" for size in (phase.peak, found.at(phase)))
        table.add_row(phase.name, str(phase.times), f"{phase.flops / 1e15:.3f}", shares, *sizes)
    return table
