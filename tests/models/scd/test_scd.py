"""What holds for SCD alone: the fused encoder pass, the frame-wise decoder, the presets, the
corruption of c."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from scd_sf.diffusion.noise import cpu_noise
from scd_sf.models.build import Scd
from scd_sf.models.interface import Corruption, Query, Stream
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig, contexts_per_sample, corrupt
from scd_sf.models.scd.scratch import ScdScratch
from scd_sf.models.scd.transplant import transplant_scd
from scd_sf.models.scd.wan import ScdWan
from scd_sf.models.wan.transformer import WanConfig
from scd_sf.nn.attention import FullSequence, Streaming
from scd_sf.nn.kv_cache import KVCache
from scd_sf.nn.masks import Layout, dense_mask
from scd_sf.types import UserError

every_scd = pytest.mark.parametrize("variant", [v for v in tiny.SOME if v.family == "scd"], ids=str)
DELTA = [tiny.Variant("scd", chunk, "delta") for chunk in (1, 3)]
GRID = (tiny.HEIGHT, tiny.WIDTH)
BILLION = 1e9


def scd(variant: tiny.Variant) -> Scd:
    model = tiny.student(variant)
    assert isinstance(model, Scd)
    return model


def encode(model: Scd, data: tiny.Clip) -> Tensor:
    """Contexts (B, chunks, tokens of a chunk, E) of a clip, teacher-forced."""
    chunks = data.x.shape[1] // model.chunk
    text = model.encoder.text(data.cond.text_BLE)
    if isinstance(model, ScdScratch):
        c_BLE = model.encode(data.x, text, data.cond, range(chunks))
    else:
        assert data.query.x is not None and data.query.t is not None
        c_BLE = model.encode(data.x, data.query.x, data.query.t, text, range(chunks))
    return c_BLE.unflatten(1, (chunks, -1))


@pytest.mark.parametrize("chunk", [1, 3])
@torch.no_grad()
def test_fused_pass_equals_a_clean_pass_and_a_query_pass(chunk: int) -> None:
    model, data = scd(tiny.Variant("scd", chunk, "junction")), tiny.clip(chunk, samples=1)
    x, query = data.x.split(chunk, 1), data.query.x.split(chunk, 1)
    text = model.encoder.text_kv(model.encoder.text(data.cond.text_BLE))
    length = chunk * tiny.CFG.tokens(*GRID)

    def run(
        frames: Tensor, t: float, index: int, cache: KVCache, write: int
    ) -> tuple[Tensor, KVCache]:
        tokens = model.encoder.embed(frames)
        positions = model.encoder.rope(range(index * chunk, (index + 1) * chunk), *GRID, tokens)
        mod = model.encoder.times(torch.full(frames.shape[:2], t, dtype=frames.dtype)).mod
        attend = Streaming(cache, (length,), write)
        out = model.encoder.run(tokens, mod, text, positions, attend)
        return out, cache.grown(cache.write(attend.staged), write * length)

    cache = KVCache.empty()
    stream: Stream = tiny.stream(model, data.cond)
    for index in range(len(x)):
        if index:
            _, cache = run(x[index - 1], 0.0, index - 1, cache, write=1)
        c, _ = run(query[index], 1.0, index, cache, write=0)
        stream = model.advance(stream, x[index - 1] if index else None, query[index])
        assert stream.context is not None and stream.context.prefix is not None
        assert torch.allclose(stream.context.prefix, c, rtol=0, atol=1e-12)
        assert isinstance(stream.cache, KVCache) and stream.cache.length == cache.length
        for layer in cache.layers:
            wanted, got = cache.layer(layer), stream.cache.layer(layer)
            assert wanted is not None and got is not None
            assert all(
                torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(got, wanted, strict=True)
            )


@torch.no_grad()
def test_context_sees_earlier_clean_frames_and_its_own_query_only() -> None:
    """c_i does not depend on x_i except through the noised query, nor on anything later."""
    model, data = scd(tiny.Variant("scd", 1, "junction")), tiny.clip(1, chunks=4)
    before = encode(model, data)

    def changed(x: Tensor, query: Tensor) -> list[bool]:
        other = replace(data, x=x, query=replace(data.query, x=query))
        return ((encode(model, other) - before).abs().amax(dim=(0, 2, 3)) > 1e-12).tolist()

    bump = torch.zeros_like(data.x)
    bump[:, 1] = 1.0
    assert changed(data.x + bump, data.query.x) == [False, False, True, True]
    assert changed(data.x, data.query.x + bump) == [False, True, False, False]
    past_and_future = torch.zeros_like(data.x)
    past_and_future[:, 3] = 1.0
    assert changed(data.x + past_and_future, data.query.x) == [False] * 4


@every_scd
@torch.no_grad()
def test_decoder_rows_are_independent_given_their_contexts(variant: tiny.Variant) -> None:
    model, data = scd(variant), tiny.clip(variant.chunk, batch=1, samples=1)
    chunks = data.x.shape[1] // variant.chunk
    text = model.encoder.text(data.cond.text_BLE)
    c, query = encode(model, data)[0], data.query.x[0].unflatten(0, (chunks, -1))
    x_t, t = data.x_t[0, 0].unflatten(0, (chunks, -1)), data.t[0, 0].unflatten(0, (chunks, -1))

    def decode(rows: slice, c: Tensor, x_t: Tensor) -> Tensor:
        context = model.decoder.context(c[rows], query[rows], torch.ones_like(t[rows]), text)
        return model.decoder(context, x_t[rows], t[rows], text)

    together = decode(slice(None), c, x_t)
    for row in range(chunks):
        one = slice(row, row + 1)
        assert torch.allclose(decode(one, c, x_t), together[one], rtol=0, atol=1e-12)
        others = torch.arange(chunks) != row
        c_other, x_other = c.clone(), x_t.clone()
        c_other[others], x_other[others] = 0.5, -0.5
        assert torch.allclose(
            decode(slice(None), c_other, x_other)[one], together[one], rtol=0, atol=1e-12
        )
        c_other[row] += torch.randn(c[row].shape, generator=tiny.generator(row), dtype=c.dtype)
        assert float((decode(one, c_other, x_t) - together[one]).abs().max()) > 1e-4, (
            "the context is ignored"
        )


@pytest.mark.parametrize("variant", DELTA, ids=str)
@torch.no_grad()
def test_delta_starts_as_causal_wan_with_chunk_diagonal_late_layers(variant: tiny.Variant) -> None:
    """At t = t_query with the same eps, transplanted 'delta' is Wan under the teacher-forcing mask
    up to the last encoder layer and chunk by chunk after it (docs/deviations.md)."""
    wan, data = tiny.wan(), tiny.clip(variant.chunk, samples=1)
    with tiny.double():
        model, _ = transplant_scd(wan, tiny.scd_config(variant))
    batch, frames = data.x.shape[:2]
    chunks, tokens, trunk = (
        frames // variant.chunk,
        variant.chunk * tiny.CFG.tokens(*GRID),
        wan.trunk,
    )
    t = torch.full((batch, frames), 0.97, dtype=torch.float64)
    x_t = 0.03 * data.x + 0.97 * data.eps[0]
    query = Query(x_t, t)
    ours = model.teacher_forced(x_t[None], t[None], data.x, data.cond, query=query)[0]

    late, text = len(tiny.ENCODER), trunk.text(data.cond.text_BLE)
    sequence = trunk.embed(torch.cat([data.x, x_t], 1))
    mask = dense_mask(Layout.teacher_forced(chunks, range(chunks), 1, tokens), x_t.device)
    mod = trunk.times(torch.cat([torch.zeros_like(t), t], 1)).mod
    rotary = trunk.rope([*range(frames), *range(frames)], *GRID, sequence)
    hidden = trunk.run(sequence, mod, text, rotary, FullSequence(mask), slice(0, late))[
        :, chunks * tokens :
    ]
    times = trunk.times(t)
    diagonal = dense_mask(
        Layout(tuple(range(1, chunks + 1)), tuple(range(chunks)), tokens), x_t.device
    )
    rotary = trunk.rope(range(frames), *GRID, sequence)
    hidden = trunk.run(hidden, times.mod, text, rotary, FullSequence(diagonal), slice(late, None))
    assert torch.allclose(ours, trunk.velocity(hidden, times.temb, *GRID), rtol=0, atol=1e-11)


def test_corruption_has_the_rms_of_each_token_and_differs_per_row() -> None:
    c = torch.randn(6, 50, 64, generator=tiny.generator(0)) * torch.linspace(0.1, 10, 50)[:, None]
    noise = (corrupt(c, 0.05, cpu_noise(tiny.generator(1))) - c) / 0.05
    ratio = noise.pow(2).mean((0, 2)).sqrt() / c.pow(2).mean((0, 2)).sqrt()
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.02)
    assert float(ratio.min()) > 0.8 and float(ratio.max()) < 1.2
    unit = (noise / c.pow(2).mean(-1, keepdim=True).sqrt()).flatten(1)
    between = torch.corrcoef(unit) - torch.eye(6)
    assert float(between.abs().max()) < 0.1
    rows = contexts_per_sample(c, 1, 5, None)
    assert torch.equal(rows, c.unflatten(1, (5, -1)).flatten(0, 1)), "no corruption, no noise"


def test_corruption_is_drawn_per_noisy_sample_and_reproducible() -> None:
    model, data = scd(tiny.Variant("scd", 1, "junction")), tiny.clip(1, samples=1)
    twice = replace(data, x_t=data.x_t.repeat(2, 1, 1, 1, 1, 1), t=data.t.repeat(2, 1, 1))
    with torch.no_grad():
        clean = tiny.teacher_forced(model, twice)
        runs = []
        for _ in range(2):
            twice.corruption = Corruption(0.5, tiny.generator(5))
            runs.append(tiny.teacher_forced(model, twice))
    assert torch.allclose(clean[0], clean[1], rtol=0, atol=1e-12)
    assert float((runs[0][0] - runs[0][1]).abs().max()) > 1e-3
    assert torch.equal(runs[0], runs[1])


def test_gradients_reach_every_parameter_of_both_nets() -> None:
    for variant in (v for v in tiny.SOME if v.family == "scd" and v.chunk == 1):
        model, data = scd(variant), tiny.clip(1, chunks=2)
        tiny.teacher_forced(model, data).pow(2).mean().backward()
        silent = [
            n for n, g in tiny.gradients(model).items() if g is None or float(g.abs().max()) == 0
        ]
        assert not silent, f"{variant}: {silent}"


def test_channel_and_paper_adapters_start_as_identities() -> None:
    channel = ScdWan(tiny.CFG, tiny.scd_config(tiny.Variant("scd", 1, "channel"))).decoder
    paper = ScdWan(tiny.CFG, tiny.scd_config(tiny.Variant("scd", 1, "paper"))).decoder
    assert channel.adapter is not None and paper.adapter is not None
    x, c = torch.randn(2, 3, tiny.CFG.width, generator=tiny.generator(0)).unbind(0)
    assert torch.equal(channel.adapter(torch.cat([x, c], -1)), x + c)
    assert torch.equal(paper.adapter(c), c)


def test_where_the_junction_falls() -> None:
    assert DecoderConfig().num_early_blocks(range(25)) == 5
    assert DecoderConfig((0, 1, 4, 5), "delta").num_early_blocks((0, 1, 2)) == 2
    assert DecoderConfig((1, 1, 5), "junction", split=1).num_early_blocks((0, 2, 3)) == 1
    with pytest.raises(
        UserError, match="no block comes after the junction, so the context would never be read"
    ):
        DecoderConfig((0, 1), "junction").num_early_blocks((0, 1, 2))
    with pytest.raises(UserError, match="fusion 'paper' has no early blocks"):
        DecoderConfig((0, 5), "paper", split=1).num_early_blocks((0,))
    assert (
        DecoderConfig((0, 5), "paper").num_early_blocks((0,))
        == DecoderConfig((0, 5), "channel").num_early_blocks((0,))
        == 0
    )


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("fusion", "sum", "decoder.fusion is 'sum'; use one of paper, junction, delta, channel"),
        ("prefix_rope", "none", "decoder.prefix_rope is 'none'"),
        ("prefix", "half", "decoder.prefix is 'half'"),
        ("split", 11, r"decoder.split is 11; it must lie in 0..10"),
    ],
)
def test_bad_decoder_configs_are_named(field: str, value: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(DecoderConfig(), **{field: value})


def test_query_is_needed_and_layers_must_exist() -> None:
    model, data = scd(tiny.Variant("scd", 1, "junction")), tiny.clip(1)
    with pytest.raises(UserError, match="needs the encoder's query"):
        model.teacher_forced(data.x_t, data.t, data.x, data.cond)
    with pytest.raises(
        UserError,
        match=r"encoder_layers is \[0, 6\]: the base model has layers 0\.\.5; remove \[6\]",
    ):
        ScdWan(tiny.CFG, ScdConfig((0, 6), DecoderConfig(tiny.DECODER)))
    with pytest.raises(UserError, match=r"decoder.layers is \[-1\]"):
        ScdWan(tiny.CFG, ScdConfig((0,), DecoderConfig((-1,))))
    with pytest.raises(UserError, match="name at least one"):
        ScdWan(tiny.CFG, ScdConfig((), DecoderConfig(tiny.DECODER)))
    with pytest.raises(UserError, match=r"chunk is 0; it must be at least 1"):
        ScdWan(tiny.CFG, ScdConfig((0,), DecoderConfig(tiny.DECODER), chunk=0))


def test_default_scd_has_the_papers_size() -> None:
    """Supplement Table 8 says 1.6B; 35 layer instances and two sets of embeddings are 1.65B."""
    with torch.device("meta"):
        model = ScdWan(WanConfig(), ScdConfig())
    count = sum(p.numel() for p in model.parameters())
    assert count / BILLION == pytest.approx(1.65, abs=0.02)
    assert len(model.encoder.blocks) + len(model.decoder.trunk.blocks) == 35
