"""Alarms: each is driven by synthetic videos or latents, said once, over when the metric has recovered,
and the same after a resume; a healthy run raises none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scd_sf.data.clip_statistics import statistics
from scd_sf.distributed import Ranks
from scd_sf.train.alarms import (
    DISTILLATION,
    Alarm,
    Alarms,
    clip_statistics_of,
    read_alarms,
    rollout_alarms,
    video_alarms,
)
from scd_sf.train.run import Run, RunConfig
from scd_sf.types import UserError

STEPS = 400


def clip(*, speed: int = 1, colour: float = 1.0, blink: float = 0.0, frames: int = 9) -> Tensor:
    """uint8 (1, F, 3, 32, 32): a coloured pattern that moves ``speed`` pixels a frame. ``colour``: of
    its saturation; ``blink``: share of the brightness that is lost in every second frame."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 8, 8, generator=rng) * 0.6 + 0.2
    picture = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")[0]
    grey = picture.mean(0, keepdim=True)
    picture = (grey + colour * (picture - grey)).clamp(0, 1)
    video = torch.stack([picture.roll(speed * number, -1) for number in range(frames)])
    video[1::2] *= 1 - blink
    return (255 * video).round().to(torch.uint8)[None]


TRUE = statistics(clip())
RANGES = {name: (value, value) for name, value in TRUE.items()}
COLLAPSES: dict[str, Tensor] = {
    "grey": clip(colour=0.02),
    "saturated": clip(colour=8.0),
    "static": clip(speed=0),
    "noise": torch.randint(256, (1, 9, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    ),
    "flicker": clip(blink=0.2),
}


def opened(path: Path, start: int = 0, kinds: Sequence[Alarm] | None = None) -> Alarms:
    cfg = RunConfig(str(path))
    run = Run(cfg, Ranks(0, 1, 0, torch.device("cpu")), config=cfg)
    run.finish()
    chosen = video_alarms(RANGES, DISTILLATION) if kinds is None else kinds
    return Alarms(run, chosen, start, STEPS)


@pytest.mark.parametrize("kind", COLLAPSES)
def test_each_collapse_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    alarms, bad = opened(tmp_path), statistics(COLLAPSES[kind])
    assert alarms.check(10, TRUE) == {}
    raised = alarms.check(20, bad)
    assert raised[f"alarm/{kind}"] == 1.0
    said = capsys.readouterr().out
    assert f"ALARM {kind}, since step 20: quick/" in said
    assert "looks like" in said and "try" in said
    assert alarms.check(30, bad) == {} and capsys.readouterr().out == "", "once"
    assert read_alarms(tmp_path).active[0].step == 20
    over = alarms.check(40, TRUE)
    assert over == dict.fromkeys(raised, 0.0) and f"alarm over at step 40: {kind}" in (
        capsys.readouterr().out
    )
    assert read_alarms(tmp_path).active == []
    assert alarms.check(50, bad) == raised, "again after it has recovered"


def test_a_healthy_run_raises_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Noise at the beginning, then videos that vary as those of the demo's healthy runs do."""
    alarms = opened(tmp_path, kinds=[*video_alarms(RANGES, ""), *rollout_alarms((0.75, 1.33))])
    logs = statistics(COLLAPSES["noise"]) | {"monitor/std_mean": 0.6}
    assert alarms.check(1, logs) == {} and alarms.check(100, logs) == {}
    for step, factor in enumerate((0.7, 1.4, 1.0, 0.9), 150):
        healthy = {name: factor * value for name, value in TRUE.items()}
        assert alarms.check(step, healthy | {"monitor/std_mean": 0.8 + step / 1000}) == {}
    assert capsys.readouterr().out == "" and read_alarms(tmp_path).events == []


def test_what_never_was_healthy_counts_from_half_of_the_training_on(tmp_path: Path) -> None:
    alarms = opened(tmp_path, kinds=rollout_alarms((0.75, 1.33)))
    assert alarms.check(199, {"monitor/std_mean": 0.5}) == {}
    assert alarms.check(200, {"monitor/std_mean": 0.5}) == {"alarm/faded": 1.0}
    assert alarms.check(201, {"monitor/std_mean": 0.76}) == {}, "the edge is no recovery"
    assert alarms.check(202, {"monitor/std_mean": 0.9}) == {"alarm/faded": 0.0}
    assert alarms.check(203, {"monitor/std_mean": 1.5}) == {"alarm/overdriven": 1.0}
    assert alarms.check(204, {"loss": 1.0}) == {}


def test_what_could_not_be_measured_is_neither_healthy_nor_not(tmp_path: Path) -> None:
    alarms, nan = opened(tmp_path), dict.fromkeys(TRUE, float("nan"))
    assert alarms.check(10, nan) == {} and alarms.record.settled == {}
    assert alarms.check(20, TRUE) == {} and len(alarms.check(30, statistics(COLLAPSES["static"])))
    lasting = alarms.record.active
    assert alarms.check(40, nan) == {} and alarms.record.active == lasting != []


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    still = statistics(COLLAPSES["static"])
    alarms = opened(tmp_path)
    alarms.check(10, TRUE)
    alarms.check(20, still)
    alarms.check(30, TRUE)
    for start, active in ((30, 0), (25, 1), (15, 0)):
        again = opened(tmp_path, start)
        assert len(again.record.active) == active, start
    assert opened(tmp_path, 15).check(20, still) == {"alarm/static": 1.0}
    assert opened(tmp_path, 5).check(20, still) == {}, "not settled then"
    (tmp_path / "alarms.json").write_text('{"settled": 3}')
    with pytest.raises(UserError, match=r"alarms\.json"):
        opened(tmp_path)


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = RunConfig(str(tmp_path / "run"))
    run = Run(cfg, Ranks(1, 1, 1, torch.device("cpu")), config=cfg)
    alarms = Alarms(run, video_alarms(RANGES, ""), 0, STEPS)
    assert alarms.check(300, statistics(COLLAPSES["static"])) == {}
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_without_true_clips_only_what_no_camera_films_is_outside(tmp_path: Path) -> None:
    """And the range of a checkpoint's clips is read from its provenance."""
    alarms = opened(tmp_path / "run", kinds=video_alarms({}, ""))
    assert alarms.check(250, TRUE) == {}
    assert alarms.check(251, statistics(COLLAPSES["static"])) == {"alarm/static": 1.0}
    assert clip_statistics_of(tmp_path / "single.safetensors") == {}
    record: dict[str, object] = {"stage": "x"}
    (tmp_path / "provenance.json").write_text(json.dumps(record))
    assert clip_statistics_of(tmp_path) == {}
    record["clip_statistics"] = {"quick/motion": [0.01, 0.02]}
    (tmp_path / "provenance.json").write_text(json.dumps(record))
    ranges = clip_statistics_of(tmp_path)
    (static,) = [alarm for alarm in video_alarms(ranges, "") if alarm.kind == "static"]
    assert static.low == pytest.approx(0.0025)
