"""What a training step costs: stage 2 by number of noisy samples and by what is recomputed, stage 3
by part.

    python benchmarks/train_step.py --out docs/results/train_step.json

Wan 1.3B's layers at their real width (1536, 12 heads, FFN 8960), but fewer: SCD with 5 encoder and
2 decoder layers, in the full model's proportion of 25 : 10; teacher and critic of 6 layers. Random
weights, batch 1, 96 tokens a frame; a step is forward and backward without the optimizer. Cases
take turns. Per case: median seconds, and their ratio to the floor (all its matmul and attention
calls, timed alone after each round). For the cycle of stage 3 (``ratio`` critic updates and one of
the student): the shares of rollout, critic, teacher and the student's backward pass.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from scd_sf.config import HelpFormatter
from scd_sf.diffusion.guidance import guide, guided
from scd_sf.diffusion.noise import cpu_noise
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.distributed import keep_freed_memory
from scd_sf.evaluation.bench import in_rounds, random_weights
from scd_sf.evaluation.roofline import peak_gib
from scd_sf.files import write_json
from scd_sf.generation.rollout import rollout
from scd_sf.losses.dmd import DmdConfig, critic_loss, dmd_loss
from scd_sf.losses.flow_matching import FlowMatchingConfig, flow_matching_loss
from scd_sf.models.build import ModelConfig, Student, build_model, set_checkpointing
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.wan.transformer import Wan, WanConfig
from scd_sf.tensor_files import dtype_of
from scd_sf.types import Conditioning, Denoiser, exit_on_user_error

CFG = WanConfig(num_layers=6)
SCD = ScdConfig(tuple(range(5)), DecoderConfig((0, 5)))
LATENT, TEXT_TOKENS = (16, 16, 24), 64
COND = Conditioning(
    torch.randn(1, TEXT_TOKENS, CFG.text_dim, generator=torch.Generator().manual_seed(0))
)


def random_model(config: ModelConfig, dtype: torch.dtype) -> Student | Wan:
    """A model with random weights of ``dtype``."""
    with torch.device("meta"):
        model = build_model(config)
    random_weights(model, dtype)
    return model


def rng() -> torch.Generator:
    """A generator that always starts from the same seed."""
    return torch.Generator().manual_seed(1)


def backward(model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    model.zero_grad(set_to_none=True)


class Parts:
    """Seconds by part of every run of a step."""

    def __init__(self) -> None:
        self.runs: list[defaultdict[str, float]] = []

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the seconds of the block to ``part`` of the newest run."""
        started = time.perf_counter()
        yield
        self.runs[-1][part] += time.perf_counter() - started

    def timed(self, part: str, model: Denoiser) -> Denoiser:
        """``model``, its calls timed as ``part``."""

        def call(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            with self.timing(part):
                return model(x_t, t, cond)

        return call

    def shares(self) -> dict[str, float]:
        """Each part's share of the seconds of all runs but the first, which warms up."""
        seconds = {part: sum(run[part] for run in self.runs[1:]) for part in self.runs[0]}
        return {part: round(value / sum(seconds.values()), 3) for part, value in seconds.items()}


def stage2(
    model: Student, x: Tensor, samples: int, *, recompute: str = "nothing"
) -> Callable[[], None]:
    """The forward and backward pass of stage 2. ``recompute``: "nothing", "everything" (activation
    checkpointing), or "all but attention"."""

    def run() -> None:
        set_checkpointing(model.trunks(), recompute != "nothing", recompute == "everything")
        loss, _ = flow_matching_loss(
            model, x, COND, COND, FlowMatchingConfig(noise_samples=samples), rng()
        )
        backward(model, loss)

    return run


def cycle(
    student: Student,
    teacher: Wan,
    critic: Wan,
    x: Tensor,
    parts: Parts,
    *,
    ratio: int,
    shared: bool,
) -> Callable[[], None]:
    """``ratio`` critic updates and one of the student, exit step 3 of 4. ``shared``: the critic
    learns from the student's rollout (``critic_data: student``) instead of rollouts of its own."""
    cfg = DmdConfig()

    def self_rollout() -> Tensor:
        noise = torch.randn(x.shape, generator=rng())
        return rollout(student, noise, COND, FewStepSampler(), cpu_noise(rng()), exit_step=2)

    def critic_update(fake: Tensor) -> None:
        with parts.timing("critic"):
            backward(critic, critic_loss(critic, fake, COND, cfg, rng())[0])

    def run() -> None:
        parts.runs.append(defaultdict(float))
        set_checkpointing(student.trunks(), False)
        for _ in range(0 if shared else ratio):
            with parts.timing("rollout"), torch.no_grad():
                fake = self_rollout()
            critic_update(fake)
        with parts.timing("rollout"):
            student_clip = self_rollout()
        timed_teacher, timed_critic = parts.timed("teacher", teacher), parts.timed("critic", critic)
        loss, _ = dmd_loss(student_clip, timed_teacher, timed_critic, COND, COND, cfg, rng())
        with parts.timing("student's backward"):
            backward(student, loss)
        for _ in range(ratio if shared else 0):
            critic_update(student_clip.detach())

    return run


def guided_teacher(teacher: Wan, x: Tensor, *, in_one_batch: bool) -> Callable[[], None]:
    """The guided teacher on one clip. ``in_one_batch``: both branches in one batch, as ``dmd_loss``
    calls it; else one after the other."""
    t = torch.full((1,), 0.7)

    @torch.no_grad()
    def run() -> None:
        if in_one_batch:
            guided(teacher, COND, 4.0)(x, t, COND)
        else:
            guide(teacher(x, t, COND), teacher(x, t, COND), 4.0)

    return run


def cases(
    dtype: torch.dtype, frames: int, ratio: int
) -> tuple[dict[str, Callable[[], None]], dict[str, Parts]]:
    """Steps by name, and the timed parts of the cycles of stage 3, by the same names."""
    x = torch.randn(1, frames, *LATENT, generator=rng())
    scd = random_model(ModelConfig(wan=CFG, scd=SCD), dtype)
    causal = random_model(ModelConfig("causal", wan=CFG), dtype)
    teacher, critic = (random_model(ModelConfig("wan", wan=CFG), dtype) for _ in range(2))
    assert not isinstance(scd, Wan) and not isinstance(causal, Wan)
    assert isinstance(teacher, Wan) and isinstance(critic, Wan)
    teacher.requires_grad_(False)
    steps = {f"stage 2, SCD, K = {k}": stage2(scd, x, k) for k in (1, 2, 4)}
    for label, recompute in (
        ("everything recomputed", "everything"),
        ("attention kept", "all but attention"),
    ):
        steps[f"stage 2, SCD, K = 2, {label}"] = stage2(scd, x, 2, recompute=recompute)
    steps["stage 2, causal, K = 1"] = stage2(causal, x, 1)
    parts = {}
    for shared in (False, True):
        name = f"stage 3, cycle of {ratio} : 1" + (", one rollout shared" if shared else "")
        parts[name] = Parts()
        steps[name] = cycle(scd, teacher, critic, x, parts[name], ratio=ratio, shared=shared)
    for in_one_batch in (True, False):
        steps[f"guided teacher, {'one batch' if in_one_batch else 'two calls'}"] = guided_teacher(
            teacher, x, in_one_batch=in_one_batch
        )
    return steps, parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON with one entry per case")
    parser.add_argument("--frames", type=int, default=6, help="latent frames of the clip")
    parser.add_argument("--rounds", type=int, default=3, help="steps of every case")
    parser.add_argument("--ratio", type=int, default=5, help="critic updates per student update")
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="bf16 is slow without AVX-512 bf16",
    )
    args = parser.parse_args()
    keep_freed_memory()
    steps, parts = cases(dtype_of(args.dtype), args.frames, args.ratio)
    selection = {name: step for name, step in steps.items() if args.only in name}
    if not selection:
        parser.error(f"--only {args.only}: no case has it in its name")
    rows = in_rounds(selection, args.rounds, floor=True)
    for row in rows:
        if row["name"] in parts:
            row["shares"] = parts[str(row["name"])].shares()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {args.dtype}"
    settings = {
        "machine": machine,
        "torch": str(torch.__version__),
        "frames": args.frames,
        "rounds": args.rounds,
        # of the whole process, which keeps freed memory for the next case
        "peak_rss_gib": round(peak_gib(), 2),
    }
    write_json(args.out, {**settings, "rows": rows})


if __name__ == "__main__":
    exit_on_user_error(main)
