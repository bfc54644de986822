"""A frame's cost: compiled steps are single graphs and equal eager; calls and blocks do not grow;
nothing waits for the device; the history is allocated once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from scd_sf.diffusion.noise import cpu_noise
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.evaluation.table import BlockPassCounter
from scd_sf.generation.compile import CompileConfig, compile_steps
from scd_sf.generation.generate import clips_of, generate_latents
from scd_sf.generation.rollout import stream_rollout
from scd_sf.models.build import Student
from scd_sf.models.causal import Causal
from scd_sf.models.interface import Stream
from scd_sf.models.replay import Replayed
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.scd.wan import ScdWan
from scd_sf.models.wan.transformer import WanConfig
from scd_sf.nn import rope
from scd_sf.nn.kv_cache import CacheConfig, RingKVCache
from scd_sf.nn.layers import WanBlock
from scd_sf.types import UserError

CPU = torch.device("cpu")
WINDOW = CacheConfig(window=3, sink=1, preallocate=4)
SHAPE = (tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)
BY_NAME = {str(variant): variant for variant in tiny.VARIANTS}
VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "slice",
    "select",
    "unsqueeze",
    "expand",
    "alias",
    "unbind",
}
VIEWS |= {"split", "narrow", "detach", "view_as_complex", "view_as_real", "lift_fresh"}


class Calls(TorchDispatchMode):
    """Counts aten calls that do work (views launch nothing)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def video(student: Student, device: torch.device = CPU) -> Tensor:
    """Six chunks by four steps, through a window that fills and wraps, as it is sampled."""
    cond = tiny.prompts(1, dtype=torch.float32).to(device)
    return clips_of(
        generate_latents(
            student, cond, [1], (6 * student.chunk, *SHAPE), FewStepSampler(), window=3, sink=1
        )
    )


@pytest.fixture
def compiler() -> Iterator[Counter[str]]:
    """A fresh compiler with torch's own limits; yields its count of graph breaks by reason."""
    torch._dynamo.reset()
    counters.clear()
    limits = ("recompile_limit", "accumulated_recompile_limit")
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in limits}):
        yield counters["graph_break"]
    torch._dynamo.reset()


def small(name: str) -> Student:
    """Two blocks in every part: compiling is slow on one core."""
    variant = BY_NAME[name]
    cfg = WanConfig(2, 12, tiny.CHANNELS, tiny.CHANNELS, tiny.TEXT, 16, 32, 2)
    model: Student = Causal(cfg, variant.chunk)
    if variant.family == "scd":
        decoder = DecoderConfig(
            (0, 1),
            variant.fusion,
            variant.rope,
            variant.prefix,
            None if variant.fusion == "paper" else 1,
        )
        model = ScdWan(cfg, ScdConfig((0, 1), decoder, variant.chunk))
    tiny.redraw(model, 0, torch.float32)
    return model


def compare(name: str, backend: str, breaks: Counter[str]) -> None:
    student, before = small(name), counters["stats"]["unique_graphs"]
    eager = video(student)
    compile_steps(student, CompileConfig(enabled=True), CPU, backend)
    compiled = video(student)
    assert float((compiled - eager).abs().max()) < 1e-5
    graphs = counters["stats"]["unique_graphs"]
    assert graphs - before in (4, 5, 6)  # nothing was left to eager, nothing compiled per frame
    assert not breaks
    video(student)
    assert counters["stats"]["unique_graphs"] == graphs, "a second video compiles again"


def test_compiled_steps_are_whole_graphs_and_equal_eager(compiler: Counter[str]) -> None:
    """Two students in one process share their code, and more graphs than torch's limit of one
    code."""
    for name in ("scd-chunk1-delta", "causal-chunk1"):
        compare(name, "eager", compiler)


def test_graphs_beyond_the_limit_are_an_error(compiler: Counter[str]) -> None:
    compile_steps(student := small("causal-chunk1"), CompileConfig(enabled=True), CPU, "eager")
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit),
    ):
        video(student)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("scd-chunk1-delta", "inductor"),
        ("causal-chunk1", "inductor"),
        ("scd-chunk3-paper-identical-full", "eager"),
        ("scd-chunk3-junction-identical-cached", "eager"),
    ],
)
def test_compilers_code_equals_eager(name: str, backend: str, compiler: Counter[str]) -> None:
    compare(name, backend, compiler)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_cuda_equals_eager(graphs: bool, compiler: Counter[str]) -> None:
    """Compiled, and with every step replayed as a CUDA graph."""
    cuda = torch.device("cuda")
    student = small("scd-chunk1-delta").to(cuda)
    eager = video(student, cuda)
    compile_steps(student, CompileConfig(enabled=True, cuda_graphs=graphs), cuda)
    assert float((video(student, cuda) - eager).abs().max()) < 1e-4 and not compiler


def test_compile_says_what_it_cannot_do() -> None:
    graphs = CompileConfig(enabled=True, cuda_graphs=True)
    with pytest.raises(UserError, match=r"compile\.cuda_graphs: the device is cpu"):
        compile_steps(small("scd-chunk1-delta"), graphs, CPU)


@pytest.mark.parametrize(
    ("name", "blocks", "encode", "decode"),
    [
        ("scd-chunk1-delta", (6, 4), 367, 203),
        ("scd-chunk1-paper-identical-full", (4, 4), 276, 208),
        ("causal-chunk1", (6, 6), 308, 316),
    ],
)
def test_a_frames_calls_and_blocks_do_not_grow(
    name: str, blocks: tuple[int, int], encode: int, decode: int
) -> None:
    """Block passes and working aten calls (CPU) of one chunk in steady state: window full, sink
    turning."""
    rope.rope_table.clear()  # tables that other tests left would be calls saved
    rope._axis.cache_clear()
    student = tiny.student(BY_NAME[name], dtype=torch.float32)
    x, t = tiny.latents(1, 1, dtype=torch.float32), torch.ones(1)
    with torch.no_grad():
        stream: Stream = tiny.stream(student, tiny.prompts(1, dtype=torch.float32), x, WINDOW)
        counted = []
        for _ in range(9):
            with Calls() as once, BlockPassCounter(student, WanBlock) as encoder:
                stream = student.advance(stream, x, x)
            with Calls() as step, BlockPassCounter(student, WanBlock) as decoder:
                student.denoise(stream, x, t)
            counted.append((once.names.total(), step.names.total(), encoder.calls, decoder.calls))
    assert counted[-1] == counted[-2] == counted[-3]
    assert counted[-1][2:] == blocks
    assert counted[-1][0] <= encode and counted[-1][1] <= decode, once.names + step.names


@pytest.mark.parametrize(
    ("name", "encode", "decode"),
    [
        ("scd-chunk1-delta", 57, 9),
        ("scd-chunk1-paper-identical-full", 59, 11),
        ("causal-chunk1", 28, 17),
    ],
)
def test_what_is_left_to_launch_beside_recordings(name: str, encode: int, decode: int) -> None:
    """Inputs that changed, copies of results, the cache's turn; per chunk and per step, whatever
    the depth."""
    rope.rope_table.clear()
    rope._axis.cache_clear()
    student = tiny.student(BY_NAME[name], dtype=torch.float32)
    student.replay = Replayed(lambda step: (lambda: None, step()))
    x, t = tiny.latents(1, 1, dtype=torch.float32), torch.ones(1)
    with torch.no_grad():
        stream: Stream = tiny.stream(student, tiny.prompts(1, dtype=torch.float32), x, WINDOW)
        for _ in range(9):
            with Calls() as once:
                stream = student.advance(stream, x, x)
            with Calls() as step:
                student.denoise(stream, x, t)
    assert once.names.total() <= encode and step.names.total() <= decode, once.names + step.names


def test_the_history_is_allocated_once() -> None:
    student = tiny.student(BY_NAME["scd-chunk1-delta"], dtype=torch.float32)
    x = tiny.latents(1, 1, dtype=torch.float32)
    with torch.no_grad():
        stream: Stream = tiny.stream(student, tiny.prompts(1, dtype=torch.float32), x, WINDOW)
        places = set()
        for _ in range(9):
            stream = student.advance(stream, x, x)
            assert isinstance(stream.cache, RingKVCache)
            kept = [stream.cache.layer(layer) for layer in range(len(tiny.ENCODER))]
            places.add(tuple(part.data_ptr() for kv in kept if kv is not None for part in kv))
    assert len(places) == 1 and len(places.pop()) == 2 * len(tiny.ENCODER)


@pytest.mark.parametrize("variant", tiny.FEW, ids=str)
def test_no_step_waits_for_the_device(variant: tiny.Variant) -> None:
    """On the meta device, which has no values: whatever reads one raises."""
    with pytest.raises(RuntimeError, match=r"item|meta"):
        torch.zeros(1, device="meta").item()
    student = tiny.student(variant, dtype=torch.float32).to("meta")
    cond = tiny.prompts(1, dtype=torch.float32).to("meta")
    noise, cache = (
        torch.empty(1, 3 * student.chunk, *SHAPE, device="meta"),
        CacheConfig(1, sink=1, preallocate=2),
    )
    if student.chunk > 1:
        cache = CacheConfig(preallocate=3 * student.chunk)
    with torch.no_grad():
        rng = cpu_noise(tiny.generator(0))
        frames = list(
            stream_rollout(student, noise, cond, FewStepSampler((1.0, 0.5)), rng, cache=cache)
        )
    assert len(frames) == 3 and all(frame.is_meta for frame in frames)
