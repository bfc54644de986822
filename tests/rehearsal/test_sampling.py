"""Streamed sampling at 832x480 on the rehearsal's device: samplers, windows, guidance, start
frames, other prompts, the VAE. Budgets are of a chunk: the first one, and any later one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKLWan
from rehearsal import world
from rehearsal.budgets import BUDGETS
from rehearsal.fake_cuda import DEVICE, FakeCuda
from torch import Tensor

from scd_sf.diffusion.guidance import GuidanceConfig
from scd_sf.diffusion.samplers import Euler, FewStepSampler, Sampler, UniPC
from scd_sf.generation.bidirectional import sample_bidirectional
from scd_sf.generation.generate import clips_of, decode, generate, generate_latents
from scd_sf.generation.guided import SampleGuidance
from scd_sf.generation.prompt_change import PromptChange
from scd_sf.models.blocks import BlocksConfig, SkipConfig, running_as
from scd_sf.models.wan.vae import Vae
from scd_sf.nn.layers import channels_last
from scd_sf.types import Conditioning

CLIP = replace(world.CLIP, frames=5)
CAUSAL = "stage1_causal_chunk3"
GUIDANCE = {
    "text": SampleGuidance(GuidanceConfig(3.0)),
    "text, decoder alone": SampleGuidance(GuidanceConfig(3.0), "decoder"),
    "corruption": SampleGuidance(corruption=1.5),
}


def told() -> Conditioning:
    return world.prompts().to(DEVICE)


@cache
def vae() -> Vae:
    """Wan's, in bf16."""
    with DEVICE:
        return Vae(channels_last(world.in_bf16(AutoencoderKLWan())))


def run(cuda: FakeCuda, name: str, chunks: Iterator[Tensor], switches: int = 0) -> Tensor:
    """All chunks: the first and the last by their own budgets; those between read and block as the
    last does, but for one read more where another prompt begins (``switches`` times)."""
    made, found = [], []
    while True:
        with cuda.counted() as counts:
            chunk = next(chunks, None)
        if chunk is None:
            break
        made.append(chunk)
        found.append(counts)
    for which, counts in (("the first", found[0]), ("a later", found[-1])):
        allowed = BUDGETS[f"sampling, {name}, {which} chunk"]
        assert counts.totals == allowed, (
            f"{which} chunk: {counts.totals}, the list allows {allowed}; {counts}"
        )
    last = found[-1].totals
    extra = [(counts.totals.reads - last.reads, counts.totals.blocking) for counts in found[1:]]
    assert (
        sorted(extra)
        == [(0, last.blocking)] * (len(extra) - switches) + [(1, last.blocking)] * switches
    ), "; ".join(map(str, found))
    return clips_of(made)


@pytest.mark.parametrize(
    "sampler", [FewStepSampler(), Euler(4), UniPC(4)], ids=lambda sampler: sampler.name
)
def test_samplers(cuda: FakeCuda, sampler: Sampler) -> None:
    made = run(
        cuda,
        sampler.name,
        generate_latents(world.student(), told(), [0], CLIP.latent(1)[1:], sampler),
    )
    assert (
        made.shape == CLIP.latent(1) and made.device == cuda.device and made.dtype == torch.float32
    )


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_within_a_window(cuda: FakeCuda, name: str) -> None:
    """Two clips; the window is full from the fourth chunk on, and its sink turns along."""
    cond, null = world.prompts(2).to(DEVICE), told()
    latents = generate_latents(
        world.student(),
        cond,
        [0, 1],
        CLIP.latent(1)[1:],
        FewStepSampler(),
        window=2,
        sink=1,
        guidance=GUIDANCE[name],
        null=null,
    )
    assert run(cuda, f"guided by {name}", latents).shape == CLIP.latent(2)


@pytest.mark.parametrize("name", ["baseline", "baseline, blocks skipped"])
def test_the_baseline(cuda: FakeCuda, name: str) -> None:
    student, shape = world.student(CAUSAL), replace(CLIP, frames=9)
    blocks = BlocksConfig(skip=SkipConfig()) if "skipped" in name else BlocksConfig()
    with running_as(student, blocks):
        run(
            cuda,
            name,
            generate_latents(student, told(), [0], shape.latent(1)[1:], FewStepSampler()),
        )


def test_from_start_frames_to_pixels(cuda: FakeCuda) -> None:
    """A clip that begins with five frames, under another prompt from its tenth on, decoded as it
    comes."""
    start = torch.zeros(1, 5, 3, CLIP.pixel_height, CLIP.pixel_width, device=cuda.device)
    frames = generate(
        world.student(),
        vae(),
        told(),
        [0],
        CLIP,
        FewStepSampler(),
        window=2,
        sink=1,
        start=start,
        changes={9: PromptChange(told())},
    )
    with cuda.budget(BUDGETS["start frames, encoded and decoded"]):
        first = next(frames)
    rest = run(cuda, "to pixels", frames, switches=1)
    assert first.shape[1] + rest.shape[1] == CLIP.pixel_frames and rest.device == cuda.device


def test_whole_clips(cuda: FakeCuda) -> None:
    """The teacher's own sampling, and a clip decoded at once."""
    teacher, cond, decoder = world.wan(), told(), vae()
    with cuda.budget(BUDGETS["a clip of the teacher, 4 steps"]):
        latents = sample_bidirectional(
            teacher, cond, CLIP.latent(1)[1:], Euler(4), [0], cuda.device
        )
    with cuda.budget(BUDGETS["a clip decoded"]):
        pixels = decode(decoder, latents)
    assert pixels.shape == (1, CLIP.pixel_frames, 3, CLIP.pixel_height, CLIP.pixel_width)
