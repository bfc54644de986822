"""A student under guidance while sampling: itself a
:class:`~scd_sf.models.interface.FrameStreamer`.

Text guidance (CFG): ``uncond + w (cond - uncond)`` with the null prompt. ``scope`` "all": the whole
student runs on both prompts, as it was trained; "decoder": only SCD's decoder does, and the encoder
is not doubled. Corruption guidance (supplement C.3, Table 5): ``v(c~) + s (v(c) - v(c~))``, c~ = c
with noise of strength context_noise, drawn once a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from scd_sf.diffusion.guidance import GuidanceConfig, guide
from scd_sf.diffusion.noise import Noise
from scd_sf.models.build import Scd, Student
from scd_sf.models.interface import FrameStreamer, SeparableStreamer, Stream
from scd_sf.models.scd.decoder import corrupt
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
    context_noise: float = 0.05
    """Noise of that corruption, relative to the context's root mean square."""

    def __post_init__(self) -> None:
        if self.scope not in ("all", "decoder"):
            raise UserError(f"guidance.scope is '{self.scope}'; use 'all' or 'decoder'")
        if self.text.w != 1.0 and self.corruption != 1.0:
            raise UserError("guidance: set either text.scale or corruption, not both")
        if self.context_noise <= 0:
            raise UserError(f"guidance.context_noise is {self.context_noise}; it must be above 0")
        check_within(self, {"corruption": (0, 1e3), "context_noise": (0, 100)}, "guidance.")

    @property
    def on(self) -> bool:
        return self.text.w != 1.0 or self.corruption != 1.0


def under_guidance(
    student: Student, guidance: SampleGuidance, null: Conditioning, noise_like: Noise
) -> FrameStreamer:
    """``student`` under ``guidance``: :class:`Guided`, or :class:`GuidedDecoder` where that is
    enough.

    ``null``: the prompt that text guidance leads away from, one row or one per clip.
    ``noise_like``: draws the corruption of contexts, the same at every call within a chunk.
    UserError: the causal baseline has no decoder of its own.
    """
    if guidance.corruption == 1.0 and guidance.scope == "all":
        return Guided(student, guidance, null)
    if not isinstance(student, Scd):
        raise UserError(
            "guidance by corruption or of the decoder alone needs an SCD student; use text with scope all"
        )
    return GuidedDecoder(student, guidance, null, noise_like)


@dataclass(frozen=True)
class Guided:
    """The whole student on two rows for every clip, under its prompt and under ``null``."""

    student: FrameStreamer
    guidance: SampleGuidance
    null: Conditioning

    @property
    def chunk(self) -> int:
        return self.student.chunk

    def start(
        self, cond: Conditioning, latent_size: tuple[int, int], cache: CacheConfig | None = None
    ) -> Stream:
        """As the student's, of 2B rows: B under ``cond``, then B under ``null``."""
        return self.student.start(both_prompts(cond, self.null), latent_size, cache)

    def switch(self, stream: Stream, cond: Conditioning) -> Stream:
        """The student's ``switch`` with 2B rows of conditions."""
        return self.student.switch(stream, both_prompts(cond, self.null))

    def advance(self, stream: Stream, x_0: Tensor | None, query_noise: Tensor) -> Stream:
        """Both rows get the same frames and the same query noise."""
        return self.student.advance(stream, None if x_0 is None else twice(x_0), twice(query_noise))

    def denoise(self, stream: Stream, x_t: Tensor, t: Tensor) -> Tensor:
        """uncond + w (cond - uncond), (B, n, C, H, W)."""
        cond, uncond = self.student.denoise(stream, twice(x_t), t.repeat(2)).chunk(2)
        return guide(cond, uncond, self.guidance.text.w)


@dataclass(frozen=True)
class GuidedDecoder:
    """SCD whose decoder alone runs on two rows for every clip; the encoder's context serves both.

    The second row has the prompt ``null``, or (guidance by corruption) the first row's prompt and a
    corrupted context.
    """

    student: SeparableStreamer
    guidance: SampleGuidance
    null: Conditioning
    noise_like: Noise

    @property
    def chunk(self) -> int:
        return self.student.chunk

    @property
    def by_corruption(self) -> bool:
        """Whether a corrupted context guides; otherwise the null prompt does."""
        return self.guidance.corruption != 1.0

    def start(
        self, cond: Conditioning, latent_size: tuple[int, int], cache: CacheConfig | None = None
    ) -> Stream:
        """As the student's, whose decoder has 2B rows."""
        return self._decoder_rows(self.student.start(cond, latent_size, cache), cond)

    def switch(self, stream: Stream, cond: Conditioning) -> Stream:
        """The student's ``switch``; the decoder gets 2B rows of conditions."""
        return self._decoder_rows(self.student.switch(stream, cond), cond)

    def _decoder_rows(self, stream: Stream, cond: Conditioning) -> Stream:
        rows = cond.repeat(2) if self.by_corruption else both_prompts(cond, self.null)
        return self.student.switch_decoder(stream, rows)

    def advance(self, stream: Stream, x_0: Tensor | None, query_noise: Tensor) -> Stream:
        """One pass of the encoder, whose context serves both rows."""
        stream, c_BLE = self.student.encode_next(stream, x_0, query_noise)
        guiding = c_BLE
        if self.by_corruption:
            guiding = corrupt(c_BLE, self.guidance.context_noise, self.noise_like)
        return self.student.with_context(stream, torch.cat([c_BLE, guiding]), twice(query_noise))

    def denoise(self, stream: Stream, x_t: Tensor, t: Tensor) -> Tensor:
        """second + w (first - second), (B, n, C, H, W)."""
        first, second = self.student.denoise(stream, twice(x_t), t.repeat(2)).chunk(2)
        w = self.guidance.corruption if self.by_corruption else self.guidance.text.w
        return guide(first, second, w)


def both_prompts(cond: Conditioning, null: Conditioning) -> Conditioning:
    """2B rows: ``cond``, then ``null`` (one row B times, or its B rows)."""
    return cond.cat(null.to(cond.text_BLE.device).expand(cond.batch))


def twice(x_BFCHW: Tensor) -> Tensor:
    """2B rows: x, then x again."""
    return x_BFCHW.repeat(2, 1, 1, 1, 1)
