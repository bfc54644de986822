"""What a request asks of a student beyond its training is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import scd_sf
from scd_sf.diffusion.guidance import GuidanceConfig
from scd_sf.generation.guided import SampleGuidance
from scd_sf.generation.pipeline import SCDWanPipeline
from scd_sf.generation.request import check_strength, unusual
from scd_sf.models.build import SamplerConfig
from scd_sf.types import UserError, VideoShape

DISTILLED, TUNED = SamplerConfig("renoise", 4), SamplerConfig("unipc", 50)
ORIGIN = {"video": {"frames": 33}}


def shape(latent_frames: int) -> VideoShape:
    return VideoShape(latent_frames, 16, 8, 8)


def test_what_a_student_was_not_trained_for() -> None:
    guidance = SampleGuidance(GuidanceConfig(3.0))
    assert unusual(DISTILLED, SampleGuidance(), shape(9), 0, ORIGIN) == []
    assert unusual(TUNED, guidance, shape(9), 0, ORIGIN) == []
    assert unusual(DISTILLED, SampleGuidance(), shape(10), 8, ORIGIN) == []
    assert unusual(DISTILLED, SampleGuidance(), shape(10), 0, {}) == []
    assert unusual(DISTILLED, SampleGuidance(), shape(9), 12, ORIGIN) == []
    (remark,) = unusual(DISTILLED, SampleGuidance(), shape(10), 12, ORIGIN)
    assert "with 12 latent frames in window and sink the picture may drift" in remark
    (remark,) = unusual(DISTILLED, guidance, shape(9), 0, ORIGIN)
    assert "meant to be sampled without it" in remark
    (remark,) = unusual(TUNED, guidance, shape(10), 0, ORIGIN)
    assert "37 frames are more than the 33 of training" in remark
    assert "together 9 latent frames" in remark


def test_numbers_that_are_a_strength() -> None:
    good: tuple[Any, ...] = (0.5, 1, np.float32(0.5), torch.tensor(0.5))
    bad: tuple[Any, ...] = ("0.5", True, [0.5], torch.ones(2))
    for strength in good:
        check_strength(strength, True)
    for strength in bad:
        with pytest.raises(UserError, match="give a number above 0"):
            check_strength(strength, True)


def test_the_package_has_the_pipeline() -> None:
    assert scd_sf.SCDWanPipeline is SCDWanPipeline
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        _ = scd_sf.Pipeline
