"""The one autoregressive loop: what it calls how often, with which gradients, and families it
cannot tell apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from scd_sf.diffusion.noise import cpu_noise
from scd_sf.diffusion.samplers import Euler, FewStepSampler, Sampler
from scd_sf.generation.rollout import rollout, stream_rollout
from scd_sf.models.build import Scd, Student
from scd_sf.models.causal import Causal
from scd_sf.models.interface import Corruption, Query, Stream
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.scd.wan import ScdWan
from scd_sf.models.wan.transformer import WanConfig
from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.types import Conditioning, UserError

some_students = pytest.mark.parametrize("variant", tiny.SOME, ids=str)
a_few = pytest.mark.parametrize("variant", tiny.FEW, ids=str)
two = pytest.mark.parametrize("variant", tiny.FEW[:2], ids=str)
FLAT = WanConfig(1, 6, 4, 4, 8, 16, 8, 14)


@dataclass
class Spy:
    """A FrameGenerator that writes down what the loop asks of it."""

    model: Student
    calls: list[tuple[str, float, bool]] = field(default_factory=list)
    history: list[Tensor | None] = field(default_factory=list)

    @property
    def chunk(self) -> int:
        return self.model.chunk

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
        return self.model.teacher_forced(
            x_t, t, x_clean, cond, query=query, corruption=corruption, targets=targets
        )

    def start(
        self, cond: Conditioning, latent_size: tuple[int, int], cache: CacheConfig | None = None
    ) -> Stream:
        self.calls.append(("start", 0.0, torch.is_grad_enabled()))
        return self.model.start(cond, latent_size, cache)

    def switch(self, stream: Stream, cond: Conditioning) -> Stream:
        raise AssertionError("no prompt changes")

    def advance(self, stream: Stream, x_0: Tensor | None, query_noise: Tensor) -> Stream:
        self.calls.append(("advance", 0.0, torch.is_grad_enabled()))
        self.history.append(x_0)
        return self.model.advance(stream, x_0, query_noise)

    def denoise(self, stream: Stream, x_t: Tensor, t: Tensor) -> Tensor:
        self.calls.append(("denoise", float(t[0]), torch.is_grad_enabled()))
        return self.model.denoise(stream, x_t, t)


def noise_for(model: Student, chunks: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return tiny.latents(2, chunks * model.chunk, seed=7, dtype=dtype)


def roll(
    model: Student | Spy, noise: Tensor, sampler: Sampler | None = None, **options: Any
) -> Tensor:
    cond = tiny.prompts(noise.shape[0], dtype=noise.dtype)
    return rollout(
        model, noise, cond, sampler or FewStepSampler(), cpu_noise(tiny.generator(3)), **options
    )


def block_passes(model: Student, chunks: int, steps: int) -> Counter[str]:
    """Transformer block forwards of one rollout, by part of the model."""
    counted: Counter[str] = Counter()
    trunks = (
        {"encoder": model.encoder, "decoder": model.decoder.trunk}
        if isinstance(model, Scd)
        else {"trunk": model.trunk}
    )
    for name, trunk in trunks.items():
        for block in trunk.blocks:
            block.register_forward_hook(lambda *_, name=name: counted.update([name]))
    with torch.no_grad():
        noise = torch.randn(1, chunks * model.chunk, 4, 4, 4, generator=tiny.generator(0))
        times = tuple(1 - i / steps for i in range(steps))
        rollout(
            model,
            noise,
            tiny.prompts(1, dtype=torch.float32),
            FewStepSampler(times),
            cpu_noise(tiny.generator(0)),
        )
    return counted


@pytest.mark.parametrize("chunk", [1, 3])
def test_scd_10_plus_4_with_4_steps_is_26_block_passes_per_chunk(chunk: int) -> None:
    """Encoder once per chunk, decoder S times: 10 + 4 * 4 = 26 (paper, Table 2 law)."""
    decoder = DecoderConfig((0, 1, 12, 13), "junction")
    counted = block_passes(
        ScdWan(FLAT, ScdConfig(tuple(range(10)), decoder, chunk)), chunks=3, steps=4
    )
    assert counted == {"encoder": 3 * 10, "decoder": 3 * 4 * 4}
    assert counted.total() == 3 * 26


@pytest.mark.parametrize(
    ("fusion", "prefix", "once"), [("junction", "cached", 2), ("delta", "full", 2)]
)
def test_what_the_context_costs_once_per_chunk(fusion: str, prefix: str, once: int) -> None:
    """A cached prefix runs c once through the late blocks; delta runs the query once through the
    early blocks."""
    config = ScdConfig(tuple(range(10)), DecoderConfig((0, 1, 12, 13), fusion, prefix=prefix))
    counted = block_passes(ScdWan(FLAT, config), chunks=3, steps=4)
    assert counted == {"encoder": 3 * 10, "decoder": 3 * (once + 4 * 4)}


@pytest.mark.parametrize("chunk", [1, 3])
def test_causal_12_with_4_steps_is_60_block_passes_per_chunk_but_the_last(chunk: int) -> None:
    """Four steps of 12 and one cache pass of 12: 60. The cache pass belongs to the next chunk's
    ``advance``, so the last chunk of a clip never pays for it: 3 chunks are 3 * 48 + 2 * 12."""
    model = Causal(WanConfig(1, 6, 4, 4, 8, 16, 8, 12), chunk)
    assert block_passes(model, chunks=3, steps=4).total() == 3 * 48 + 2 * 12
    # hooks of the first count are still there, harmless
    per_chunk = block_passes(model, chunks=4, steps=4).total()
    assert per_chunk == 4 * 48 + 3 * 12
    assert per_chunk - (3 * 48 + 2 * 12) == 60


@a_few
def test_order_of_calls_and_times(variant: tiny.Variant) -> None:
    spy = Spy(tiny.student(variant))
    with torch.no_grad():
        out = roll(spy, noise_for(spy.model))
    per_chunk = ["advance", "denoise", "denoise", "denoise", "denoise"]
    assert [name for name, _, _ in spy.calls] == ["start"] + 3 * per_chunk
    times = [t for name, t, _ in spy.calls if name == "denoise"]
    assert times == pytest.approx(3 * [1.0, 0.9375, 5 / 6, 0.625])
    assert spy.history[0] is None
    for index, x_0 in enumerate(spy.history[1:]):
        assert x_0 is not None and torch.equal(x_0, out.split(variant.chunk, 1)[index])


@some_students
@torch.no_grad()
def test_rollout_follows_the_teacher_forced_model(variant: tiny.Variant) -> None:
    """No drift between sampling and training: the last step's x_0 is the teacher-forced prediction
    from the same x_t, given the clip the rollout itself produced as clean history."""
    model = tiny.student(variant)
    noise = noise_for(model)
    out = roll(model, noise, FewStepSampler((1.0,)))
    t = torch.ones(1, 2, noise.shape[1])  # the loop's times are fp32
    drawn = cpu_noise(tiny.generator(3))
    query = Query(torch.cat([drawn(x) for x in noise.split(variant.chunk, 1)], 1), t[0].double())
    velocity = model.teacher_forced(noise[None], t, out, tiny.prompts(2), query=query)[0]
    assert torch.allclose(noise - velocity, out, rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_query_has_noise_of_its_own(chunk: int) -> None:
    """Neither the chunk's own noise nor another chunk's query (ADR 0004)."""
    queries: list[Tensor] = []

    class Recorder(Spy):
        def advance(self, stream: Any, x_0: Tensor | None, query_noise: Tensor) -> Any:
            queries.append(query_noise)
            return self.model.advance(stream, x_0, query_noise)

    spy = Recorder(tiny.student(tiny.Variant("scd", chunk, "delta")))
    noise = noise_for(spy.model)
    with torch.no_grad():
        roll(spy, noise)
    drawn = [*queries, *noise.split(chunk, 1)]
    assert len(queries) == 3
    for i, first in enumerate(drawn):
        assert all(float((first - other).abs().mean()) > 0.5 for other in drawn[i + 1 :])


@a_few
@pytest.mark.parametrize("exit_step", [0, 2, 3])
def test_gradients_only_at_the_exit_step(variant: tiny.Variant, exit_step: int) -> None:
    spy = Spy(tiny.student(variant))
    out = roll(spy, noise_for(spy.model), exit_step=exit_step)
    assert out.requires_grad
    flags = [(name, grad) for name, _, grad in spy.calls]
    denoising = [("denoise", False)] * exit_step + [("denoise", True)]
    assert flags == [("start", True)] + 3 * [("advance", True), *denoising]
    assert all(x_0 is None or not x_0.requires_grad for x_0 in spy.history)


@a_few
def test_exit_at_the_last_step_is_the_plain_rollout(variant: tiny.Variant) -> None:
    model = tiny.student(variant)
    with torch.no_grad():
        plain = roll(model, noise_for(model))
    assert torch.equal(roll(model, noise_for(model), exit_step=3).detach(), plain)


@some_students
def test_exit_gradient_reaches_every_parameter(variant: tiny.Variant) -> None:
    """In SCD the encoder runs only in ``advance``: it must train there, all of it, and so must the
    decoder."""
    model = tiny.student(variant)
    roll(model, noise_for(model, chunks=2), exit_step=1).pow(2).mean().backward()
    silent = [n for n, g in tiny.gradients(model).items() if g is None or float(g.abs().max()) == 0]
    assert not silent


@pytest.mark.parametrize("chunk", [1, 3])
def test_frozen_encoder_under_no_grad_would_get_nothing(chunk: int) -> None:
    """Why ``advance`` runs with gradients: under no_grad the same rollout leaves the encoder
    silent."""

    class Blind(Spy):
        def advance(self, stream: Any, x_0: Tensor | None, query_noise: Tensor) -> Any:
            with torch.no_grad():
                return self.model.advance(stream, x_0, query_noise)

    model = tiny.student(tiny.Variant("scd", chunk, "junction"))
    roll(Blind(model), noise_for(model, chunks=2), exit_step=1).pow(2).mean().backward()
    reached = {
        n
        for n, g in tiny.gradients(model).items()
        if n.startswith("encoder.blocks") and g is not None
    }
    assert not reached


@a_few
def test_no_gradient_leaks_between_chunks(variant: tiny.Variant) -> None:
    """Chunk j's exit gradient in the parameters is what it is when the earlier chunks are
    constants."""
    model = tiny.student(variant)
    noise = noise_for(model).requires_grad_()
    chunks = list(
        stream_rollout(
            model,
            noise,
            tiny.prompts(2),
            FewStepSampler((1.0, 0.5)),
            cpu_noise(tiny.generator(3)),
            exit_step=0,
        )
    )
    for j, x_0 in enumerate(chunks):
        (gradient,) = torch.autograd.grad(x_0.pow(2).sum(), noise, retain_graph=True)
        reach = gradient.abs().amax(dim=(0, 2, 3, 4)).split(variant.chunk)
        assert [float(r.max()) > 0 for r in reach] == [i == j for i in range(3)]

    last = chunks[2].pow(2).mean()
    together = torch.autograd.grad(last, list(model.parameters()), allow_unused=True)
    stream, previous = tiny.stream(model, tiny.prompts(2)), None
    drawn = cpu_noise(tiny.generator(3))
    for j, x_T in enumerate(noise.detach().split(variant.chunk, 1)):
        with torch.set_grad_enabled(j == 2):
            stream = model.advance(stream, previous, drawn(x_T))
        previous = chunks[j].detach()
    x_0 = noise.detach()[:, -variant.chunk :]
    x_0 = x_0 - model.denoise(stream, x_0, torch.ones(2))
    alone = torch.autograd.grad(x_0.pow(2).mean(), list(model.parameters()), allow_unused=True)
    for (name, _), left, right in zip(model.named_parameters(), together, alone, strict=True):
        assert (left is None) == (right is None), name
        assert left is None or torch.allclose(left, right, rtol=1e-10, atol=1e-12), name


@two
def test_checkpointing_changes_no_rollout_gradient(variant: tiny.Variant) -> None:
    model, found = tiny.student(variant), []
    for on in (False, True):
        tiny.set_checkpointing(model, on)
        roll(model, noise_for(model), exit_step=1).pow(2).mean().backward()
        found.append(tiny.gradients(model))
    tiny.assert_same_gradients(found[0], found[1], 1e-13)


@two
@torch.no_grad()
def test_preallocated_and_windowed_caches(variant: tiny.Variant) -> None:
    model = tiny.student(variant)
    noise, n = noise_for(model, chunks=5), variant.chunk

    def with_cache(cache: CacheConfig | None) -> Tensor:
        return roll(model, noise, FewStepSampler((1.0,)), cache=cache)

    plain = with_cache(None)
    assert torch.allclose(with_cache(CacheConfig(preallocate=4 * n)), plain, rtol=0, atol=1e-11)
    window = with_cache(CacheConfig(window=n, sink=n))
    assert torch.allclose(with_cache(CacheConfig(n, n, preallocate=1)), window, rtol=0, atol=1e-11)
    assert torch.allclose(window[:, : 3 * n], plain[:, : 3 * n], rtol=0, atol=1e-11)
    assert float((window[:, 4 * n :] - plain[:, 4 * n :]).abs().max()) > 1e-6


@torch.no_grad()
def test_stream_yields_finished_chunks_and_euler_works() -> None:
    model = tiny.student(tiny.Variant("scd", 3, "delta"))
    noise = noise_for(model, chunks=2)
    chunks = stream_rollout(model, noise, tiny.prompts(2), Euler(3), cpu_noise(tiny.generator(3)))
    first = next(chunks)
    assert first.shape == (2, 3, *noise.shape[2:])
    whole = torch.cat([first, *chunks], 1)
    assert whole.shape == noise.shape
    assert torch.equal(whole, roll(model, noise, Euler(3)))


def test_one_prompt_serves_a_whole_batch() -> None:
    model = tiny.student(tiny.Variant("scd", 1, "junction"))
    noise, cond = noise_for(model), tiny.prompts(1)
    with torch.no_grad():
        shared = rollout(model, noise, cond, FewStepSampler((1.0,)), cpu_noise(tiny.generator(3)))
        spread = rollout(
            model, noise, cond.repeat(2), FewStepSampler((1.0,)), cpu_noise(tiny.generator(3))
        )
    assert torch.allclose(shared, spread, rtol=0, atol=1e-11)


def test_cpu_noise_is_the_generators_and_keeps_dtype() -> None:
    like = torch.zeros(2, 3, dtype=torch.float64)
    first, again = cpu_noise(tiny.generator(1))(like), cpu_noise(tiny.generator(1))(like)
    assert torch.equal(first, again) and first.dtype == torch.float64
    assert torch.equal(first.float(), torch.randn(2, 3, generator=tiny.generator(1)))


def test_indivisible_clip_and_early_exit_of_euler_are_refused() -> None:
    model = tiny.student(tiny.Variant("causal", 3))
    with pytest.raises(UserError, match="does not divide the clip's 4 latent frames"):
        roll(model, tiny.latents(1, 4))
    with pytest.raises(UserError, match="'euler' has no early exit"):
        roll(model, tiny.latents(1, 3), Euler(2), exit_step=0)
