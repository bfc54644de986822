"""Parameter groups, the learning rate schedule, and the moving average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scd_sf.distributed import Ranks
from scd_sf.files import LFS_POINTER
from scd_sf.train.ema import Ema, EmaConfig
from scd_sf.train.optim import Schedule, param_groups, set_learning_rate
from scd_sf.train.shards import EngineState, Shard, StateFiles, read_shards, share
from scd_sf.types import UserError

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


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
        id(p)
        for p in (net.proj.bias, net.norm_out.weight, net.norm_out.bias, net.scale_shift_table)
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


def shards(tensors: dict[str, torch.Tensor], ranks: Ranks = ALONE) -> list[Shard]:
    return [share(name, tensor, ranks) for name, tensor in tensors.items()]


def followed(cfg: EmaConfig, *values: float) -> list[float]:
    """The average of one weight after each of its values."""
    ema, averages = Ema(cfg, ALONE), []
    for value in values:
        ema.update(shards({"w": torch.tensor([value])}))
        averages.append(float(dict(ema.whole())["w"]))
    return averages


def test_ema_follows_the_recurrence_in_fp32() -> None:
    d1, d2 = 2 / 11, 3 / 12
    after_one = d1 * 1.0 + (1 - d1) * 2.0
    assert followed(EmaConfig(decay=0.5), 1.0, 2.0, 4.0)[-1] == pytest.approx(
        d2 * after_one + (1 - d2) * 4.0
    )
    assert [Ema(EmaConfig(decay=0.5), ALONE).decay_at(n) for n in (0, 8, 100)] == pytest.approx(
        [0.1, 0.5, 0.5]
    )


def test_ema_before_start_is_the_weights_themselves() -> None:
    averages = followed(EmaConfig(decay=0.9, start=2, warmup=False), 1.0, 5.0, 15.0)
    assert averages == pytest.approx([1.0, 5.0, 6.0])


def test_ema_restores_exactly_and_never_aliases_the_weights(tmp_path: Path) -> None:
    """Through a file and into other parts: ranks of three hold together what one rank holds
    alone."""
    weights = {"w": torch.randn(5, 3), "bias": torch.randn(2), "scalar": torch.randn(())}
    ema = Ema(EmaConfig(), ALONE)
    ema.update(shards(weights))
    snapshot = ema.copy()
    save_file(dict(ema.whole()), tmp_path / "ema.safetensors")
    for weight in weights.values():
        weight.add_(1.0)
    assert not torch.equal(dict(ema.whole())["w"], weights["w"])
    ema.update(shards(weights))
    parts = []
    for ranks in (Ranks(rank, 3, rank, torch.device("cpu")) for rank in range(3)):
        part = Ema(EmaConfig(), ranks)
        part.restore(read_shards(tmp_path / "ema.safetensors", shards(weights, ranks)), 1)
        part.update(shards(weights, ranks))
        parts.append(list(part._average.values()))
    for (name, whole), *pieces in zip(ema.whole(), *parts, strict=True):
        assert {piece.name for piece in pieces} == {name}
        assert torch.equal(torch.cat([piece.values for piece in pieces]), whole.flatten())
    assert (
        not torch.equal(dict(snapshot.whole())["w"], dict(ema.whole())["w"])
        and snapshot.updates == 1
    )
    with pytest.raises(ValueError, match="cut differently"):
        ema.update(shards(weights, Ranks(0, 2, 0, torch.device("cpu"))))
    with pytest.raises(UserError, match=r"ema.safetensors.*use another checkpoint"):
        list(read_shards(tmp_path / "ema.safetensors", shards({"other": torch.ones(1)})))
    with pytest.raises(UserError, match=r"w is \(5, 3\) there, \(1,\) in the model"):
        list(read_shards(tmp_path / "ema.safetensors", shards({"w": torch.ones(1)})))
    save_file({"w": torch.tensor([1.0, float("nan")])}, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"nan\.safetensors: tensor 'w' holds NaN"):
        list(read_shards(tmp_path / "nan.safetensors", shards({"w": torch.ones(2)})))


def test_broken_training_state_is_named(tmp_path: Path) -> None:
    """NaN in the master weights or in a buffer, and a pointer of Git LFS for a rank's file or the
    average."""
    (like,) = shards({"w": torch.ones(2)})
    broken = torch.tensor([1.0, float("nan")])
    EngineState(
        0, {"master/w@0": broken, "exp_avg/w@0": torch.ones(2), "buffer/b": broken.clone()}, {}
    ).write(tmp_path)
    files = StateFiles(tmp_path, 1)
    assert torch.equal(files.read("exp_avg", like), torch.ones(2))
    with pytest.raises(UserError, match=r"tensor 'master/w' holds NaN"):
        files.read("master", like)
    with pytest.raises(UserError, match=r"tensor 'buffer/b' holds NaN"):
        files.whole("b", torch.ones(2))
    pointer = tmp_path / "rank0.safetensors"
    pointer.write_bytes(LFS_POINTER + b".github.com/spec/v1\noid sha256:00\nsize 9\n")
    for attempt in (lambda: StateFiles(tmp_path, 1), lambda: list(read_shards(pointer, [like]))):
        with pytest.raises(UserError, match=r"rank0\.safetensors: a Git LFS pointer"):
            attempt()


def test_ema_copy_to() -> None:
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    ema = Ema(EmaConfig(), ALONE)
    ema.update(shards(dict(source.named_parameters())))
    ema.copy_to(target)
    assert torch.equal(source.weight, target.weight)
    with pytest.raises(UserError, match=r"no average for parameter '0\.weight'"):
        ema.copy_to(nn.Sequential(target))


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_ema_config_is_checked(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        EmaConfig(decay=decay)


def test_parts_of_a_model_learn_at_their_own_rate() -> None:
    """Groups by scale and by decay; every group's rate follows the schedule at its own multiple."""
    net = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    groups = param_groups(net.named_parameters(), 0.1, {"decoder": 2.0})
    assert [(g["lr_scale"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (1.0, 0.1, 1),
        (1.0, 0.0, 1),
        (2.0, 0.1, 1),
        (2.0, 0.0, 1),
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_learning_rate(optimizer.param_groups, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25, 0.5, 0.5]
    with pytest.raises(
        UserError,
        match=r"lr_scale\.head: no parameter's name starts so; they start with decoder, enc",
    ):
        param_groups(net.named_parameters(), 0.1, {"head": 2.0})
