"""What the rehearsal must catch, and that the list of docs/gpu.md is measured."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rehearsal import world
from rehearsal.budgets import BUDGETS, Budget
from rehearsal.fake_cuda import FakeCuda
from torch import Tensor

from scd_sf.nn.attention import FullSequence
from scd_sf.nn.masks import Layout, block_mask
from scd_sf.types import on_device

TABLES = block_mask(Layout((0, 0), (0, 1), 128), torch.device("cpu"))


def on(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cuda")


def attended(*types: torch.dtype, mask: Tensor | None = None) -> Tensor:
    q, k, v = (on((1, 1, 8, 8), dtype) for dtype in types)
    return F.scaled_dot_product_attention(q, k, v, mask)


MIXES: dict[str, Callable[[], object]] = {
    "added": lambda: on((3,)) + torch.ones(3),
    "into the host's": lambda: torch.zeros(3).add_(on((3,))),
    "into the host's number": lambda: torch.zeros(()).add_(on(())),
    "joined": lambda: torch.cat([on((3,)), torch.ones(3, dtype=torch.bfloat16)]),
    "joined, a number": lambda: torch.stack([on(()), torch.ones((), dtype=torch.bfloat16)]),
    "looked up": lambda: F.embedding(torch.tensor([1]), on((4, 8))),
    "types of a product": lambda: on((3, 4)) @ on((4, 3), torch.float32),
    "types of a layer": lambda: F.linear(on((3, 4), torch.float32), on((5, 4)), on((5,))),
    "types of a convolution": lambda: F.conv3d(
        on((1, 3, 2, 4, 4), torch.float32), on((5, 3, 1, 1, 1))
    ),
    "types of a norm": lambda: F.layer_norm(on((3, 4), torch.float32), (4,), on((4,)), on((4,))),
    "types of attention": lambda: attended(torch.half, torch.bfloat16, torch.half),
    "a mask on the host": lambda: attended(
        *[torch.half] * 3, mask=torch.ones(8, 8, dtype=torch.bool)
    ),
    "a block mask on the host": lambda: FullSequence(TABLES)(0, *[on((1, 1, 256, 8))] * 3),
    "the host's generator": lambda: torch.randn(3, generator=torch.Generator(), device="cuda"),
    "the device's generator": lambda: torch.randn(3, generator=torch.Generator("cuda")),
    "shapes": lambda: on((3, 4)) @ on((3, 4)),
}


def test_mixes_are_refused(cuda: FakeCuda) -> None:
    for name, mix in MIXES.items():
        with pytest.raises(RuntimeError) as caught:
            mix()
        assert "outside of it" not in str(caught.value), name


def test_what_a_gpu_takes(cuda: FakeCuda) -> None:
    """Numbers of the host beside tensors of the device, promoted types, generators of its own."""
    x = on((3, 4))
    assert (x * torch.tensor(2.0) + 1.0).dtype == torch.bfloat16
    assert (x + on((4,), torch.float32)).dtype == torch.float32
    assert torch.where(x > 0, x, torch.zeros(())).device == cuda.device
    own = torch.Generator("cuda").manual_seed(3)
    assert torch.randn(3, generator=own, device="cuda").device == cuda.device
    assert torch.nn.Linear(4, 5, device="cuda")(on((3, 4), torch.float32)).grad_fn is not None


COUNTED: dict[str, tuple[Callable[[], object], Budget]] = {
    "item": (lambda: on(()).item(), Budget(1, 0)),
    "float, bool, int": (
        lambda: [float(on(())), bool(on(()) > 0), int(on((), torch.int64))],
        Budget(3, 0),
    ),
    "tolist": (lambda: on((3,)).tolist(), Budget(1, 0)),
    "cpu": (lambda: on((3,)).cpu(), Budget(1, 0)),
    "into the host's": (lambda: torch.zeros(3).copy_(on((3,))), Budget(1, 0)),
    "nonzero": (lambda: on((3,)).nonzero(), Budget(1, 0)),
    "solved": (
        lambda: torch.linalg.solve(on((2, 2), torch.float32), on((2,), torch.float32)),
        Budget(1, 0),
    ),
    "equal": (lambda: torch.equal(on((3,)), on((3,))), Budget(1, 0)),
    "by a mask": (lambda: on((3, 4))[on((3,), torch.bool)], Budget(1, 0)),
    "by a list": (lambda: on((3, 4))[[0, 2]], Budget(0, 1, 1)),
    "pinned": (lambda: on_device(torch.ones(3), "cuda"), Budget(0, 1)),
    "not pinned": (lambda: torch.ones(3).to("cuda", non_blocking=True), Budget(0, 1, 1)),
    "waited for": (lambda: torch.ones(3).pin_memory().to("cuda"), Budget(0, 1, 1)),
    "a list": (lambda: torch.tensor([1, 2], device="cuda"), Budget(0, 1, 1)),
    "into a part": (lambda: on((3, 4))[0].copy_(torch.ones(4)), Budget(0, 1, 1)),
    "synchronised": (lambda: torch.cuda.synchronize(0), Budget(1, 0)),
}


def test_waits_are_counted(cuda: FakeCuda) -> None:
    places = r"the list allows .*tests/rehearsal/test_mode.py:\d+ x"
    for name, (work, budget) in COUNTED.items():
        with cuda.counted() as counts:
            work()
        assert counts.totals == budget, f"{name}: {counts}"
        with pytest.raises(AssertionError, match=places), cuda.budget(Budget(0, 0)):
            work()


def test_the_device_is_gone_afterwards() -> None:
    with world.CUDA:
        x = on((3,))
    with pytest.raises(RuntimeError, match="outside of it"):
        x + 1
    assert torch.Generator is torch._C.Generator and not torch._C._only_lift_cpu_tensors()


def test_the_documents_list() -> None:
    """Every budget of docs/gpu.md is one that a test here asks for, and the other way round."""
    texts = [file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py")]
    asked = re.findall(r'BUDGETS\[f?"([^"]+)"\]', "".join(texts))
    patterns = [re.compile(re.sub(r"\\{.*?\\}", ".+", re.escape(name))) for name in asked]
    assert len(BUDGETS) > 40 and not [
        name for name in BUDGETS if not any(p.fullmatch(name) for p in patterns)
    ]
    assert not [p for p in patterns if not any(p.fullmatch(name) for name in BUDGETS)]
