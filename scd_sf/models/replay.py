"""Steps of a model recorded once and replayed: a CUDA graph launches all of a step's kernels at the
price of one.

For sampling. Addresses and Python numbers are baked into a recording, so inputs are copied into
places of their own (skipped where the same tensor was given last time), and whatever else decides a
step is part of its key: a step that reads the history has one recording for each of its lengths, a
few dozen for a window; they share their scratch memory. Sizes of videos (with their windows) are
kept for the four that were begun last, :data:`MOST_SIZES`: a fifth one takes the place of the
least recent, whose histories and recordings are freed and made again when it comes back. A step may
be run more often than it counts: it writes where no step reads yet (``RingKVCache.write``).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from scd_sf.models.trunk import TrunkConfig
from scd_sf.nn.kv_cache import Buffers, Cache, CacheConfig, RingKVCache, new_cache
from scd_sf.types import UserError

T = TypeVar("T")
Record = Callable[[Callable[[], T]], tuple[Callable[[], None], T]]
MOST = 128  # recordings of one step
MOST_SIZES = 4  # batch, frame size and window: each has histories of its own, which are large


def cuda_recorder(device: torch.device) -> Record[Any]:
    """Records on ``device``, whichever is the current one: a stream of another would record
    nothing. The step runs twice before: kernels are built and loaded there. All on one stream:
    libraries keep a workspace for each. A pool of memory ends with its last graph: the next graph
    begins another."""
    graphs = weakref.WeakSet[Any]()
    pool: Any = None  # taken with the first graph
    with torch.cuda.device(device):
        record_stream = torch.cuda.Stream()

    def record(step: Callable[[], T]) -> tuple[Callable[[], None], T]:
        nonlocal pool
        with torch.cuda.device(device):
            if not graphs:
                pool = torch.cuda.graph_pool_handle()
            caller_stream = torch.cuda.current_stream()
            record_stream.wait_stream(caller_stream)
            with torch.cuda.stream(record_stream):
                for _ in range(2):
                    step()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, pool=pool, stream=record_stream, capture_error_mode="thread_local"
                ):
                    out = step()
            graphs.add(graph)
            caller_stream.wait_stream(record_stream)
        return graph.replay, out

    return record


@dataclass
class _Place:
    """The tensor that a recording reads an input from, and the ``source`` that was last copied to
    it, at its ``version``. ``used``: the last call that read it."""

    tensor: Tensor
    source: Tensor
    version: int = -1
    used: int = 0


@dataclass
class _Recording:
    """``replay`` runs the step again, which writes ``out``. ``used``: the last call of it."""

    replay: Callable[[], None]
    out: Any
    used: int = 0


@dataclass
class _History:
    """Buffers of a history, and the cache that uses them at present."""

    number: int
    buffers: Buffers = field(default_factory=dict)
    owner: weakref.ref[RingKVCache] | None = None


@dataclass
class _Size:
    """The histories of videos of one size. ``begun``: the last call before its last video."""

    histories: list[_History] = field(default_factory=list)
    begun: int = 0


class Replayed:
    """Calls of steps, replayed. ``record`` runs a step once and returns (replay, what the step
    returned): on a GPU :func:`cuda_recorder`. A copy of a model has none of its recordings: they
    are of the original's weights."""

    def __init__(self, record: Record[Any]) -> None:
        self._record, self._numbers, self._weights = record, itertools.count(), tuple[int, ...]()
        self._calls = 0
        self._recordings: dict[Hashable, _Recording] = {}
        self._places: dict[Hashable, _Place] = {}
        self._sizes: dict[Hashable, _Size] = {}  # the one that was begun last is the last

    def __deepcopy__(self, memo: object) -> Replayed:
        return Replayed(self._record)

    def __call__(self, name: str, key: Hashable, step: Callable[..., T], *inputs: Any) -> T:
        """``step(*inputs)``. ``name`` and ``key`` say all that decides it but the inputs' values;
        inputs are tensors in tuples, mappings and dataclasses. What is returned are copies."""
        assert not torch.is_grad_enabled(), (
            "recorded steps have no gradient: sampling only, under torch.no_grad()"
        )
        self._calls += 1
        description: list[Hashable] = []

        def place(tensor: Tensor) -> Tensor:
            description.append((tuple(tensor.shape), tensor.dtype, tensor.device))
            return self._copy_in((name, len(description), description[-1]), tensor)

        places = _walk(inputs, place, description)
        full_key = (name, key, tuple(description))
        if full_key not in self._recordings:
            self._recordings[full_key] = _Recording(*self._record(lambda: step(*places)))
        recording = self._recordings[full_key]
        recording.used = self._calls
        recording.replay()
        copies: T = _walk(recording.out, lambda tensor: tensor.clone(), [])
        return copies

    def _copy_in(self, key: Hashable, tensor: Tensor) -> Tensor:
        if key not in self._places:
            with torch.inference_mode(False):  # others will write there outside of it
                self._places[key] = _Place(
                    torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device), tensor
                )
        place = self._places[key]
        place.used = self._calls
        version = -1 if tensor.is_inference() else tensor._version
        if place.source is not tensor or place.version != version or version < 0:
            place.tensor.copy_(tensor)
            place.source, place.version = tensor, version
        return place.tensor

    def lend_buffers(self, cache: Cache, key: Hashable, lengths: int, model: nn.Module) -> None:
        """Give a new history the buffers that recordings know: those of a video that is gone, or
        new ones.

        ``key``, the size, decides the buffers' shapes; ``lengths`` is the number of lengths of the
        history. If ``model`` has other tensors now than what was recorded read (values may change in
        place), everything is recorded again. Sizes beyond :data:`MOST_SIZES` are forgotten; a video
        that is being made goes on and is recorded again. UserError: more lengths than are recorded.
        """
        assert isinstance(cache, RingKVCache), (
            "recorded steps need a preallocated history (CacheConfig.sampling)"
        )
        if lengths > MOST:
            raise UserError(
                f"compile.cuda_graphs records a step once per length of the history, here {lengths}; at most {MOST}: "
                "set a window"
            )
        weights = tuple(
            tensor.data_ptr() for tensor in itertools.chain(model.parameters(), model.buffers())
        )
        if weights != self._weights:
            self._weights = weights
            self._recordings = {}
            self._places = {}
            self._sizes = {}
        size = self._sizes.pop(key, _Size())
        size.begun = self._calls
        self._sizes[key] = size
        if len(self._sizes) > MOST_SIZES:
            self._forget_oldest_size()
        free_histories = [
            history
            for history in size.histories
            if history.owner is None or history.owner() is None
        ]
        if free_histories:
            history = free_histories[0]
        else:
            history = _History(next(self._numbers))
            size.histories.append(history)
        history.owner = weakref.ref(cache)
        cache.use(history.buffers, (key, history.number))

    def _forget_oldest_size(self) -> None:
        """Drop the size that was begun first, and what no call used since the next one began. A
        place is used by every call of the recordings that read it, so it outlives them."""
        del self._sizes[next(iter(self._sizes))]
        oldest = next(iter(self._sizes.values())).begun
        self._recordings = {
            key: recording for key, recording in self._recordings.items() if recording.used > oldest
        }
        self._places = {key: place for key, place in self._places.items() if place.used > oldest}


def run_step(
    replay: Replayed | None, name: str, key: Hashable, step: Callable[..., T], *inputs: Any
) -> T:
    """``step(*inputs)``, through ``replay`` unless that is None."""
    return step(*inputs) if replay is None else replay(name, key, step, *inputs)


def new_history(
    model: nn.Module,
    replay: Replayed | None,
    cfg: TrunkConfig,
    config: CacheConfig | None,
    batch: int,
    latent_size: tuple[int, int],
    chunk: int,
    *,
    chunks_per_pass: int,
) -> Cache:
    """An empty history of ``batch`` videos with latent frames of (H, W), in buffers that recordings
    know.

    A forward reads it with up to ``chunks_per_pass`` chunks of ``chunk`` new frames.
    """
    history = new_cache(config, cfg.tokens(*latent_size), cfg.rope_axes, chunks_per_pass * chunk)
    if replay is not None:
        lengths = (config or CacheConfig()).num_lengths(chunk)
        replay.lend_buffers(history, (batch, latent_size, config), lengths, model)
    return history


def _walk(value: Any, change: Callable[[Tensor], Tensor], description: list[Hashable]) -> Any:
    """``value`` with ``change`` applied to every tensor; all else is appended to
    ``description``."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        description.append(tuple(value))
        return {name: _walk(part, change, description) for name, part in value.items()}
    if isinstance(value, tuple):
        description.append(len(value))
        parts = [_walk(part, change, description) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if is_dataclass(value) and not isinstance(value, type):
        description.append(type(value))
        return replace(
            value,
            **{f.name: _walk(getattr(value, f.name), change, description) for f in fields(value)},
        )
    description.append(value)
    return value
