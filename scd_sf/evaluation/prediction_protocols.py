"""Protocols of video prediction: which clips are scored, with how much context, how many
trajectories, and how these are reduced.

A protocol is data with a name and a version, and every result contains it. Figures of two
protocols, or of two versions of one, are never compared. Sources: SCD, FAR, TECO and MCVD, as
collected in docs/results/metrics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scd_sf.evaluation.frames import SsimWindow, check_ssim_window
from scd_sf.types import UserError, check_within

Reduction = Literal["best", "mean"]
CUSTOM = "custom, not comparable"
VERSION = "2"  # of all protocols below


@dataclass(frozen=True)
class PredictionProtocol:
    """One protocol. Frames are pixel frames at the data's own rate; ``resolution`` is the side of
    the square picture.

    The model gets ``context`` frames and predicts the ``generated`` frames after them, which the
    frame figures compare with the clip. It predicts one trajectory of every clip for each of
    ``seeds``. A frame figure is averaged over the frames of a trajectory, then reduced over
    trajectories by ``reduce``: ``best`` (of each clip and each figure by itself) or ``mean``; then
    averaged over clips. FVD is computed per trajectory over all clips, then averaged over
    trajectories; ``fvd_context``: it includes the context frames (true ones on both sides). The
    context starts at ``first_frame`` of the source clip. ``selection`` describes the clips in
    words; the caller has to choose them. ``ssim``: the pixels that SSIM counts, see
    ``ssim_frames``. All protocols count TECO's, and ``far_compat`` counts FAR's.

    Since version 2 SSIM counts the valid window; version 1 counted padded borders.
    """

    name: str
    version: str
    context: int
    generated: int
    clips: int
    resolution: int
    seeds: tuple[int, ...]
    reduce: Reduction
    fvd_context: bool = True
    first_frame: int = 0
    selection: str = ""
    ssim: SsimWindow = "valid"

    def __post_init__(self) -> None:
        for name, value, minimum in (
            ("context", self.context, 0),
            ("generated", self.generated, 1),
            ("clips", self.clips, 1),
            ("resolution", self.resolution, 1),
            ("first_frame", self.first_frame, 0),
            ("seeds", len(self.seeds), 1),
        ):
            if value < minimum:
                raise UserError(
                    f"protocol {self.name}: {name} is {value}; at least {minimum} is needed"
                )
        check_within(
            self,
            {"context": (0, 10**6), "generated": (1, 10**6), "resolution": (1, 2**15)},
            f"protocol {self.name}: ",
        )
        if self.seeds and min(self.seeds) < 0:
            raise UserError(
                f"protocol {self.name}: seeds is {list(self.seeds)}; they must be 0 or more"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError(
                f"protocol {self.name}: a seed is there twice in {self.seeds}; its trajectories are equal"
            )
        if self.reduce not in ("best", "mean"):
            raise UserError(
                f"protocol {self.name}: reduce is {self.reduce!r}; use 'best' or 'mean'"
            )
        check_ssim_window(self.ssim)

    @classmethod
    def custom(
        cls,
        *,
        context: int,
        generated: int,
        clips: int,
        resolution: int,
        seeds: tuple[int, ...] = (0,),
        reduce: Reduction = "mean",
        ssim: SsimWindow = "valid",
    ) -> PredictionProtocol:
        """A protocol for smaller machines and tests, whose name says that its figures do not
        compare. UserError: a number outside its range."""
        return cls(CUSTOM, VERSION, context, generated, clips, resolution, seeds, reduce, ssim=ssim)

    @property
    def frames(self) -> int:
        """Frames of the reference: context and generated."""
        return self.context + self.generated

    @property
    def title(self) -> str:
        """Name, version, frames, size, clips and trajectories as one line for tables."""
        trajectories = (
            f"{self.reduce} of {len(self.seeds)}" if len(self.seeds) > 1 else "1 trajectory"
        )
        sizes = (
            f"{self.context} -> {self.generated} frames of {self.resolution} px, {self.clips} clips"
        )
        ssim_note = ", SSIM with padded borders" if self.ssim == "padded" else ""
        return f"{self.name} v{self.version}: {sizes}, {trajectories}{ssim_note}"


_MINECRAFT = "TECO-Minecraft: the first 256 clips of the validation list, not shuffled, from frame 0, with actions"
_UCF = "UCF-101: every 10th video of test list 3, the first 256 of those, from frame 0, centre crop"
_RE10K = "RealEstate10K test clips without cameras; their number, trajectories and the side (128 or 256) are our choice"
_FAR_SEEDS = (0, 2, 4, 6)

_PROTOCOL_LIST = (
    PredictionProtocol(
        "minecraft-fvd", VERSION, 36, 264, 256, 128, (0,), "mean", selection=_MINECRAFT
    ),
    PredictionProtocol(
        "minecraft-frames", VERSION, 144, 156, 256, 128, (0,), "mean", selection=_MINECRAFT
    ),
    PredictionProtocol(
        "minecraft-scd", VERSION, 144, 156, 256, 128, tuple(range(4)), "best", selection=_MINECRAFT
    ),
    PredictionProtocol(
        "far-minecraft", VERSION, 144, 156, 256, 128, _FAR_SEEDS, "mean", selection=_MINECRAFT
    ),
    PredictionProtocol(
        "far-minecraft-fvd", VERSION, 36, 264, 256, 128, _FAR_SEEDS, "mean", selection=_MINECRAFT
    ),
    PredictionProtocol(
        "ucf101", VERSION, 4, 12, 256, 64, tuple(range(100)), "best", selection=_UCF
    ),
    PredictionProtocol("realestate10k", VERSION, 16, 48, 256, 256, (0,), "mean", selection=_RE10K),
)
PROTOCOLS = {protocol.name: protocol for protocol in _PROTOCOL_LIST}


def named_protocol(name: str) -> PredictionProtocol:
    """The protocol of that name. UserError (listing the names) for an unknown one."""
    if name not in PROTOCOLS:
        raise UserError(f"protocol '{name}' is unknown; use one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
