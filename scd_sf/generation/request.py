"""What a request for videos means: the sampler and the size that it gets of a student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from scd_sf.models.build import SamplerConfig, Student
from scd_sf.models.interface import check_chunks
from scd_sf.models.wan.vae import VaeGeometry
from scd_sf.types import UserError, VideoShape


def choose_sampler(
    trained_sampler: SamplerConfig,
    requested_sampler: SamplerConfig | None,
    where: str,
    *,
    force: bool = False,
) -> SamplerConfig:
    """The checkpoint's sampler with the times it was trained at, or another one. A distilled
    student gives noise with one it was not trained for: UserError unless ``force``."""
    sampler = (
        trained_sampler
        if requested_sampler is None or requested_sampler == replace(trained_sampler, times=())
        else requested_sampler
    )
    if sampler != trained_sampler and trained_sampler.name == "renoise" and not force:
        raise UserError(
            f"{where}: distilled for sampler {asdict(trained_sampler)}, not for {asdict(sampler)}; "
            "leave the sampler unset, or force it"
        )
    return sampler


# Allowed numbers of frames and pixels of a request; 0: as trained.
SIZES_ASKED: dict[str, tuple[float, float]] = {
    "frames": (0, 10**6),
    "height": (0, 2**15),
    "width": (0, 2**15),
}


def choose_shape(
    requested_size: Mapping[str, int | None],
    origin: Mapping[str, object],
    student: Student,
    vae: VaeGeometry,
    where: str,
) -> VideoShape:
    """The clip's shape from ``requested_size`` (frames, height, width in pixels), else from the
    training videos that the provenance ``origin`` records. UserError: a size that nobody knows or
    that does not fit the VAE, the patches or the chunk."""
    video = origin.get("video")
    trained_size = video if isinstance(video, dict) else {}
    size = {
        name: int(requested_size.get(name) or trained_size.get(name) or 0)
        for name in ("frames", "height", "width")
    }
    if missing_fields := [f"{name}=" for name, value in size.items() if not value]:
        raise UserError(
            f"{where}: does not say what it was trained on; set {', '.join(missing_fields)}"
        )
    shape = vae.shape(size["frames"], size["height"], size["width"])
    if shape.channels != student.cfg.in_channels:
        raise UserError(
            f"{where}: takes {student.cfg.in_channels} latent channels, this VAE has {shape.channels}; set base="
        )
    student.cfg.tokens(shape.height, shape.width)
    check_chunks(shape.frames, student.chunk)
    return shape
