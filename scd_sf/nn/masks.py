"""The teacher-forcing mask: one predicate, from which the dense mask (CPU, tests) and
FlexAttention's BlockMask come.

A token is described by two integers: ``kind`` (0 = clean; k = noisy sample number k, where SCD's
encoder has its query frames) and ``chunk`` (which frames it belongs to). Clean tokens see clean chunks <= their own and
nothing noisy; noisy tokens see clean chunks < their own, and their own chunk of their own sample
(supplement Algorithm 1; Self-Forcing's mask).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from scd_sf.nn.tables import kept_within, tensor_bytes
from scd_sf.types import on_device

CLEAN = 0
BLOCK = 128  # FlexAttention's own default
DENSE_LIMIT = 4096  # tokens; a dense mask of more is not made


def teacher_forcing(kind_q: Tensor, chunk_q: Tensor, kind_k: Tensor, chunk_k: Tensor) -> Tensor:
    """True where a query token (kind_q, chunk_q) may look at a key token (kind_k, chunk_k);
    broadcasts."""
    history = (kind_k == CLEAN) & (chunk_k < chunk_q)
    own_chunk = (kind_k == kind_q) & (chunk_k == chunk_q)
    return history | own_chunk


@dataclass(frozen=True)
class Layout:
    """Groups of ``tokens`` tokens each, in the order of the sequence, with kind and chunk of every
    group."""

    kinds: tuple[int, ...]
    chunks: tuple[int, ...]
    tokens: int

    @classmethod
    def teacher_forced(
        cls, num_chunks: int, targets: Sequence[int], samples: int, tokens: int
    ) -> Layout:
        """``[clean 0..num_chunks-1 | targets of sample 1 | .. | targets of sample K]``, ``tokens``
        per chunk."""
        kinds = [CLEAN] * num_chunks
        chunks = list(range(num_chunks))
        for sample in range(1, samples + 1):
            kinds += [sample] * len(targets)
            chunks += list(targets)
        return cls(tuple(kinds), tuple(chunks), tokens)

    def per_token(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(L,) kinds and (L,) chunks."""
        kinds, chunks = (on_device(torch.tensor(x), device) for x in (self.kinds, self.chunks))
        return kinds.repeat_interleave(self.tokens), chunks.repeat_interleave(self.tokens)

    def visible(self) -> Tensor:
        """(groups, groups) boolean, True = the tokens of a group may attend to those of another."""
        kinds, chunks = torch.tensor(self.kinds), torch.tensor(self.chunks)
        return teacher_forcing(kinds[:, None], chunks[:, None], kinds[None, :], chunks[None, :])


def _dense_bytes(mask: Tensor) -> int:
    return tensor_bytes(mask)


@kept_within(_dense_bytes)
def dense_mask(layout: Layout, device: torch.device) -> Tensor:
    """(L, L) boolean, True = may attend."""
    with torch.inference_mode(False):  # cached: see rope.py
        tokens = layout.tokens
        return (
            on_device(layout.visible(), device)
            .repeat_interleave(tokens, 0)
            .repeat_interleave(tokens, 1)
        )


def _block_bytes(mask: BlockMask) -> int:
    """Bytes of a mask's tables, forwards and backwards, and of the tensors its predicate reads."""
    tables = (
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
        mask.q_num_blocks,
        mask.q_indices,
        mask.full_q_num_blocks,
        mask.full_q_indices,
    )
    return tensor_bytes(*tables) + 16 * mask.seq_lengths[0]


@kept_within(_block_bytes)
def block_mask(layout: Layout, device: torch.device) -> BlockMask:
    """The same predicate as FlexAttention's sparse block mask.

    Made from groups, never from L x L pairs (which would be 4 GB at Wan's 480p with one noisy
    sample): visible pairs of groups, summed over the groups that a block touches, say whether a
    block is empty, partly or wholly visible.
    """
    with torch.inference_mode(False):
        kinds, chunks = layout.per_token(device)
        length = len(kinds)

        def predicate(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return teacher_forcing(kinds[q], chunks[q], kinds[k], chunks[k])

        tokens = torch.arange(0, length, BLOCK)  # the first token of every block
        first = tokens // layout.tokens  # the groups first .. stop - 1 that a block touches
        stop = (tokens + BLOCK - 1).clamp(max=length - 1) // layout.tokens + 1
        num_groups = stop - first
        sums = nn.functional.pad(layout.visible().long().cumsum(0).cumsum(1), (1, 0, 1, 0))
        lower, upper = sums[first], sums[stop]
        pairs = upper[:, stop] - upper[:, first] - lower[:, stop] + lower[:, first]
        complete = tokens + BLOCK <= length
        all_visible = pairs == num_groups[:, None] * num_groups
        full_blocks = all_visible & complete[:, None] & complete
        return BlockMask.from_kv_blocks(
            *_block_table((pairs > 0) & ~full_blocks, device),
            *_block_table(full_blocks, device),
            BLOCK_SIZE=BLOCK,
            mask_mod=predicate,
            seq_lengths=(length, length),
        )


def _block_table(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(1, 1, rows) how many of a row's blocks are set, (1, 1, rows, columns) their indices before
    the rest."""
    counts = blocks.sum(1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return on_device(counts[None, None], device), on_device(indices[None, None], device)


def _row_bytes(rows: tuple[Tensor | None, tuple[slice, ...]]) -> int:
    return tensor_bytes(rows[0])


@kept_within(_row_bytes)
def row_mask(layout: Layout, start: int, stop: int) -> tuple[Tensor | None, tuple[slice, ...]]:
    """A mask (stop - start, tokens of all runs) for the tokens ``start`` .. ``stop`` - 1, and the
    runs of tokens that any of them sees. The mask is None where all see all runs. No tensor is as
    large as tokens x tokens."""
    tokens, groups = layout.tokens, slice(start // layout.tokens, (stop - 1) // layout.tokens + 1)
    visible = _visible(layout)[groups]
    columns = visible.any(0).nonzero().flatten().tolist()
    runs: list[slice] = []
    for group in columns:
        if runs and runs[-1].stop == group * tokens:
            runs[-1] = slice(runs[-1].start, (group + 1) * tokens)
        else:
            runs.append(slice(group * tokens, (group + 1) * tokens))
    visible = visible[:, columns]
    if bool(visible.all()):
        return None, tuple(runs)
    first = start - groups.start * tokens
    with torch.inference_mode(False):
        rows = visible.repeat_interleave(tokens, 0)[first : first + stop - start]
        return rows.repeat_interleave(tokens, 1), tuple(runs)


@lru_cache(maxsize=32)
def _visible(layout: Layout) -> Tensor:
    with torch.inference_mode(False):
        return layout.visible()


def teacher_forcing_mask(layout: Layout, device: torch.device) -> Tensor | BlockMask | Layout:
    """BlockMask on CUDA. On CPU, where FlexAttention has no backward, dense; of a long sequence the
    layout itself, of which attention takes rows block by block. Tensors on the meta device get a
    BlockMask too, whose own tables are real: ``scd plan`` reads from it how much is visible."""
    if device.type == "cpu":
        return (
            layout
            if len(layout.kinds) * layout.tokens > DENSE_LIMIT
            else dense_mask(layout, device)
        )
    return block_mask(layout, torch.device("cpu") if device.type == "meta" else device)
