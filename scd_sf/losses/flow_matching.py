"""Teacher-forced flow matching: stage 2 of SCD and the causal baseline, and pretraining of the
bidirectional model.

Paper Eq. 1 and Algorithm 1, supplement Table 6. The loss is the fp32 mean square of the raw
velocity error, weight 1. Letters: B batch, K noisy samples per encoder pass, F latent frames, C H W
latent axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from scd_sf.diffusion.flow import (
    add_noise,
    shift_time,
    shifted_logit_normal,
    shifted_uniform,
    velocity_target,
)
from scd_sf.diffusion.noise import cpu_noise
from scd_sf.models.interface import Corruption, FrameGenerator, Query, check_chunks, pick_chunks
from scd_sf.types import Conditioning, Denoiser, Logs, UserError, check_within, on_device

TIME_BINS, _SUM, _COUNT = 5, "time_sum/", "time_count/"


@dataclass(frozen=True)
class FlowMatchingConfig:
    """The joint flow-matching loss; the defaults are the supplement's Table 6 where it speaks."""

    shift: float = 5.0
    """Timestep shift of the training times."""
    noise_samples: int = 2
    """K: noisy samples of the decoder per clean clip and encoder pass (Table 4)."""
    context_noise: float = 0.05
    """Noise on the context, relative to its root mean square (Table 5); 0: none."""
    text_dropout: float = 0.1
    """Share of clips trained with the empty prompt, for guidance."""
    query_from: float = 0.8
    """Least time of the encoder's noise query, before the shift (SCD on Wan)."""
    query_pure: float = 0.5
    """Share of queries that are pure noise, t = 1 (SCD on Wan)."""
    target_chunks: int | None = None
    """Chunks of a clip that the decoder is trained on, drawn anew each time; null: all."""
    time: Literal["uniform", "logit_normal"] = "uniform"
    """uniform (Algorithm 1), or logit_normal(0, 1) as in the released configuration; then
    shifted."""
    action_dropout: float = 0.1
    """Share of actions replaced by the null action, per frame, in encoder and decoder
    independently."""
    label_dropout: float = 0.1
    """Share of clips whose label is replaced by the null label."""

    def __post_init__(self) -> None:
        shares = ("text_dropout", "query_from", "query_pure", "action_dropout", "label_dropout")
        bounds: dict[str, tuple[float, float]] = {
            **dict.fromkeys(shares, (0, 1)),
            "shift": (1e-3, 1e3),
            "noise_samples": (1, 1000),
            "context_noise": (0, 100),
        }
        check_within(self, bounds, "loss.")
        if self.target_chunks is not None and self.target_chunks < 1:
            raise UserError(
                f"loss.target_chunks is {self.target_chunks}; use a number of chunks >= 1, or null for all"
            )


def drop_text(
    cond: Conditioning, null: Conditioning, rate: float, rng: torch.Generator
) -> Conditioning:
    """Replace whole prompts by the null prompt with probability ``rate`` (for classifier-free
    guidance)."""
    is_dropped = torch.rand(cond.batch, generator=rng) < rate
    text = cond.text_BLE
    keep = on_device(~is_dropped, text.device).reshape(-1, 1, 1)
    return replace(
        cond, text_BLE=torch.where(keep, text, on_device(null.text_BLE, text.device, text.dtype))
    )


def drop_signals(cond: Conditioning, cfg: FlowMatchingConfig, rng: torch.Generator) -> Conditioning:
    """Actions and labels replaced by the null ones; the decoder's actions by draws of their own.
    Without any: none."""

    def with_nulls(x: Tensor, rate: float) -> Tensor:
        return x.masked_fill(on_device(torch.rand(x.shape, generator=rng) < rate, x.device), -1)

    if cond.labels_B is not None:
        cond = replace(cond, labels_B=with_nulls(cond.labels_B, cfg.label_dropout))
    if cond.actions_BF is not None:
        encoder, decoder = (with_nulls(cond.actions_BF, cfg.action_dropout) for _ in range(2))
        cond = replace(cond, actions_BF=encoder, decoder_actions_BF=decoder)
    return cond


def query_times(shape: tuple[int, ...], cfg: FlowMatchingConfig, rng: torch.Generator) -> Tensor:
    """The encoder query's noise level: exactly 1 with probability ``query_pure``, else u in
    [query_from, 1] shifted."""
    u = cfg.query_from + (1 - cfg.query_from) * torch.rand(shape, generator=rng)
    pure = torch.rand(shape, generator=rng) < cfg.query_pure
    return torch.where(pure, torch.ones(()), shift_time(u, cfg.shift))


@dataclass(frozen=True)
class _Draw:
    """What is drawn for a batch: conditions with dropout, K noisy samples x_t (K, B, F, C, H, W) at
    t (K, B, F), the velocity to predict, the encoder's query frames and the contexts' corruption."""

    cond: Conditioning
    x_t: Tensor
    t: Tensor
    velocity: Tensor
    query: Query | None
    corruption: Corruption | None


def _draw(
    generator: FrameGenerator,
    x_0: Tensor,
    cond: Conditioning,
    null: Conditioning,
    cfg: FlowMatchingConfig,
    rng: torch.Generator,
) -> _Draw:
    batch, num_chunks = len(x_0), check_chunks(x_0.shape[1], generator.chunk)
    cond = drop_signals(drop_text(cond, null, cfg.text_dropout, rng), cfg, rng)

    def per_frame(times: Tensor) -> Tensor:
        return on_device(times.repeat_interleave(generator.chunk, -1), x_0.device)

    draw_times = shifted_uniform if cfg.time == "uniform" else shifted_logit_normal
    t = per_frame(draw_times((cfg.noise_samples, batch, num_chunks), cfg.shift, rng))
    eps = cpu_noise(rng)(x_0.expand(cfg.noise_samples, *x_0.shape))
    query = None
    if generator.needs_query:
        t_query = per_frame(query_times((batch, num_chunks), cfg, rng))
        # never eps: the decoder would read the answer off the context
        query_eps = cpu_noise(rng)(x_0)
        query = Query(add_noise(x_0, query_eps, t_query), t_query)
    corruption = Corruption(cfg.context_noise, rng) if cfg.context_noise else None
    x_K = x_0.unsqueeze(0)
    x_t, velocity = add_noise(x_K, eps, t), velocity_target(x_K, eps)
    return _Draw(cond, x_t, t, velocity, query, corruption)


def _squared_errors(
    generator: FrameGenerator, x_0: Tensor, draw: _Draw, targets: Sequence[int]
) -> Tensor:
    """Squared errors of the target chunks' velocities, (K, B, M * n, C, H, W), fp32."""
    velocity = generator.teacher_forced(
        draw.x_t,
        draw.t,
        x_0,
        draw.cond,
        query=draw.query,
        corruption=draw.corruption,
        targets=targets,
    )
    target = pick_chunks(draw.velocity, targets, generator.chunk, 2)
    return (velocity.float() - target.float()).pow(2)


def flow_matching_loss(
    generator: FrameGenerator,
    x_0: Tensor,
    cond: Conditioning,
    null: Conditioning,
    cfg: FlowMatchingConfig,
    rng: torch.Generator,
) -> tuple[Tensor, Logs]:
    """x_0 (B, F, C, H, W) clean latents -> (scalar fp32 loss, logs). One time per chunk and noisy
    sample. ``null``: the empty prompt (one row) that text dropout puts in a prompt's place.

    The logs are the loss, and sums by time for :func:`loss_by_time`, so that micro-batches and
    ranks may be added up.
    """
    num_chunks = check_chunks(x_0.shape[1], generator.chunk)
    targets = list(range(num_chunks))
    if cfg.target_chunks is not None and cfg.target_chunks < num_chunks:
        targets = sorted(torch.randperm(num_chunks, generator=rng)[: cfg.target_chunks].tolist())
    draw = _draw(generator, x_0, cond, null, cfg, rng)
    squares = _squared_errors(generator, x_0, draw, targets)
    loss = squares.mean()
    with torch.no_grad():
        errors = squares.mean(dim=(-3, -2, -1))
        times = pick_chunks(draw.t, targets, generator.chunk, 2)
    return loss, {"loss": float(loss.detach()), **_by_time(errors, times)}


@torch.no_grad()
def validation_loss(
    generator: FrameGenerator,
    x_0: Tensor,
    cond: Conditioning,
    null: Conditioning,
    cfg: FlowMatchingConfig,
    rng: torch.Generator,
) -> Tensor:
    """The loss of all chunks of x_0 (B, F, C, H, W), scalar fp32: ``cfg.target_chunks`` of them at
    a time, so that no sequence is longer than in training. Query of pure noise as in sampling; no
    dropout, no corruption, K = 2."""
    plain_cfg = replace(
        cfg,
        noise_samples=2,
        context_noise=0.0,
        query_pure=1.0,
        text_dropout=0.0,
        action_dropout=0.0,
        label_dropout=0.0,
    )
    num_chunks = check_chunks(x_0.shape[1], generator.chunk)
    draw = _draw(generator, x_0, cond, null, plain_cfg, rng)
    size = min(cfg.target_chunks or num_chunks, num_chunks)
    parts = []
    for first in range(0, num_chunks, size):
        # the last group has the same size; chunks of the group before it are left out
        start = min(first, num_chunks - size)
        squares = _squared_errors(generator, x_0, draw, range(start, start + size))
        parts.append(squares[:, :, (first - start) * generator.chunk :])
    return torch.cat(parts, 2).mean()


def _by_time(errors: Tensor, t: Tensor) -> Logs:
    """Number of frames, and sum of their errors, in each of TIME_BINS equal parts of [0, 1]."""
    index = (t * TIME_BINS).long().clamp(max=TIME_BINS - 1).flatten()
    table = torch.zeros(2, TIME_BINS, dtype=torch.float64, device=t.device)
    table[0].index_add_(0, index, errors.flatten().double())
    table[1].index_add_(0, index, torch.ones_like(index, dtype=torch.float64))
    sums, counts = table.tolist()
    return {f"{_SUM}{i}": sums[i] for i in range(TIME_BINS)} | {
        f"{_COUNT}{i}": counts[i] for i in range(TIME_BINS)
    }


def loss_by_time(logs: Logs) -> Logs:
    """The logs of one update, added up or averaged, with mean losses by time ("loss/t0.8-1.0") in
    place of the sums."""
    means = {name: value for name, value in logs.items() if not name.startswith((_SUM, _COUNT))}
    for i in range(TIME_BINS):
        if logs[f"{_COUNT}{i}"]:
            means[f"loss/t{i / TIME_BINS:.1f}-{(i + 1) / TIME_BINS:.1f}"] = (
                logs[f"{_SUM}{i}"] / logs[f"{_COUNT}{i}"]
            )
    return means


def denoiser_flow_loss(
    denoiser: Denoiser, x_0: Tensor, cond: Conditioning, t: Tensor, rng: torch.Generator
) -> Tensor:
    """Flow loss of a bidirectional model (teacher pretraining, critic): one t (B,) per clip. Scalar
    fp32."""
    eps = cpu_noise(rng)(x_0)
    velocity = denoiser(add_noise(x_0, eps, t), t, cond)
    return (velocity.float() - velocity_target(x_0, eps).float()).pow(2).mean()
