"""What a rollout can be given beside a prompt: frames that are there already, other prompts later,
endless noise."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from scd_sf.diffusion.samplers import Euler
from scd_sf.generation.prompt_change import PromptChange
from scd_sf.generation.rollout import rollout, stream_rollout
from scd_sf.models.interface import Stream
from scd_sf.nn.kv_cache import CacheConfig

families = pytest.mark.parametrize("variant", tiny.SOME, ids=str)


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


@families
@torch.no_grad()
def test_history_continues_where_a_rollout_stopped(variant: tiny.Variant) -> None:
    """Its first chunks given as history: the rest comes out as in the rollout itself."""
    model, cond, n = tiny.student(variant), tiny.prompts(2), variant.chunk
    noise = tiny.latents(2, 4 * n, 5)
    whole = rollout(model, noise, cond, Euler(2), zeros)
    for given in (1, 3):
        cut = given * n
        chunks = stream_rollout(
            model, noise[:, cut:], cond, Euler(2), zeros, history=whole[:, :cut]
        )
        assert torch.allclose(torch.cat(list(chunks), 1), whole[:, cut:], rtol=0, atol=1e-11)


@families
@torch.no_grad()
def test_another_prompt_from_a_chunk_on(variant: tiny.Variant) -> None:
    model, n = tiny.student(variant), variant.chunk
    first, second, noise = tiny.prompts(2, 0), tiny.prompts(2, 1), tiny.latents(2, 4 * n, 5)

    def roll(prompts: dict[int, PromptChange]) -> Tensor:
        parts = stream_rollout(model, noise, first, Euler(2), zeros, prompts=prompts.get)
        return torch.cat(list(parts), 1)

    plain, switched = rollout(model, noise, first, Euler(2), zeros), roll({2: PromptChange(second)})
    assert torch.equal(switched[:, : 2 * n], plain[:, : 2 * n])
    assert float((switched[:, 2 * n :] - plain[:, 2 * n :]).abs().max()) > 1e-5
    assert torch.equal(roll({1: PromptChange(first)}), plain)
    assert torch.equal(
        roll({0: PromptChange(second)}), rollout(model, noise, second, Euler(2), zeros)
    )


@torch.no_grad()
def test_memory_of_a_long_video_is_constant() -> None:
    """300 frames under a window of 3 and a sink of 1: the cache's storage stops growing, the frames
    stay finite."""
    model = tiny.student(tiny.FEW[1], dtype=torch.float32)
    n, shape = model.chunk, (tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)
    window = CacheConfig(window=3 * n, sink=n, preallocate=1)
    stream: Stream = tiny.stream(model, tiny.prompts(1, dtype=torch.float32), cache=window)
    x, sizes = torch.randn(1, n, *shape, generator=tiny.generator(0)), set()
    previous: Tensor | None = None
    for frame in range(300):
        stream = model.advance(stream, previous, x)
        previous = model.denoise(stream, x, torch.ones(1)).clamp(-2, 2)
        if frame >= 5:
            sizes.add(sum(k.untyped_storage().nbytes() for k, _ in stream.cache._buffers.values()))
    assert len(sizes) == 1 and previous is not None and previous.isfinite().all()
