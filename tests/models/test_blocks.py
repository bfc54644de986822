"""Probes P5 and P6 as ways to run a model: against models with the blocks cut out, and against
masks written out."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn

from scd_sf.config import from_yaml, to_yaml
from scd_sf.diffusion.samplers import build_sampler, many_step_times
from scd_sf.evaluation.table import BlockPassCounter
from scd_sf.generation.bidirectional import sample_bidirectional
from scd_sf.generation.compile import CompileConfig, compile_steps
from scd_sf.generation.generate import clips_of, generate_latents
from scd_sf.models.blocks import BlocksConfig, SkipConfig, blocks_of, set_blocks
from scd_sf.models.build import CheckpointConfig, ModelConfig, build_model
from scd_sf.models.causal import Causal
from scd_sf.models.interface import FrameStreamer, Stream
from scd_sf.models.wan.transformer import Wan
from scd_sf.nn.attention import attention
from scd_sf.nn.layers import WanBlock
from scd_sf.nn.masks import Layout, dense_mask
from scd_sf.types import UserError

SHAPE = (3, tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)


def without(model: Causal | Wan, indices: range) -> Causal | Wan:
    """A model that does not have these blocks."""
    cut = Causal(model.cfg, model.chunk) if isinstance(model, Causal) else Wan(model.cfg)
    cut.double().load_state_dict(model.state_dict())
    cut.trunk.blocks = nn.ModuleList(
        block for i, block in enumerate(cut.trunk.blocks) if i not in indices
    )
    return cut


@torch.no_grad()
def test_below_the_level_the_middle_is_not_there_and_above_it_nothing_is_missing() -> None:
    """Rows of one batch on either side of it; a middle that is replaced by noise must not matter
    below."""
    wan, data = tiny.wan(), tiny.clip(1, samples=1)
    short = without(wan, tiny.SKIP.middle(6))
    low, high = (torch.full((2,), t, dtype=torch.float64) for t in (0.62, 0.63))
    expected = torch.stack(
        [short(data.x_t[0], low, data.cond)[0], wan(data.x_t[0], high, data.cond)[1]]
    )
    set_blocks(wan, BlocksConfig(skip=tiny.SKIP))
    with BlockPassCounter(wan, WanBlock) as counter:
        both = wan(data.x_t[0], torch.stack([low[0], high[1]]), data.cond)
    assert torch.allclose(both, expected, rtol=0, atol=1e-12) and counter.calls == 6
    with BlockPassCounter(wan, WanBlock) as counter:
        assert torch.allclose(wan(data.x_t[0], low, data.cond)[0], expected[0], rtol=0, atol=1e-12)
    assert counter.calls == 4
    set_blocks(wan, BlocksConfig())
    assert torch.equal(wan(data.x_t[0], high, data.cond)[1], expected[1])


@torch.no_grad()
def test_the_first_steps_of_a_sampler_are_whole() -> None:
    """Whole, then short, in an Euler rollout: its frames are those of a loop that changes the model
    by hand."""
    skip = SkipConfig(prefix=2, suffix=2, full_steps=2, steps=5, shift=5.0)
    causal, wan = (
        tiny.student(tiny.Variant("causal", 1), dtype=torch.float32),
        tiny.wan(dtype=torch.float32),
    )
    cond, sampler = tiny.prompts(1, dtype=torch.float32), build_sampler("euler", 5, 5.0)
    assert isinstance(causal, Causal)
    plain = clips_of(generate_latents(causal, cond, [0], SHAPE, sampler))
    for model in (causal, wan):
        set_blocks(model, BlocksConfig(skip=skip))
    with BlockPassCounter(causal, WanBlock) as counter:
        skipped = clips_of(generate_latents(causal, cond, [0], SHAPE, sampler))
    assert counter.calls == 3 * (2 * 6 + 3 * 4) + 2 * 6, (
        "and the clean pass of a finished frame is whole"
    )
    assert not torch.allclose(skipped, plain, atol=1e-3)

    calls: list[int] = []
    short = without(wan, skip.middle(6)).float()
    whole = Wan(wan.cfg)
    whole.load_state_dict(wan.state_dict())

    def by_hand(x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        calls.append(len(calls))
        velocity: Tensor = (whole if len(calls) <= skip.full_steps else short)(x_t, t, cond)
        return velocity

    expected = sample_bidirectional(by_hand, cond, SHAPE, sampler, [0])
    assert torch.allclose(
        sample_bidirectional(wan, cond, SHAPE, sampler, [0]), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("steps", [4, 50])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_the_level_lies_between_two_steps(steps: int, shift: float) -> None:
    times = torch.tensor(many_step_times(steps, shift)[:-1], dtype=torch.float32)
    for first in range(steps + 1):
        full = SkipConfig(full_steps=first, steps=steps, shift=shift).full(times, 0.0)
        assert full.tolist() == [True] * first + [False] * (steps - first)
    assert SkipConfig().full(torch.tensor([0.0]), 0.0).all(), (
        "finished frames run through all blocks"
    )


def test_gradients_of_what_was_bypassed() -> None:
    """The middle learns from the steps that it runs in and from finished frames; without any its
    gradient is zero, but there."""
    model, data = tiny.student(tiny.SKIPPING), tiny.clip(1)
    for level, targets, learns in ((0.5, [0], False), (0.9, [0], True), (0.5, [0, 1], True)):
        data.t = torch.full_like(data.t, level)
        tiny.teacher_forced(model, data, targets).pow(2).mean().backward()
        norms = {
            name: None if g is None else float(g.norm())
            for name, g in tiny.gradients(model).items()
        }
        middle = [
            norm
            for name, norm in norms.items()
            if name.startswith(("trunk.blocks.2.", "trunk.blocks.3."))
        ]
        assert None not in norms.values(), "every rank reaches the same parameters"
        assert any(norm and norm > 0 for norm in middle) == learns
        assert (norms["trunk.blocks.1.ffn.net.2.weight"] or 0) > 0


class PerLayer:
    """The whole table of scores of every layer, under its own mask."""

    def __init__(self, masks: list[Tensor]) -> None:
        self.masks = masks

    def __call__(self, layer: int, q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor) -> Tensor:
        return attention(q_BNLD, k_BNLD, v_BNLD, self.masks[layer])


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3])
def test_frame_diagonal_blocks_are_the_masks_written_out(chunk: int) -> None:
    variant = tiny.Variant("causal", chunk, blocks=BlocksConfig(2))
    model, data = tiny.student(variant), tiny.clip(chunk)
    assert isinstance(model, Causal)
    layout = Layout.teacher_forced(
        2, [0, 1, 2], 2, chunk * model.cfg.tokens(tiny.HEIGHT, tiny.WIDTH)
    )
    causal = dense_mask(layout, torch.device("cpu"))
    kinds, chunks = layout.per_token(torch.device("cpu"))
    own = (kinds[:, None] == kinds) & (chunks[:, None] == chunks)
    trunk, frames = model.trunk, 2 * chunk
    noisy = data.x_t.transpose(0, 1).flatten(1, 2)
    t = torch.cat(
        [torch.zeros(2, frames, dtype=torch.float64), data.t.transpose(0, 1).flatten(1)], 1
    )
    rotary = trunk.rope(
        [*range(frames), *range(3 * chunk), *range(3 * chunk)], tiny.HEIGHT, tiny.WIDTH, noisy
    )
    x, text = torch.cat([data.x[:, :frames], noisy], 1), trunk.text(data.cond.text_BLE)
    tokens = trunk(x, t, text, rotary, PerLayer([causal] * 4 + [own] * 2))
    out = trunk.velocity(tokens, trunk.times(t).temb, tiny.HEIGHT, tiny.WIDTH)[:, frames:]
    ours = tiny.teacher_forced(model, data)
    assert torch.allclose(ours, out.unflatten(1, (2, -1)).transpose(0, 1), rtol=0, atol=1e-12)
    set_blocks(model, BlocksConfig())
    assert not torch.allclose(ours, tiny.teacher_forced(model, data), atol=1e-3)


@torch.no_grad()
def test_a_frame_diagonal_block_keeps_no_history_and_a_finished_frame_does_not_run_through_it() -> (
    None
):
    for diagonal in (2, 6):
        model = tiny.student(tiny.Variant("causal", 1, blocks=BlocksConfig(diagonal)))
        x, cond = tiny.latents(2, 1), tiny.prompts(2)
        stream: Stream = tiny.stream(model, cond, x)
        with BlockPassCounter(model, WanBlock) as counter:
            stream = model.advance(stream, x, x) if diagonal < 6 else stream
            assert counter.calls == 6 - diagonal
        assert sorted(stream.cache.layers) == list(range(6 - diagonal))
        student: FrameStreamer = model
        now, other = (
            student.denoise(student.advance(stream, past, x), x, torch.ones(2))
            for past in (x, x + 1)
        )
        assert torch.allclose(now, other, rtol=0, atol=1e-12) == (diagonal == 6), (
            "then no block sees a past"
        )


def test_a_checkpoint_says_how_it_is_run() -> None:
    config = CheckpointConfig(
        ModelConfig("causal", wan=tiny.CFG, blocks=BlocksConfig(2, tiny.SKIP))
    )
    read = from_yaml(CheckpointConfig, to_yaml(config))
    assert read == config
    model = build_model(read.model)
    assert isinstance(model, Causal) and blocks_of(model) == BlocksConfig(2, tiny.SKIP)
    assert read.model.with_blocks(None) is read.model
    plain = build_model(read.model.with_blocks(BlocksConfig()))
    assert isinstance(plain, Causal) and blocks_of(plain) == BlocksConfig()
    with pytest.raises(UserError, match="compile"):
        compile_steps(model, CompileConfig(enabled=True), torch.device("cpu"))


@pytest.mark.parametrize(
    ("family", "blocks", "words"),
    [
        ("scd", BlocksConfig(1), "only the causal baseline has it"),
        ("wan", BlocksConfig(1), "only the causal baseline has it"),
        ("causal", BlocksConfig(7), "the model has 6 blocks"),
        ("scd", BlocksConfig(skip=tiny.SKIP), "SCD's decoder is short already"),
        ("causal", BlocksConfig(skip=SkipConfig(prefix=3, suffix=3)), "leave nothing of 6 blocks"),
        ("causal", BlocksConfig(3, tiny.SKIP), "make the suffix at least as long"),
    ],
)
def test_what_a_model_cannot_do(family: str, blocks: BlocksConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ModelConfig(
            family,
            wan=tiny.CFG,
            scd=tiny.scd_config(tiny.Variant("scd", 1, "delta")),
            blocks=blocks,
        )


@pytest.mark.parametrize(
    "wrong", [{"prefix": -1}, {"full_steps": 51}, {"steps": 0}, {"shift": 0.0}]
)
def test_schedules_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"skip\."):
        SkipConfig(**wrong)  # type: ignore[arg-type]
