"""The causal baseline: a whole model under a frame-causal mask. On Wan's layers it is
Self-Forcing's generator, on DiT blocks (dit.py) the paper's Causal DiT, without FAR's long and
short context.

Every denoising step runs the whole trunk; a finished chunk is written to the cache by one more pass
at t = 0. Letters: B batch, K noisy samples, F latent frames, M target chunks, C H W latent axes, L
tokens, E width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from scd_sf.models.interface import (
    Corruption,
    Query,
    check_chunks,
    chunk_frames,
    pick_chunks,
    pick_frames,
)
from scd_sf.models.replay import Replayed, new_history, run_step
from scd_sf.models.trunk import RunBlocks, Text, Trunk, TrunkConfig, run_all
from scd_sf.nn.attention import AttentionContext, FullSequence, Streaming
from scd_sf.nn.kv_cache import KV, Cache, CacheConfig
from scd_sf.nn.masks import Layout, teacher_forcing_mask
from scd_sf.nn.rope import Rotary
from scd_sf.types import Conditioning


@dataclass(frozen=True)
class CausalStream:
    """State of a video that is being generated: the prompt's K/V, embedded actions and labels, the
    history, the size (H, W) of a latent frame, and the index of the coming chunk."""

    text: Text
    signal: Tensor | None
    cache: Cache
    latent_size: tuple[int, int]
    index: int = -1


class Causal(nn.Module):
    """A :class:`~scd_sf.models.interface.FrameGenerator` with exactly the parameters of the
    bidirectional model.

    ``frame_diagonal``: its last so many blocks see their own chunk alone (paper, section 4.2).
    Nothing reads their keys and values of finished frames, so those are never made: teacher forcing
    drops the clean frames before these blocks, and the cache does not have them. ``run_blocks``:
    how the others are run.
    """

    def __init__(self, cfg: TrunkConfig, chunk: int = 1) -> None:
        super().__init__()
        self.cfg, self._chunk, self.frame_diagonal = cfg, chunk, 0
        self.replay: Replayed | None = None
        self.trunk = Trunk(cfg, range(cfg.num_layers))
        self.run_blocks: RunBlocks = run_all

    @property
    def chunk(self) -> int:
        return self._chunk

    @property
    def needs_query(self) -> bool:
        return False

    @property
    def _num_history_blocks(self) -> int:
        """Number of blocks that see the history."""
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
        corruption: Corruption | None = None,
        targets: Sequence[int] | None = None,
    ) -> Tensor:
        """``[clean | noisy 1 | .. | noisy K]`` as one sequence; see the protocol for shapes."""
        samples, height, width = x_t.shape[0], *x_t.shape[-2:]
        num_chunks = check_chunks(x_t.shape[2], self.chunk)
        targets = range(num_chunks) if targets is None else targets
        x_clean = x_clean[:, : -self.chunk]  # no chunk attends to the last one
        frames = x_clean.shape[1]
        trunk, tokens = self.trunk, self.cfg.tokens(height, width)
        noisy = pick_chunks(x_t, targets, self.chunk, 2).transpose(0, 1).flatten(1, 2)
        noisy_t = pick_chunks(t, targets, self.chunk, 2).transpose(0, 1).flatten(1)
        sequence = trunk.embed(torch.cat([x_clean.to(noisy.dtype), noisy], 1))
        positions = [*range(frames), *(chunk_frames(targets, self.chunk) * samples)]
        clean_t = trunk.clean_times((len(x_clean), frames), noisy_t)
        signal = pick_frames(trunk.signal(cond), positions)
        times = trunk.times(torch.cat([clean_t, noisy_t], 1), signal)
        text = trunk.text(cond.text_BLE)
        rotary = trunk.rope(positions, height, width, sequence)

        def attend(history: int) -> FullSequence:
            """Noisy chunks after ``history`` clean ones."""
            layout = Layout.teacher_forced(history, targets, samples, self.chunk * tokens)
            return FullSequence(teacher_forcing_mask(layout, sequence.device))

        history_blocks = slice(0, self._num_history_blocks)
        chunk_blocks = slice(self._num_history_blocks, None)
        out = self.run_blocks(
            trunk, sequence, times, text, rotary, attend(num_chunks - 1), history_blocks
        )
        out = out[:, frames * tokens :]
        if self.frame_diagonal:
            out = trunk.run(
                out, times.mod[:, frames:], text, rotary.last(out.shape[1]), attend(0), chunk_blocks
            )
        velocity = trunk.velocity(out, times.temb[:, frames:], height, width)
        return velocity.unflatten(1, (samples, -1)).transpose(0, 1)

    def forward(
        self,
        x_t: Tensor,
        t_BF: Tensor,
        text: Text,
        rotary: Rotary,
        attend: AttentionContext,
        signal_BFE: Tensor | None,
    ) -> Tensor:
        """The whole trunk: x_t (B, F, C, H, W) at times t (B, F) -> velocity of the same shape."""
        trunk = self.trunk
        times, tokens = trunk.times(t_BF, signal_BFE), trunk.embed(x_t)
        tokens = self.run_blocks(trunk, tokens, times, text, rotary, attend, slice(None))
        return trunk.velocity(tokens, times.temb, *x_t.shape[-2:])

    def start(
        self, cond: Conditioning, latent_size: tuple[int, int], cache: CacheConfig | None = None
    ) -> CausalStream:
        history = new_history(
            self,
            self.replay,
            self.cfg,
            cache,
            cond.batch,
            latent_size,
            self.chunk,
            chunks_per_pass=1,
        )
        return self.switch(CausalStream((), None, history, latent_size), cond)

    def switch(self, stream: CausalStream, cond: Conditioning) -> CausalStream:
        def step(text_BLE: Tensor) -> Text:
            return self.trunk.text_kv(self.trunk.text(text_BLE))

        text = run_step(self.replay, "text", (), step, cond.text_BLE)
        return replace(stream, text=text, signal=self.trunk.signal(cond))

    def advance(
        self, stream: CausalStream, x_0: Tensor | None, query_noise: Tensor
    ) -> CausalStream:
        """One clean pass of the blocks that see the history writes the K/V of x_0; ``query_noise``
        is not read."""
        stream = replace(stream, index=stream.index + 1)
        if x_0 is None:
            return stream
        tokens = x_0.shape[1] * self.cfg.tokens(*stream.latent_size)

        def write(
            x: Tensor, t_BF: Tensor, text: Text, rotary: Rotary, signal: Tensor | None
        ) -> Mapping[int, KV]:
            attend = Streaming(stream.cache, (tokens,), write=1)
            history_blocks = slice(0, self._num_history_blocks)
            self.trunk(x, t_BF, text, rotary, attend, history_blocks, keep=0, signal_BFE=signal)
            return stream.cache.write(attend.take())

        with torch.no_grad():  # its output is unused and its K/V are detached
            x_0 = x_0.detach()
            clean_t = self.trunk.clean_times(x_0.shape[:2], x_0)
            inputs = self._inputs(stream, x_0, clean_t, stream.index - 1)
            new_kv = run_step(self.replay, "write", stream.cache.place, write, *inputs)
        return replace(stream, cache=stream.cache.grown(new_kv, tokens))

    def denoise(self, stream: CausalStream, x_t: Tensor, t: Tensor) -> Tensor:
        """The whole trunk on the noisy chunk, reading the history where the cache has one."""

        def step(
            x: Tensor, t_BF: Tensor, text: Text, rotary: Rotary, signal: Tensor | None
        ) -> Tensor:
            attend = Streaming(stream.cache, (x.shape[1] * self.cfg.tokens(*stream.latent_size),))
            velocity: Tensor = self(x, t_BF, text, rotary, attend, signal)
            return velocity

        inputs = self._inputs(stream, x_t, t.unsqueeze(1).expand(-1, x_t.shape[1]), stream.index)
        return run_step(self.replay, "denoise", stream.cache.place, step, *inputs)

    def _inputs(
        self, stream: CausalStream, x: Tensor, t_BF: Tensor, index: int
    ) -> tuple[Tensor, Tensor, Text, Rotary, Tensor | None]:
        """Inputs of one pass over chunk ``index``: latents, times, text, positions, signal."""
        frames = chunk_frames([index], self.chunk)
        rotary = self.trunk.rope(frames, *stream.latent_size, x)
        return x, t_BF, stream.text, rotary, pick_frames(stream.signal, frames)
