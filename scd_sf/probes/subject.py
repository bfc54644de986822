"""A model together with the inputs of a probe.

Letters: B clips, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from scd_sf.data.frames import FrameClips
from scd_sf.data.latents import LatentClips
from scd_sf.diffusion.samplers import Sampler
from scd_sf.generation.bidirectional import sample_bidirectional
from scd_sf.generation.generate import clips_of, generate_latents
from scd_sf.models.blocks import blocks_of
from scd_sf.models.build import Scd, Student
from scd_sf.models.causal import Causal
from scd_sf.models.wan.transformer import Wan
from scd_sf.types import Conditioning, UserError, VideoShape


@dataclass(frozen=True)
class Subject:
    """``cond``: B prompts (actions, labels), ``seeds``: one per clip. ``clips``: encoded clips for
    probes that need true frames (None: no clips). ``sampler_shift`` and ``training_shift``:
    timestep shifts of the sampler and of the training."""

    name: str
    model: Student | Wan
    shape: VideoShape
    cond: Conditioning
    sampler: Sampler
    seeds: tuple[int, ...]
    clips: LatentClips | FrameClips | None = None
    device: torch.device | str = "cpu"
    sampler_shift: float = 5.0
    training_shift: float = 5.0

    @property
    def chunk(self) -> int:
        """Latent frames that are denoised together."""
        return self.shape.frames if isinstance(self.model, Wan) else self.model.chunk

    @property
    def tokens(self) -> int:
        """Tokens of a latent frame."""
        return self.model.cfg.tokens(self.shape.height, self.shape.width)

    @property
    def step_blocks(self) -> list[nn.Module]:
        """The blocks that run at every denoising step, in order: all, or SCD's decoder."""
        trunk = self.model.decoder.trunk if isinstance(self.model, Scd) else self.model.trunk
        return list(trunk.blocks)

    @property
    def history_blocks(self) -> list[nn.Module]:
        """The blocks that see other frames, in order: all, or SCD's encoder (which runs once per
        chunk)."""
        trunk = self.model.encoder if isinstance(self.model, Scd) else self.model.trunk
        return list(trunk.blocks)

    @property
    def bypassed(self) -> range:
        """Indices of blocks that a skip-layer schedule (P5) leaves out of some steps, at which they
        have no features."""
        skip = blocks_of(self.model).skip
        return range(0) if skip is None else skip.middle(len(self.step_blocks))

    def check_whole(self) -> None:
        """UserError: some blocks do not run at every step."""
        if blocks := self.bypassed:
            raise UserError(
                f"{self.name}: its blocks {blocks.start}..{blocks.stop - 1} do not run at every step (blocks.skip), so "
                "steps cannot be compared; whole=true runs all blocks, or probe the checkpoint it was trained from"
            )

    def first(self, clips: int) -> Subject:
        """The subject with its first ``clips`` prompts alone; their videos stay the same."""
        return replace(self, cond=self.cond.rows(slice(0, clips)), seeds=self.seeds[:clips])

    def with_sampler(self, sampler: Sampler) -> Subject:
        return replace(self, sampler=sampler)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Latents (B, F, C, H, W) of the subject's videos, by the ordinary rollout."""
        size = (self.shape.frames, self.shape.channels, self.shape.height, self.shape.width)
        cond = self.cond.to(self.device)
        if isinstance(self.model, Wan):
            return sample_bidirectional(
                self.model, cond, size, self.sampler, self.seeds, self.device
            )
        assert isinstance(self.model, Causal | Scd)
        return clips_of(generate_latents(self.model, cond, self.seeds, size, self.sampler))
