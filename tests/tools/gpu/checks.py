"""Every path at tiny size on a device against the CPU. Plain functions: `make gpu` runs them where
pytest is not.

    python tests/tools/gpu/checks.py OUT.json cpu|cuda NAME ..

A check returns what differed and by how much, and the most that it may: {what: (value, limit)}. On
the CPU the device is compared with itself, or with a form of the same computation that the GPU does
not use.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # tests/, where it is no path of pytest's

import tiny
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from torch import Tensor
from train import distillation
from train.distillation import Case, worst

from scd_sf.diffusion.noise import cpu_noise, generator, local_noise
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.distributed import Ranks, ensure_process_group, init_distributed
from scd_sf.generation.compile import CompileConfig, compile_steps
from scd_sf.generation.generate import clips_of, generate_latents
from scd_sf.generation.rollout import stream_rollout
from scd_sf.models.build import Student
from scd_sf.models.causal import Causal
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.scd.wan import ScdWan
from scd_sf.models.wan.transformer import WanConfig
from scd_sf.models.wan.vae import Vae, VaeStream
from scd_sf.nn.attention import FullSequence
from scd_sf.nn.masks import Layout, dense_mask, teacher_forcing_mask
from scd_sf.train.base import Engine, StepModule

Differences = dict[str, tuple[float, float]]
Check = Callable[[Ranks], Differences]
CPU = torch.device("cpu")
STUDENTS = {
    "SCD delta": ("delta", 1, "identical", "full"),
    "SCD paper": ("paper", 1, "temporal", "full"),
    "SCD junction cached, chunks of 3": ("junction", 3, "identical", "cached"),
    "causal": ("", 1, "", ""),
    "causal, chunks of 3": ("", 3, "", ""),
}
EXACT, FP32, BF16 = 0.0, 1e-4, 0.1


def distance(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference, relative to the other's largest entry where that is above
    1."""
    return float(
        (one.cpu().float() - other.cpu().float()).abs().max() / other.abs().max().clamp(min=1).cpu()
    )


# ----------------------------------------------------------------------------------------- training


def steps(case: Case) -> Check:
    """Three updates of stage 2, or cycles of stage 3, through an engine, against plain torch on the
    CPU."""

    def check(ranks: Ranks) -> Differences:
        expected = distillation.reference(case.lr, case.stage2, case.context_noise)
        found = distillation.compared(distillation.run(case, ranks), expected)
        if case.dtype == "bf16":
            return {
                "loss": (found["loss"], BF16),
                "1 - cosine of the way": (1 - found["cosine"], 0.1),
            }
        return {name: (found[name], FP32) for name in ("loss", "norm", "masters")}

    return check


def resume(case: Case) -> Check:
    """Two updates, saved, loaded by a fresh engine: the third is the same to the last bit."""

    def check(ranks: Ranks) -> Differences:
        def engine() -> Engine:
            module = StepModule(distillation.students(True), distillation.stage2_loss(0.0))
            return case.trainer(module, case.student, ranks)

        def turn(one: Engine, number: int) -> None:
            for micro in range(one.micro_batches):
                x = tiny.latents(1, distillation.FRAMES, 20 * number + micro, torch.float32).to(
                    ranks.device
                )
                cond = tiny.prompts(1, micro, torch.float32).to(ranks.device)
                one.backward(one(x, cond, tiny.generator(10 * number + micro)))
                one.step()

        whole, fresh = engine(), engine()
        for number in range(2):
            turn(whole, number)
        with tempfile.TemporaryDirectory() as folder:
            whole.state().write(Path(folder, "state"))
            fresh.load(Path(folder, "state"))
        turn(whole, 2)
        turn(fresh, 2)
        masters = fresh.fp32_masters()
        return {
            "masters": (
                worst(distance(masters[n], value) for n, value in whole.fp32_masters().items()),
                EXACT,
            )
        }

    return check


def collectives(ranks: Ranks) -> Differences:
    """NCCL (gloo on a CPU) with one rank: the backend that was chosen, and what it returns."""
    ensure_process_group(ranks)
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    x = torch.arange(1000.0, device=ranks.device)
    total, parts = x.clone(), torch.empty_like(x)
    dist.all_reduce(total)
    dist.broadcast(total, src=0)
    dist.all_gather_into_tensor(parts, total)
    dist.barrier()
    return {
        "sums": (distance(parts, x), EXACT),
        "another backend": (float(dist.get_backend() != backend), EXACT),
    }


# ---------------------------------------------------------------------------------------- attention


def teacher_forcing(dtype: torch.dtype) -> Check:
    """The mask of stage 2 as the device runs it (FlexAttention on CUDA, rows on a CPU) against the
    dense mask on the CPU: outputs and gradients, groups that cross blocks and ragged ends."""

    def check(ranks: Ranks) -> Differences:
        found: Differences = {}
        for targets, tokens in (([0, 1, 2, 3], 100), ([3, 1], 128), ([2], 31)):
            layout = Layout.teacher_forced(4, targets, 2, tokens)
            length = len(layout.kinds) * tokens
            rng = torch.Generator().manual_seed(tokens)
            q, k, v, up = (torch.randn(1, 2, length, 64, generator=rng) for _ in range(4))
            dense = attend(FullSequence(dense_mask(layout, CPU)), q, k, v, up)
            mask = (
                layout if ranks.device.type == "cpu" else teacher_forcing_mask(layout, ranks.device)
            )
            own = attend(FullSequence(mask), *(x.to(ranks.device, dtype) for x in (q, k, v, up)))
            limit = FP32 if dtype == torch.float32 else 0.05
            for name, one, other in zip(("output", "dq", "dk", "dv"), own, dense, strict=True):
                found[name] = (worst((distance(one, other), found.get(name, (0.0, 0.0))[0])), limit)
        return found

    return check


def attend(context: FullSequence, q: Tensor, k: Tensor, v: Tensor, up: Tensor) -> list[Tensor]:
    """The output, and the gradients for ``up``."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = context(0, *leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, up)]


# ----------------------------------------------------------------------------------------- sampling


def student(name: str) -> Student:
    """Two blocks in every part: compiling is slow."""
    fusion, chunk, rope, prefix = STUDENTS[name]
    cfg = WanConfig(2, 16, tiny.CHANNELS, tiny.CHANNELS, tiny.TEXT, 16, 32, 2)
    model: Student = Causal(cfg, chunk)
    if fusion:
        decoder = DecoderConfig((0, 1), fusion, rope, prefix, None if fusion == "paper" else 1)
        model = ScdWan(cfg, ScdConfig((0, 1), decoder, chunk))
    tiny.redraw(model, 0, torch.float32)
    return model.requires_grad_(False)


def video(model: Student, device: torch.device, *, window: int = 0) -> Tensor:
    """Six chunks by four steps as they are sampled; ``window``: one that fills and turns."""
    cond = tiny.prompts(1, dtype=torch.float32).to(device)
    shape = (6 * model.chunk, tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)
    return clips_of(
        generate_latents(
            model, cond, [1], shape, FewStepSampler(), window=window, sink=1 if window else 0
        )
    )


def sampling(mode: str) -> Check:
    """Every student, the whole history and a window, against eager on the CPU; twice, as graphs are
    replayed."""

    def check(ranks: Ranks) -> Differences:
        found: Differences = {}
        cfg = CompileConfig(enabled=mode != "eager", cuda_graphs=mode == "graphs")
        for name in STUDENTS:
            if mode != "eager" and (
                name.endswith("3") or (ranks.device.type == "cpu" and name != "SCD delta")
            ):
                # the same code at another length; on a CPU others are
                # tests/generation/test_compile.py's
                continue
            model = student(name)
            expected = {window: video(model, CPU, window=window) for window in (0, 3 * model.chunk)}
            model.to(ranks.device)
            graphs = cfg.cuda_graphs and ranks.device.type == "cuda"
            compile_steps(model, replace(cfg, cuda_graphs=graphs), ranks.device)
            for window, wanted in expected.items():
                for _ in range(2):
                    value = distance(video(model, ranks.device, window=window), wanted)
                    found[name] = (worst((value, found.get(name, (0.0, 0.0))[0])), FP32)
            torch._dynamo.reset()
        return found

    return check


@torch.no_grad()
def nothing_waits(ranks: Ranks) -> Differences:
    """The rollout's steps: on CUDA one that reads a value back from the device is an error (torch's
    debug mode)."""
    found: Differences = {}
    for name in STUDENTS:
        model = student(name)

        def rolled(device: torch.device, model: Student = model) -> Tensor:
            shape = (1, 6 * model.chunk, tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)
            noise = torch.randn(shape, generator=tiny.generator(1)).to(device)
            cond = tiny.prompts(1, dtype=torch.float32).to(device)
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            chunks = list(
                stream_rollout(model, noise, cond, FewStepSampler(), cpu_noise(tiny.generator(2)))
            )
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            return torch.cat(chunks, 1)

        expected = rolled(CPU)
        model.to(ranks.device)
        found[name] = (distance(rolled(ranks.device), expected), FP32)
    return found


@torch.no_grad()
def vae_stream(ranks: Ranks) -> Differences:
    """Encoding, decoding, and decoding frame by frame."""
    torch.manual_seed(0)
    kwargs = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    zeros, ones = [0.0] * 4, [1.0] * 4
    model = AutoencoderKLWan(
        **kwargs, temperal_downsample=[False, True, True], latents_mean=zeros, latents_std=ones
    )
    pixels = torch.rand(1, 9, 3, 32, 32, generator=tiny.generator(1)) * 2 - 1
    vae = Vae(model)
    latents = vae.encode(pixels)
    whole = vae.decode(latents)
    own = Vae(model.to(ranks.device))
    moved = latents.to(ranks.device)
    stream = VaeStream(own)
    pushed = torch.cat([stream.push(frame) for frame in moved.split(1, 1)], 1)
    return {
        "latents": (distance(own.encode(pixels), latents), FP32),
        "pixels": (distance(own.decode(moved), whole), FP32),
        "pixels frame by frame": (distance(pushed, whole), FP32),
    }


def noise(ranks: Ranks) -> Differences:
    """What is drawn on the device depends on its place in the training alone, and is standard
    normal."""
    x = torch.empty(64, 1024, device=ranks.device)
    first, again, other = (local_noise(x, generator(0, "step", n)) for n in (1, 1, 2))
    return {
        "same place": (distance(first, again), EXACT),
        "std - 1": (abs(float(first.std()) - 1), 0.02),
        "correlation with another place": (abs(float((first * other).mean())), 0.02),
    }


# --------------------------------------------------------------------------------------------- list

STAGE3 = {
    "local": Case("local", "local", context_noise=0.0),
    "ZeRO-2": Case(2, 2, context_noise=0.0),
    "ZeRO-3": Case(3, 2, context_noise=0.0),
    "all offloaded": Case(2, 2, offload=True, offload_teacher=True, context_noise=0.0),
    "ZeRO-2, bf16": Case(2, 2, dtype="bf16", context_noise=0.0),
}
STAGE2 = {name: replace(case, stage2=True) for name, case in STAGE3.items()}
STAGE2["ZeRO-3, offloaded"] = Case(3, 2, stage2=True, offload=True, context_noise=0.0)
CHECKS: dict[str, Check] = {
    "FlexAttention, fp32": teacher_forcing(torch.float32),
    "FlexAttention, bf16": teacher_forcing(torch.bfloat16),
    "sampling, eager": sampling("eager"),
    "sampling, nothing waits for the device": nothing_waits,
    "VAE, streamed": vae_stream,
    "NCCL, one rank": collectives,
    **{f"stage 2, {name}": steps(case) for name, case in STAGE2.items()},
    **{f"stage 3, {name}": steps(case) for name, case in STAGE3.items()},
    "resume, local": resume(Case("local", "local", stage2=True)),
    "resume, ZeRO-2, bf16": resume(Case(2, 2, dtype="bf16", stage2=True)),
    "resume, ZeRO-3, offloaded": resume(Case(3, 2, stage2=True, offload=True)),
    "sampling, graphs": sampling("graphs"),
    "sampling, compiled": sampling("compiled"),
    "noise": noise,
}


def compared(name: str, ranks: Ranks) -> Differences:
    """One check, with exact fp32 convolutions and matmuls on a GPU."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if ranks.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")  # a check before may have been left by an error
    return CHECKS[name](ranks)


def main() -> None:
    """For the tests: checks by name, in a process of their own, because a process group and a
    compiler remain."""
    out, device, *names = sys.argv[1:]
    ranks = init_distributed()
    assert ranks.device.type == device, f"asked for {device}, here is {ranks.device}"
    Path(out).write_text(json.dumps({name: compared(name, ranks) for name in names}))


if __name__ == "__main__":
    main()
