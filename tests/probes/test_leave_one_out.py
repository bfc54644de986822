"""P7: a block left out is a block that is not there, its cost has honest error bars, and a split
comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import probed
import pytest
import recipe_runner
import tiny
import tiny_run
import torch
from torch import Tensor, nn

from scd_sf.checkpoint import find
from scd_sf.config import load_config
from scd_sf.diffusion.flow import shift_time
from scd_sf.models.build import Scd, Student, load_student
from scd_sf.models.scd.transplant import TransplantConfig
from scd_sf.models.wan.transformer import Wan
from scd_sf.probes.leave_one_out import (
    LeaveOneOut,
    block_costs,
    leave_one_out,
    left_out,
    named_blocks,
    propose_split,
    stage1_yaml,
)
from scd_sf.probes.paired import NONE, Change, FlowLosses, LossConfig, increase, training_levels
from scd_sf.types import Conditioning, UserError

LEVELS = (0.3, 0.8)
VARIANTS = [*tiny.FEW, tiny.Variant("scd", 1, "paper", "temporal")]


class Nothing(nn.Module):
    """In a block's place: its input, of the last frames that are asked for."""

    def forward(self, x_BLE: Tensor, mod_BF6E: Tensor, *arguments: object) -> Tensor:
        keep, frames = arguments[-1], mod_BF6E.shape[1]
        return (
            x_BLE
            if not isinstance(keep, int)
            else x_BLE[:, (frames - keep) * (x_BLE.shape[1] // frames) :]
        )


def models() -> list[Student | Wan]:
    return [tiny.wan(), *(tiny.student(variant) for variant in VARIANTS)]


@pytest.mark.parametrize("model", models(), ids=["wan", *map(str, VARIANTS)])
@torch.no_grad()
def test_a_block_left_out_is_not_there_and_comes_back_bit_for_bit(model: Student | Wan) -> None:
    data = tiny.clip(model.chunk if not isinstance(model, Wan) else 1, chunks=2)
    losses = FlowLosses(
        data.x, Conditioning(data.cond.text_BLE, data.cond.actions_BF, data.cond.labels_B), LEVELS
    )
    before, weights = (
        losses.measure(model),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    stacks = [model.encoder, model.decoder.trunk] if isinstance(model, Scd) else [model.trunk]
    places = [(stack.blocks, i) for stack in stacks for i in range(len(stack.blocks))]
    assert [id(b) for b in named_blocks(model).values()] == [id(blocks[i]) for blocks, i in places]
    for blocks, i in places:
        with left_out(blocks[i]):
            hooked = losses.measure(model)
        block = blocks[i]
        blocks[i] = Nothing()
        assert torch.equal(hooked, losses.measure(model))
        blocks[i] = block
        assert not torch.equal(hooked, before)
    with pytest.raises(RuntimeError, match="stop"), left_out(places[0][0][0]):
        raise RuntimeError("stop")
    assert torch.equal(losses.measure(model), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_losses_are_the_velocity_errors_and_do_not_depend_on_the_batch() -> None:
    wan, x, cond = tiny.wan(), tiny.latents(5, 2), tiny.prompts(5)
    found = FlowLosses(x, cond, LEVELS, (3,), batch=2).measure(wan)
    assert found.shape == (2, 5) and torch.allclose(
        found, FlowLosses(x, cond, LEVELS, (3,), batch=5).measure(wan)
    )
    rng = torch.Generator().manual_seed(1_000_003 * 3 + 4)
    eps = torch.randn(x.shape[1:], generator=rng).double()
    x_t = 0.2 * x[4:] + 0.8 * eps
    velocity = wan(x_t, torch.tensor([0.8]), cond.rows(slice(4, 5)))
    assert float(found[1, 4]) == pytest.approx(
        float((velocity - (eps - x[4:])).pow(2).mean()), rel=1e-6
    )
    other = FlowLosses(x, cond, LEVELS, (4,)).measure(wan)
    assert torch.allclose(FlowLosses(x, cond, LEVELS, (3, 4)).measure(wan), (found + other) / 2)


@torch.no_grad()
def test_costs_of_blocks() -> None:
    """A block without effect costs nothing at all; figures are those of the losses."""
    wan, losses = tiny.wan(), FlowLosses(tiny.latents(4, 2), tiny.prompts(4), LEVELS, (0, 1))
    for layer in ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2"):
        for parameter in wan.trunk.get_submodule(f"blocks.2.{layer}").parameters():
            parameter.zero_()
    base, found = block_costs(wan, losses)
    assert [cost.block for cost in found] == [str(i) for i in range(6)] and torch.equal(
        base, losses.measure(wan)
    )
    assert found[2].overall == NONE and found[2].by_level == (NONE, NONE)
    with left_out(wan.trunk.blocks[5]):
        without = losses.measure(wan)
    assert found[5].overall.mean == pytest.approx(float(without.mean() / base.mean()) - 1)
    assert found[5].by_level[1].mean == pytest.approx(float(without[1].mean() / base[1].mean()) - 1)


def test_the_probe_and_its_files(tmp_path: Path) -> None:
    """A split for a whole stack and none for SCD; what cannot be measured is refused before
    anything is."""
    clips = probed.write_clips(tmp_path / "clips")
    cfg = LeaveOneOut(LossConfig(clips=4, levels=2), decoder_blocks=3)
    wan = probed.subject(tiny.wan(dtype=torch.float32), clips)
    result = leave_one_out(wan, cfg)
    assert len(result.write(tmp_path / "out")) == 1
    written = json.loads((tmp_path / "out" / "leave_one_out.json").read_text())
    assert written["clips"] == 4 and len(written["levels"]) == len(written["base"]) == 2
    split = propose_split([Change(**block["overall"]) for block in written["blocks"]], 3)
    assert written["proposed_split"]["decoder_layers"] == list(split.decoder_layers)
    config = load_config(
        TransplantConfig, tmp_path / "out" / "leave_one_out-stage1.yaml", ["base=x", "out=y"]
    )
    assert (
        config.scd.decoder.layers == split.decoder_layers
        and str(list(split.decoder_layers)) in result.text
    )
    again = leave_one_out(wan, cfg)
    assert again.data == result.data and again.text == result.text

    scd = tiny.student(tiny.Variant("scd", 1, "delta"), dtype=torch.float32)
    of_scd = leave_one_out(probed.subject(scd, clips), cfg)
    assert (
        of_scd.data["proposed_split"] is None
        and not of_scd.files
        and "block decoder" in of_scd.text
    )
    with pytest.raises(UserError, match="data="):
        leave_one_out(probed.subject(wan.model, None), cfg)
    with pytest.raises(UserError, match=r"needs 1\.\.5"):
        leave_one_out(wan, LeaveOneOut(decoder_blocks=6))
    with pytest.raises(UserError, match="clips 2"):
        LossConfig(clips=1)
    with pytest.raises(UserError, match="1 clips of 3 latent frames; error bars"):
        leave_one_out(probed.subject(wan.model, probed.write_clips(tmp_path / "one", 1)), cfg)


def test_error_bars_are_those_of_resampled_clips() -> None:
    rng = torch.Generator().manual_seed(0)
    base = 1 + torch.rand(2, 400, generator=rng, dtype=torch.float64)
    changed = base * 1.1 + 0.05 * torch.randn(2, 400, generator=rng, dtype=torch.float64)
    found = increase(base, changed)
    again = []
    for _ in range(400):
        chosen = torch.randint(400, (400,), generator=rng)
        again.append(increase(base[:, chosen], changed[:, chosen]).mean)
    assert found.mean == pytest.approx(0.1, abs=0.01)
    assert found.error == pytest.approx(float(torch.tensor(again).std()), rel=0.15)
    assert increase(base, 1.3 * base).error < 1e-12, "what all clips share is no uncertainty"


def test_levels_are_quantiles_of_the_training_density() -> None:
    u = shift_time(torch.rand(200_000, generator=tiny.generator(0), dtype=torch.float64), 5.0)
    wanted = torch.quantile(u, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64))
    assert training_levels(5, 5.0) == pytest.approx(wanted.tolist(), abs=5e-3)


def costs(*means: float, error: float = 0.001) -> list[Change]:
    return [Change(mean, error) for mean in means]


def test_the_papers_curve_gives_the_papers_split() -> None:
    """A U over 30 layers: encoder 0-24, decoder 0-4 and 25-29 (paper 4.3)."""
    curve = costs(*[0.9, 0.5, 0.2, 0.1, 0.05], *[0.01] * 20, *[0.05, 0.1, 0.2, 0.5, 0.9])
    split = propose_split(curve)
    assert split.encoder_layers == tuple(range(25)) and split.decoder_layers == (
        *range(5),
        *range(25, 30),
    )
    assert split.early == 5 and split.held == pytest.approx(3.5 / 3.7)


@pytest.mark.parametrize(
    ("means", "size", "decoder"),
    [
        ([0.0, 0.0, 0.0, 0.0, 0.5, 0.9], 2, (4, 5)),  # all at the end: a plain late decoder
        ([0.9, 0.5, 0.4, 0.0, 0.0, 0.1], 3, (0, 1, 5)),  # the last block is always the decoder's
        ([0.9, 0.0, 0.0, 0.2, 0.3, 0.4], 4, (0, 3, 4, 5)),
        ([0.9, 0.0, 0.0, 0.0, 0.0, 0.9], 4, (0, 1, 4, 5)),  # what is equally good is cut evenly
        # and so is what the error bars cannot tell apart
        ([0.9, 0.0005, -0.0005, 0.0, 0.0004, 0.9], 4, (0, 1, 4, 5)),
        ([0.9, 0.01, 0.0, 0.0, 0.0, 0.9], 3, (0, 1, 5)),
    ],
)
def test_splits(means: list[float], size: int, decoder: tuple[int, ...]) -> None:
    split = propose_split(costs(*means), size)
    assert split.decoder_layers == decoder
    late = next(layer for i, layer in enumerate(decoder) if layer != i)
    assert split.encoder_layers == tuple(range(late))


@pytest.mark.parametrize("size", [-1, 6, 7])
def test_a_decoder_must_fit(size: int) -> None:
    with pytest.raises(UserError, match=r"decoder_blocks is .*needs 1\.\.5"):
        propose_split(costs(*[0.1] * 6), size)


def test_stage_1_takes_the_proposal(tmp_path: Path) -> None:
    """The file that the probe writes makes a checkpoint with these layers, and a comment cannot
    break it."""
    wan = tiny_run.write_wan(tmp_path / "wan")
    for number, (means, size) in enumerate(
        [([0.5, 0.1, 0.0, 0.0, 0.1, 0.5], 4), ([0.0, 0.0, 0.0, 0.0, 0.1, 0.5], 2)]
    ):
        split = propose_split(costs(*means), size)
        file = tmp_path / f"stage1-{number}.yaml"
        file.write_text(stage1_yaml(split, "a model\nfamily: causal"))
        config = load_config(TransplantConfig, file, ["base=x", "out=y"])
        assert (config.family, config.scd.encoder_layers) == ("scd", split.encoder_layers)
        out = tmp_path / f"out-{number}"
        given = ["--config", file, f"base={wan}", f"out={out}"]
        recipe_runner.succeed("recipes/stage1_transplant.py", *given)
        student, _ = load_student(find(out))
        assert isinstance(student, Scd)
        assert student.encoder.layers == split.encoder_layers
        assert (
            student.decoder.trunk.layers == split.decoder_layers
            and student.decoder.split == split.early
        )
