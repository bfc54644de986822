"""Parameter groups, the learning rate schedule, and the moving average."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scd_sf.train.ema import Ema, EmaConfig
from scd_sf.train.optim import Schedule, param_groups
from scd_sf.types import UserError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm_out = nn.Linear(3, 4), nn.LayerNorm(4)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, 4))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_no_decay_on_biases_norms_and_tables() -> None:
    net = Net()
    decayed, plain = param_groups(net.named_parameters(), 0.1)
    assert decayed["weight_decay"] == 0.1 and decayed["params"] == [net.proj.weight]
    assert plain["weight_decay"] == 0.0
    assert {id(p) for p in plain["params"]} == {
        id(p) for p in (net.proj.bias, net.norm_out.weight, net.norm_out.bias, net.scale_shift_table)
    }


def test_an_empty_group_is_left_out() -> None:
    assert len(param_groups([("w", nn.Parameter(torch.zeros(2, 2)))], 0.1)) == 1


def test_schedule_warms_up_stays_and_anneals() -> None:
    schedule = Schedule(lr=1.0, warmup=4, anneal_from=0.5, total=20)
    assert [schedule.at(n) for n in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.at(10) == 1.0
    assert schedule.at(15) == pytest.approx(0.5)
    assert schedule.at(20) == 0.0 and schedule.at(25) == 0.0
    assert Schedule(lr=1.0, total=20).at(19) == 1.0


def test_ema_follows_the_recurrence_in_fp32() -> None:
    ema = Ema(EmaConfig(decay=0.5))
    values = [torch.tensor([v]) for v in (1.0, 2.0, 4.0)]
    for value in values:
        ema.update({"w": value})
    d1, d2 = 2 / 11, 3 / 12
    after_one = d1 * 1.0 + (1 - d1) * 2.0
    assert ema.tensors()["w"].item() == pytest.approx(d2 * after_one + (1 - d2) * 4.0)
    assert [ema.decay_at(n) for n in (0, 8, 100)] == pytest.approx([0.1, 0.5, 0.5])


def test_ema_before_start_is_the_weights_themselves() -> None:
    ema = Ema(EmaConfig(decay=0.9, start=2, warmup=False))
    for value in (1.0, 5.0):
        ema.update([("w", torch.tensor([value]))])
        assert ema.tensors()["w"].item() == value
    ema.update([("w", torch.tensor([15.0]))])
    assert ema.tensors()["w"].item() == pytest.approx(6.0)


def test_ema_restores_exactly_and_never_aliases_the_weights() -> None:
    weight = torch.randn(5)
    ema, other = Ema(EmaConfig()), Ema(EmaConfig())
    ema.update({"w": weight})
    weight.add_(1.0)
    assert not torch.equal(ema.tensors()["w"], weight)
    other.restore(ema.tensors(), ema.updates)
    for average in (ema, other):
        average.update({"w": weight})
    assert torch.equal(ema.tensors()["w"], other.tensors()["w"]) and other.updates == 2


def test_ema_copy_to() -> None:
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    ema = Ema(EmaConfig())
    ema.update(dict(source.named_parameters()))
    ema.copy_to(target)
    assert torch.equal(source.weight, target.weight)
    with pytest.raises(UserError, match=r"no average for parameter '0\.weight'"):
        ema.copy_to(nn.Sequential(target))


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_ema_config_is_checked(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        EmaConfig(decay=decay)
