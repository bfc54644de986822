"""One way from conditions and seeds to latents: a clip depends on these alone, and is the beginning
of longer ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from scd_sf.diffusion.guidance import GuidanceConfig
from scd_sf.diffusion.noise import Noise
from scd_sf.diffusion.samplers import Euler, FewStepSampler, OnStep, Sampler, Velocity
from scd_sf.generation.generate import (
    ClipNoise,
    as_stored,
    clips_of,
    first_chunk,
    generate_latents,
)
from scd_sf.generation.guided import SampleGuidance
from scd_sf.generation.inputs import ChunkInput, chunk_inputs
from scd_sf.generation.prompt_change import PromptChange
from scd_sf.generation.rollout import stream_rollout
from scd_sf.models.wan.vae import load_vae
from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.types import Conditioning, UserError

SHAPE = (tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)
families = pytest.mark.parametrize("variant", tiny.FEW, ids=str)
# sums of another batch are taken in another order
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-5}


def made(
    variant: tiny.Variant,
    cond: Conditioning,
    seeds: list[int],
    chunks: int = 3,
    sampler: Sampler | None = None,
    **more: Any,
) -> Tensor:
    model = tiny.student(variant, dtype=torch.float32)
    shape = (chunks * variant.chunk, *SHAPE)
    return clips_of(
        generate_latents(model, cond, seeds, shape, sampler or FewStepSampler(), **more)
    )


@families
def test_a_clip_is_the_beginning_of_a_longer_one(variant: tiny.Variant) -> None:
    cond = tiny.prompts(2, dtype=torch.float32)
    long, short = made(variant, cond, [3, 4], 6), made(variant, cond, [3, 4], 2)
    assert torch.equal(long[:, : short.shape[1]], short)


@families
def test_two_prompts_and_two_seeds_are_the_four_single_runs(variant: tiny.Variant) -> None:
    """In any order, alone or together; another seed or prompt is another clip."""
    cond = tiny.prompts(2, dtype=torch.float32)
    four = made(variant, cond.cat(cond), [7, 7, 8, 8])
    for row, (prompt, seed) in enumerate([(0, 7), (1, 7), (0, 8), (1, 8)]):
        alone = made(variant, cond.rows(slice(prompt, prompt + 1)), [seed])
        torch.testing.assert_close(alone[0], four[row], **CLOSE)
        others = [other for other in range(4) if other != row]
        assert all(float((four[row] - four[other]).abs().max()) > 1e-3 for other in others)


def test_guidance_by_corruption_keeps_to_its_row() -> None:
    """The corruption's noise too belongs to (seed, frame)."""
    variant = tiny.Variant("scd", 1, "delta")
    cond = tiny.prompts(2, dtype=torch.float32)
    null = tiny.prompts(1, 9, dtype=torch.float32)
    guidance = SampleGuidance(corruption=1.5, context_noise=0.3)
    both = made(variant, cond, [7, 8], guidance=guidance, null=null)
    alone = made(variant, cond.rows(slice(1, 2)), [8], 5, guidance=guidance, null=null)
    torch.testing.assert_close(alone[0, :3], both[1], **CLOSE)
    assert float((both - made(variant, cond, [7, 8])).abs().max()) > 1e-3
    for known in (1, 2):  # and not to how much of the clip was there before
        rest = made(variant, cond, [7, 8], history=both[:, :known], guidance=guidance, null=null)
        torch.testing.assert_close(rest, both[:, known:], **CLOSE)
    with pytest.raises(UserError, match="give null"):
        made(variant, cond, [7, 8], guidance=SampleGuidance(GuidanceConfig(3.0)))


def test_noise_is_a_function_of_seed_and_frame() -> None:
    """Whatever the sampler drew before, however frames are grouped into chunks, and wherever a clip
    goes on."""

    def initial(chunk: int, first: int, draws: int) -> Tensor:
        noise, parts = ClipNoise([5], "cpu"), []
        for x in noise.chunks(SHAPE, chunk, first, 6):
            parts.append(x)
            for _ in range(draws):
                noise.role("step")(x)
        return torch.cat(parts, 1)

    whole = initial(1, 0, 0)
    assert torch.equal(initial(3, 0, 2), whole) and torch.equal(initial(1, 2, 1), whole[:, 2:])
    assert abs(float(whole.mean())) < 0.2 and 0.85 < float(whole.std()) < 1.15
    assert len({float(frame.sum()) for frame in whole[0]}) == 6
    noise = ClipNoise([5], "cpu")
    x = next(noise.chunks(SHAPE, 1, 0, 1))
    draws = [
        x,
        noise.role("step")(x),
        noise.role("step")(x),
        noise.role("query")(x),
        noise.role("corruption")(x),
    ]
    assert len({float(draw.sum()) for draw in draws}) == len(draws)


@families
def test_history_and_other_prompts(variant: tiny.Variant) -> None:
    """A clip that goes on from its own first chunk is the clip itself, but for sums; a switch
    changes what follows."""
    cond, other, n = (
        tiny.prompts(1, dtype=torch.float32),
        tiny.prompts(1, 5, dtype=torch.float32),
        variant.chunk,
    )
    whole = made(variant, cond, [3], 4, Euler(2))
    rest = made(variant, cond, [3], 4, Euler(2), history=whole[:, :n])
    torch.testing.assert_close(rest, whole[:, n:], **CLOSE)
    switched = made(variant, cond, [3], 4, Euler(2), changes={2: PromptChange(other)})
    assert torch.equal(switched[:, : 2 * n], whole[:, : 2 * n])
    assert float((switched[:, 2 * n :] - whole[:, 2 * n :]).abs().max()) > 1e-4


@pytest.mark.parametrize("variant", [v for v in tiny.FEW if not str(v).startswith("dit")], ids=str)
def test_the_past_is_encoded_again_or_forgotten(variant: tiny.Variant) -> None:
    """Where the prompt changes, the clip goes on as one that begins with the frames that are left:
    all that the window and the sink hold, and the last chunk; or the last chunk alone."""
    prompts = [tiny.prompts(1, seed, dtype=torch.float32) for seed in (0, 5)]
    cond, other = (replace(prompt, actions_BF=None) for prompt in prompts)
    n = variant.chunk
    whole = made(variant, cond, [3], 4, Euler(2))
    again = made(variant, cond, [3], 4, Euler(2), changes={2: PromptChange(cond, "recache")})
    torch.testing.assert_close(again, whole, **CLOSE)  # the same prompt and all frames: nothing new
    model = tiny.student(variant, dtype=torch.float32)
    noise = torch.randn(1, 8 * n, *SHAPE, generator=torch.Generator().manual_seed(1))

    def rolled(start: Conditioning, chunks: Tensor, **more: Any) -> Tensor:
        with torch.no_grad():
            parts = stream_rollout(
                model,
                chunks,
                start,
                Euler(2),
                torch.zeros_like,
                query_noise=lambda x: noise[:, :n] + 0 * x,
                cache=CacheConfig.sampling(2 * n, n, 8 * n),
                **more,
            )
            return clips_of(parts)

    for history, left in (("recache", [0, 2, 3, 4]), ("flush", [4]), ("keep", None)):
        changes = {5: PromptChange(other, history)}
        clip = rolled(cond, noise, prompts=changes.get)
        assert torch.equal(clip[:, : 5 * n], rolled(cond, noise[:, : 5 * n]))
        for second in ("recache", "flush"):  # what was forgotten stays so
            twice = rolled(cond, noise, prompts=(changes | {6: PromptChange(cond, second)}).get)
            assert torch.equal(twice[:, : 6 * n], clip[:, : 6 * n])
            assert float((twice[:, 6 * n :] - clip[:, 6 * n :]).abs().max()) > 1e-5
        if left is not None:
            known = torch.cat([clip[:, place * n : (place + 1) * n] for place in left], 1)
            rest = rolled(other, noise[:, 5 * n :], history=known)
            torch.testing.assert_close(clip[:, 5 * n :], rest, **CLOSE)
            kept = rolled(cond, noise, prompts={5: PromptChange(other)}.get)
            assert float((clip[:, 5 * n :] - kept[:, 5 * n :]).abs().max()) > 1e-5
    with pytest.raises(UserError, match="use keep, recache, flush"):
        PromptChange(other, "forget")
    with pytest.raises(UserError, match="not for actions"):
        PromptChange(Conditioning.of_frames(1, torch.zeros(1, 3)), "recache")


def test_text_states_are_those_that_are_stored() -> None:
    """Fresh fp32 states and those from a float16 file give one clip; states beyond its range stay
    as they are."""
    variant, cond = tiny.Variant("scd", 1, "delta"), tiny.prompts(1, dtype=torch.float32)
    stored = Conditioning(cond.text_BLE.half().float(), cond.actions_BF, cond.labels_B)
    assert not torch.equal(stored.text_BLE, cond.text_BLE)
    assert torch.equal(made(variant, stored, [1]), made(variant, cond, [1]))
    huge = Conditioning(torch.full((1, 1, 1), 1e6))
    assert torch.equal(as_stored(huge).text_BLE, huge.text_BLE)


def test_where_a_prompt_changes() -> None:
    """Pixel frame 1 + 4k begins latent frame k + 1; a chunk changes when all of its frames do."""
    assert [first_chunk(frame, 4, 1) for frame in (0, 1, 2, 5, 6, 9)] == [0, 1, 2, 2, 3, 3]
    assert [first_chunk(frame, 4, 3) for frame in (0, 1, 9, 10)] == [0, 1, 1, 2]
    assert [first_chunk(frame, 4, 1, num_known=2) for frame in (0, 5, 9)] == [0, 0, 1]


def test_nobody_else_assembles_a_rollout() -> None:
    """The loop itself is called by generate() alone, and with gradients by what trains or counts
    training."""
    root = Path(__file__).resolve().parents[2]
    folders = ("scd_sf", "recipes", "data_prep", "vbench_eval", "benchmarks")
    texts = {
        path.relative_to(root).as_posix(): path.read_text()
        for f in folders
        for path in (root / f).rglob("*.py")
    }
    callers = {name for name, text in texts.items() if re.search(r"\bstream_rollout\(", text)}
    assert callers == {"scd_sf/generation/generate.py", "scd_sf/generation/rollout.py"}
    training = {name for name, text in texts.items() if re.search(r"(?<![.\w])rollout\(", text)}
    assert training == {
        "scd_sf/generation/rollout.py",
        "recipes/stage3_self_forcing.py",
        "scd_sf/tools/plan/phases.py",
        "benchmarks/rollout.py",
        "benchmarks/train_step.py",
        "scd_sf/tools/gpu/trial.py",
        "recipes/scratch_experiments.py",  # counts block passes on the meta device
    }


@dataclass
class Recorded:
    """A sampler that keeps where it began, and with what."""

    inner: Sampler
    began: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def steps(self) -> int:
        return self.inner.steps

    @property
    def times(self) -> tuple[float, ...]:
        return self.inner.times

    def __call__(
        self,
        velocity: Velocity,
        x_T: Tensor,
        noise_like: Noise,
        exit_step: int | None = None,
        on_step: OnStep | None = None,
        begin: int = 0,
    ) -> Tensor:
        self.began.append((begin, x_T))
        return self.inner(velocity, x_T, noise_like, exit_step, on_step, begin)


@families
def test_a_clip_from_a_video(variant: tiny.Variant) -> None:
    """Strength 1 is the clip from noise, to the last bit; others begin with (1 - t) x + t eps, eps
    the noise of the clip. Each chunk has a strength of its own; a single row of latents serves all;
    the clip ends with its inputs."""
    cond, n = tiny.prompts(2, dtype=torch.float32), variant.chunk
    video = tiny.latents(2, 3 * n, seed=5, dtype=torch.float32)
    parts = video.split(n, dim=1)
    plain = made(variant, cond, [3, 4])

    def anew(strengths: list[float], sampler: Sampler | None = None, **more: Any) -> Tensor:
        inputs = [ChunkInput(part, s) for part, s in zip(parts, strengths, strict=False)]
        return made(variant, cond, [3, 4], sampler=sampler, inputs=inputs, **more)

    assert torch.equal(anew([1.0] * 3), plain)
    mixed = anew([1.0, 0.7, 1.0])
    assert torch.equal(mixed[:, :n], plain[:, :n])
    assert float((mixed[:, n : 2 * n] - plain[:, n : 2 * n]).abs().max()) > 1e-3
    assert torch.equal(anew([0.7, 0.7]), anew([0.7] * 3)[:, : 2 * n])
    one = [ChunkInput(part[:1], 0.7) for part in parts]
    both = [ChunkInput(part[:1].expand(2, -1, -1, -1, -1), 0.7) for part in parts]
    assert torch.equal(
        made(variant, cond, [3, 4], inputs=one), made(variant, cond, [3, 4], inputs=both)
    )
    guidance, null = SampleGuidance(GuidanceConfig(3.0)), tiny.prompts(1, 9, dtype=torch.float32)
    more: dict[str, Any] = {"window": 2 * n, "sink": n, "guidance": guidance, "null": null}
    assert torch.equal(anew([1.0] * 3, **more), made(variant, cond, [3, 4], **more))

    sampler = Recorded(Euler(4, 1.0))
    initial = ClipNoise([3, 4], "cpu").chunks(SHAPE, n, 0, 3 * n)
    anew([0.25, 1.0, 0.6], sampler)
    for (begin, x), expected, part, eps in zip(
        sampler.began, (3, 0, 2), parts, initial, strict=True
    ):
        t = sampler.times[begin]
        assert begin == expected
        torch.testing.assert_close(x, (1 - t) * part + t * eps, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="below all noise levels"):
        anew([0.2] * 3, sampler)


def test_an_input_is_taken_when_its_chunk_is_begun() -> None:
    """After the encoder's pass of the chunk, not before the chunk before is there; and frames of
    pixels only as they are needed."""
    vae, shipped = (
        load_vae(Path(__file__).resolve().parents[2] / "assets" / "wan_doom"),
        list[int](),
    )
    pixels = torch.rand(1, 30, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def frames() -> Iterator[Tensor]:
        for number, frame in enumerate(pixels.split(1, dim=1)):
            shipped.append(number)
            yield frame

    for chunk, taken, count in ((1, [1, 5, 9, 13], 8), (3, [9, 21], 2)):
        shipped.clear()
        inputs = chunk_inputs(vae, frames(), chunk, 0.7)
        parts = []
        for frames_so_far in taken:
            part = next(inputs)
            assert len(shipped) == frames_so_far and part.strength == 0.7
            parts.append(part.latents)
        parts += [part.latents for part in inputs]
        assert len(parts) == count and len(shipped) == 30
        used = 1 + (count * chunk - 1) * 4
        whole = vae.encode(pixels[:, :used] * 2 - 1)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    wide = torch.cat(
        [part.latents for part in chunk_inputs(vae, [pixels[:, :7], pixels[:, 7:]], 1, 1)], 1
    )
    torch.testing.assert_close(wide, vae.encode(pixels[:, :29] * 2 - 1), rtol=0, atol=1e-5)

    variant, order = tiny.Variant("scd", 1, "delta"), list[str]()

    def sources() -> Iterator[ChunkInput]:
        for part in tiny.latents(1, 3, seed=5, dtype=torch.float32).split(1, dim=1):
            order.append("input")
            yield ChunkInput(part, 0.7)

    model = tiny.student(variant, dtype=torch.float32)
    for _ in generate_latents(
        model,
        tiny.prompts(1, dtype=torch.float32),
        [3],
        (3, *SHAPE),
        FewStepSampler(),
        inputs=sources(),
        next_prompt=lambda: order.append("prompt"),
    ):
        order.append("chunk")
    assert order == ["prompt", "input", "chunk"] * 3


def test_refusals() -> None:
    variant, cond = tiny.Variant("causal", 3), tiny.prompts(2, dtype=torch.float32)
    with pytest.raises(UserError, match="2 conditions but 1 seeds"):
        made(variant, cond, [1])
    with pytest.raises(
        UserError, match="window is 2, but the model makes 3 latent frames at a time"
    ):
        made(variant, cond, [1, 2], window=2)
    model = tiny.student(variant, dtype=torch.float32)
    with pytest.raises(UserError, match="chunk is 3"):
        next(generate_latents(model, cond, [1, 2], (4, *SHAPE), FewStepSampler()))
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        next(generate_latents(model, cond, [1, 2], (3, *SHAPE), FewStepSampler()))
