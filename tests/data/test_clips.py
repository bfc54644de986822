"""Clips on disk: what is written comes back, and what is damaged is refused with the file's name
and a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scd_sf.data.clips import Clip, ClipSet, read_video, write_clips, write_video
from scd_sf.files import sha256_file
from scd_sf.types import UserError

SHAPE = {"frames": 5, "height": 32, "width": 48, "fps": 35}


def moving_square(start: int) -> Tensor:
    """uint8 (5, 3, 32, 48): a coloured square on grey that moves right by 4 pixels a frame."""
    video = torch.full((5, 3, 32, 48), 90, dtype=torch.uint8)
    for frame in range(5):
        left = start + 4 * frame
        video[frame, :, 8:20, left : left + 12] = torch.tensor([200, 40, 60], dtype=torch.uint8)[
            :, None, None
        ]
    return video


def a_clip(root: Path, number: int, split: str, path: str | None = None) -> Clip:
    file = root / f"clips/{number}.mp4"
    return Clip(
        f"c{number}",
        split,
        "hall",
        "still",
        ("still",) * 5,
        0.0,
        "still: a hall",
        "still, a room",
        0,
        1,
        path or f"clips/{number}.mp4",
        file.stat().st_size,
        sha256_file(file),
    )


@pytest.fixture
def clip_dir(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for number in range(3):
        write_video(
            tmp_path / f"clips/{number}.mp4", moving_square(number * 4), 35, crf=4, chroma="yuv444p"
        )
    clips = [a_clip(tmp_path, number, "val" if number == 2 else "train") for number in range(3)]
    write_clips(tmp_path, clips, SHAPE, {"made_by": "a test"})
    return tmp_path


@pytest.mark.parametrize(("chroma", "crf", "worst"), [("yuv444p", 4, 3.0), ("yuv420p", 10, 8.0)])
def test_a_written_video_comes_back(tmp_path: Path, chroma: str, crf: int, worst: float) -> None:
    video = moving_square(2)
    write_video(tmp_path / "a.mp4", video, 35, crf=crf, chroma=chroma)  # type: ignore[arg-type]
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == video.shape and back.dtype == torch.uint8
    assert (back.float() - video.float()).abs().mean() < worst
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_equal_frames_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, moving_square(0), 16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(5, 32, 48, 3, dtype=torch.uint8),
        torch.zeros(5, 3, 32, 48),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_other_frames_are_refused(tmp_path: Path, frames: Tensor) -> None:
    with pytest.raises(UserError, match="needs uint8 frames"):
        write_video(tmp_path / "a.mp4", frames, 35)
    assert not list(tmp_path.iterdir())


def test_odd_sizes_need_full_chroma(tmp_path: Path) -> None:
    odd = torch.zeros(1, 3, 31, 48, dtype=torch.uint8)
    with pytest.raises(UserError, match="odd size"):
        write_video(tmp_path / "a.mp4", odd, 35)
    write_video(tmp_path / "a.mp4", odd, 35, chroma="yuv444p")
    assert read_video(tmp_path / "a.mp4").shape == odd.shape


def test_clip_set_reads_what_was_written(clip_dir: Path) -> None:
    clips = ClipSet(clip_dir)
    assert (len(clips), clips.frames, clips.height, clips.width, clips.fps) == (3, 5, 32, 48, 35)
    assert (clips.places, clips.motions, clips[1].actions) == (["hall"], ["still"], ("still",) * 5)
    assert clips.hash == sha256_file(clip_dir / "clips.jsonl")
    assert clips.videos([2, 0]).shape == (2, 5, 3, 32, 48)
    assert torch.equal(clips.videos([2])[0], read_video(clip_dir / "clips/2.mp4"))
    clips.verify()


def test_splits(clip_dir: Path) -> None:
    assert [clip.id for clip in ClipSet(clip_dir, "train").clips] == ["c0", "c1"]
    assert [clip.id for clip in ClipSet(clip_dir, "val").clips] == ["c2"]
    with pytest.raises(UserError, match="no split 'test'; it holds train, val"):
        ClipSet(clip_dir, "test")


def test_a_line_survives_json(clip_dir: Path) -> None:
    clip = ClipSet(clip_dir)[0]
    assert Clip.from_json(clip.to_json(), "here") == clip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def change_manifest(root: Path, name: str, value: object) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(manifest | {name: value}))


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: (root / "manifest.json").unlink(), "manifest.json: no such file"),
    (lambda root: cut(root / "manifest.json"), "manifest.json: not JSON"),
    (lambda root: change_manifest(root, "version", 9), "manifest.json: 'format'/'version'"),
    (
        lambda root: change_manifest(root, "shape", {"frames": 5}),
        "manifest.json: 'shape': .* required field `height`",
    ),
    (lambda root: (root / "clips.jsonl").unlink(), "clips.jsonl: cannot be read"),
    (lambda root: cut(root / "clips.jsonl"), "clips.jsonl:3: not JSON"),
    (lambda root: (root / "clips/1.mp4").unlink(), "1.mp4: listed in clips.jsonl but missing"),
    (lambda root: cut(root / "clips/1.mp4"), r"1.mp4: .* \(truncated\?\)"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named(clip_dir: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(clip_dir)
    with pytest.raises(UserError, match=message) as error:
        ClipSet(clip_dir)
    assert (
        "again" in str(error.value) or "first" in str(error.value) or "release" in str(error.value)
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path", ["../outside.mp4", "/etc/hostname", "clips/../../outside.mp4", "link.mp4"]
)
def test_no_path_leaves_the_directory(
    clip_dir: Path, tmp_path_factory: pytest.TempPathFactory, path: str
) -> None:
    outside = tmp_path_factory.mktemp("elsewhere") / "outside.mp4"
    write_video(outside, moving_square(0), 35)
    (clip_dir / "link.mp4").symlink_to(outside)
    write_clips(clip_dir, [a_clip(clip_dir, 0, "train", path)], SHAPE, {})
    with pytest.raises(UserError, match="which leaves"):
        ClipSet(clip_dir)


def test_a_changed_file_is_found(clip_dir: Path) -> None:
    file = clip_dir / "clips/0.mp4"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"0\.mp4: contents changed"):
        ClipSet(clip_dir).verify()


def test_bad_videos(clip_dir: Path) -> None:
    (clip_dir / "text.mp4").write_text("not a video")
    with pytest.raises(UserError, match=r"text\.mp4: cannot be decoded"):
        read_video(clip_dir / "text.mp4")
    with pytest.raises(UserError, match=r"none\.mp4: no such file"):
        read_video(clip_dir / "none.mp4")
    write_video(clip_dir / "clips/0.mp4", moving_square(0)[:3], 35)
    write_clips(clip_dir, [a_clip(clip_dir, 0, "train")], SHAPE, {})
    with pytest.raises(UserError, match=r"0\.mp4: 3 frames of 48x32 at 35 per second"):
        ClipSet(clip_dir).video(0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "fields differ"),
        ('{"id": "a"}', "fields differ"),
        ("bad seed", r"Expected `int`, got `bool` - at `\$\.seed`"),
    ],
)
def test_bad_lines(clip_dir: Path, line: str, message: str) -> None:
    if line == "bad seed":
        line = ClipSet(clip_dir)[0].to_json().replace('"seed": 0', '"seed": true')
    with pytest.raises(UserError, match=f"clips.jsonl:7: {message}"):
        Clip.from_json(line, "clips.jsonl:7")
