"""Invariants of every student, whatever its family (design section 3, "Invariants" and "Gradient
rules")."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from scd_sf.evaluation.roofline import HeavyCalls
from scd_sf.models.build import Student
from scd_sf.models.interface import Query, Stream, check_chunks, pick_chunks
from scd_sf.nn.kv_cache import CacheConfig, KVCache, Window
from scd_sf.types import UserError

some_students = pytest.mark.parametrize("variant", tiny.SOME, ids=str)
a_few = pytest.mark.parametrize("variant", tiny.FEW, ids=str)


def streamed(model: Student, data: tiny.Clip, cache: CacheConfig | None = None) -> Tensor:
    """The same velocities as the teacher-forced pass, chunk by chunk through the cache: (K, B, F,
    C, H, W)."""
    stream: Stream = tiny.stream(model, data.cond, cache=cache)
    previous, chunks = None, []
    for index in range(data.x.shape[1] // model.chunk):
        own = slice(index * model.chunk, (index + 1) * model.chunk)
        stream = model.advance(stream, previous, data.query.x[:, own])
        samples = zip(data.x_t, data.t, strict=True)
        chunks.append(
            torch.stack([model.denoise(stream, x[:, own], t[:, own][:, 0]) for x, t in samples])
        )
        previous = data.x[:, own]
    return torch.cat(chunks, dim=2)


@pytest.mark.parametrize(
    ("variant", "dtype", "tolerance"),
    [
        *(pytest.param(v, torch.float64, 1e-12, id=f"{v}-fp64") for v in tiny.VARIANTS),
        *(pytest.param(v, torch.float32, 1e-5, id=f"{v}-fp32") for v in tiny.FEW),
    ],
)
@torch.no_grad()
def test_mask_over_the_clip_equals_frame_by_frame_cache(
    variant: tiny.Variant, dtype: torch.dtype, tolerance: float
) -> None:
    model, data = tiny.student(variant, dtype=dtype), tiny.clip(variant.chunk, dtype=dtype)
    whole = tiny.teacher_forced(model, data)
    assert whole.shape == data.x_t.shape
    assert float(whole.std()) > 0.1
    assert float((streamed(model, data) - whole).abs().max()) < tolerance * max(
        1.0, float(whole.abs().max())
    )


@some_students
def test_batched_samples_equal_looped_samples_and_gradients(variant: tiny.Variant) -> None:
    model, data = tiny.student(variant), tiny.clip(variant.chunk, chunks=2, samples=3)
    batched = tiny.teacher_forced(model, data)
    batched.pow(2).mean().backward()
    at_once = tiny.gradients(model)

    looped = []
    for x_t, t in zip(data.x_t, data.t, strict=True):
        velocity = model.teacher_forced(x_t[None], t[None], data.x, data.cond, query=data.query)
        (velocity.pow(2).mean() / len(data.t)).backward()
        looped.append(velocity.detach()[0])
    assert torch.allclose(batched, torch.stack(looped), rtol=0, atol=1e-11)
    tiny.assert_same_gradients(at_once, tiny.gradients(model), 1e-11)


@some_students
@torch.no_grad()
def test_a_subset_of_targets_is_a_slice_of_the_full_output(variant: tiny.Variant) -> None:
    model, data = tiny.student(variant), tiny.clip(variant.chunk)
    whole = tiny.teacher_forced(model, data)
    for targets in ([1], [0, 2], [2, 0, 1]):
        some = tiny.teacher_forced(model, data, targets)
        assert torch.allclose(
            some, pick_chunks(whole, targets, variant.chunk, 2), rtol=0, atol=1e-11
        )


@some_students
@torch.no_grad()
def test_a_clean_chunk_changes_later_chunks_only(variant: tiny.Variant) -> None:
    """x_t and the query stay; the clean x_1 is replaced: chunks 0 and 1 must not notice, chunk 2
    must."""
    model, data = tiny.student(variant), tiny.clip(variant.chunk)
    before = tiny.teacher_forced(model, data).unflatten(2, (3, -1))
    data.x[:, variant.chunk : 2 * variant.chunk] += 1.0
    after = tiny.teacher_forced(model, data).unflatten(2, (3, -1))
    change = (after - before).abs().amax(dim=(0, 1, 3, 4, 5, 6))
    assert change[:2].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert float(change[2]) > 1e-4


@some_students
@torch.no_grad()
def test_a_noisy_chunk_is_invisible_to_all_other_chunks_and_samples(variant: tiny.Variant) -> None:
    model, data = tiny.student(variant), tiny.clip(variant.chunk)
    before = tiny.teacher_forced(model, data).unflatten(2, (3, -1))
    data.x_t[1, :, variant.chunk : 2 * variant.chunk] += 1.0
    change = (
        (tiny.teacher_forced(model, data).unflatten(2, (3, -1)) - before)
        .abs()
        .amax(dim=(1, 3, 4, 5, 6))
    )
    assert float(change[1, 1]) > 1e-2
    change[1, 1] = 0
    assert float(change.max()) < 1e-12


@a_few
@torch.no_grad()
def test_clips_of_a_batch_do_not_mix_and_each_keeps_its_prompt(variant: tiny.Variant) -> None:
    model, data = tiny.student(variant), tiny.clip(variant.chunk)
    whole = tiny.teacher_forced(model, data)
    for row in (0, 1):
        only = slice(row, row + 1)
        query = Query(data.query.x[only], data.query.t[only])
        cond = data.cond.rows(only)
        alone = model.teacher_forced(
            data.x_t[:, only], data.t[:, only], data.x[only], cond, query=query
        )
        assert torch.allclose(alone, whole[:, only], rtol=0, atol=1e-11)
    data.cond.text_BLE[1] += 1.0
    assert data.cond.actions_BF is not None
    data.cond.actions_BF[1] = (data.cond.actions_BF[1] + 2) % tiny.DIT.num_actions
    other = tiny.teacher_forced(model, data)
    assert torch.allclose(other[:, 0], whole[:, 0], rtol=0, atol=1e-11)
    assert float((other[:, 1] - whole[:, 1]).abs().max()) > 1e-4


@some_students
def test_no_gradient_crosses_chunks(variant: tiny.Variant) -> None:
    """d output_j / d input_i is None for i < j: finished frames and earlier noise are not in the
    graph at all."""
    model, data = tiny.student(variant), tiny.clip(variant.chunk, samples=1)
    chunks = data.x.shape[1] // variant.chunk
    clean = [x.clone().requires_grad_() for x in data.x.chunk(chunks, 1)]
    query = [x.clone().requires_grad_() for x in data.query.x.chunk(chunks, 1)]
    noisy = [x.clone().requires_grad_() for x in data.x_t[0].chunk(chunks, 1)]
    stream: Stream = tiny.stream(model, data.cond)
    for j in range(chunks):
        stream = model.advance(stream, clean[j - 1] if j else None, query[j])
        out = (
            model.denoise(stream, noisy[j], torch.full((2,), 0.7, dtype=torch.float64)).pow(2).sum()
        )
        leaves = [*clean, *query, *noisy]
        found = torch.autograd.grad(out, leaves, retain_graph=True, allow_unused=True)
        reached = [leaves[i] is not None and g is not None for i, g in enumerate(found)]
        own_query = model.needs_query
        expected = (
            [False] * chunks
            + [i == j and own_query for i in range(chunks)]
            + [i == j for i in range(chunks)]
        )
        assert reached == expected


@some_students
def test_history_is_detached_and_never_written_in_place(variant: tiny.Variant) -> None:
    """Nor held twice: every cache of a rollout reads the same tensors, each as large as its own
    tokens."""
    model, data = tiny.student(variant), tiny.clip(variant.chunk, samples=1)
    stream: Stream = tiny.stream(model, data.cond)
    previous, caches = None, []
    for x in data.x.split(variant.chunk, 1):
        stream = model.advance(stream, previous, x)
        assert isinstance(stream.cache, KVCache)
        read = {i: stream.cache.layer(i) for i in stream.cache.layers}
        caches.append(
            (
                stream.cache,
                {i: (kv[0].clone(), kv[1].clone()) for i, kv in read.items() if kv is not None},
            )
        )
        previous = x
    tokens = variant.chunk * tiny.CFG.tokens(tiny.HEIGHT, tiny.WIDTH)
    storages = set()
    for index, (cache, copies) in enumerate(caches):
        start_token = variant.family == "scd" and variant.backbone == "dit"
        assert cache.length == (index + start_token) * tokens and (copies or not index)
        for layer, (k, v) in copies.items():
            now = cache.layer(layer)
            assert now is not None and not now[0].requires_grad and not now[1].requires_grad
            assert (
                now[0].shape[2] == cache.length
                and torch.equal(now[0], k)
                and torch.equal(now[1], v)
            )
            held = [tensor for piece in cache.layers[layer] for tensor in piece]
            assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in held)
            storages |= {tensor.untyped_storage()._cdata for tensor in held}
    last = caches[-1][0].layers
    assert len(storages) == sum(2 * len(pieces) for pieces in last.values())


@some_students
def test_denoise_is_a_pure_read(variant: tiny.Variant) -> None:
    model, data = tiny.student(variant), tiny.clip(variant.chunk, samples=1)
    with torch.no_grad():
        stream: Stream = tiny.stream(model, data.cond, data.x[:, : variant.chunk])
        stream = model.advance(
            stream, data.x[:, : variant.chunk], data.x[:, variant.chunk : 2 * variant.chunk]
        )
        x_t, t = data.x_t[0][:, : variant.chunk], torch.tensor([0.3, 0.9], dtype=torch.float64)
        first = model.denoise(stream, x_t, t)
        model.denoise(stream, x_t + 1, t)
        assert torch.equal(model.denoise(stream, x_t, t), first)


@pytest.mark.parametrize("variant", [*tiny.FEW, tiny.SOME[2]], ids=str)
def test_checkpointing_changes_no_gradient(variant: tiny.Variant) -> None:
    """Teacher-forced, and streamed over two chunks with history: fp64, on and on but for attention
    against off."""
    model, data = tiny.student(variant), tiny.clip(variant.chunk, chunks=2, batch=1, samples=1)
    for forward in (tiny.teacher_forced, streamed):
        found = []
        for on, recompute_attention in ((False, True), (True, True), (True, False)):
            tiny.set_checkpointing(model, on, recompute_attention)
            forward(model, data).pow(2).mean().backward()
            found.append(tiny.gradients(model))
        assert any(g is not None and float(g.abs().max()) > 0 for g in found[0].values())
        for other in found[1:]:
            tiny.assert_same_gradients(found[0], other, 1e-13)


def test_attention_is_computed_again_unless_it_is_kept() -> None:
    model, data = (
        tiny.student(tiny.FEW[0]),
        tiny.clip(tiny.FEW[0].chunk, chunks=2, batch=1, samples=1),
    )
    counts = []
    for on, recompute_attention in ((False, True), (True, True), (True, False)):
        tiny.set_checkpointing(model, on, recompute_attention)
        with HeavyCalls() as heavy:
            tiny.teacher_forced(model, data).pow(2).mean().backward()
        names = {str(func): 0 for func, *_ in heavy.calls}
        for (func, *_), count in heavy.calls.items():
            names[str(func)] += count
        counts.append(
            sum(n for name, n in names.items() if "attention" in name and "backward" not in name)
        )
    assert counts[1] == 2 * counts[0] and counts[2] == counts[0], counts


@a_few
@torch.no_grad()
def test_window_and_sink_forget_the_middle_and_ring_equals_functional(
    variant: tiny.Variant,
) -> None:
    model, data = tiny.student(variant), tiny.clip(variant.chunk, chunks=5, batch=1, samples=1)
    chunk = variant.chunk

    def with_cache(cache: CacheConfig | None) -> Tensor:
        return streamed(model, data, cache).unflatten(2, (5, -1))

    whole, windowed = with_cache(None), with_cache(CacheConfig(window=chunk, sink=chunk))
    assert torch.allclose(windowed[:, :, :3], whole[:, :, :3], rtol=0, atol=1e-12)
    assert float((windowed[:, :, 4] - whole[:, :, 4]).abs().max()) > 1e-5
    assert torch.allclose(
        with_cache(CacheConfig(chunk, chunk, preallocate=1)), windowed, rtol=0, atol=1e-12
    )
    assert torch.allclose(with_cache(CacheConfig(preallocate=4 * chunk)), whole, rtol=0, atol=1e-12)
    with pytest.raises(UserError, match="give it a window"):
        with_cache(CacheConfig(preallocate=2 * chunk))


@a_few
@torch.no_grad()
def test_bf16_weights_give_fp32_velocities_near_the_fp32_model(variant: tiny.Variant) -> None:
    data = tiny.clip(variant.chunk, dtype=torch.float32)
    exact = tiny.teacher_forced(tiny.student(variant, dtype=torch.float32), data)
    model = tiny.student(variant, dtype=torch.bfloat16)
    for coarse in (tiny.teacher_forced(model, data), streamed(model, data)):
        assert coarse.dtype == torch.float32
        assert float((coarse - exact).pow(2).mean().sqrt() / exact.std()) < 0.1


@a_few
def test_bad_geometry_is_named(variant: tiny.Variant) -> None:
    model, data = tiny.student(variant), tiny.clip(variant.chunk)
    with pytest.raises(UserError, match="not divisible by the patch"):
        model.start(data.cond, (tiny.HEIGHT + 1, tiny.WIDTH))
    if variant.chunk > 1:
        with pytest.raises(
            UserError, match=r"chunk is 3, which does not divide the clip's 4 latent frames"
        ):
            model.teacher_forced(
                data.x_t[:, :, :4], data.t[..., :4], data.x[:, :4], data.cond, query=data.query
            )


AXES = (4, 2, 2)


def test_chunk_helpers() -> None:
    assert check_chunks(6, 3) == 2
    with pytest.raises(UserError, match="choose a divisor"):
        check_chunks(5, 2)
    x = torch.arange(6)
    assert pick_chunks(x, [0, 1, 2], 2, 0) is x
    assert pick_chunks(x, [2, 0], 2, 0).tolist() == [4, 5, 0, 1]
    assert CacheConfig(window=2, sink=1).token_window(7, AXES) == Window(14, 7, 7, AXES)
    assert CacheConfig(window=2, sink=1, turn_sink=False).token_window(7, AXES) == Window(
        14, 7, 0, AXES
    )
    assert CacheConfig().token_window(7, AXES) == Window(None, 0, 0, AXES)


@pytest.mark.parametrize(
    "setting", [{"window": 0}, {"window": -1}, {"sink": -1}, {"preallocate": 0}]
)
def test_bad_cache_settings_are_named(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="cache"):
        replace(CacheConfig(), **setting)


def test_sampling_under_inference_mode_does_not_poison_training() -> None:
    """Rotary tables and masks are kept between calls: those first made under inference mode must
    still train."""
    variant = tiny.Variant("scd", 1, "junction")
    model, data = tiny.student(variant), tiny.clip(1, chunks=5, samples=1)
    with torch.inference_mode():
        tiny.teacher_forced(model, data)
        streamed(model, data)
    tiny.teacher_forced(model, data).pow(2).mean().backward()
    streamed(model, data).pow(2).mean().backward()
    assert all(g is not None for g in tiny.gradients(model).values())


def test_a_window_that_holds_every_frame_reserves_no_more() -> None:
    assert CacheConfig.sampling(10**12, 3, 21) == CacheConfig.sampling(0, 0, 21)
    assert CacheConfig.sampling(18, 3, 22).preallocate == 21
