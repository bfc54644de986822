"""Look into a rollout while it runs: block outputs at every denoising step, and queries and keys of
attention.

Ordinary forward hooks on the model's blocks and a sampler that counts its steps; both are gone
afterwards. Letters: B clips, N heads, L tokens, D head dim, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from scd_sf.diffusion.noise import Noise
from scd_sf.diffusion.solvers import Sampler, Velocity
from scd_sf.nn.attention import AttentionContext, FullSequence, Streaming
from scd_sf.probes.subject import Subject

ATTEND = 4  # which argument of a block's forward says how its tokens attend


@dataclass
class Place:
    """Where a rollout is: the chunk, the denoising step and its time in [0, 1]; step None: between
    the steps, where finished frames are read in."""

    chunk: int = 0
    step: int | None = None
    t: float = 1.0


@dataclass
class CountingSampler:
    """The sampler, saying where it is."""

    inner: Sampler
    place: Place = field(default_factory=Place)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def steps(self) -> int:
        return self.inner.steps

    def __call__(
        self, velocity: Velocity, x_T: Tensor, noise_like: Noise, exit_step: int | None = None
    ) -> Tensor:
        done = 0

        def counted(x_t: Tensor, t: float) -> Tensor:
            nonlocal done
            self.place.step, self.place.t = done, t
            out = velocity(x_t, t)
            self.place.step, done = None, done + 1
            return out

        x_0 = self.inner(counted, x_T, noise_like, exit_step)
        self.place.chunk += 1
        return x_0


# (place, block, tokens (B, L, E)): a block's output
Features = Callable[[Place, int, Tensor], None]
# (place, block, q (B, N, L, D), k (B, N, L', D)): all keys that the last L queries may look at
QueriesAndKeys = Callable[[Place, int, Tensor, Tensor], None]


@dataclass
class _Watched:
    """An attention context that shows what it is given and does what it did."""

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
def _hooked(blocks: list[nn.Module], add: Callable[[int, nn.Module], Any]) -> Iterator[None]:
    handles = [add(index, block) for index, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch_features(subject: Subject, blocks: list[int], show: Features) -> Tensor:
    """Run the subject's rollout; ``show`` gets the output of the chosen step blocks at every step,
    tokens of the chunk alone. Returns the rollout's latents, which are those of a plain run.
    UserError: a block that is bypassed."""
    subject.check_whole()
    sampler, chosen = (
        CountingSampler(subject.sampler),
        [subject.step_blocks[index] for index in blocks],
    )
    length = subject.chunk * subject.tokens

    def add(index: int, block: nn.Module) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> None:
            if sampler.place.step is not None:
                show(sampler.place, blocks[index], out[:, out.shape[1] - length :])

        return block.register_forward_hook(hook)

    with _hooked(chosen, add):
        return subject.with_sampler(sampler).sample()


def watch_attention(subject: Subject, show: QueriesAndKeys) -> Tensor:
    """Run the subject's rollout; ``show`` gets queries and keys of every history block: at every
    step, or (SCD's encoder) once per chunk. Returns the rollout's latents. UserError: a block that
    is bypassed."""
    subject.check_whole()
    sampler, blocks = CountingSampler(subject.sampler), subject.history_blocks
    at_steps = blocks[0] is subject.step_blocks[0]

    def add(index: int, block: nn.Module) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if (sampler.place.step is not None) != at_steps:
                return None
            attend = arguments[ATTEND]
            assert isinstance(attend, FullSequence | Streaming)
            watched = _Watched(attend, lambda q, k: show(sampler.place, index, q, k))
            return (*arguments[:ATTEND], watched, *arguments[ATTEND + 1 :])

        return block.register_forward_pre_hook(hook)

    with _hooked(blocks, add):
        return subject.with_sampler(sampler).sample()
