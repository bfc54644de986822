"""Three alternating cycles of distillation, and a stage-2 update, on tiny real models: plain torch
beside every engine.

The reference is torch alone, in one process: ``AdamW``, ``clip_grad_norm_``, sums over
micro-batches. A micro-batch is one prompt with a number of its own; its noise and exit step follow
from that number, so the ranks share the same work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import tiny
import torch
from torch import Tensor, nn

from scd_sf.diffusion.noise import cpu_noise
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.distributed import Ranks
from scd_sf.generation.rollout import rollout
from scd_sf.losses.dmd import DmdConfig, critic_loss, dmd_loss
from scd_sf.losses.flow_matching import FlowMatchingConfig, flow_matching_loss
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.scd.wan import ScdWan
from scd_sf.models.wan.transformer import Wan
from scd_sf.train.base import Engine, EngineConfig, StepModule
from scd_sf.train.engine import build_engine, frozen_engine
from scd_sf.types import Conditioning

CYCLES, CRITIC_TURNS, GLOBAL, FRAMES = 3, 2, 4, 2
CLIP, LR, SMALL_LR, BUCKET = 0.05, 1e-3, 2e-6, 20_000
SAMPLER = FewStepSampler()
LATENT = (FRAMES, tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)
# FlexAttention's least on a GPU
WAN = dataclasses.replace(tiny.CFG, num_layers=3, attention_head_dim=16)
SCD = ScdConfig((0, 1), DecoderConfig((0, 2), "junction", "temporal", "full"), chunk=1)
Update = dict[str, float]


class Trainer(Protocol):
    """What the cycles need of an engine."""

    micro_batches: int
    module: nn.Module

    def __call__(self, *args: Any) -> Any: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self) -> Any: ...
    def fp32_masters(self) -> dict[str, Tensor]: ...


@dataclass
class Info:
    grad_norm: float


@dataclass
class Plain:
    """The reference: one process, torch only."""

    module: nn.Module
    lr: float
    micro_batches: int = GLOBAL
    done: int = 0
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        model = self.module.model if isinstance(self.module, StepModule) else self.module
        self.named = dict(model.named_parameters())
        # Keys' biases have no gradient but rounding noise; eps keeps Adam from dividing noise by
        # noise.
        self.optimizer = torch.optim.AdamW(
            self.named.values(), self.lr, (0.0, 0.99), 1e-5, weight_decay=0.0
        )

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: Tensor) -> None:
        (loss / self.micro_batches).backward()
        self.done += 1

    def step(self) -> Info:
        if self.done < self.micro_batches:
            return Info(0.0)
        norm = nn.utils.clip_grad_norm_(self.named.values(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done = 0
        return Info(float(norm))

    def fp32_masters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.named.items()}


@dataclass(frozen=True)
class Case:
    """Which engines; ``student`` and ``critic`` are ZeRO stages, or "local"."""

    student: int | str
    critic: int | str
    offload_teacher: bool = False
    checkpointing: bool = True
    dtype: Literal["fp32", "bf16"] = "fp32"
    stage2: bool = False
    offload: bool = False
    context_noise: float = 0.05

    @property
    def lr(self) -> float:
        """At stage 3's own rate bf16 weights hardly move."""
        return LR if self.dtype == "fp32" else SMALL_LR

    def __str__(self) -> str:
        parts = [f"student{self.student}", f"critic{self.critic}", self.dtype]
        flags = {
            "offload": self.offload_teacher,
            "checkpointing": self.checkpointing,
            "stage2": self.stage2,
        }
        flags |= {"optimizer_offload": self.offload}
        return "-".join([*parts, *(name for name, on in flags.items() if on)])

    def engine(self, stage: int | str) -> EngineConfig:
        backend: Any = "torch" if stage == "local" else "deepspeed"
        options: dict[str, Any] = (
            {} if stage == "local" else {"zero_stage": stage, "offload": self.offload}
        )
        optimizer: dict[str, Any] = {
            "lr": self.lr,
            "betas": (0.0, 0.99),
            "eps": 1e-5,
            "weight_decay": 0.0,
        }
        return EngineConfig(
            backend, dtype=self.dtype, grad_clip=CLIP, bucket=BUCKET, **optimizer, **options
        )

    def trainer(self, module: nn.Module, stage: int | str, ranks: Ranks) -> Engine:
        return build_engine(
            module, self.engine(stage), ranks, global_batch=GLOBAL, micro_batch=1, total_updates=100
        )


def students(checkpointing: bool) -> nn.Module:
    model = ScdWan(WAN, SCD)
    tiny.redraw(model, 0, torch.float32)
    tiny.set_checkpointing(model, checkpointing)
    return model


def self_rollout(
    model: Any, noise: Tensor, cond: Conditioning, exit_step: int, rng: torch.Generator
) -> Tensor:
    return rollout(model, noise, cond, SAMPLER, cpu_noise(rng), exit_step=exit_step)


def stage2_loss(context_noise: float) -> Callable[..., Tensor]:
    """``context_noise``: 0 where devices are compared, as that noise is drawn where it is used."""
    cfg = FlowMatchingConfig(noise_samples=2, text_dropout=0.5, context_noise=context_noise)

    def loss(model: Any, x_0: Tensor, cond: Conditioning, rng: torch.Generator) -> Tensor:
        null = tiny.prompts(1, 99, torch.float32).to(x_0.device)
        return flow_matching_loss(model, x_0, cond, null, cfg, rng)[0]

    return loss


def numbers(trainer: Trainer, ranks: Ranks) -> Iterator[int]:
    """This rank's micro-batches of an update."""
    return (index * ranks.world + ranks.rank for index in range(trainer.micro_batches))


def one_rollout(
    student: Trainer, seed: int, number: int, device: torch.device
) -> tuple[Tensor, Conditioning]:
    """Micro-batches 0, 1 leave at one step, 2, 3 at another: ranks in lockstep, and two exits in
    each accumulation."""
    cond = tiny.prompts(1, 10 * seed + number, torch.float32).to(device)
    rng = tiny.generator(1000 * seed + number)
    noise = torch.randn((1, *LATENT), generator=rng).to(device)
    return student(noise, cond, (seed + 2 * (number // 2)) % SAMPLER.steps, rng), cond


def update(trainer: Trainer, ranks: Ranks, loss_of: Callable[[int], Tensor]) -> Update:
    total = 0.0
    for number in numbers(trainer, ranks):
        loss = loss_of(number)
        trainer.backward(loss)
        info = trainer.step()
        total += float(loss.detach()) / trainer.micro_batches
    return {**ranks.mean({"loss": total}), "norm": info.grad_norm}


def cycles(student: Trainer, critic: Trainer, teacher: nn.Module, ranks: Ranks) -> list[Update]:
    """Critic updates on rollouts of their own, then the student's: as in stage 3."""
    device = ranks.device
    cfg, negative, history = DmdConfig(), tiny.prompts(1, 98, torch.float32).to(device), []
    for cycle in range(CYCLES):
        for turn in range(CRITIC_TURNS):
            seed = 10 * cycle + turn

            def of_critic(number: int, seed: int = seed) -> Tensor:
                with torch.no_grad():
                    x, cond = one_rollout(student, seed, number, device)
                return critic_loss(critic, x, cond, cfg, tiny.generator(5000 + 10 * seed + number))[
                    0
                ]

            history.append(update(critic, ranks, of_critic))

        def of_student(number: int, seed: int = 10 * cycle + 7) -> Tensor:
            x, cond = one_rollout(student, seed, number, device)
            return dmd_loss(
                x, teacher, critic, cond, negative, cfg, tiny.generator(7000 + 10 * seed + number)
            )[0]

        history.append(update(student, ranks, of_student))
    return history


def stage2(student: Trainer, ranks: Ranks) -> list[Update]:
    def of_student(step: int, number: int) -> Tensor:
        x, cond = (
            tiny.latents(1, FRAMES, 20 * step + number, torch.float32),
            tiny.prompts(1, number, torch.float32),
        )
        return student(
            x.to(ranks.device), cond.to(ranks.device), tiny.generator(900 + 10 * step + number)
        )

    return [update(student, ranks, partial(of_student, step)) for step in range(CYCLES)]


Tensors = dict[str, Tensor]


@dataclass
class Outcome:
    """``history`` per update, the fp32 masters at the end, and how far they went; ``changed``:
    shares of elements."""

    history: list[Update]
    masters: Tensors
    way: Tensor
    changed: dict[str, float]

    @classmethod
    def of(
        cls, history: list[Update], trainers: dict[str, Trainer], starts: dict[str, Tensors]
    ) -> Outcome:
        masters: Tensors = {}
        way, changed = [], {}
        for who, trainer in trainers.items():
            now, before = trainer.fp32_masters(), starts[who]
            masters |= {f"{who}.{name}": tensor for name, tensor in now.items()}
            way += [(now[name] - before[name]).flatten() for name in sorted(now)]
            model = (
                trainer.module.model if isinstance(trainer.module, StepModule) else trainer.module
            )
            live = {
                name: p.detach().cpu()
                for name, p in model.named_parameters()
                if p.shape == before[name].shape
            }
            for kind, values in (("masters", now), ("weights", live)):
                differ = [
                    (value != before[name].to(value.dtype)).flatten()
                    for name, value in values.items()
                ]
                changed[f"{who}.{kind}"] = (
                    float(torch.cat(differ).float().mean()) if differ else 0.0
                )
        return cls(history, masters, torch.cat(way), changed)


def whole(module: nn.Module) -> Tensors:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def reference(lr: float = LR, stage2_only: bool = False, context_noise: float = 0.05) -> Outcome:
    """Plain torch in one process, fp32, without activation checkpointing."""
    alone, model, wan = (
        Ranks(0, 1, 0, torch.device("cpu")),
        students(False),
        tiny.wan(1, torch.float32, WAN),
    )
    starts = {"student": whole(model), "critic": whole(wan)}
    if stage2_only:
        student = Plain(StepModule(model, stage2_loss(context_noise)), lr)
        return Outcome.of(stage2(student, alone), {"student": student}, starts)
    student, critic = Plain(StepModule(model, self_rollout), lr), Plain(wan, lr)
    history = cycles(student, critic, tiny.wan(2, torch.float32, WAN).requires_grad_(False), alone)
    return Outcome.of(history, {"student": student, "critic": critic}, starts)


def run(case: Case, ranks: Ranks) -> Outcome:
    model, wan = students(case.checkpointing), tiny.wan(1, torch.float32, WAN)
    tiny.set_checkpointing(wan, case.checkpointing)
    starts = {"student": whole(model), "critic": whole(wan)}
    if case.stage2:
        student = case.trainer(
            StepModule(model, stage2_loss(case.context_noise)), case.student, ranks
        )
        return Outcome.of(stage2(student, ranks), {"student": student}, starts)
    student = case.trainer(StepModule(model, self_rollout), case.student, ranks)
    critic = case.trainer(wan, case.critic, ranks)
    weights = {
        name: lambda value=value: value
        for name, value in tiny.wan(2, torch.float32, WAN).state_dict().items()
    }
    teacher_cfg = EngineConfig(
        "deepspeed", dtype=case.dtype, offload=case.offload_teacher, bucket=BUCKET
    )
    teacher = frozen_engine(lambda: Wan(WAN), weights, teacher_cfg, ranks)
    return Outcome.of(
        cycles(student, critic, teacher, ranks), {"student": student, "critic": critic}, starts
    )


def worst(values: Iterable[float]) -> float:
    """The largest; NaN where one is, wherever it stands (Python's own ``max`` passes over it)."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def compared(outcome: Outcome, expected: Outcome) -> dict[str, float]:
    """Largest absolute differences, the angle between both ways, and what :class:`Outcome` says of
    the first."""
    pairs = list(zip(outcome.history, expected.history, strict=True))
    result = {key: worst(abs(a[key] - b[key]) for a, b in pairs) for key in ("loss", "norm")}
    names = expected.masters.keys() | outcome.masters.keys()
    result["masters"] = worst(
        float((outcome.masters[n] - expected.masters[n]).abs().max()) for n in names
    )
    result["cosine"] = float(torch.cosine_similarity(outcome.way, expected.way, dim=0))
    return result | outcome.changed | {"least_norm": min(row["norm"] for row in outcome.history)}
