"""One predicate, two forms: the dense mask against its rule in words, the BlockMask against the
dense mask."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from scd_sf.nn.attention import FullSequence, compiled_flex
from scd_sf.nn.masks import Layout, block_mask, dense_mask, row_mask, teacher_forcing_mask

CPU = torch.device("cpu")
LAYOUTS = [
    Layout.teacher_forced(3, [0, 1, 2], 1, 2),
    Layout.teacher_forced(4, [1, 3], 2, 3),
    Layout.teacher_forced(1, [0], 3, 5),
    Layout.teacher_forced(5, [4, 0, 2], 1, 60),
]
layouts = pytest.mark.parametrize(
    "layout", LAYOUTS, ids=[f"{len(x.kinds)}x{x.tokens}" for x in LAYOUTS]
)


@layouts
def test_dense_mask_says_what_the_docstring_says(layout: Layout) -> None:
    mask, tokens = dense_mask(layout, CPU), layout.tokens
    groups = list(zip(layout.kinds, layout.chunks, strict=True))
    assert mask.shape == (len(groups) * tokens,) * 2
    for i, (kind_q, chunk_q) in enumerate(groups):
        for j, (kind_k, chunk_k) in enumerate(groups):
            if kind_q == 0:
                visible = kind_k == 0 and chunk_k <= chunk_q
            else:
                visible = (kind_k == 0 and chunk_k < chunk_q) or (kind_k, chunk_k) == (
                    kind_q,
                    chunk_q,
                )
            block = mask[i * tokens : (i + 1) * tokens, j * tokens : (j + 1) * tokens]
            assert bool(block.all()) == bool(block.any()) == visible, (i, j)


def same_blocks(layout: Layout) -> BlockMask:
    """Our BlockMask after comparing every table with the one torch makes from all pairs of
    tokens."""
    ours = block_mask(layout, CPU)
    length = len(layout.kinds) * layout.tokens
    theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu")
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for counts, indices in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        want = getattr(theirs, counts)
        assert torch.equal(getattr(ours, counts), want), counts
        for row, number in enumerate(want[0, 0].tolist()):
            first, second = getattr(ours, indices)[0, 0, row], getattr(theirs, indices)[0, 0, row]
            assert torch.equal(first[:number], second[:number]), (indices, row)
    return ours


@layouts
def test_block_mask_is_the_dense_mask(layout: Layout) -> None:
    """Its predicate, evaluated everywhere, and its tables of blocks, partly and wholly visible, for
    both passes."""
    dense, sparse = dense_mask(layout, CPU), same_blocks(layout)
    index = torch.arange(len(dense))
    zero = torch.zeros((), dtype=torch.long)
    assert torch.equal(sparse.mask_mod(zero, zero, index[:, None], index[None, :]), dense)


def test_block_mask_of_whole_and_ragged_blocks() -> None:
    """Groups that are blocks, that cross blocks, that end inside one; and Wan's size without a pair
    of tokens."""
    for tokens in (128, 256, 100, 390, 31):
        same_blocks(Layout.teacher_forced(4, [3, 1], 2, tokens))
    big = block_mask(Layout.teacher_forced(21, list(range(21)), 1, 1560), CPU)
    assert big.shape == (1, 1, 65520, 65520)


def test_layout_order_and_tokens() -> None:
    layout = Layout.teacher_forced(2, [1, 0], 2, 3)
    assert layout.kinds == (0, 0, 1, 1, 2, 2)
    assert layout.chunks == (0, 1, 1, 0, 1, 0)
    kinds, chunks = layout.per_token(CPU)
    assert kinds.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert chunks[:6].tolist() == [0, 0, 0, 1, 1, 1]


@layouts
def test_rows_of_the_mask_are_the_dense_masks(layout: Layout) -> None:
    """Block by block, over the keys that some row sees; a block that sees all of them needs no
    mask."""
    dense = dense_mask(layout, CPU)
    for start in range(0, len(dense), 5):
        stop = min(start + 5, len(dense))
        mask, runs = row_mask(layout, start, stop)
        chosen = torch.cat([torch.arange(len(dense))[run] for run in runs])
        seen = dense[start:stop, chosen]
        assert int(seen.sum()) == int(dense[start:stop].sum())
        assert bool(seen.all()) if mask is None else torch.equal(mask, seen)


def test_long_sequences_make_no_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by rows is attention under the dense mask, forward and backward, and for the last
    tokens alone."""
    layout = Layout.teacher_forced(6, range(6), 2, 4)
    length = len(layout.kinds) * layout.tokens
    q, k, v = (
        torch.randn(2, 2, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    dense = FullSequence(dense_mask(layout, CPU))(0, q, k, v)
    expected = torch.autograd.grad(dense.pow(2).sum(), (q, k, v))
    monkeypatch.setattr("scd_sf.nn.masks.DENSE_LIMIT", 8)
    monkeypatch.setattr("scd_sf.nn.attention.ROWS", 12)
    lazy = FullSequence(teacher_forcing_mask(layout, CPU))
    assert lazy.mask is layout
    out = lazy(0, q, k, v)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-12)
    for got, wanted in zip(torch.autograd.grad(out.pow(2).sum(), (q, k, v)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(lazy(0, q[:, :, -20:], k, v), dense[:, :, -20:], rtol=0, atol=1e-12)


def test_drawn_targets_compile_once_and_a_length_too_many_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stage 2 draws other targets in every micro-batch. torch gives up after 8 shapes, and what
    then ran unfused would take a table of all pairs: here 200 sets are one shape, and the ninth
    shape raises."""
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = compiled_flex(counter)
    monkeypatch.setattr("scd_sf.nn.attention.compiled_flex", lambda: compiled)

    def attend(chunks: int, targets: list[int]) -> None:
        layout = Layout.teacher_forced(chunks - 1, targets, 1, 16)
        q = torch.randn(1, 1, len(layout.kinds) * 16, 16)
        with torch.no_grad():
            got = FullSequence(block_mask(layout, CPU))(0, q, q, q)
        torch.testing.assert_close(got, FullSequence(dense_mask(layout, CPU))(0, q, q, q))

    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        attend(8, sorted(torch.randperm(8, generator=rng)[:3].tolist()))
    assert counter.frame_count == 1
    with pytest.raises(FailOnRecompileLimitHit):
        for chunks in range(9, 20):
            attend(chunks, [0, 1, 2])
    torch._dynamo.reset()


def test_cpu_gets_the_dense_mask_and_masks_are_kept() -> None:
    layout = LAYOUTS[0]
    mask = teacher_forcing_mask(layout, CPU)
    assert isinstance(mask, torch.Tensor) and mask.dtype == torch.bool
    assert teacher_forcing_mask(Layout.teacher_forced(3, [0, 1, 2], 1, 2), CPU) is mask


def test_masks_made_under_inference_mode_are_ordinary_tensors() -> None:
    """They are kept: a validation sample under inference mode must not leave tensors that training
    cannot save."""
    layout = Layout.teacher_forced(2, [0], 1, 7)
    with torch.inference_mode():
        dense, sparse = dense_mask(layout, CPU), block_mask(layout, CPU)
    assert (
        not dense.is_inference()
        and not sparse.kv_indices.is_inference()
        and not sparse.kv_num_blocks.is_inference()
    )
