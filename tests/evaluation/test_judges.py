"""The judges on a toy world whose place and motion are known: accuracy, floor, determinism,
files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from scd_sf.evaluation.judges import (
    Judges,
    JudgesConfig,
    adherence,
    fit_judges,
    load_judges,
    opposites,
    save_judges,
    shuffled_floor,
)
from scd_sf.types import UserError

PLACES, MOTIONS = ("beach", "cave"), ("still", "turn_left", "turn_right")
QUICK = JudgesConfig(steps=80, batch=16, width=16)


def toy(seed: int, count: int) -> tuple[Tensor, list[str], list[str]]:
    """Latents (count, 5, 4, 8, 8): a random texture that shifts by one column a frame; the place
    tints channel 0."""
    generator = torch.Generator().manual_seed(seed)
    clips, places, motions = [], [], []
    for index in range(count):
        place, motion = index % 2, (index // 2) % 3
        wide = torch.randn(4, 8, 16, generator=generator)
        starts = {0: [4] * 5, 1: [8, 7, 6, 5, 4], 2: [0, 1, 2, 3, 4]}[motion]
        clip = torch.stack([wide[:, :, start : start + 8] for start in starts])
        clip[:, 0] += 2.0 * place
        clips.append(clip * 3 + 5)
        places.append(PLACES[place])
        motions.append(MOTIONS[motion])
    return torch.stack(clips), places, motions


@pytest.fixture(scope="module")
def judges() -> Judges:
    return fit_judges(*toy(0, 240), seed=1, config=QUICK)


def test_judges_read_held_out_clips_and_shuffled_prompts_fall_to_chance(judges: Judges) -> None:
    latents, places, motions = toy(1, 60)
    ceiling = adherence(judges, latents, places, motions)
    assert ceiling.place == 1.0
    assert ceiling.motion >= 0.9
    assert ceiling.left_right is not None and ceiling.left_right >= 0.95
    floor = shuffled_floor(judges, latents, places, motions, permutations=100, seed=0)
    assert floor.place == pytest.approx(0.5, abs=0.05)
    assert floor.motion == pytest.approx(1 / 3, abs=0.05)
    assert floor.left_right == pytest.approx(0.5, abs=0.05)


def test_reversed_time_turns_left_into_right(judges: Judges) -> None:
    latents, _, motions = toy(1, 60)
    _, shown = judges.judge(latents.flip(1))
    turned = [seen for seen, asked in zip(shown, motions, strict=True) if asked == "turn_left"]
    assert turned.count("turn_right") >= 0.9 * len(turned)


def test_same_seed_same_judges_and_global_random_state_is_left_alone() -> None:
    latents, places, motions = toy(0, 24)
    short = JudgesConfig(steps=3, batch=4, width=8)
    before = torch.get_rng_state()
    first, second = (fit_judges(latents, places, motions, seed=5, config=short) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert not first.training


def test_judges_survive_the_file(judges: Judges, tmp_path: Path) -> None:
    save_judges(judges, tmp_path / "judges.safetensors")
    again = load_judges(tmp_path / "judges.safetensors")
    assert (again.places, again.motions) == (PLACES, MOTIONS)
    latents, _, _ = toy(2, 12)
    assert again.judge(latents) == judges.judge(latents)


def test_damaged_or_foreign_files_are_named(judges: Judges, tmp_path: Path) -> None:
    path = tmp_path / "judges.safetensors"
    save_judges(judges, path)
    path.write_bytes(path.read_bytes()[:500])
    for bad in (path, tmp_path / "absent.safetensors"):
        with pytest.raises(UserError, match=bad.name):
            load_judges(bad)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="'format'"):
        load_judges(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "scd_sf.judges.1", "judges": "{}"})
    with pytest.raises(UserError, match="fit the judges again"):
        load_judges(path)


def test_bad_input_is_named(judges: Judges) -> None:
    latents, places, motions = toy(1, 6)
    with pytest.raises(UserError, match="never saw motion 'fly'"):
        adherence(judges, latents, places, ["fly"] * 6)
    with pytest.raises(UserError, match="one per video"):
        adherence(judges, latents, places[1:], motions)
    with pytest.raises(UserError, match="6 clips but 5 places"):
        fit_judges(latents, places[1:], motions, seed=0)
    with pytest.raises(UserError, match="not \\(videos"):
        judges.judge(latents[:, :, :3])
    with pytest.raises(UserError, match="shows no motion"):
        judges.judge(latents[:, :1])
    with pytest.raises(ValueError, match="multiple of 8"):
        JudgesConfig(width=12)


def test_opposites_come_from_the_names() -> None:
    assert opposites(["forward", "turn_right", "turn_left", "strafe_left"]) == [
        ("turn_left", "turn_right")
    ]
    assert opposites(["forward"]) == []


def test_without_opposites_left_right_is_none() -> None:
    latents, places, _ = toy(0, 12)
    plain = fit_judges(
        latents,
        places,
        ["still", "forward"] * 6,
        seed=0,
        config=JudgesConfig(steps=2, batch=4, width=8),
    )
    assert adherence(plain, latents, places, ["still"] * 12).left_right is None
    assert (
        shuffled_floor(plain, latents, places, ["still"] * 12, permutations=3, seed=0).left_right
        is None
    )
