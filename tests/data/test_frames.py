"""The store of encoded frames: what is written is read, a begun one goes on, and nothing wrong gets
in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scd_sf.data.frames import FrameClips, FrameSetInfo, FrameWriter
from scd_sf.files import sha256_file
from scd_sf.types import UserError

INFO = FrameSetInfo(4, 2, 3, 16, num_actions=3, labels=("a", "b"))


def clip(number: int, frames: int) -> tuple[str, Tensor, Tensor, int]:
    rng = torch.Generator().manual_seed(number)
    actions = torch.randint(0, 3, (frames,), generator=rng)
    return f"c{number}", torch.randn(frames, 4, 2, 3, generator=rng), actions, number % 2


def write(root: Path, lengths: list[int], per_shard: int = 10) -> FrameWriter:
    writer = FrameWriter(root, {"source": "x"}, INFO, frames_per_shard=per_shard)
    for number, frames in enumerate(lengths):
        if f"c{number}" not in writer.done:
            writer.append(*clip(number, frames))
    return writer


def test_windows_are_what_was_written(tmp_path: Path) -> None:
    write(tmp_path, [7, 5, 9]).finish()
    clips = FrameClips(tmp_path)
    assert len(clips) == 3 and len(clips.reader.shards) == 2 and clips.info == INFO
    assert clips.at_least(6) == [0, 2]
    batch = clips.batch([2, 0], [3, 1], 6)
    for row, (number, start) in enumerate([(2, 3), (0, 1)]):
        _, latents, actions, label = clip(number, [7, 5, 9][number])
        torch.testing.assert_close(
            batch.latents_BFCHW[row], latents[start : start + 6].half().float()
        )
        assert batch.cond.actions_BF is not None and batch.cond.labels_B is not None
        assert batch.cond.actions_BF[row].tolist() == actions[start : start + 6].tolist()
        assert batch.cond.labels_B[row] == label
    assert set(batch.tensors()) == {"latents", "actions", "labels"}
    with pytest.raises(IndexError):
        clips.batch([1], [1], 5)
    with pytest.raises(UserError, match="no clip has 10 frames"):
        clips.at_least(10)
    clips.verify()


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    lengths = [7, 5, 9, 4, 8]
    write(tmp_path / "whole", lengths).finish()
    write(tmp_path / "parts", lengths[:4])  # stopped: two clips wait and are lost
    again = write(tmp_path / "parts", lengths)
    assert again.rows[0].id == "c0"
    again.finish()
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == names
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes(), name
    assert write(tmp_path / "parts", lengths).finished
    with pytest.raises(UserError, match="other inputs"):
        FrameWriter(tmp_path / "parts", {"source": "y"}, INFO)


def test_wrong_clips_are_refused(tmp_path: Path) -> None:
    writer = FrameWriter(tmp_path, {}, INFO)
    name, latents, actions, label = clip(0, 5)
    for given, message in (
        ((name, latents[:, :3], actions, label), "do not fit"),
        ((name, latents * torch.nan, actions, label), "not finite"),
        ((name, latents, actions + 3, label), "actions must be"),
        ((name, latents, actions[1:], label), "actions must be"),
        ((name, latents, None, label), "lacks them"),
        ((name, latents, actions, 2), "label 2"),
    ):
        with pytest.raises(UserError, match=message):
            writer.append(*given)
    with pytest.raises(UserError, match="no clip was encoded"):
        writer.finish()


def test_a_changed_index_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, [7, 5]).finish()
    path = tmp_path / "clips.jsonl"
    path.write_text(path.read_text().replace('"label": 1', '"label": 0'))
    with pytest.raises(UserError, match="does not belong to the manifest"):
        FrameClips(tmp_path)
    path.write_text(path.read_text().replace('"frames": 5', '"frames": true'))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(
        json.dumps({**manifest, "clips_sha256": sha256_file(path)})
    )
    with pytest.raises(UserError, match=r"Expected `int`, got `bool` - at `\$\.frames`"):
        FrameClips(tmp_path)
