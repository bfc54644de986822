"""Recorded steps give the same videos as steps that are run, for every history, prompt, guidance and interleaving.

A tape stands for the CUDA graph: it notes every operator with the very tensors it read and wrote, and runs them again.
Python is not run again, so numbers that Python counts are baked in as a graph bakes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scd_sf.diffusion.guidance import GuidanceConfig
from scd_sf.diffusion.solvers import Renoise
from scd_sf.generation.generate import clips_of, generate_latents
from scd_sf.generation.guided import SampleGuidance
from scd_sf.models.build import Student
from scd_sf.models.replay import MOST, Replayed, cuda_recorder
from scd_sf.types import Conditioning, UserError

T = TypeVar("T")
SHAPE = (tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)
SAMPLER = Renoise((1.0, 0.5))
REPLAYED = [v for v in tiny.SOME if v.blocks.skip is None]


class Tape(TorchDispatchMode):
    """What was run: operator, arguments, results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        for func, args, kwargs, out in self.calls:
            returned = func._schema.returns
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif all(part.alias_info is None for part in returned):  # views of what is recorded need nothing
                again = func(*args, **kwargs)
                pairs = zip(out, again, strict=True) if isinstance(out, (tuple, list)) else [(out, again)]
                for old, new in pairs:
                    if isinstance(old, Tensor):
                        old.copy_(new)


def record(step: Callable[[], T]) -> tuple[Callable[[], None], T]:
    step()
    with Tape() as tape:
        out = step()
    return tape.play, out


def chunks(student: Student, told: Conditioning, seed: int, **options: Any) -> Iterator[Tensor]:
    options = {"window": 2 * student.chunk, "sink": student.chunk} | options
    return generate_latents(student, told, [seed], (5 * student.chunk, *SHAPE), SAMPLER, **options)


@pytest.mark.parametrize("variant", REPLAYED, ids=str)
def test_videos_are_the_same(variant: tiny.Variant) -> None:
    """Windows that fill and wrap, sinks that turn, other prompts and seeds on the same recordings, prompts that change,
    two videos at once, one that is left unfinished."""
    student = tiny.student(variant, dtype=torch.float32)
    first, second = (tiny.prompts(1, seed=number, dtype=torch.float32) for number in (1, 2))
    changed = {"changes": {2: second}}
    wanted = [clips_of(chunks(student, *given)) for given in ((first, 1), (second, 2))]
    wanted.append(clips_of(chunks(student, first, 3, **changed)))
    student.replay = Replayed(record)
    assert torch.equal(clips_of(chunks(student, first, 1)), wanted[0])
    recorded = len(student.replay._recorded)
    assert torch.equal(clips_of(chunks(student, second, 2)), wanted[1])
    assert torch.equal(clips_of(chunks(student, first, 3, **changed)), wanted[2])
    assert len(student.replay._recorded) == recorded, "another video is recorded again"
    left = chunks(student, second, 7)
    next(left)
    both = list(zip(chunks(student, first, 1), chunks(student, second, 2), strict=True))
    for number in range(2):
        assert torch.equal(torch.cat([pair[number] for pair in both], 1), wanted[number])


def test_guidance_history_and_no_window() -> None:
    variant = next(v for v in tiny.FEW if v.family == "scd" and v.chunk == 1)
    student = tiny.student(variant, dtype=torch.float32)
    first, null = (tiny.prompts(1, seed=n, dtype=torch.float32) for n in (1, 2))
    options: list[dict[str, Any]] = [
        {"window": 0, "sink": 0, "history": tiny.latents(1, 2, dtype=torch.float32)},
        {"guidance": SampleGuidance(text=GuidanceConfig(3.0)), "null": null},
        {"guidance": SampleGuidance(text=GuidanceConfig(3.0), scope="decoder"), "null": null},
        {"guidance": SampleGuidance(corruption=1.5), "null": null},
    ]
    wanted = [clips_of(chunks(student, first, 1, **given)) for given in options]
    student.replay = Replayed(record)
    for _ in range(2):
        for given, video in zip(options, wanted, strict=True):
            assert torch.equal(clips_of(chunks(student, first, 1, **given)), video)


def test_what_did_not_change_is_not_copied_and_a_history_too_long_is_refused() -> None:
    variant = next(v for v in tiny.FEW if v.family == "scd" and v.chunk == 1)
    student = tiny.student(variant, dtype=torch.float32)
    copied = []
    replayed = Replayed(record)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    x, y = torch.ones(2), torch.ones(2)
    with torch.no_grad():
        assert replayed("step", (), step, x, y).tolist() == [2.0, 2.0]
        places = {place.tensor.data_ptr(): place for place in replayed._places.values()}
        for place in places.values():
            copied.append(place.tensor._version)
        assert replayed("step", (), step, x, torch.full((2,), 3.0)).tolist() == [4.0, 4.0]
        x += 1  # the same tensor, changed
        assert replayed("step", (), step, x, y).tolist() == [3.0, 3.0]
    assert [place.tensor._version - before for place, before in zip(places.values(), copied, strict=True)] == [1, 2]
    student.replay = replayed
    with pytest.raises(UserError, match=r"compile\.cuda_graphs .* set a window"):
        shape = (MOST, *SHAPE)
        next(generate_latents(student, tiny.prompts(1, dtype=torch.float32), [1], shape, SAMPLER))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", REPLAYED, ids=str)
def test_on_a_gpu(variant: tiny.Variant) -> None:
    student, cuda = tiny.student(variant, dtype=torch.float32).to("cuda"), torch.device("cuda")
    first, second = (tiny.prompts(1, seed=number, dtype=torch.float32).to(cuda) for number in (1, 2))
    wanted = [clips_of(chunks(student, *given)) for given in ((first, 1), (second, 2), (first, 3))]
    student.replay = Replayed(cuda_recorder())
    for given, video in zip(((first, 1), (second, 2), (first, 3)), wanted, strict=True):
        torch.testing.assert_close(clips_of(chunks(student, *given)), video, rtol=0, atol=1e-5)
    both = list(zip(chunks(student, first, 1), chunks(student, second, 2), strict=True))
    for number in range(2):
        torch.testing.assert_close(torch.cat([pair[number] for pair in both], 1), wanted[number], rtol=0, atol=1e-5)
