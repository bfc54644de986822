"""One formula, two spellings, and w = 1 is the plain branch."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from scd_sf.diffusion.guidance import GuidanceConfig, guide, guided
from scd_sf.types import Conditioning, UserError


class Recorder:
    """A denoiser that is a simple function of everything it gets, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.batches.append(x_t.shape[0])
        time = t.reshape(t.shape + (1,) * (x_t.ndim - t.ndim))
        return x_t * time + cond.text_BLE.mean(dim=(1, 2)).reshape(-1, 1, 1, 1, 1)


def test_additive_3_is_standard_4() -> None:
    additive, standard = GuidanceConfig(3.0, "additive"), GuidanceConfig(4.0)
    assert additive.w == standard.w == 4.0
    assert (
        additive.logs()
        == standard.logs()
        == {"guidance/standard_w": 4.0, "guidance/additive_s": 3.0}
    )
    cond, uncond = torch.randn(2, 7, generator=tiny.generator(0), dtype=torch.float64)
    assert torch.allclose(guide(cond, uncond, additive.w), cond + 3.0 * (cond - uncond))


def test_w_1_is_the_plain_branch_itself() -> None:
    cond, uncond = torch.randn(2, 7, generator=tiny.generator(0))
    assert guide(cond, uncond, 1.0) is cond
    assert torch.equal(guide(cond, uncond, 0.0), uncond)
    plain = Recorder()
    assert guided(plain, tiny.prompts(1), 1.0) is plain


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("null_batch", [1, 3])
def test_both_branches_run_in_one_batch(per_frame: bool, null_batch: int) -> None:
    plain, x_t, cond = Recorder(), tiny.latents(3, 2), tiny.prompts(3)
    null = tiny.prompts(null_batch, seed=9)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    t = t[:, None].repeat(1, 2) if per_frame else t
    out = guided(plain, null, 4.0)(x_t, t, cond)
    assert plain.batches == [6]
    negative = plain(x_t, t, null if null_batch == 3 else null.expand(3))
    assert torch.allclose(
        out, negative + 4.0 * (plain(x_t, t, cond) - negative), rtol=0, atol=1e-12
    )


def test_unknown_form_is_named() -> None:
    with pytest.raises(
        UserError, match=r"guidance.form is 'offset'; use 'standard' \(w\) or 'additive'"
    ):
        GuidanceConfig(3.0, "offset")
