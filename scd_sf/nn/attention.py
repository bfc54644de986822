"""Attention contexts: how the tokens of a forward attend is an argument of the model.

Training, teacher, critic and decoder pass :class:`FullSequence`; the rollout passes
:class:`Streaming`. Letters: B batch, N heads, L tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from scd_sf.nn.kv_cache import KV, Past
from scd_sf.nn.masks import Layout, row_mask

ROWS = 1024  # queries at a time


class AttentionContext(Protocol):
    """How the tokens of one forward attend in layer ``layer``: q, k, v (B, N, L, D), rotated ->
    like q.

    q may be of the last tokens alone (only they go on), where the context allows it.
    """

    def __call__(self, layer: int, q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor) -> Tensor: ...


def attention(q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot product attention. On the meta device (``scd plan`` counts there) FlashAttention's
    own operator: the general one would lay out the whole table of scores. On a CPU bf16 is trained
    in fp32: the bf16 backward pass takes ten times as long (docs/results/scratch_speed.md)."""
    if q_BNLD.is_meta and mask is None:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q_BNLD, k_BNLD, v_BNLD)[0]
        return out
    if q_BNLD.dtype == torch.bfloat16 and q_BNLD.device.type == "cpu" and torch.is_grad_enabled():
        q, k, v = q_BNLD.float(), k_BNLD.float(), v_BNLD.float()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).to(q_BNLD.dtype)
    return F.scaled_dot_product_attention(q_BNLD, k_BNLD, v_BNLD, attn_mask=mask)


@lru_cache(maxsize=2)
def compiled_flex(backend: str | Callable[..., object] = "inductor") -> Callable[..., Tensor]:
    """FlexAttention, fused. ``fullgraph``: a shape too many (torch's limit is 8) is an error;
    otherwise the unfused operator would run, whose table of scores is 34 GB and more at Wan's
    size."""
    compiled: Callable[..., Tensor] = torch.compile(
        flex_attention, dynamic=False, fullgraph=True, backend=backend
    )
    return compiled


class FullSequence:
    """Attention of a whole sequence. ``mask``: None (all see all), dense boolean (L, L), a
    BlockMask, or a layout of groups (long sequences on a CPU: attention runs on ``ROWS`` queries at
    a time, and nothing is as large as L x L).
    """

    def __init__(self, mask: Tensor | BlockMask | Layout | None = None) -> None:
        self.mask = mask

    def __call__(self, layer: int, q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor) -> Tensor:
        if isinstance(self.mask, BlockMask):
            if q_BNLD.is_meta:  # scd plan counts: every token sees its share of the others
                share = round(k_BNLD.shape[2] * (1 - self.mask.sparsity() / 100))
                return attention(q_BNLD, k_BNLD[:, :, :share], v_BNLD[:, :, :share])
            return compiled_flex()(q_BNLD, k_BNLD, v_BNLD, block_mask=self.mask)
        if isinstance(self.mask, Layout):
            return self._by_rows(self.mask, q_BNLD, k_BNLD, v_BNLD)
        return attention(q_BNLD, k_BNLD, v_BNLD, self.mask)

    @staticmethod
    def _by_rows(layout: Layout, q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor) -> Tensor:
        outputs, length, queries = [], k_BNLD.shape[2], q_BNLD.shape[2]
        step = max(1, ROWS // layout.tokens) * layout.tokens
        for start in range(length - queries, length, step):
            stop = min(start + step, length)
            mask, runs = row_mask(layout, start, stop)
            q = q_BNLD[:, :, start - (length - queries) : stop - (length - queries)]
            k, v = _pick_tokens(k_BNLD, runs), _pick_tokens(v_BNLD, runs)
            outputs.append(attention(q, k, v, mask))
        return torch.cat(outputs, dim=2)


def _pick_tokens(x_BNLD: Tensor, runs: Sequence[slice]) -> Tensor:
    """The tokens of these runs, (B, N, sum of run lengths, D). A single run is not copied."""
    if len(runs) == 1:
        return x_BNLD[:, :, runs[0]]
    return torch.cat([x_BNLD[:, :, run] for run in runs], 2)


class Streaming:
    """New tokens in consecutive groups; group g sees the past and groups 0..g (block-causal,
    without any mask).

    ``groups`` are token counts. The K/V of the first ``write`` groups are *staged*, nothing is
    mutated: the caller runs ``cache.write(context.take())`` after the forward. Under activation
    checkpointing the recomputation stages nothing new.
    """

    def __init__(self, past: Past, groups: tuple[int, ...], write: int = 0) -> None:
        self.past, self.groups, self.write = past, groups, write
        self.staged: dict[int, KV] = {}

    def take(self) -> dict[int, KV]:
        """The staged K/V by layer, which are removed from this object. Activation checkpoints keep
        it until backward, and would keep the tensors too."""
        kv, self.staged, self.write = self.staged, {}, 0
        return kv

    def __call__(self, layer: int, q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor) -> Tensor:
        if self.write and layer not in self.staged:
            num_tokens = sum(self.groups[: self.write])
            self.staged[layer] = (k_BNLD[:, :, :num_tokens], v_BNLD[:, :, :num_tokens])
        num_keys, queries = k_BNLD.shape[2], q_BNLD.shape[2]
        if queries == 0:
            return q_BNLD
        k_BNLD, v_BNLD = self.past.joined(layer, k_BNLD, v_BNLD)
        outputs, start = [], queries - num_keys
        for group in self.groups:
            end = start + group
            if end > 0:
                visible = k_BNLD.shape[2] - (queries - end)
                q = q_BNLD[:, :, max(start, 0) : end]
                k = k_BNLD[:, :, :visible]
                v = v_BNLD[:, :, :visible]
                outputs.append(attention(q, k, v))
            start = end
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
