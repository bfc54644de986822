"""Recorded steps give the same videos as steps that are run, for every history, prompt, guidance
and interleaving.

A tape stands for the CUDA graph (tests/tape.py).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tape import record
from torch import Tensor

from scd_sf.diffusion.guidance import GuidanceConfig
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.generation.generate import clips_of, generate_latents
from scd_sf.generation.guided import SampleGuidance
from scd_sf.generation.prompt_change import PromptChange
from scd_sf.models.build import Student
from scd_sf.models.replay import MOST, MOST_SIZES, Replayed, cuda_recorder
from scd_sf.nn.kv_cache import RingKVCache
from scd_sf.types import Conditioning, UserError

SHAPE = (tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)
SAMPLER = FewStepSampler((1.0, 0.5))
REPLAYED = [v for v in tiny.SOME if v.blocks.skip is None]


def chunks(student: Student, told: Conditioning, seed: int, **options: Any) -> Iterator[Tensor]:
    options = {"window": 2 * student.chunk, "sink": student.chunk} | options
    return generate_latents(student, told, [seed], (5 * student.chunk, *SHAPE), SAMPLER, **options)


@pytest.mark.parametrize("variant", REPLAYED, ids=str)
def test_videos_are_the_same(variant: tiny.Variant) -> None:
    """Windows that fill and wrap, sinks that turn, other prompts and seeds on the same recordings,
    prompts that change, the past encoded again, two videos at once, one that is left unfinished."""
    student = tiny.student(variant, dtype=torch.float32)
    first, second = (tiny.prompts(1, seed=number, dtype=torch.float32) for number in (1, 2))
    again = PromptChange(Conditioning(second.text_BLE), "recache")  # it is for prompts alone
    changed = {
        "changes": {2: PromptChange(second)} | ({4: again} if variant.backbone == "wan" else {})
    }
    wanted = [clips_of(chunks(student, *given)) for given in ((first, 1), (second, 2))]
    wanted.append(clips_of(chunks(student, first, 3, **changed)))
    student.replay = Replayed(record)
    assert torch.equal(clips_of(chunks(student, first, 1)), wanted[0])
    count = len(student.replay._recordings)
    assert torch.equal(clips_of(chunks(student, second, 2)), wanted[1])
    assert torch.equal(clips_of(chunks(student, first, 3, **changed)), wanted[2])
    assert len(student.replay._recordings) == count, "another video is recorded again"
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


def test_old_sizes_are_forgotten() -> None:
    """Histories and recordings are kept of the sizes that were begun last. Videos of a size that
    comes back, and one that was begun before its size was forgotten, are the same."""
    student = tiny.student(tiny.FEW[0], dtype=torch.float32)
    first = tiny.prompts(1, seed=1, dtype=torch.float32)
    sizes = [
        {"window": window * student.chunk, "sink": sink * student.chunk}
        for window in (1, 2, 3)
        for sink in (0, 1)
    ]
    assert len(sizes) > MOST_SIZES + 1
    wanted = [clips_of(chunks(student, first, 1, **size)) for size in sizes]
    few, replayed = Replayed(record), Replayed(record)
    student.replay = few
    for size in sizes[-MOST_SIZES:]:
        clips_of(chunks(student, first, 1, **size))
    student.replay = replayed
    begun = chunks(student, first, 1, **sizes[0])
    parts = [next(begun)]
    for size, video in zip(sizes, wanted, strict=True):
        assert torch.equal(clips_of(chunks(student, first, 1, **size)), video)
    assert list(replayed._sizes) == list(few._sizes) and len(few._sizes) == MOST_SIZES
    assert replayed._places.keys() == few._places.keys()
    assert len(replayed._recordings) == len(few._recordings)  # of other histories
    assert torch.equal(clips_of([*parts, *begun]), wanted[0])
    for _ in range(2):  # the newest ones are not recorded again
        count = len(replayed._recordings)
        assert torch.equal(clips_of(chunks(student, first, 1, **sizes[-1])), wanted[-1])
        assert len(replayed._recordings) == count
    assert torch.equal(clips_of(chunks(student, first, 1, **sizes[0])), wanted[0])


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
    assert [
        place.tensor._version - before
        for place, before in zip(places.values(), copied, strict=True)
    ] == [1, 2]
    student.replay = replayed
    with pytest.raises(UserError, match=r"compile\.cuda_graphs .* set a window"):
        shape = (MOST, *SHAPE)
        next(generate_latents(student, tiny.prompts(1, dtype=torch.float32), [1], shape, SAMPLER))


def test_places_made_in_inference_mode_serve_outside_of_it() -> None:
    replayed, buffers = Replayed(record), dict[int, Any]()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            x, cache = torch.ones(1, 1, 2, 4), RingKVCache(4, 2)
            assert torch.equal(replayed("step", (), lambda x: x + 1, x), x + 1)
            cache.use(buffers, "a")
            cache = cache.grown(cache.write({0: (x, x)}), 2)
            assert torch.equal(cache.joined(0, x, x)[0], torch.ones(1, 1, 4, 4))


def test_other_weights_and_copies() -> None:
    """A model whose weights were replaced is recorded again, and a stream that began before goes
    on; a copy has its own recordings; a gradient is refused."""
    variant = next(v for v in tiny.FEW if v.family == "scd" and v.chunk == 1)
    student, told = tiny.student(variant, dtype=torch.float32), tiny.prompts(1, dtype=torch.float32)
    before = clips_of(chunks(student, told, 1))
    halved = {name: value / 2 for name, value in student.state_dict().items()}
    student.replay = Replayed(record)
    assert torch.equal(clips_of(chunks(student, told, 1)), before)
    copied = copy.deepcopy(student)
    copied.load_state_dict(halved)
    plain = copy.deepcopy(copied)
    plain.replay = None
    other = clips_of(chunks(plain, told, 1))
    assert torch.equal(clips_of(chunks(copied, told, 1)), other) and not torch.equal(other, before)
    assert torch.equal(clips_of(chunks(student, told, 1)), before)
    student.load_state_dict({name: value.clone() for name, value in halved.items()}, assign=True)
    begun = chunks(student, told, 1)
    parts = [next(begun)]
    assert torch.equal(clips_of(chunks(student, told, 1)), other)
    student.load_state_dict({name: value.clone() for name, value in halved.items()}, assign=True)
    assert torch.equal(clips_of(chunks(student, told, 1)), other)
    assert torch.equal(clips_of([*parts, *begun]), other)
    with pytest.raises(AssertionError, match="recorded steps have no gradient"):
        student.replay("step", (), lambda x: x + 1, torch.ones(1))


class Gpus:
    """Stands in for torch.cuda: which device is current, and on which stream of which device what
    happened."""

    def __init__(self) -> None:
        self.device, self.streams, self.seen = 0, [0], list[object]()

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        self.streams.append(10 * self.device)
        yield
        self.streams.pop()
        self.device = before

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        self.streams.append(stream.number)
        try:
            yield
        finally:
            self.streams.pop()

    @contextmanager
    def graph(
        self, graph: object, *, pool: object, stream: Any, capture_error_mode: str
    ) -> Iterator[None]:
        self.seen.append(("graph", pool, capture_error_mode))
        with self.on_stream(stream):
            yield


def test_recorded_on_the_models_own_gpu_and_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, made = Gpus(), list[int]()

    class Stream:
        def __init__(self) -> None:
            made.append(10 * gpus.device + 1 + len(made))
            self.number = made[-1]

        def wait_stream(self, other: object) -> None:
            gpus.seen.append("waits")

    class Graph:
        def replay(self) -> None:
            pass

    pools = itertools.count()
    stand_ins = {
        "device": gpus.on_device,
        "stream": gpus.on_stream,
        "graph": gpus.graph,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: ("pool", gpus.device, next(pools)),
        "current_stream": lambda: SimpleNamespace(
            wait_stream=lambda other: gpus.seen.append("is waited for")
        ),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    recorder = cuda_recorder(torch.device("cuda", 3))
    replays = [recorder(lambda: gpus.seen.append(gpus.streams[-1]))[0] for _ in range(2)]
    once = ["waits", 31, 31, ("graph", ("pool", 3, 0), "thread_local"), 31, "is waited for"]
    assert gpus.seen == once * 2 and made == [31] and gpus.streams == [0]
    replays.clear()  # a pool ends with its last graph
    recorder(lambda: None)
    assert gpus.seen[-2] == ("graph", ("pool", 3, 1), "thread_local")

    def fail() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        recorder(fail)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", REPLAYED, ids=str)
def test_on_a_gpu(variant: tiny.Variant) -> None:
    student, cuda = tiny.student(variant, dtype=torch.float32).to("cuda"), torch.device("cuda")
    first, second = (
        tiny.prompts(1, seed=number, dtype=torch.float32).to(cuda) for number in (1, 2)
    )
    wanted = [clips_of(chunks(student, *given)) for given in ((first, 1), (second, 2), (first, 3))]
    student.replay = Replayed(cuda_recorder(cuda))
    for given, video in zip(((first, 1), (second, 2), (first, 3)), wanted, strict=True):
        torch.testing.assert_close(clips_of(chunks(student, *given)), video, rtol=0, atol=1e-5)
    both = list(zip(chunks(student, first, 1), chunks(student, second, 2), strict=True))
    for number in range(2):
        torch.testing.assert_close(
            torch.cat([pair[number] for pair in both], 1), wanted[number], rtol=0, atol=1e-5
        )
