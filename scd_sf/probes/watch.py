"""Observe a rollout while it runs: block outputs at every denoising step, and queries and keys of
attention.

It uses forward hooks on the model's blocks and a sampler that counts its steps; both are removed
afterwards. Letters: B clips, N heads, L tokens, D head dim, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from scd_sf.diffusion.noise import Noise
from scd_sf.diffusion.samplers import OnStep, Sampler, Velocity
from scd_sf.nn.attention import AttentionContext, FullSequence, Streaming
from scd_sf.probes.subject import Subject

ATTEND = 4  # position of the attention context among the arguments of a block's forward


@dataclass
class Place:
    """The position of a rollout: the chunk, the denoising step and its time in [0, 1]. ``step`` is
    None between the steps, where finished frames are read in."""

    chunk: int = 0
    step: int | None = None
    t: float = 1.0


@dataclass
class CountingSampler:
    """The sampler ``inner``, which keeps its position in ``place``."""

    inner: Sampler
    place: Place = field(default_factory=Place)

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
        step = begin

        def counting_velocity(x_t: Tensor, t: float) -> Tensor:
            nonlocal step
            self.place.step = step
            self.place.t = t
            out = velocity(x_t, t)
            self.place.step = None
            step += 1
            return out

        x_0 = self.inner(counting_velocity, x_T, noise_like, exit_step, on_step, begin)
        self.place.chunk += 1
        return x_0


# (place, block, tokens (B, L, E)): a block's output
Features = Callable[[Place, int, Tensor], None]
# (place, block, q (B, N, L, D), k (B, N, L', D)): all keys that the last L queries may look at
QueriesAndKeys = Callable[[Place, int, Tensor, Tensor], None]


@dataclass
class _AttentionObserver:
    """An attention context that passes its queries and keys to ``show`` and computes the same as
    ``inner``."""

    inner: AttentionContext
    show: Callable[[Tensor, Tensor], None]

    def __call__(self, layer: int, q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor) -> Tensor:
        out = self.inner(layer, q_BNLD, k_BNLD, v_BNLD)
        keys = (
            self.inner.past.joined(layer, k_BNLD, v_BNLD)[0]
            if isinstance(self.inner, Streaming)
            else k_BNLD
        )
        self.show(q_BNLD, keys)
        return out


@contextmanager
def _hooks(blocks: list[nn.Module], add: Callable[[int, nn.Module], Any]) -> Iterator[None]:
    """Inside, every block has the hook that ``add(index, block)`` registers."""
    handles = [add(index, block) for index, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch_features(subject: Subject, blocks: list[int], show: Features) -> Tensor:
    """Run the subject's rollout and call ``show`` with the output of the step blocks ``blocks`` at
    every step, for the chunk's tokens alone. Returns the rollout's latents, equal to those of a
    plain run. UserError: a block that is bypassed."""
    subject.check_whole()
    sampler = CountingSampler(subject.sampler)
    step_blocks = [subject.step_blocks[index] for index in blocks]
    length = subject.chunk * subject.tokens

    def add(index: int, block: nn.Module) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> None:
            if sampler.place.step is not None:
                show(sampler.place, blocks[index], out[:, out.shape[1] - length :])

        return block.register_forward_hook(hook)

    with _hooks(step_blocks, add):
        return subject.with_sampler(sampler).sample()


def watch_attention(subject: Subject, show: QueriesAndKeys) -> Tensor:
    """Run the subject's rollout and call ``show`` with queries and keys of every history block, at
    every step or (SCD's encoder) once per chunk. Returns the rollout's latents. UserError: a block
    that is bypassed."""
    subject.check_whole()
    sampler = CountingSampler(subject.sampler)
    blocks = subject.history_blocks
    at_steps = blocks[0] is subject.step_blocks[0]

    def add(index: int, block: nn.Module) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if (sampler.place.step is not None) != at_steps:
                return None
            attend = arguments[ATTEND]
            assert isinstance(attend, FullSequence | Streaming)
            observer = _AttentionObserver(attend, lambda q, k: show(sampler.place, index, q, k))
            return (*arguments[:ATTEND], observer, *arguments[ATTEND + 1 :])

        return block.register_forward_pre_hook(hook)

    with _hooks(blocks, add):
        return subject.with_sampler(sampler).sample()
