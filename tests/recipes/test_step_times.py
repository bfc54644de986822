"""A student is sampled at the very times it was distilled at, wherever it is sampled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recipe_runner
import torch
from tiny_run import Chain

from scd_sf.config import load_config
from scd_sf.diffusion.samplers import FewStepSampler, few_step_times
from scd_sf.generation.request import choose_sampler
from scd_sf.generation.sampling import SampleConfig, open_generator
from scd_sf.models.build import SamplerConfig, describe_checkpoint
from scd_sf.models.export import export_weights
from scd_sf.tools.stage_configs import Stage3Config
from scd_sf.train.run import RunConfig
from scd_sf.types import UserError

LINEAR = (1.0, 0.75, 0.25)


def config(**more: object) -> Stage3Config:
    return Stage3Config("i", "t", "c", "p", RunConfig("r"), **more)  # type: ignore[arg-type]


def test_a_checkpoint_carries_its_times(chain: Chain, tmp_path: Path) -> None:
    """Trained at three uneven times with a shift of their own, apart from that of DMD's noise
    levels."""
    given = [f"linear_times={list(LINEAR)}", "step_shift=3", "loss.shift=5", "train.steps=1"]
    recipe_runner.succeed("recipes/stage3_self_forcing.py", *chain.stage3(tmp_path / "run"), *given)
    times = few_step_times(3.0, LINEAR)
    own = describe_checkpoint(tmp_path / "run")[0].sampler
    assert own == SamplerConfig("renoise", 3, 3.0, times) and own.build() == FewStepSampler(times)
    export_weights(tmp_path / "run", tmp_path / "one.safetensors", "single")
    for checkpoint in (tmp_path / "run", tmp_path / "one.safetensors"):
        for sampler in ([], ["sampler={name: renoise, steps: 3, shift: 3.0}"]):
            arguments = [
                f"checkpoint={checkpoint}",
                "out=x",
                f"prompts={json.dumps(['left in hall'])}",
                *sampler,
            ]
            video_generator, settings = open_generator(
                load_config(SampleConfig, None, arguments), torch.device("cpu")
            )
            assert video_generator.sampler == FewStepSampler(times)
            assert settings["sampler"]["times"] == list(times)  # type: ignore[index]


def test_which_sampler_a_student_gets() -> None:
    """Its own for the same name, steps and shift; another one of a distilled student is refused
    unless forced."""
    own = SamplerConfig("renoise", 3, 5.0, few_step_times(5.0, LINEAR))
    plain = SamplerConfig("renoise", 3, 5.0)
    assert choose_sampler(own, None, "x") is own and choose_sampler(own, plain, "x") is own
    with pytest.raises(UserError, match="distilled for sampler"):
        choose_sampler(own, SamplerConfig("renoise", 4, 5.0), "x")
    assert (
        choose_sampler(own, SamplerConfig("euler", 4, 5.0), "x", force=True).build().name == "euler"
    )
    old = SamplerConfig("renoise", 4, 5.0)  # a checkpoint from before times were written down
    assert old.build() == FewStepSampler(few_step_times())


def test_the_steps_and_the_noise_law_are_two_settings() -> None:
    assert config().sampler.times == few_step_times(5.0) and config(
        step_shift=1.0
    ).sampler.times == (
        1,
        0.75,
        0.5,
        0.25,
    )
    with pytest.raises(UserError, match=r"sampler times are \[0.9"):
        config(linear_times=(0.9, 0.5), step_shift=1.0)
    with pytest.raises(UserError, match="2 times for 3 steps"):
        SamplerConfig("renoise", 3, 5.0, (1.0, 0.5)).build()
    with pytest.raises(UserError, match="only renoise"):
        SamplerConfig("euler", 2, 5.0, (1.0, 0.5)).build()
