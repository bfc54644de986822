"""One way from conditions and seeds to latents: a clip depends on these alone, and is the beginning
of longer ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from scd_sf.diffusion.guidance import GuidanceConfig
from scd_sf.diffusion.samplers import Euler, FewStepSampler, Sampler
from scd_sf.generation.generate import ClipNoise, as_stored, clips_of, first_chunk, generate_latents
from scd_sf.generation.guided import SampleGuidance
from scd_sf.types import Conditioning, UserError

SHAPE = (tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)
families = pytest.mark.parametrize("variant", tiny.FEW, ids=str)
CLOSE = {"rtol": 0, "atol": 2e-5}  # sums of another batch are taken in another order


def made(
    variant: tiny.Variant,
    cond: Conditioning,
    seeds: list[int],
    chunks: int = 3,
    sampler: Sampler | None = None,
    **more: object,
) -> Tensor:
    model = tiny.student(variant, dtype=torch.float32)
    shape = (chunks * variant.chunk, *SHAPE)
    return clips_of(
        generate_latents(model, cond, seeds, shape, sampler or FewStepSampler(), **more)
    )  # type: ignore[arg-type]


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
    switched = made(variant, cond, [3], 4, Euler(2), changes={2: other})
    assert torch.equal(switched[:, : 2 * n], whole[:, : 2 * n])
    assert float((switched[:, 2 * n :] - whole[:, 2 * n :]).abs().max()) > 1e-4


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
