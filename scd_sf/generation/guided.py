"""A student under guidance while sampling: itself a :class:`~scd_sf.models.interface.FrameStreamer`.

Text guidance (CFG): ``uncond + w (cond - uncond)`` with the null prompt. ``scope`` "all": the whole student runs on
both prompts, as it was trained; "decoder": only SCD's decoder does, and the encoder is not doubled. Corruption
guidance (supplement C.3, Table 5): ``v(c~) + s (v(c) - v(c~))``, c~ = c with noise of strength eta, drawn once a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scd_sf.diffusion.guidance import GuidanceConfig, guide
from scd_sf.diffusion.noise import Noise
from scd_sf.models.build import Scd, Student
from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.types import Conditioning, UserError, check_within


@dataclass(frozen=True)
class SampleGuidance:
    """Guidance of a student while sampling: text or corruption, one of the two at a time."""

    text: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Classifier-free guidance with the null prompt."""
    scope: str = "all"
    """What text guidance doubles: all, or the decoder alone."""
    corruption: float = 1.0
    """Guidance away from a corrupted context: the s of Table 5 (its best is 1.5); 1: off."""
    eta: float = 0.05
    """Noise of that corruption, relative to the context's root mean square."""

    def __post_init__(self) -> None:
        if self.scope not in ("all", "decoder"):
            raise UserError(f"guidance.scope is '{self.scope}'; use 'all' or 'decoder'")
        if self.text.w != 1.0 and self.corruption != 1.0:
            raise UserError("guidance: set either text.scale or corruption, not both")
        if self.eta <= 0:
            raise UserError(f"guidance.eta is {self.eta}; it must be above 0")
        check_within(self, {"corruption": (0, 1e3), "eta": (0, 100)}, "guidance.")

    @property
    def on(self) -> bool:
        return self.text.w != 1.0 or self.corruption != 1.0


class Guided:
    """``student`` under ``guidance``. Every chunk is denoised as two rows, the guiding one second."""

    def __init__(self, student: Student, guidance: SampleGuidance, null: Conditioning, noise_like: Noise) -> None:
        """``null``: the prompt of nothing, batch 1. ``noise_like``: draws the corruption of c."""
        self.student, self.guidance, self.null, self.noise_like = student, guidance, null, noise_like
        self.whole = guidance.corruption == 1.0 and guidance.scope == "all"
        if not self.whole and not isinstance(student, Scd):
            raise UserError(
                "guidance by corruption or of the decoder alone needs an SCD student; use text with scope all"
            )

    @property
    def chunk(self) -> int:
        return self.student.chunk

    def start(self, cond: Conditioning, latent: tuple[int, int], cache: CacheConfig | None = None) -> Any:
        if self.whole:
            return self.student.start(self._both(cond), latent, cache)
        return self._decoder_rows(self.student.start(cond, latent, cache), cond)

    def switch(self, stream: Any, cond: Conditioning) -> Any:
        generator: Any = self.student
        if self.whole:
            return generator.switch(stream, self._both(cond))
        return self._decoder_rows(generator.switch(stream, cond), cond)

    def advance(self, stream: Any, x_0: Tensor | None, query_noise: Tensor) -> Any:
        twice = query_noise.repeat(2, 1, 1, 1, 1)
        generator: Any = self.student
        if self.whole:
            return generator.advance(stream, None if x_0 is None else x_0.repeat(2, 1, 1, 1, 1), twice)
        stream, c_BLE = generator.encode_next(stream, x_0, query_noise)
        other = c_BLE
        if self.guidance.corruption != 1.0:
            rms = c_BLE.pow(2).mean(-1, keepdim=True).sqrt()
            other = c_BLE + self.guidance.eta * rms * self.noise_like(c_BLE)
        return generator.with_context(stream, torch.cat([c_BLE, other]), twice)

    def denoise(self, stream: Any, x_t: Tensor, t: Tensor) -> Tensor:
        generator: Any = self.student
        both: Tensor = generator.denoise(stream, x_t.repeat(2, 1, 1, 1, 1), t.repeat(2))
        guided, guiding = both.chunk(2)
        corruption = self.guidance.corruption
        return guide(guided, guiding, corruption if corruption != 1.0 else self.guidance.text.w)

    def _both(self, cond: Conditioning) -> Conditioning:
        return cond.cat(self.null.to(cond.text_BLE.device).expand(cond.batch))

    def _decoder_rows(self, stream: Any, cond: Conditioning) -> Any:
        """The decoder's prompts for both rows of every clip."""
        assert isinstance(self.student, Scd)
        rows = cond.repeat(2) if self.guidance.corruption != 1.0 else self._both(cond)
        return self.student.switch_decoder(stream, rows)
