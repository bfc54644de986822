"""The meter against real tensors: the same FLOPs, and the bytes that PyTorch's allocator really
had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from scd_sf.losses.flow_matching import FlowMatchingConfig, flow_matching_loss
from scd_sf.models.build import ModelConfig, Student, build_model, set_checkpointing
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.wan.transformer import Wan, WanConfig
from scd_sf.nn.attention import FullSequence, attention
from scd_sf.nn.masks import Layout, teacher_forcing_mask
from scd_sf.tools.plan.meter import Meter
from scd_sf.types import Conditioning

CFG = WanConfig(2, 32, 8, 8, 16, 32, 256, 6)
MODEL = ModelConfig(wan=CFG, scd=ScdConfig(tuple(range(5)), DecoderConfig((0, 5))))


def student(device: str, *, checkpointing: bool) -> Student:
    with torch.device(device):
        model = build_model(MODEL)
    assert not isinstance(model, Wan)
    set_checkpointing(model.trunks(), checkpointing)
    return model


def step(model: Student, device: str) -> None:
    x = torch.zeros(1, 4, 8, 16, 16, device=device)
    cond = Conditioning(torch.zeros(1, 8, CFG.text_dim, device=device))
    cfg = FlowMatchingConfig(noise_samples=2)
    flow_matching_loss(model, x, cond, cond, cfg, torch.Generator().manual_seed(0))[0].backward()


def test_views_and_what_was_there_before_are_not_counted() -> None:
    weight = torch.empty(1000, 1000, device="meta")
    with Meter() as meter:
        flat = weight.t()[:10].reshape(-1)
        assert meter.live == 40_000  # the copy that reshape has to make
        del flat
        kept = weight @ weight
        assert meter.live == 4_000_000 and meter.flops == 2 * 1000**3
        del kept
        assert meter.live == 0 and meter.peak >= 4_000_000
        weight.add_(1.0)
    assert meter.live == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_costs_what_the_real_one_does(checkpointing: bool) -> None:
    """FLOPs outside attention to the last one, memory within 15 %."""
    real = student("cpu", checkpointing=checkpointing)
    with FlopCounterMode(display=False) as counter:
        step(real, "cpu")
    real.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(real, "cpu")
    planned = student("meta", checkpointing=checkpointing)
    with Meter() as meter:
        step(planned, "meta")
    attention = sum(flops for name, flops in meter.by_operator.items() if "attention" in name)
    assert 0 < attention < 0.5 * meter.flops
    counted = counter.get_flop_counts()["Global"]  # from torch 2.15 on with the CPU's attention
    assert meter.flops - attention == sum(
        flops for name, flops in counted.items() if "attention" not in str(name)
    )
    assert meter.peak == pytest.approx(most_alive(recorded), rel=0.15)


def most_alive(recorded: profile) -> int:
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events: list[Any] = [
        e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def test_masked_attention_is_counted_by_what_is_visible() -> None:
    layout = Layout.teacher_forced(4, range(4), 1, 128)
    q = torch.empty(1, 2, 1024, 32, device="meta")
    with Meter() as meter:
        FullSequence(teacher_forcing_mask(layout, q.device))(0, q, q, q)
    visible = layout.visible().float().mean()
    with Meter() as whole:
        attention(q, q, q)
    assert meter.flops == pytest.approx(float(visible) * whole.flops, rel=1e-6)
    assert whole.flops == 2 * 2 * 2 * 1024 * 1024 * 32


def test_numbers_for_a_log_are_there() -> None:
    with Meter(), torch.no_grad():
        mean: Tensor = nn.Linear(4, 4, device="meta")(torch.empty(2, 4, device="meta")).mean()
        assert float(mean) == 1.0 and mean.expand(2).tolist() == [1.0, 1.0]
