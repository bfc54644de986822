"""Models trained from scratch: sizes and costs of Table 2, and the defects of the public code that
must not come back.

The invariants that all students share (mask == cache, batched K == looped K, causality, guidance)
are held for these models by test_interface.py, test_scd.py, test_guided.py and test_rollout.py.
Letters: see scd_sf/models/dit.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

from scd_sf import yaml_text
from scd_sf.config import from_yaml, plain_yaml
from scd_sf.diffusion.flow import shifted_logit_normal, shifted_uniform
from scd_sf.diffusion.noise import cpu_noise
from scd_sf.diffusion.samplers import Euler
from scd_sf.evaluation.table import BlockPassCounter
from scd_sf.generation.rollout import rollout
from scd_sf.losses.flow_matching import FlowMatchingConfig, drop_signals, flow_matching_loss
from scd_sf.models.build import CheckpointConfig, ModelConfig, Scd, build_model
from scd_sf.models.causal import Causal
from scd_sf.models.dit import DitConfig
from scd_sf.models.interface import Corruption
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.scd.scratch import ScdScratch
from scd_sf.nn.layers import DitBlock, WanBlock
from scd_sf.types import Conditioning, UserError

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs"
SCD = tiny.Variant("scd", 1, "paper", "temporal", "full", "dit")
# Name: millions of parameters in the supplement's Table 2, in our own count, and block passes a
# frame at S = 50.
TABLE_2 = {
    "causal_b": (131, 129.6, 600),
    "scd_b": (132, 131.6, 208),
    "scd_b_e": (174, 174.1, 212),
    "scd_b_d": (217, 216.6, 608),
    "causal_m": (230, 230.2, 600),
    "scd_m": (230, 233.6, 208),
    "scd_m_e": (306, 309.2, 212),
    "scd_m_d": (383, 384.7, 608),
}


def from_file(name: str) -> ModelConfig:
    """The model of a shipped configuration, with Minecraft's three actions."""
    section = {"model": plain_yaml(CONFIGS / f"pretrain_{name}.yaml")["model"]}
    model = from_yaml(CheckpointConfig, yaml_text.dump(section)).model
    return dataclasses.replace(model, dit=dataclasses.replace(model.dit, num_actions=3))


@pytest.mark.parametrize("name", TABLE_2)
def test_parameters_and_block_passes_are_table_2s(name: str) -> None:
    """Within 1 % of the paper; its M rows leave out the second net's embeddings, which make up to
    1.6 %."""
    paper, counted, passes = TABLE_2[name]
    config = from_file(name)
    with torch.device("meta"):
        model = build_model(config)
    assert isinstance(model, Scd | Causal)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(counted, rel=0.002)
    assert millions == pytest.approx(paper, rel=0.016 if name.startswith("scd_m") else 0.011)
    noise = torch.empty(1, 2, 32, 8, 8, device="meta")
    cond = Conditioning.of_frames(1, torch.zeros(1, 2, dtype=torch.long)).to("meta")
    counts = []
    for steps in (1, 2):
        with torch.no_grad(), BlockPassCounter(model, (WanBlock, DitBlock)) as counter:
            rollout(model, noise, cond, Euler(steps, 1.0), lambda x: x)
        counts.append(counter.samples)
    once = 2 * counts[0] - counts[1]  # what does not depend on the steps
    # the causal baseline's K/V of the first frame, on top of 600
    clean = 12 if name.startswith("causal") else 0
    assert once - clean + 50 * (counts[1] - counts[0]) == 2 * passes


def test_rope_is_flux_split_and_quarter_is_time() -> None:
    assert DitConfig().rope_axes == (16, 24, 24)
    with pytest.raises(UserError, match="multiple of 16"):
        DitConfig(attention_head_dim=24)


def test_the_encoder_never_sees_noise() -> None:
    """B1: the released configuration trains it on noisy frames. Here noise changes no context,
    whatever its level."""
    model, data = tiny.student(SCD), tiny.clip(1)
    assert isinstance(model, ScdScratch)
    seen: list[Tensor] = []
    handle = model.encoder.blocks[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().clone())
    )
    for x_t, t in ((data.x_t, data.t), (torch.randn_like(data.x_t), torch.rand_like(data.t))):
        model.teacher_forced(x_t, t, data.x, data.cond)
    handle.remove()
    assert torch.equal(seen[0], seen[1])
    own = model.encoder.embed(data.x[:, :-1])
    tokens = tiny.DIT.tokens(tiny.HEIGHT, tiny.WIDTH)
    assert torch.equal(seen[0][:, tokens:], own) and torch.equal(seen[0][0, 0], model.start_token)


def test_actions_lead_to_their_own_frame() -> None:
    """B2: frame i is told a_i in both nets, in training and in sampling: a_i changes frame i and
    later ones, and the decoder's own action changes its frame alone."""
    model, data = tiny.student(SCD), tiny.clip(1, chunks=4, samples=1)
    actions = data.cond.actions_BF
    assert actions is not None
    changed = actions.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 3
    both = dataclasses.replace(data.cond, actions_BF=changed)
    decoder = dataclasses.replace(data.cond, decoder_actions_BF=changed)

    def moved(cond: Conditioning) -> list[bool]:
        run = [model.teacher_forced(data.x_t, data.t, data.x, c) for c in (data.cond, cond)]
        return [float((run[0] - run[1])[:, :, i].abs().max()) > 1e-9 for i in range(4)]

    with torch.no_grad():
        assert moved(both) == [False, False, True, True]
        assert moved(decoder) == [False, False, True, False]


def test_contexts_carry_no_frame_of_their_own_or_later() -> None:
    model, data = tiny.student(SCD), tiny.clip(1, chunks=4, samples=1)
    other = data.x.clone()
    other[:, 2] += 1.0
    with torch.no_grad():
        first, second = (
            model.teacher_forced(data.x_t, data.t, x, data.cond) for x in (data.x, other)
        )
    moved = [float((first - second)[:, :, i].abs().max()) > 1e-9 for i in range(4)]
    assert moved == [False, False, False, True]


def test_modulation_is_per_frame() -> None:
    """P9: the adaLN projections run on one vector per frame; the head (P7) on the noisy frame's
    tokens alone."""
    model, data = tiny.student(SCD), tiny.clip(1, chunks=3, samples=2)
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: shapes.append((name, tuple(args[0].shape)))

    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear) and "adaln" in name) or name.endswith("proj_out"):
            module.register_forward_pre_hook(note(name))
    model.teacher_forced(data.x_t, data.t, data.x, data.cond)
    frames = {"encoder": 3, "decoder": 2}
    for name, shape in shapes:
        net = name.split(".")[0]
        if name.endswith("proj_out"):
            assert shape[1] == tiny.DIT.tokens(tiny.HEIGHT, tiny.WIDTH)
        elif "blocks" in name:
            assert shape[1] <= frames[net], (name, shape)
    assert sum("blocks" in name for name, _ in shapes) == 2 * 6


def test_corruption_is_new_for_every_noisy_sample_and_leaves_the_history_alone() -> None:
    """B5: one draw per encoder pass is not enough. Eq. 7 at unit variance: the norm comes before
    the noise."""
    model, data = tiny.student(SCD), tiny.clip(1, samples=3, batch=1)
    assert isinstance(model, ScdScratch)
    same = Corruption(0.5, tiny.generator(0))
    x_t, t = data.x_t[:1].expand(3, -1, -1, -1, -1, -1), data.t[:1].expand(3, -1, -1)
    with torch.no_grad():
        plain = model.teacher_forced(x_t, t, data.x, data.cond)
        out = model.teacher_forced(x_t, t, data.x, data.cond, corruption=same)
        stream = tiny.stream(model, data.cond, data.x[:, :1])
        _, c = model.encode_next(stream, data.x[:, :1], data.x[:, :1])
    assert torch.equal(plain[0], plain[1]) and len({float(o.sum()) for o in out}) == 3
    assert torch.allclose(c.mean(-1), torch.zeros(()).double(), atol=1e-6)
    assert torch.allclose(c.pow(2).mean(-1), torch.ones(()).double(), atol=1e-3)


def test_samples_in_turn_give_the_gradients_of_one_batch() -> None:
    model, data = tiny.student(SCD), tiny.clip(1, samples=3)
    assert isinstance(model, Scd)
    results = []
    for in_turn in (False, True):
        model.samples_in_turn = in_turn
        with BlockPassCounter(model.decoder, DitBlock) as counter:
            out = tiny.teacher_forced(model, data)
            out.pow(2).mean().backward()
        results.append((out.detach(), tiny.gradients(model), (counter.calls, counter.samples)))
    assert torch.allclose(results[0][0], results[1][0], rtol=0, atol=1e-12)
    tiny.assert_same_gradients(results[0][1], results[1][1], 1e-12)
    # K samples of 3 frames of 2 clips, in two blocks; in turn they are computed twice
    rows = 3 * 2 * 3
    assert results[0][2] == (2, 2 * rows) and results[1][2] == (2 * 3 * 2, 2 * 2 * rows)


def test_the_first_frame_is_generated_and_labels_or_nothing_do_too() -> None:
    """B12: no context is needed, and neither actions nor labels are."""
    for told in ({"num_actions": 0, "num_labels": 0}, {"num_actions": 0}, {"num_labels": 0}):
        cfg = dataclasses.replace(tiny.DIT, **told)
        model = ScdScratch(cfg, tiny.scd_config(SCD))
        tiny.redraw(model, 0, torch.float32)
        cond = dataclasses.replace(tiny.prompts(2), text_BLE=torch.zeros(2, 0, 0))
        noise = tiny.latents(2, 3, dtype=torch.float32)
        with torch.no_grad():
            clip = rollout(model, noise, cond, Euler(2, 1.0), cpu_noise(tiny.generator(0)))
        assert clip.shape == noise.shape and bool(clip.isfinite().all())
        loss, _ = flow_matching_loss(
            model, noise, cond, Conditioning.of_frames(1), FlowMatchingConfig(), tiny.generator(1)
        )
        loss.backward()
        silent = [n for n, p in model.named_parameters() if p.grad is None]
        assert not silent, silent


def test_what_is_missing_is_named() -> None:
    model, data = tiny.student(SCD), tiny.clip(1)
    with pytest.raises(UserError, match="told actions and none were given"):
        model.teacher_forced(
            data.x_t, data.t, data.x, dataclasses.replace(data.cond, actions_BF=None)
        )
    with pytest.raises(UserError, match="given for 2 frames"):
        short = dataclasses.replace(data.cond, actions_BF=torch.zeros(2, 2, dtype=torch.long))
        model.teacher_forced(data.x_t, data.t, data.x, short)
    with pytest.raises(UserError, match="prefix_time=query"):
        DecoderConfig((4, 5), "paper", prefix="cached", prefix_time="step")
    with pytest.raises(UserError, match=r"model\.backbone is 'dit'"):
        ModelConfig("wan", backbone="dit")


def test_dropout_of_actions_is_per_frame_and_independent_in_both_nets() -> None:
    actions, labels = torch.ones(400, 50, dtype=torch.long), torch.zeros(4000, dtype=torch.long)
    cfg = FlowMatchingConfig(action_dropout=0.1, label_dropout=0.25)
    cond = drop_signals(Conditioning.of_frames(400, actions), cfg, tiny.generator(0))
    assert cond.actions_BF is not None and cond.decoder_actions_BF is not None
    encoder, decoder = cond.actions_BF == -1, cond.decoder_actions_BF == -1
    for dropped in (encoder, decoder):
        assert float(dropped.double().mean()) == pytest.approx(0.1, abs=0.01)
    assert float((encoder & decoder).double().mean()) == pytest.approx(0.01, abs=0.003)
    dropped_labels = drop_signals(
        Conditioning.of_frames(4000, None, labels), cfg, tiny.generator(0)
    ).labels_B
    assert dropped_labels is not None
    assert float((dropped_labels == -1).double().mean()) == pytest.approx(0.25, abs=0.03)


def test_time_samplers_have_their_quantiles() -> None:
    uniform = shifted_uniform((20000,), 1.0, tiny.generator(0))
    assert float(uniform.quantile(0.25)) == pytest.approx(0.25, abs=0.02)
    normal = shifted_logit_normal((20000,), 1.0, tiny.generator(0))
    assert float(normal.median()) == pytest.approx(0.5, abs=0.02)
    assert float(normal.quantile(0.8413)) == pytest.approx(0.7311, abs=0.02)  # sigmoid(1)


def test_a_fresh_model_is_silent() -> None:
    """adaLN-zero: every block is the identity, the head gives zero."""
    torch.manual_seed(0)
    model, data = ScdScratch(tiny.DIT, tiny.scd_config(SCD)), tiny.clip(1, dtype=torch.float32)
    with torch.no_grad():
        assert not bool(tiny.teacher_forced(model, data).any())
    assert isinstance(model.encoder.blocks[0], DitBlock)
    assert float(model.encoder.blocks[0].attn.to_q.weight.detach().abs().max()) > 0
