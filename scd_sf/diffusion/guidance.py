"""Classifier-free guidance. One formula, ``uncond + w (cond - uncond)``; two spellings of its scale
in configs.

Self-Forcing's code writes ``cond + s (cond - uncond)``: its 3.0 is w = 4.0 here. Configs say which
they mean with ``form``; both numbers are logged (docs/deviations.md, "CFG"). A student that is
guided while sampling: generation/guided.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scd_sf.types import Conditioning, Denoiser, Logs, UserError, check_within


@dataclass(frozen=True)
class GuidanceConfig:
    """Classifier-free guidance: uncond + w (cond - uncond)."""

    scale: float = 1.0
    """How strong; standard: w, 1 is off; additive: s = w - 1, 0 is off."""
    form: str = "standard"
    """Which of the two ``scale`` is: standard or additive (Self-Forcing's)."""

    def __post_init__(self) -> None:
        if self.form not in ("standard", "additive"):
            raise UserError(
                f"guidance.form is '{self.form}'; use 'standard' (w) or 'additive' (w = scale + 1)"
            )
        least = 0 if self.form == "standard" else -1
        check_within(self, {"scale": (least, 1e3)}, "guidance.")

    @property
    def w(self) -> float:
        """The scale in the standard convention."""
        return self.scale if self.form == "standard" else self.scale + 1.0

    def logs(self) -> Logs:
        return {"guidance/standard_w": self.w, "guidance/additive_s": self.w - 1.0}


def guide(cond: Tensor, uncond: Tensor, w: float) -> Tensor:
    """uncond + w (cond - uncond); w = 1 returns ``cond`` itself."""
    return cond if w == 1.0 else uncond + w * (cond - uncond)


def guided(denoiser: Denoiser, uncond: Conditioning, w: float) -> Denoiser:
    """A denoiser under guidance, both branches in one batch (one ZeRO-3 gather); w = 1 is the plain
    branch.

    ``uncond`` has batch 1 or the batch of the call.
    """
    if w == 1.0:
        return denoiser

    def denoise(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        null = uncond.expand(cond.batch) if uncond.batch == 1 else uncond
        velocities = denoiser(
            x_t.repeat(2, 1, 1, 1, 1), t.repeat(2, *([1] * (t.ndim - 1))), cond.cat(null)
        )
        positive, negative = velocities.chunk(2)
        return guide(positive, negative, w)

    return denoise
