"""The causal baseline: a whole model under a frame-causal mask. On Wan's layers it is Self-Forcing's generator, on DiT
blocks (dit.py) the paper's Causal DiT, without FAR's long and short context.

Every denoising step runs the whole trunk; a finished chunk is written to the cache by one more pass at t = 0.
Letters: B batch, K noisy samples, F latent frames, M target chunks, C H W latent axes, L tokens, E width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from scd_sf.models.interface import Query, check_chunks, pick_chunks, pick_frames
from scd_sf.models.replay import Replayed, new_history, run_step
from scd_sf.models.trunk import Text, Trunk, TrunkConfig
from scd_sf.nn.attention import FullSequence, Streaming
from scd_sf.nn.kv_cache import KV, Cache, CacheConfig
from scd_sf.nn.masks import Layout, teacher_forcing_mask
from scd_sf.nn.rope import Rotary
from scd_sf.types import Conditioning


@dataclass(frozen=True)
class CausalStream:
    """One video in the making: prompt K/V, what the frames are told, history, and the index of the coming chunk."""

    text: Text
    signal: Tensor | None
    cache: Cache
    latent: tuple[int, int]
    index: int = -1


class Causal(nn.Module):
    """A :class:`~scd_sf.models.interface.FrameGenerator` with exactly the parameters of the bidirectional model.

    ``frame_diagonal``: its last so many blocks see their own chunk alone (paper 4.2). Nobody reads their keys
    and values of finished frames, so those are never made: teacher forcing drops the clean frames before these blocks,
    and the cache does not have them.
    """

    def __init__(self, cfg: TrunkConfig, chunk: int = 1) -> None:
        super().__init__()
        self.cfg, self._chunk, self.frame_diagonal = cfg, chunk, 0
        self.replay: Replayed | None = None
        self.trunk = Trunk(cfg, range(cfg.num_layers))

    @property
    def chunk(self) -> int:
        return self._chunk

    @property
    def needs_query(self) -> bool:
        return False

    @property
    def _temporal(self) -> int:
        """How many blocks see the history."""
        return len(self.trunk.blocks) - self.frame_diagonal

    def trunks(self) -> list[Trunk]:
        """The stacks of blocks, e.g. to switch activation checkpointing."""
        return [self.trunk]

    def teacher_forced(
        self,
        x_t: Tensor,
        t: Tensor,
        x_clean: Tensor,
        cond: Conditioning,
        *,
        query: Query | None = None,
        targets: Sequence[int] | None = None,
    ) -> Tensor:
        """``[clean | noisy 1 | .. | noisy K]`` as one sequence; see the protocol for shapes."""
        samples, height, width = x_t.shape[0], *x_t.shape[-2:]
        num_chunks = check_chunks(x_t.shape[2], self.chunk)
        targets = list(range(num_chunks)) if targets is None else targets
        x_clean = x_clean[:, : -self.chunk]  # nobody looks at the last one; one length, whichever are the targets
        frames = x_clean.shape[1]
        trunk, tokens = self.trunk, self.cfg.tokens(height, width)
        noisy = pick_chunks(x_t, targets, self.chunk, 2).transpose(0, 1).flatten(1, 2)
        noisy_t = pick_chunks(t, targets, self.chunk, 2).transpose(0, 1).flatten(1)
        sequence = trunk.embed(torch.cat([x_clean.to(noisy.dtype), noisy], 1))
        target_frames = [c * self.chunk + i for c in targets for i in range(self.chunk)]
        positions = [*range(frames), *(target_frames * samples)]
        both_t = torch.cat([trunk.clean_times((len(x_clean), frames), noisy_t), noisy_t], 1)
        times, text = trunk.times(both_t, pick_frames(trunk.signal(cond), positions)), trunk.text(cond.text_BLE)
        rotary = trunk.rope(positions, height, width, sequence)

        def attend(history: int) -> FullSequence:
            """Of chunks that have ``history`` clean ones in front."""
            layout = Layout.teacher_forced(history, targets, samples, self.chunk * tokens)
            return FullSequence(teacher_forcing_mask(layout, sequence.device))

        temporal, own = slice(0, self._temporal), slice(self._temporal, None)
        out = trunk.run(sequence, times.mod, text, rotary, attend(num_chunks - 1), temporal, t_BF=both_t)
        out = out[:, frames * tokens :]
        if self.frame_diagonal:
            out = trunk.run(out, times.mod[:, frames:], text, rotary.last(out.shape[1]), attend(0), own)
        velocity = trunk.velocity(out, times.temb[:, frames:], height, width)
        return velocity.unflatten(1, (samples, -1)).transpose(0, 1)

    def start(self, cond: Conditioning, latent: tuple[int, int], cache: CacheConfig | None = None) -> CausalStream:
        history = new_history(self, self.replay, self.cfg, cache, cond.batch, latent, self.chunk, 1)
        return CausalStream(*self._told(cond), history, latent)

    def switch(self, stream: CausalStream, cond: Conditioning) -> CausalStream:
        text, signal = self._told(cond)
        return replace(stream, text=text, signal=signal)

    def _told(self, cond: Conditioning) -> tuple[Text, Tensor | None]:
        text = run_step(self.replay, "text", (), lambda x: self.trunk.text_kv(self.trunk.text(x)), cond.text_BLE)
        return text, self.trunk.signal(cond)

    def advance(self, stream: CausalStream, x_0: Tensor | None, query_noise: Tensor) -> CausalStream:
        """Write the finished chunk's K/V (one clean pass of the blocks that see the history); nothing to write before
        the first chunk."""
        stream = replace(stream, index=stream.index + 1)
        if x_0 is None:
            return stream
        tokens = x_0.shape[1] * self.cfg.tokens(*stream.latent)

        def write(x: Tensor, t_BF: Tensor, text: Text, rotary: Rotary, signal: Tensor | None) -> Mapping[int, KV]:
            attend = Streaming(stream.cache, (tokens,), write=1)
            self.trunk(x, t_BF, text, rotary, attend, slice(0, self._temporal), 0, signal)
            return stream.cache.write(attend.take())

        with torch.no_grad():  # its output is unused and its K/V are detached
            x_0 = x_0.detach()
            inputs = self._inputs(stream, x_0, self.trunk.clean_times(x_0.shape[:2], x_0), stream.index - 1)
            written = run_step(self.replay, "write", stream.cache.place, write, *inputs)
        return replace(stream, cache=stream.cache.grown(written, tokens))

    def denoise(self, stream: CausalStream, x_t: Tensor, t: Tensor) -> Tensor:
        """The whole trunk on the noisy chunk, reading the history where the cache has one."""

        def step(x: Tensor, t_BF: Tensor, text: Text, rotary: Rotary, signal: Tensor | None) -> Tensor:
            attend = Streaming(stream.cache, (x.shape[1] * self.cfg.tokens(*stream.latent),))
            velocity: Tensor = self.trunk(x, t_BF, text, rotary, attend, slice(None), None, signal)
            return velocity

        inputs = self._inputs(stream, x_t, t.unsqueeze(1).expand(-1, x_t.shape[1]), stream.index)
        return run_step(self.replay, "denoise", stream.cache.place, step, *inputs)

    def _inputs(
        self, stream: CausalStream, x: Tensor, t_BF: Tensor, index: int
    ) -> tuple[Tensor, Tensor, Text, Rotary, Tensor | None]:
        """Of one pass over chunk ``index``."""
        frames = range(index * self.chunk, index * self.chunk + x.shape[1])
        return x, t_BF, stream.text, self.trunk.rope(frames, *stream.latent, x), pick_frames(stream.signal, frames)
