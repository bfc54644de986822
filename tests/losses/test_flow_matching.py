"""The stage 2 loss against its definition, sample by sample, with a generator that writes down what
it was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from scd_sf.diffusion.flow import add_noise, shift_time
from scd_sf.losses.flow_matching import (
    FlowMatchingConfig,
    denoiser_flow_loss,
    drop_text,
    flow_matching_loss,
    loss_by_time,
    query_times,
    validation_loss,
)
from scd_sf.models.interface import Corruption, Query, pick_chunks
from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.nn.masks import Layout, teacher_forcing_mask
from scd_sf.types import Conditioning, Logs, UserError

PLAIN = FlowMatchingConfig(context_noise=0.0, text_dropout=0.0)


@dataclass
class Recorder:
    """A FrameGenerator whose velocity is zero, so that the loss is the mean square of the
    target."""

    chunk: int = 1
    dtype: torch.dtype = torch.float32
    needs_query: bool = True
    seen: dict[str, Any] = field(default_factory=dict)

    def teacher_forced(
        self,
        x_t: Tensor,
        t: Tensor,
        x_clean: Tensor,
        cond: Conditioning,
        *,
        query: Query | None = None,
        corruption: Corruption | None = None,
        targets: Sequence[int] | None = None,
    ) -> Tensor:
        self.seen = {
            "x_t": x_t,
            "t": t,
            "x_clean": x_clean,
            "cond": cond,
            "query": query,
            "corruption": corruption,
            "targets": targets,
        }
        return torch.zeros_like(
            pick_chunks(x_t, list(targets or []), self.chunk, 2), dtype=self.dtype
        )

    def start(
        self, cond: Conditioning, latent_size: tuple[int, int], cache: CacheConfig | None = None
    ) -> Any:
        raise AssertionError("stage 2 does not stream")

    def switch(self, stream: Any, cond: Conditioning) -> Any:
        raise AssertionError("stage 2 does not stream")

    def advance(self, stream: Any, x_0: Tensor | None, query_noise: Tensor) -> Any:
        raise AssertionError("stage 2 does not stream")

    def denoise(self, stream: Any, x_t: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("stage 2 does not stream")


def record(
    cfg: FlowMatchingConfig, chunk: int = 1, frames: int = 6, seed: int = 0
) -> tuple[Recorder, Tensor, Tensor]:
    model, x_0 = Recorder(chunk), tiny.latents(2, frames, dtype=torch.float32)
    cond, null = tiny.prompts(2, dtype=torch.float32), tiny.prompts(1, seed=5, dtype=torch.float32)
    loss, logs = flow_matching_loss(model, x_0, cond, null, cfg, tiny.generator(seed))
    assert loss.dtype == torch.float32 and loss.ndim == 0 and logs["loss"] == float(loss)
    assert_times_add_up(logs, model)
    return model, x_0, loss


def assert_times_add_up(logs: Logs, model: Recorder) -> None:
    """The losses by time, weighted by the frames whose time it is, are the loss."""
    t = pick_chunks(model.seen["t"], model.seen["targets"], model.chunk, 2)
    found = {name: value for name, value in loss_by_time(logs).items() if name != "loss"}
    bounds = {name: [float(x) for x in name.removeprefix("loss/t").split("-")] for name in found}
    counts = {
        name: int(((t >= low) & ((t < high) | (high == 1.0))).sum())
        for name, (low, high) in bounds.items()
    }
    assert sum(counts.values()) == t.numel() and min(counts.values()) > 0
    assert sum(found[name] * counts[name] for name in found) / t.numel() == pytest.approx(
        logs["loss"], rel=1e-5
    )


@pytest.mark.parametrize("chunk", [1, 3])
def test_noise_times_and_targets_belong_together(chunk: int) -> None:
    """From x_t, t and x_0 the noise can be solved for; the loss is then the mean square of eps -
    x_0."""
    model, x_0, loss = record(replace(PLAIN, noise_samples=3), chunk)
    x_t, t = model.seen["x_t"], model.seen["t"]
    assert x_t.shape == (3, *x_0.shape) and t.shape == (3, 2, 6)
    by_chunk = t.unflatten(-1, (-1, chunk))
    assert torch.equal(by_chunk, by_chunk[..., :1].expand_as(by_chunk)), "one time per chunk"
    assert len(by_chunk[..., 0].unique()) == by_chunk[..., 0].numel(), "times are independent"
    s = t[..., None, None, None].double()
    eps = (x_t - (1 - s) * x_0) / s
    assert torch.equal(model.seen["x_clean"], x_0)
    assert float(loss) == pytest.approx(float((eps - x_0).pow(2).mean()), rel=1e-4)
    assert float((eps[0] - eps[1]).abs().mean()) > 0.5, "every sample its own noise"


def test_loss_is_fp32_on_the_raw_velocity() -> None:
    """A bf16 velocity is compared in fp32, with no time weight: the mean over all elements, no
    more."""
    coarse = Recorder(dtype=torch.bfloat16)
    x_0, cond = tiny.latents(2, 3, dtype=torch.float32), tiny.prompts(2, dtype=torch.float32)
    loss, _ = flow_matching_loss(coarse, x_0, cond, tiny.prompts(1), PLAIN, tiny.generator(0))
    fine, _ = flow_matching_loss(Recorder(), x_0, cond, tiny.prompts(1), PLAIN, tiny.generator(0))
    assert loss.dtype == torch.float32 and float(loss) == float(fine)


def test_the_query_has_noise_of_its_own() -> None:
    """An encoder that saw the decoder's noise would give the answer away: v = (eps - x_t) / (1 - t)
    (ADR 0004)."""
    model, x_0, _ = record(replace(PLAIN, noise_samples=3))
    query, x_t, t = model.seen["query"], model.seen["x_t"], model.seen["t"]
    for k in range(3):
        eps = (x_t[k] - (1 - t[k][..., None, None, None]) * x_0) / t[k][..., None, None, None]
        assert float((query.x - add_noise(x_0, eps, query.t)).abs().mean()) > 0.5
    assert model.seen["corruption"] is None
    assert record(replace(PLAIN, context_noise=0.05))[0].seen["corruption"].strength == 0.05


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_subset_of_targets(chunk: int) -> None:
    chunks = 6 // chunk
    seen = set()
    for seed in range(20):
        model, _, _ = record(replace(PLAIN, target_chunks=1), chunk, seed=seed)
        targets = model.seen["targets"]
        assert len(targets) == 1 and 0 <= targets[0] < chunks
        seen.add(targets[0])
    assert seen == set(range(chunks))
    model, _, _ = record(replace(PLAIN, target_chunks=chunks + 5), chunk)
    assert model.seen["targets"] == list(range(chunks))


@pytest.mark.parametrize("variant", tiny.FEW, ids=str)
def test_a_subset_has_the_loss_of_those_chunks(variant: tiny.Variant) -> None:
    """With every chunk as target, and with some: the same model, noise and times give the same
    per-chunk errors."""
    model, x_0 = tiny.student(variant), tiny.latents(2, 3 * variant.chunk)
    cond, null = tiny.prompts(2), tiny.prompts(1, seed=5)
    losses = [
        float(
            flow_matching_loss(
                model, x_0, cond, null, replace(PLAIN, target_chunks=n), tiny.generator(3)
            )[0].detach()
        )
        for n in (1, 2, None)
    ]
    assert all(0.5 < loss < 20 for loss in losses)
    assert len(set(losses)) == 3


@pytest.mark.parametrize("variant", tiny.FEW, ids=str)
def test_validation_takes_as_many_targets_at_a_time_as_training(
    variant: tiny.Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever that number, it is the loss of all chunks; and every sequence has the length of a
    training step's."""
    model, x_0 = tiny.student(variant), tiny.latents(1, 3 * variant.chunk)
    cond, null = tiny.prompts(1), tiny.prompts(1, seed=5)
    lengths: list[int] = []

    def noted(layout: Layout, device: torch.device) -> object:
        lengths.append(len(layout.kinds))
        return teacher_forcing_mask(layout, device)

    for module in ("scd.wan", "scd.scratch", "causal"):
        monkeypatch.setattr(f"scd_sf.models.{module}.teacher_forcing_mask", noted)

    def seen(targets: int | None) -> tuple[float, set[int]]:
        lengths.clear()
        cfg = replace(PLAIN, target_chunks=targets, text_dropout=0.5)
        return float(validation_loss(model, x_0, cond, null, cfg, tiny.generator(3))), set(lengths)

    (whole, _), (alone, single), (pairs, double) = seen(None), seen(1), seen(2)
    assert alone == pytest.approx(whole, rel=1e-9) and pairs == pytest.approx(whole, rel=1e-9)
    for targets, there in ((1, single), (2, double)):
        lengths.clear()
        for seed in range(6):
            flow_matching_loss(
                model, x_0, cond, null, replace(PLAIN, target_chunks=targets), tiny.generator(seed)
            )
        assert set(lengths) == there, "drawn targets change the length"


def test_text_dropout_replaces_whole_prompts_at_the_rate() -> None:
    cond, null = tiny.prompts(4000), tiny.prompts(1, seed=5)
    dropped = drop_text(cond, null, 0.1, tiny.generator(0)).text_BLE
    is_null = (dropped == null.text_BLE).flatten(1).all(1)
    is_own = (dropped == cond.text_BLE).flatten(1).all(1)
    assert bool((is_null ^ is_own).all())
    assert float(is_null.double().mean()) == pytest.approx(0.1, abs=0.015)
    assert torch.equal(drop_text(cond, null, 0.0, tiny.generator(0)).text_BLE, cond.text_BLE)
    assert torch.equal(
        drop_text(cond, null, 1.0, tiny.generator(0)).text_BLE, null.text_BLE.expand(4000, -1, -1)
    )


def test_query_times_law() -> None:
    """A fraction exactly 1; the rest is the shifted top of the schedule, u in [.8, 1]."""
    t = query_times((20000,), FlowMatchingConfig(), tiny.generator(0))
    pure = t == 1.0
    assert float(pure.double().mean()) == pytest.approx(0.5, abs=0.015)
    low = float(shift_time(torch.tensor(0.8), 5.0))
    assert low == pytest.approx(0.952, abs=1e-3)
    rest = t[~pure]
    assert float(rest.min()) >= low - 1e-6 and float(rest.max()) <= 1.0
    levels = torch.tensor([0.1, 0.5, 0.9])
    assert torch.allclose(rest.quantile(levels), shift_time(0.8 + 0.2 * levels, 5.0), atol=2e-3)
    assert bool(
        (query_times((50,), FlowMatchingConfig(query_pure=1.0), tiny.generator(0)) == 1).all()
    )


def test_everything_follows_from_the_generator() -> None:
    (_, _, first), (_, _, again), (_, _, other) = (
        record(PLAIN),
        record(PLAIN),
        record(PLAIN, seed=1),
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_denoiser_flow_loss_is_its_definition() -> None:
    x_0, cond, t = (
        tiny.latents(2, 3, dtype=torch.float32),
        tiny.prompts(2),
        torch.tensor([0.2, 0.9]),
    )
    eps = torch.randn(x_0.shape, generator=tiny.generator(4))
    loss = denoiser_flow_loss(
        lambda x_t, t, cond: (2 * x_t).bfloat16().float(), x_0, cond, t, tiny.generator(4)
    )
    expected = ((2 * add_noise(x_0, eps, t)).bfloat16().float() - (eps - x_0)).pow(2).mean()
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text_dropout", 1.5),
        ("query_from", -0.1),
        ("query_pure", 2.0),
        ("noise_samples", 0),
        ("target_chunks", 0),
        ("shift", -1.0),
        ("context_noise", -3.0),
    ],
)
def test_bad_settings_are_named(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"loss\.{name}"):
        replace(FlowMatchingConfig(), **{name: value})
