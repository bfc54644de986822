"""Loss values that must not drift: fixed seeds, deterministic tiny models in fp64, 1e-6 relative.

A change here is a change of the method: say why in CHANGELOG.md, then write the file again with

    python tests/golden/test_golden.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

# `tiny`, when this file is run as a script
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny
import torch

from scd_sf.diffusion.guidance import GuidanceConfig
from scd_sf.diffusion.noise import cpu_noise
from scd_sf.diffusion.samplers import Euler, FewStepSampler
from scd_sf.generation.rollout import rollout
from scd_sf.losses.dmd import DmdConfig, critic_loss, dmd_loss
from scd_sf.losses.flow_matching import FlowMatchingConfig, flow_matching_loss
from scd_sf.types import Conditioning

FILE = Path(__file__).with_name("losses.json")
VARIANTS = [
    tiny.Variant("causal", 1),
    tiny.Variant("causal", 3),
    tiny.Variant("scd", 1, "junction"),
    tiny.Variant("scd", 3, "junction", "temporal", "cached"),
    tiny.Variant("scd", 1, "paper", "temporal"),
    tiny.Variant("scd", 1, "delta"),
    tiny.Variant("scd", 1, "channel"),
]


def student_values(variant: tiny.Variant) -> dict[str, float]:
    """Stage 2 loss and gradient norm, the mean square of a few-step and of an Euler rollout, stage
    3 loss."""
    model, x_0 = tiny.student(variant, seed=11), tiny.latents(2, 3 * variant.chunk, seed=12)
    cond, null = (
        Conditioning(tiny.prompts(batch, seed=seed).text_BLE) for batch, seed in ((2, 13), (1, 14))
    )
    loss, _ = flow_matching_loss(
        model, x_0, cond, null, FlowMatchingConfig(target_chunks=2), tiny.generator(15)
    )
    loss.backward()
    norms = [g.norm() for g in tiny.gradients(model).values() if g is not None]
    values = {"flow": float(loss.detach()), "flow_grad_norm": float(torch.stack(norms).norm())}
    with torch.no_grad():
        for sampler in (FewStepSampler(), Euler(3)):
            clip = rollout(model, x_0, cond, sampler, cpu_noise(tiny.generator(16)))
            values[f"rollout_{sampler.name}"] = float(clip.pow(2).mean())
    clip = rollout(model, x_0, cond, FewStepSampler(), cpu_noise(tiny.generator(16)), exit_step=1)
    teacher, critic = tiny.wan(17), tiny.wan(18)
    cfg = DmdConfig(guidance=GuidanceConfig(3.0, "additive"))
    loss, _ = dmd_loss(clip, teacher, critic, cond, null, cfg, tiny.generator(19))
    loss.backward()
    norms = [g.norm() for g in tiny.gradients(model).values() if g is not None]
    values |= {"dmd": float(loss.detach()), "dmd_grad_norm": float(torch.stack(norms).norm())}
    values["critic"] = float(critic_loss(critic, clip, cond, cfg, tiny.generator(20))[0].detach())
    return values


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_values_are_the_recorded_ones(variant: tiny.Variant) -> None:
    recorded = json.loads(FILE.read_text())[str(variant)]
    assert student_values(variant) == pytest.approx(recorded, rel=1e-6)


if __name__ == "__main__":
    FILE.write_text(
        json.dumps({str(variant): student_values(variant) for variant in VARIANTS}, indent=1) + "\n"
    )
    print(f"wrote {FILE}")
