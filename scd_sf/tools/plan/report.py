"""A budget as tables and sentences, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from scd_sf.tools.plan.advice import Advice, command_line
from scd_sf.tools.plan.budget import CONTEXT_GIB, GIB, SLACK, TABLES_GIB, TEXT, Budget
from scd_sf.tools.stage_configs import Stage3Config

_COLUMNS = ("weights", "masters", "moments", "average", "accumulated", "buffers", "update")


def print_budget(console: Console, budget: Budget, changes: list[Advice]) -> None:
    """Print the tables of roles and phases, then the sums. ``changes``: from
    :func:`scd_sf.tools.plan.advice.advice`."""
    console.print(
        Group(_roles(budget), _phases(budget), *(Text(line) for line in lines(budget, changes)))
    )


def lines(budget: Budget, changes: list[Advice]) -> Iterator[str]:
    """The sums, one sentence each."""
    job, cluster = budget.job, budget.cluster
    latents, text = budget.clip_bytes()
    yield from (f"assumed: {line}" for line in job.assumptions)
    yield (
        f"per GPU: {budget.peak / GIB:.1f} GiB at the worst moment; with {TABLES_GIB:g} GiB of tables, {SLACK:.0%} "
        f"of allocator slack and {CONTEXT_GIB} GiB of CUDA (estimates) {budget.needed_gib:.1f} of "
        f"{cluster.gpu_mem:g} GiB: {_fits(budget.gpu_fits)}"
    )
    if job.stage == 3:
        yield f"of these the rollout's K/V: {budget.cache_bytes() / GIB:.2f} GiB per GPU"
    if TEXT in budget.memory:
        yield (
            f"of these the text encoder: {budget.memory[TEXT].weights / GIB:.1f} GiB on every GPU, as the prompts are "
            "a list; prompts that were encoded before (data_prep/encode_prompts.py) need none"
        )
    of_node = f" of {cluster.host_mem:g} GiB: {_fits(budget.host_fits)}" if cluster.host_mem else ""
    yield (
        f"host memory (an estimate): {budget.host / GIB:.1f} GiB per process while starting or saving, "
        f"{budget.node_host / GIB:.1f} per node{of_node}"
    )
    keep = job.cfg.train.keep
    yield (
        f"checkpoints: {budget.checkpoint / GIB:.1f} GiB each; {budget.disk / GIB:.0f} GiB for {keep} and the next one"
    )
    if job.stage == 2:
        yield (
            f"data: {latents / 2**20:.1f} MiB of latents a clip and up to {text / 2**20:.1f} MiB of text states; "
            f"{latents * 70_000 / 1e9:.0f} GB of latents for the paper's 70,000 clips"
        )
    hours = budget.seconds * job.cfg.train.steps / 3600
    yield (
        f"compute: {budget.flops / 1e15:,.1f} PFLOP a step; at {cluster.mfu:.0%} MFU of {cluster.peak_tflops:g} "
        f"TFLOP/s on {cluster.world} GPUs {budget.seconds:.3g} s a step, {hours:,.1f} h for "
        f"{job.cfg.train.steps:,} steps: an estimate, in which recomputation counts as work"
    )
    normals = ", ".join(
        f"{phase.name} {phase.host_normals / 1e6:.1f} million" for phase in budget.phases
    )
    yield f"normal numbers that the host draws for a micro-batch, ahead of the GPU: {normals}"
    yield (
        f"while validating: {budget.validation / GIB:.1f} GiB per GPU with the averaged student in fp32, and what "
        "sampling and the VAE's decoder need on top"
    )
    for step in changes:
        host = f", {step.plan.node_host / GIB:.1f} per node" if cluster.host_mem else ""
        fits = ", fits" if step.plan.fits else ""
        yield f"to change: {step.change.text} -> {step.plan.needed_gib:.1f} GiB{host}{fits}"
    if changes and (best := changes[-1].plan).fits:
        yield f"all of it, to copy: {command_line(changes)}"
        yield (
            f"with it {best.needed_gib:.1f} of {cluster.gpu_mem:g} GiB, {best.host / GIB:.0f} GiB of host memory per "
            f"process, {best.seconds * job.cfg.train.steps / 3600:,.1f} h (an estimate)"
        )
    elif not budget.fits:
        kind = "GPUs" if budget.host_fits else "machines"
        yield f"no change of the configuration is enough: more GPUs (--nodes), or {kind} with more memory"


def _fits(fits: bool) -> str:
    return "fits" if fits else "DOES NOT FIT"


def as_json(budget: Budget, changes: list[Advice]) -> dict[str, object]:
    """A budget as JSON values in bytes, FLOPs and seconds. Keys of estimates end in
    ``estimate``."""
    job, cluster = budget.job, budget.cluster
    latents, text = budget.clip_bytes()
    return {
        "stage": job.stage,
        "world": cluster.world,
        "assumed": list(job.assumptions),
        "parameters": budget.counts,
        "bytes": {role: memory.as_json() for role, memory in budget.memory.items()},
        "phases": {
            phase.name: {
                "times": phase.times,
                "flops_per_clip": phase.flops,
                "parts": phase.parts,
                "activations": phase.peak,
                "device": budget.at(phase),
                "host_normal_numbers": phase.host_normals,
            }
            for phase in budget.phases
        },
        "device_peak": budget.peak,
        "device_while_validating_at_least": budget.validation,
        "device_needed_gib_estimate": round(budget.needed_gib, 2),
        "fits": budget.fits,
        "cache": budget.cache_bytes() if job.stage == 3 else 0,
        "host_per_process": budget.host,
        "host_per_node": budget.node_host,
        "host_fits": budget.host_fits if cluster.host_mem else None,
        "checkpoint": budget.checkpoint,
        "disk": budget.disk,
        "clip": {"latents": latents, "text_at_most": text},
        "flops_per_step": budget.flops,
        "seconds_per_step_estimate": budget.seconds,
        "hours_estimate": budget.seconds * job.cfg.train.steps / 3600,
        "advice": [
            {
                "change": step.change.text,
                "overrides": list(step.change.overrides),
                "gib_estimate": round(step.plan.needed_gib, 2),
                "fits": step.plan.fits,
            }
            for step in changes
        ],
    }


def _roles(budget: Budget) -> Table:
    table = Table(
        title=f"stage {budget.job.stage} on {budget.cluster.world} GPUs: GiB per GPU",
        title_justify="left",
    )
    for column in ("role", "parameters", "engine", *_COLUMNS):
        table.add_column(column, justify="left" if column in ("role", "engine") else "right")
    for role, memory in budget.memory.items():
        sizes = (f"{vars(memory)[column] / GIB:.2f}" for column in _COLUMNS)
        if role == TEXT and isinstance(cfg := budget.job.cfg, Stage3Config):
            table.add_row(
                role, f"{budget.counts[role] / 1e9:.3f} B", f"whole {cfg.text.dtype}", *sizes
            )
            continue
        engine = budget.job.engines()[role]
        stage = 3 if role == "teacher" else engine.zero_stage
        kind = "torch" if engine.backend == "torch" else f"ZeRO-{stage}"
        words = f"{kind} {engine.dtype}{' offload' if engine.offload else ''}"
        table.add_row(role, f"{budget.counts[role] / 1e9:.3f} B", words, *sizes)
    return table


def _phases(budget: Budget) -> Table:
    table = Table(title="parts of a step", title_justify="left")
    for column in ("part", "times", "PFLOP a clip", "of it", "activations GiB", "GiB per GPU"):
        table.add_column(column, justify="left" if column in ("part", "of it") else "right")
    for phase in budget.phases:
        shares = ", ".join(
            f"{name} {flops / phase.flops:.0%}" for name, flops in phase.parts.items()
        )
        sizes = (f"{size / GIB:.2f}" for size in (phase.peak, budget.at(phase)))
        table.add_row(phase.name, str(phase.times), f"{phase.flops / 1e15:.3f}", shares, *sizes)
    return table
