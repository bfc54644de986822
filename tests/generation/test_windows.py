"""Windows, sinks and prompts that change, against a slow reference that is written from their
definition: the whole sequence anew for every chunk, no cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import tiny
import torch
from tape import record
from torch import Tensor

from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.generation.prompt_change import PromptChange
from scd_sf.generation.rollout import stream_rollout
from scd_sf.models.build import Student
from scd_sf.models.causal import Causal
from scd_sf.models.replay import Replayed
from scd_sf.models.scd.wan import ScdWan
from scd_sf.models.trunk import Trunk
from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.nn.rope import Rotary, rotate

CHUNKS, SAMPLER = 7, FewStepSampler((1.0, 0.5))
PROMPTS = [replace(tiny.prompts(1, seed), actions_BF=None, labels_B=None) for seed in range(3)]
STUDENTS = [
    tiny.Variant("causal", 3),
    tiny.Variant("scd", 3, "delta"),
    tiny.Variant("scd", 3, "junction", "temporal", "cached"),
    tiny.Variant("causal", 1),
    tiny.Variant("scd", 1, "delta"),
]
Changes = dict[int, tuple[int, str]]  # chunk -> prompt, what becomes of the past
# window and sink in latent frames, of students that make 3 at a time; where the prompt changes
CASES: list[tuple[int, int, Changes]] = [
    (3, 0, {0: (1, "recache"), 4: (2, "recache")}),
    (3, 1, {3: (1, "recache"), 4: (2, "flush")}),
    (4, 0, {1: (1, "flush"), 6: (2, "recache")}),
    (4, 2, {4: (1, "recache"), 6: (2, "keep")}),
    (5, 4, {4: (1, "recache"), 5: (2, "recache")}),
    (7, 2, {0: (1, "flush"), 3: (2, "keep")}),
    (8, 1, {1: (1, "recache"), 5: (2, "flush")}),
    (3, 5, {2: (1, "flush"), 3: (2, "recache")}),
    (19, 2, {3: (1, "recache"), 5: (2, "flush")}),  # all of them are held
    (0, 0, {6: (1, "recache")}),
]
ONE_AT_A_TIME: list[tuple[int, int, Changes]] = [
    (1, 0, {0: (1, "recache"), 4: (2, "recache")}),
    (2, 1, {4: (1, "recache"), 5: (2, "flush")}),
    (6, 1, {6: (1, "recache")}),
]


@dataclass
class Group:
    """Frames that are read together at time ``t`` (1, n) under one prompt, the first of them frame
    ``first`` of the clip. ``past``: what it reads beside its own, as (frame, position to it)."""

    x: Tensor
    t: Tensor
    text: Tensor
    first: int
    past: list[tuple[int, int]]


def held(count: int, window: int, sink: int) -> list[tuple[int, int]]:
    """Of ``count`` frames those that are remembered, and where: the last ``window`` at their own
    places, the first ``sink`` right before them."""
    if not window:
        return [(frame, frame) for frame in range(count)]
    dropped = max(0, count - window - sink)
    first = [(frame, frame + dropped) for frame in range(min(sink, count))]
    return first + [(frame, frame) for frame in range(max(sink, count - window), count)]


@dataclass
class Reading:
    """Attention of one layer, group after group, with the softmax written out; keys are turned to
    the places that they have for the group that reads them."""

    trunk: Trunk
    groups: Sequence[Group]
    unturned: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def turn(self, x: Tensor, frames: Sequence[int]) -> Tensor:
        return rotate(x, self.trunk.rope(frames, tiny.HEIGHT, tiny.WIDTH, x))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = self.groups[len(self.unturned)]
        n = group.x.shape[1]
        size, own = q.shape[2] // n, range(group.first, group.first + n)
        keys, values = [self.turn(k, own)], [v]
        for frame, place in group.past:
            part = slice(frame % n * size, (frame % n + 1) * size)
            k_past, v_past = self.unturned[frame // n]
            keys.append(self.turn(k_past[:, :, part], [place]))
            values.append(v_past[:, :, part])
        self.unturned.append((k, v))
        scores = self.turn(q, own) @ torch.cat(keys, 2).transpose(2, 3) / q.shape[-1] ** 0.5
        return scores.softmax(-1) @ torch.cat(values, 2)


def through(trunk: Trunk, groups: Sequence[Group]) -> Tensor:
    """The last group's tokens after all blocks."""
    states = [trunk.embed(group.x) for group in groups]
    ones = torch.ones(states[0].shape[1], sum(trunk.cfg.rope_axes) // 2, dtype=states[0].dtype)
    for layer, block in enumerate(trunk.blocks):
        attend = Reading(trunk, groups)
        states = [
            block(x, trunk.times(group.t).mod, group.text, Rotary.of(ones, 0 * ones), attend, layer)
            for x, group in zip(states, groups, strict=True)
        ]
    return states[-1]


def chunk_of(
    model: Student,
    x_T: Tensor,
    query: Tensor,
    past: list[tuple[Tensor, Tensor]],
    prompt: Tensor,
    window: int,
    sink: int,
) -> Tensor:
    """The chunk after ``past``: finished chunks, each with the prompt that it is read under."""
    n, ones = model.chunk, x_T.new_ones(1, model.chunk)
    clean = [
        Group(x, 0 * ones, text, n * i, held(n * i, window, sink))
        for i, (x, text) in enumerate(past)
    ]
    count = n * len(past)
    if isinstance(model, Causal):
        trunk = model.trunk

        def velocity(x: Tensor, t: float) -> Tensor:
            now = Group(x, torch.full((1, n), t), prompt, count, held(count, window, sink))
            tokens = through(trunk, [*clean, now])
            return trunk.velocity(tokens, trunk.times(now.t).temb, tiny.HEIGHT, tiny.WIDTH)
    else:
        assert isinstance(model, ScdWan)
        before = max(0, count - n)  # the last chunk is read beside what is held before it
        reads = [*held(before, window, sink), *((f, f) for f in range(before, count))]
        c = through(model.encoder, [*clean, Group(query, ones, prompt, count, reads)])
        context = model.decoder.context(c, query, ones, prompt)

        def velocity(x: Tensor, t: float) -> Tensor:
            made: Tensor = model.decoder(context, x, torch.full((1, n), t), prompt)
            return made

    return SAMPLER(velocity, x_T, torch.zeros_like)


def slow(
    model: Student,
    noise: Sequence[Tensor],
    queries: Sequence[Tensor],
    changes: Changes,
    window: int,
    sink: int,
) -> Tensor:
    """The clip by the definition. A chunk is read for the first time, and so under the prompt of
    then, when the next one is made."""
    trunk = model.trunk if isinstance(model, Causal) else model.encoder
    n, made, past = model.chunk, list[Tensor](), list[tuple[Tensor, Tensor]]()
    prompt = trunk.text(PROMPTS[0].text_BLE)
    for number, (x_T, query) in enumerate(zip(noise, queries, strict=True)):
        index, history = changes.get(number, (None, "keep"))
        prompt = prompt if index is None else trunk.text(PROMPTS[index].text_BLE)
        if history == "flush":
            past = []
        if history == "recache":
            chunks = {frame // n for frame, _ in held(n * len(past), window, sink)}
            past = [(past[i][0], prompt) for i in sorted(chunks)]
        past += [(x, prompt) for x in made[-1:]]
        made.append(chunk_of(model, x_T, query, past, prompt, window, sink))
    return torch.cat(made, 1)


@pytest.mark.parametrize("variant", STUDENTS, ids=str)
@torch.no_grad()
def test_windows_and_prompts_that_change_are_what_they_are_said_to_be(
    variant: tiny.Variant,
) -> None:
    """Windows and sinks that chunks do not divide; changes at the first, a middle and the last
    chunk and in neighbours; run and recorded."""
    model, n = tiny.student(variant), variant.chunk
    recorded = tiny.student(variant)
    recorded.replay = Replayed(record)
    noise, queries = ([tiny.latents(1, n, seed + i) for i in range(CHUNKS)] for seed in (100, 200))

    def rolled(student: Student, changes: Changes, window: int, sink: int) -> Tensor:
        prompt_changes = {
            k: PromptChange(PROMPTS[p], history) for k, (p, history) in changes.items()
        }
        drawn = iter(queries)
        parts = stream_rollout(
            student,
            torch.cat(noise, 1),
            PROMPTS[0],
            SAMPLER,
            torch.zeros_like,
            query_noise=lambda _: next(drawn),
            cache=CacheConfig.sampling(window, sink, CHUNKS * n),
            prompts=prompt_changes.get,
        )
        return torch.cat(list(parts), 1)

    for window, sink, changes in CASES if n == 3 else ONE_AT_A_TIME:
        expected = slow(model, noise, queries, changes, window, sink)
        for student in (model, recorded):
            clip = rolled(student, changes, window, sink)
            where = f"window {window}, sink {sink}, {changes}"
            assert float((clip - expected).abs().max()) < 1e-9, where
