"""Guidance while sampling: against its formulas written out with plain students, and what it does
not double."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from scd_sf.diffusion.guidance import GuidanceConfig
from scd_sf.diffusion.samplers import Euler
from scd_sf.evaluation.table import BlockPassCounter
from scd_sf.generation.guided import SampleGuidance, under_guidance
from scd_sf.generation.rollout import rollout
from scd_sf.models.build import Scd
from scd_sf.models.interface import FrameStreamer, SeparableStreamer, Stream
from scd_sf.nn.layers import DitBlock, WanBlock
from scd_sf.types import Conditioning, UserError

families = pytest.mark.parametrize("variant", tiny.FEW, ids=str)
scd_only = pytest.mark.parametrize("variant", [v for v in tiny.SOME if v.family == "scd"], ids=str)
NULL = tiny.prompts(1, 99)
LATENT = (tiny.HEIGHT, tiny.WIDTH)
TEXT = SampleGuidance(GuidanceConfig(3.0))


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def ones(x: Tensor) -> Tensor:
    return torch.ones_like(x)


def second_chunk(model: FrameStreamer, cond: Conditioning, n: int) -> Tensor:
    """The velocity of a stream's second chunk: history, query and x_t are fixed."""
    known, query, x_t = tiny.latents(2, n, 1), tiny.latents(2, n, 2), tiny.latents(2, n, 3)
    stream: Stream = tiny.stream(model, cond, query)
    stream = model.advance(stream, known, query)
    return model.denoise(stream, x_t, torch.full((2,), 0.6))


def at_context(model: SeparableStreamer, stream: Stream, c_BLE: Tensor, n: int) -> Tensor:
    """The velocity of :func:`second_chunk` given a context."""
    stream = model.with_context(stream, c_BLE, tiny.latents(2, n, 2))
    return model.denoise(stream, tiny.latents(2, n, 3), torch.full((2,), 0.6))


@families
@torch.no_grad()
def test_text_guidance_of_the_whole_student(variant: tiny.Variant) -> None:
    model, cond, n = tiny.student(variant), tiny.prompts(2), variant.chunk
    plain, null = second_chunk(model, cond, n), second_chunk(model, NULL.expand(2), n)
    got = second_chunk(under_guidance(model, TEXT, NULL, zeros), cond, n)
    assert torch.allclose(got, null + 3.0 * (plain - null), rtol=0, atol=1e-11)
    assert float((got - plain).abs().max()) > 1e-4
    additive = SampleGuidance(GuidanceConfig(2.0, "additive"))
    assert torch.allclose(
        second_chunk(under_guidance(model, additive, NULL, zeros), cond, n), got, rtol=0, atol=1e-12
    )


@scd_only
@torch.no_grad()
def test_guidance_of_the_decoder_alone(variant: tiny.Variant) -> None:
    """The same context under both prompts, and the encoder runs once per clip and chunk."""
    model, cond, n = tiny.student(variant), tiny.prompts(2), variant.chunk
    assert isinstance(model, Scd)
    guided = under_guidance(model, SampleGuidance(GuidanceConfig(3.0), "decoder"), NULL, zeros)
    with BlockPassCounter(model.encoder, (WanBlock, DitBlock)) as counter:
        got = second_chunk(guided, cond, n)
    assert counter.samples == 2 * 2 * len(tiny.ENCODER)
    query = tiny.latents(2, n, 2)
    stream: Stream = tiny.stream(model, cond, query)
    stream, c = model.encode_next(stream, tiny.latents(2, n, 1), query)
    plain = at_context(model, stream, c, n)
    null = at_context(model, model.switch(stream, NULL.expand(2)), c, n)
    assert torch.allclose(got, null + 3.0 * (plain - null), rtol=0, atol=1e-11)


@scd_only
@torch.no_grad()
def test_guidance_by_corruption(variant: tiny.Variant) -> None:
    """v(c~) + s (v(c) - v(c~)); one noise per chunk for all steps; no noise, no effect."""
    model, cond, n = tiny.student(variant), tiny.prompts(2), variant.chunk
    assert isinstance(model, Scd)
    got = second_chunk(
        under_guidance(model, SampleGuidance(corruption=1.5, context_noise=0.1), NULL, ones),
        cond,
        n,
    )
    query = tiny.latents(2, n, 2)
    stream: Stream = tiny.stream(model, cond, query)
    stream, c = model.encode_next(stream, tiny.latents(2, n, 1), query)
    plain = at_context(model, stream, c, n)
    dirty = c + 0.1 * c.pow(2).mean(-1, keepdim=True).sqrt()
    corrupted = at_context(model, stream, dirty, n)
    assert torch.allclose(got, corrupted + 1.5 * (plain - corrupted), rtol=0, atol=1e-11)
    silent = second_chunk(
        under_guidance(model, SampleGuidance(corruption=1.5), NULL, zeros), cond, n
    )
    assert torch.allclose(silent, plain, rtol=0, atol=1e-11)


@families
@torch.no_grad()
def test_rollout_cannot_tell_it_apart(variant: tiny.Variant) -> None:
    model, noise = tiny.student(variant), tiny.latents(2, 3 * variant.chunk, 5)
    guided = rollout(
        under_guidance(model, TEXT, NULL, zeros), noise, tiny.prompts(2), Euler(2), zeros
    )
    plain = rollout(model, noise, tiny.prompts(2), Euler(2), zeros)
    assert guided.shape == plain.shape and float((guided - plain).abs().max()) > 1e-4


def test_what_is_refused() -> None:
    causal = tiny.student(tiny.FEW[0])
    assert not SampleGuidance().on and TEXT.on and SampleGuidance(corruption=1.5).on
    for setting in (SampleGuidance(corruption=1.5), SampleGuidance(GuidanceConfig(3.0), "decoder")):
        with pytest.raises(UserError, match="needs an SCD student"):
            under_guidance(causal, setting, NULL, zeros)
    for arguments, words in (
        ({"scope": "encoder"}, "guidance.scope is 'encoder'"),
        ({"text": GuidanceConfig(3.0), "corruption": 1.5}, "not both"),
        ({"context_noise": 0.0}, "guidance.context_noise is 0.0"),
    ):
        with pytest.raises(UserError, match=words):
            SampleGuidance(**arguments)
