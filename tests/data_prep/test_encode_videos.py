"""encode_latents.py on a folder of videos as people have it (tests/messy_videos.py)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import messy_videos
import pytest
import raw_videos
import recipe_runner
import tiny_run
import torch
from recipe_runner import At

from scd_sf.data.clip_files import clip_path, clip_paths, files_of
from scd_sf.data.latents import LatentClips
from scd_sf.data.sources.video_reader import cut_clips, read_frames, video_info
from scd_sf.data.video_captions import read_captions, read_video_folder
from scd_sf.data.video_plan import CutConfig, plan_videos, scan_video, validation_count
from scd_sf.files import is_part
from scd_sf.models.wan.vae import load_vae, vae_geometry
from scd_sf.tools.data.encode_videos import check_video_folder
from scd_sf.types import UserError, VideoShape

SCRIPT = "data_prep/encode_latents.py"
CUT = ["--frames", "5", "--fps", "8", "--size", "48x32"]
PLACES_TO_DIE = "os:replace|os:fsync|scd_sf.tools.data.encode_videos:write_clip|scd_sf.models.wan.vae:Vae.encode"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_wan(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return messy_videos.write_folder(tmp_path_factory.mktemp("own") / "videos")


@pytest.fixture(scope="module")
def unbroken(
    tmp_path_factory: pytest.TempPathFactory, model: Path, videos: Path
) -> tuple[Path, str]:
    """The output of one run, and what it said."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    before = listing(videos)
    said = recipe_runner.succeed(SCRIPT, *arguments(videos, model, out)).out
    assert listing(videos) == before, "something was written into the folder of the videos"
    return out, said


def arguments(videos: Path, model: Path, out: Path) -> list[str]:
    return ["--clips", str(videos), "--model", str(model), "--out", str(out), *CUT]


def listing(root: Path) -> list[tuple[str, int, int]]:
    paths = [Path(folder) / name for folder, folders, names in os.walk(root) for name in names]
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in [root, *paths])


def contents(out: Path) -> dict[str, bytes]:
    """All that a run leaves, but its notes of damaged videos and of times of change."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
        and path.parent.name != "work"
        and path.name not in (".lock", "scans.jsonl")
    }


def left_out(report: Path) -> dict[str, str]:
    return {row["file"]: row["reason"] for row in json.loads(report.read_text())["left_out"]}


def test_a_messy_folder_becomes_training_data(
    unbroken: tuple[Path, str], videos: Path, model: Path
) -> None:
    out, said = unbroken
    train, val = (
        LatentClips(out / "train", expected=VideoShape(2, 4, 4, 6)),
        LatentClips(out / "val"),
    )
    train.verify()
    names = [[row.tags["video"] for row in clips.rows] for clips in (train, val)]
    assert len(set(names[1])) == 1 and not set(names[0]) & set(names[1])
    assert {name: (names[0] + names[1]).count(name) for name in sorted(names[0] + names[1])} == {
        "My clip 01 (red, right).mp4": 1,  # 10 frames of 16 per second
        "damaged.mp4": 7,  # 12 but for the damage at frame 36
        "day 2/hochkant_ü.mov": 1,
        "fast.MP4": 1,
        "long.avi": 6,  # 100 frames of 24 per second are 33
        "sound.mp4": 1,
        "uneven.mkv": 2,  # 1.2 s and the length of a frame are 10
        "wide.mp4": 1,
    }
    for clips in (train, val):
        for row_, text in zip(clips.rows, clips.texts(range(len(clips))), strict=True):
            name = row_.tags["video"]
            wanted = {"day 2/hochkant_ü.mov": "left turn ü", "uneven.mkv": "right turn"}
            wanted |= {"wide.mp4": "left turn"}
            assert text == wanted.get(name, messy_videos.CAPTION)
    # the second clip of a video, from its own frames
    row = next(
        n
        for n, r in enumerate(train.rows)
        if r.tags["video"] == "long.avi" and r.tags["seconds"] == "0.625"
    )
    frames = read_frames(videos / "long.avi", "long", fps=8)[5:10]
    wanted_latents = load_vae(model).encode(frames[None].float() / 127.5 - 1)
    torch.testing.assert_close(train.latents([row]), wanted_latents, rtol=2e-3, atol=2e-3)
    with pytest.raises(UserError, match="its folders train, val have one; give one of them"):
        LatentClips(out)
    reasons = left_out(out / "report.json")
    for name, reason in {
        "short.mp4": "is too short: 4 frames at 8 per second, a clip has 5",
        "silent caption.mp4": "has no caption",
        "latin.mp4": "its caption latin.txt cannot be used: 'utf-8' codec can't decode",
        "day 2/same again.mp4": "has the contents and the caption of My clip 01 (red, right).mp4",
        "cut.mp4": "cannot be decoded",
        "empty.mp4": "is empty",
        "page.mp4": "cannot be decoded",
        "old.wmv": ".wmv is not read",
        "not\ufffdplain.mp4": "its name is no plain text",
        "latin\ufffd/inside.mp4": "its name is no plain text",
        "link.mp4": "is a link that leaves the folder",
        "loop.mp4": "cannot be read",
        "folder": "is a link to a folder",
        "pipe.mp4": "is not a regular file",
    }.items():
        assert reason in reasons.pop(name)
    assert not reasons
    report = json.loads((out / "report.json").read_text())
    assert (report["videos"], report["taken"], report["clips"]) == (22, 8, 20)
    assert report["other_files"] == {".jpg": 1, ".txt": 2, "hidden": 2}
    assert "damaged.mp4: 7 of 12 clips, then it cannot be decoded: frame 36 is damaged" in said
    assert f"data={out}/train val={out}/val" in said and "8 of 22 videos, 20 clips" in said


def test_done_is_done_and_other_videos_or_settings_are_refused(
    unbroken: tuple[Path, str], videos: Path, model: Path, tmp_path: Path
) -> None:
    out, _ = unbroken
    before = listing(out / "train")
    given = arguments(videos, model, out)
    assert "already complete" in recipe_runner.succeed(SCRIPT, *given).out
    assert listing(out / "train") == before and not (out / "text-cache").exists()
    for more, message in (
        (["--fps", "16"], "made with other settings (fps)"),
        (["--rest", "overlap", "--val", "2"], "made with other settings (rest, val)"),
        (["--size", "32x48"], "made with other settings (sizes)"),
        (["--caption", "x"], "silent caption.mp4 is new since the encoding began"),
        (["--out", str(videos / "out")], "lies in the folder of the videos"),
        (["--out", str(videos.parent)], "holds other files"),
        (["--size", "48x32"], "give every size once"),
        (["--text-cache", str(videos / "cache")], "lies in the folder of the videos"),
        (["--frames", "6"], "--frames 6: the VAE takes 1 + 4*k frames; use 5"),
        (["--store-text", "bfloat16"], "a clip's file has one type"),
    ):
        refused = recipe_runner.run(SCRIPT, *given, *more)
        assert refused.code == 2 and message in refused.err.splitlines()[-1], more
        if "made with other settings" in message or "encoding began" in message:
            assert f"delete {out} and encode again" in refused.err
    manifest = out / "val" / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    recipe_runner.succeed(SCRIPT, *given)
    assert manifest.read_bytes() == content
    plan = out / "videos.jsonl"
    old = plan.read_text()
    rows = [json.loads(line) for line in old.splitlines()]
    rows[0]["folder"] = "val" if rows[0]["folder"] == "train" else "train"
    for count, message in (
        (len(rows), f"{rows[0]['file']} is in another split"),
        (len(rows) - 1, f"{rows[-1]['file']} is new since"),  # the cause, not what follows from it
    ):
        plan.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        assert message in recipe_runner.run(SCRIPT, *given).err
    plan.write_text(old)
    text = videos / "wide.txt"
    old = text.read_text()
    text.write_text("right turn")
    refused = recipe_runner.run(SCRIPT, *given)
    text.write_text(old)
    assert "wide.mp4 was changed since the encoding began (caption)" in refused.err
    data = (videos / "sound.mp4").read_bytes()
    (videos / "sound.mp4").write_bytes((videos / "short.mp4").read_bytes())
    refused = recipe_runner.run(SCRIPT, *given)
    (videos / "sound.mp4").write_bytes(data)
    assert "sound.mp4 was taken when the encoding began, and is gone or left out now" in refused.err
    # what a refused run scanned is of no use, wherever its file is in name order
    for scan in (out / "work").glob("scan-*"):
        shutil.copy(scan, scan.with_name("scan-~.jsonl"))
    assert "already complete" in recipe_runner.succeed(SCRIPT, *given).out


def test_clips_before_a_damage_are_made_again(
    unbroken: tuple[Path, str], videos: Path, model: Path, tmp_path: Path
) -> None:
    """Also when the damage is known already, as when another rank met it first."""
    out = shutil.copytree(unbroken[0], tmp_path / "out")
    clips = LatentClips(out / "train")
    ids = [row.id for row in clips.rows if row.tags["video"] == "damaged.mp4"]
    clip_path(out / "train", ids[0]).unlink()
    assert (
        "clips of rank 0 1/1" in recipe_runner.succeed(SCRIPT, *arguments(videos, model, out)).out
    )
    assert contents(out) == contents(unbroken[0])


def test_sizes_that_the_model_cannot_take(videos: Path) -> None:
    given = ["--clips", videos, "--check", "--frames", "5"]
    refused = recipe_runner.run(SCRIPT, *given, "--size", "40x30")
    assert "--size 40x30: sides must be multiples of 16; use 32x32" in refused.err


def test_check_reports_and_loads_no_model(videos: Path, tmp_path: Path) -> None:
    """Several sizes, the end of videos overlapped, a table elsewhere."""
    table = tmp_path / "mine.csv"
    rows = ["Video,Prompt,split,fps"]
    rows += [
        f'"{name}",x,{split},9'
        for name, split in (
            ("My clip 01 (red, right).mp4", "train"),
            ("long.avi", "val"),
            (str(videos / "wide.mp4"), ""),
            ("none.mp4", ""),
            ("../outside.mp4", ""),
            ("holiday.jpg", ""),
            ("day 2/hochkant_ü.mov", ""),
        )
    ]
    table.write_text("\r\n".join(rows) + "\r\n", encoding="utf-8-sig")
    forbidden = "scd_sf.tools.data.encode_videos:load_vae|scd_sf.models.wan.text:load_text_encoder"
    report = tmp_path / "report.json"
    result = recipe_runner.succeed(
        SCRIPT, "--clips", videos, "--check", "--captions", table, "--report", report,
        "--frames", "5", "--fps", "8", "--size", "48x32", "--size", "32x48", "--rest", "overlap",
        at=At(forbidden, 1),
    )  # fmt: skip
    summary = json.loads(report.read_text())
    folders = {name: (row["videos"], row["clips"]) for name, row in summary["folders"].items()}
    assert folders["48x32/val"] == (1, 7), "33 frames: six clips and one that overlaps"
    assert folders["32x48/train"] == (1, 2), "6 frames of the turned video"
    reasons = left_out(report)
    assert reasons["none.mp4"] == "is in mine.csv, but there is no such file"
    assert (
        "which leaves" in reasons["../outside.mp4"]
        and "cannot be decoded" in reasons["holiday.jpg"]
    )
    assert "not read: fps" in result.out and "their shape is far from every --size" in result.out
    assert summary["bytes"] > 0 and "left out: none.mp4" in result.out
    nothing = recipe_runner.run(SCRIPT, "--clips", videos, "--check", "--frames", "4001")
    assert nothing.code == 2 and "no clip can be cut" in nothing.err
    many = tmp_path / "many"
    many.mkdir()
    for number, count in enumerate([9] * 12 + [13] * 11 + [17]):
        raw_videos.write(many / f"{number}.mp4", messy_videos.moving(count, number), rate=8)
        (many / f"{number}.txt").write_text("x")
    options = ["--clips", many, "--check", "--fps", "8", "--size", "48x32"]
    said = recipe_runner.run(SCRIPT, *options, "--frames", "21").out
    assert "24 videos too short for --frames 21: --frames 13 takes 12, --frames 9 takes 24" in said
    assert "... and 4 more; --check --report FILE names them all" in said
    said = recipe_runner.run(SCRIPT, *options, "--frames", "17", "--report", report).out
    assert "23 videos too short for --frames 17: --frames 9 takes 23" in said
    assert f"... and 3 more; {report} names them all" in said


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_anywhere_on_any_number_of_ranks_every_clip_is_made_once(
    unbroken: tuple[Path, str], videos: Path, model: Path, tmp_path: Path, seed: int
) -> None:
    random_, out = random.Random(seed), tmp_path / "out"
    given = arguments(videos, model, out)
    for world in (2, 1, 1) if seed else (1, 1, 2):
        at = {rank: At(PLACES_TO_DIE, random_.randint(1, 40)) for rank in range(world)}
        results = recipe_runner.run_ranks(SCRIPT, *given, world=world, at=at)
        assert all(result.code == -signal.SIGKILL or world == 2 for result in results)
    paths = [path for folder in ("train", "val") for path in clip_paths(out / folder)]
    for path in paths[:1]:
        path.write_bytes(path.read_bytes()[:-1])  # as a file system that lies about fsync leaves it
    world = 2 - seed
    last = recipe_runner.run_ranks(SCRIPT, *given, world=world)
    assert [result.code for result in last] == [0] * world, last[0].err[-2000:]
    assert contents(out) == contents(unbroken[0])
    assert not any(is_part(file) for file in files_of(out / "train"))


@pytest.mark.slow
def test_stage_2_trains_on_the_folders(
    unbroken: tuple[Path, str], model: Path, tmp_path: Path
) -> None:
    out, _ = unbroken
    layers = ["scd.encoder_layers=[0, 1, 2]", "scd.decoder.layers=[0, 5]"]
    recipe_runner.succeed(
        "recipes/stage1_transplant.py", f"base={model}", f"out={tmp_path}/stage1", *layers
    )
    given = [f"init={tmp_path}/stage1", f"data={out}/train", f"val={out}/val"]
    given += ["engine={backend: torch, lr: 1e-2}", "run.log_every=1", f"run.dir={tmp_path}/run"]
    given += ["train={steps: 2, global_batch: 2, micro_batch: 1, save_every: 2, validate_every: 2}"]
    recipe_runner.succeed(tiny_run.SCRIPTS["stage2"], *given, "sampler={name: euler, steps: 2}")
    assert [row["loss"] for row in tiny_run.metrics(tmp_path / "run") if "loss" in row]


MEMORY = """
import re, sys
from pathlib import Path
from scd_sf.data.sources.video_reader import cut_clips, video_info
path = Path(sys.argv[1])
count = video_info(path, "x").frames_at(16) // 5
assert sum(1 for _ in cut_clips(path, "x", range(0, 5 * count, 5), frames=5, height=64, width=64, fps=16)) == count
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    """A video of 20 times the length: its frames would take 190 MB as they are decoded."""
    peaks = []
    for frames in (32, 640):
        path = tmp_path / f"{frames}.mp4"
        raw_videos.write(path, messy_videos.moving(frames, 1, 256, 384), rate=16)
        command = [sys.executable, "-c", MEMORY, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 40, f"MiB: {peaks}"


def test_clips_are_frames_of_the_resampled_video(tmp_path: Path) -> None:
    """Also of a turned, uneven and stretched video; clips may overlap; what ends early says so."""
    times = [0, 20, 300, 330, 700, 705, 1000, 1001, 1500, 2600]
    path = raw_videos.write(
        tmp_path / "a.mkv", [raw_videos.grey(20 * n) for n in range(10)], times=times
    )
    frames = read_frames(path, "a", fps=8)
    assert video_info(path, "a").frames_at(8) == len(frames)
    size: dict[str, Any] = {"height": raw_videos.HEIGHT, "width": raw_videos.WIDTH, "fps": 8}
    clips = list(cut_clips(path, "a", (0, 3, 5), frames=5, **size))
    for start, clip in zip((0, 3, 5), clips, strict=True):
        assert torch.equal(clip, frames[start : start + 5])
    with pytest.raises(UserError, match=f"ends after {len(frames)} frames of 8 per second"):
        list(cut_clips(path, "a", (len(frames) - 4,), frames=5, **size))
    raw_videos.write(tmp_path / "still.mkv", [raw_videos.grey(9)] * 2, times=[0, 10**8])
    with pytest.raises(UserError, match="one frame stands for 100000 seconds"):
        video_info(tmp_path / "still.mkv", "still.mkv")


def test_the_split_is_by_contents_and_exact() -> None:
    for val in (-0.1, 1.5, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--val is"):
            CutConfig(val=val)
    assert [validation_count(n, 0.05) for n in (1, 2, 30, 100)] == [0, 1, 2, 5]
    assert [validation_count(n, 4) for n in (1, 3, 30)] == [0, 2, 4] and not validation_count(9, 0)


def test_a_videos_clips_are_in_one_split_whatever_its_name(tmp_path: Path) -> None:
    for number in range(6):
        raw_videos.write(tmp_path / f"{number}.mp4", messy_videos.moving(11, number), rate=8)
        (tmp_path / f"{number}.txt").write_text("x")
    cut = CutConfig(5, 8, ((48, 32),), val=2)

    def splits() -> dict[str, str]:
        folder = read_video_folder(tmp_path)
        scans = {v.file: scan_video(tmp_path, v.file) for v in folder.videos}
        plan = plan_videos(folder.videos, scans, cut)
        assert all(video.starts == (0, 5) and video.unused == 1 for video in plan.videos)
        return {video.sha256: video.folder for video in plan.videos}

    first = splits()
    assert sorted(first.values()) == ["train"] * 4 + ["val"] * 2
    (tmp_path / "0.mp4").rename(tmp_path / "z.mp4")
    (tmp_path / "0.txt").rename(tmp_path / "z.txt")
    assert splits() == first


TABLES: dict[str, tuple[str, str, str]] = {
    "DiffSynth": ("metadata.csv", "video,prompt\na.mp4,left\nb c.mp4,\"right, then\n left\"\n", ""),
    "DiffSynth json": (
        "metadata.json",
        '[{"video": "a.mp4", "prompt": "left"}, {"video": "b c.mp4", "prompt": "right"}]',
        "",
    ),
    "finetrainers": ("videos.txt", "a.mp4\nb c.mp4\n", ""),
    "HF": ("metadata.jsonl", '{"file_name": "a.mp4", "text": "left"}\n', "b c.mp4"),
    "musubi": ("captions.jsonl", '{"video_path": "./a.mp4", "caption": "left", "width": 3}\n', "b c.mp4"),
    "old": ("captions.jsonl", '{"file": "a.mp4", "caption": "left", "split": "val", "place": "hall"}\n', "b c.mp4"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TABLES))
def test_tables_of_captions(tmp_path: Path, name: str) -> None:
    file, text, without = TABLES[name]
    for video in ("a.mp4", "b c.mp4"):
        (tmp_path / video).write_bytes(b"x")
    (tmp_path / file).write_text(text)
    if name == "finetrainers":
        (tmp_path / "prompts.txt").write_text(" left \r\nright\r\n")
    folder = read_video_folder(tmp_path)
    captions = {video.file: video.caption for video in folder.videos}
    assert captions["a.mp4"] == "left" and [part.name for part in folder.refused] == (
        [without] if without else []
    )
    assert not folder.other_files
    if not without and name != "DiffSynth":
        assert captions["b c.mp4"] == "right"
    if name == "DiffSynth":
        assert captions["b c.mp4"] == "right, then left"
    if name == "musubi":
        assert folder.notes == ["captions.jsonl: not read: width"]
    if name == "old":
        assert (
            asdict(folder.videos[0])["tags"] == {"place": "hall"}
            and folder.videos[0].split == "val"
        )
    folder = read_video_folder(tmp_path, caption="any")
    assert {video.caption for video in folder.videos} >= {"left"} and not folder.refused
    (tmp_path / "captions.csv").write_text("file,caption\na.mp4,x\n")
    with pytest.raises(UserError, match="choose one with --captions"):
        read_video_folder(tmp_path)


def test_tables_of_other_trainers_that_are_refused(tmp_path: Path) -> None:
    """Lists of different lengths, two of captions, a list that is a link out of the folder, JSON
    that is no list. Rows that leave the folder are left out, as in other tables."""
    videos, root = tmp_path / "v" / "videos.txt", tmp_path / "v"
    root.mkdir()
    (root / "a.mp4").write_bytes(b"x")
    videos.write_text("../v/a.mp4\n/etc/passwd\na.mp4\n\n")
    (root / "prompts.txt").write_text("x\ny\nz\n\n")
    folder = read_video_folder(root)
    assert [video.caption for video in folder.videos] == ["z"]
    assert [part.name for part in folder.refused] == ["../v/a.mp4", "/etc/passwd"]
    (root / "prompts.txt").write_text("x\ny\n")
    with pytest.raises(UserError, match=r"prompts\.txt: has 2 lines, videos\.txt has 4; write one"):
        read_video_folder(root)
    (root / "caption.txt").write_text("x\n")
    with pytest.raises(UserError, match=r"has prompts\.txt and caption\.txt beside it; keep one"):
        read_video_folder(root)
    (root / "prompts.txt").unlink()
    (root / "caption.txt").rename(tmp_path / "secret")
    (root / "caption.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"caption\.txt: is a link that leaves the folder"):
        read_video_folder(root)
    (root / "caption.txt").unlink()  # videos.txt alone is no table
    assert [part.name for part in read_video_folder(root).refused] == ["a.mp4"]
    table = root / "metadata.json"
    for text, fault in (
        ("[1]", ":row 1: not a JSON object; "),
        ('[{"video": "a.mp4"}]', ":row 1: has none of caption, prompt, text; "),
        ("[" * 10**5, "not JSON"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=rf"metadata\.json:? ?{fault}"):
            read_video_folder(root)
    table.write_text('{"a.mp4": "x"}')
    with pytest.raises(UserError, match=r"metadata\.json: not a JSON list of rows; "):
        read_video_folder(root, table)


def test_names_of_tables_that_are_none(tmp_path: Path) -> None:
    """A data set's card as metadata.json, alone or beside a table; video.txt and prompt.txt that are
    the captions of video.mp4 and prompt.mp4: as before these tables were known."""
    for name, caption in (("a", "left"), ("video", "a cat"), ("prompt", "a dog")):
        (tmp_path / f"{name}.MP4").write_bytes(b"x")
        (tmp_path / f"{name}.txt").write_text(caption)
    (tmp_path / "metadata.json").write_text(' {"license": "mit", "fps": 24}')
    folder = read_video_folder(tmp_path)
    captions = {video.file: video.caption for video in folder.videos}
    assert captions == {"a.MP4": "left", "prompt.MP4": "a dog", "video.MP4": "a cat"}
    assert not folder.refused and folder.other_files == {".json": 1}
    (note,) = folder.notes
    assert note.startswith("metadata.json: not read: it is no list of rows like {")
    (tmp_path / "metadata.csv").write_text("file,caption\na.MP4,right\n")
    folder = read_video_folder(tmp_path)
    assert folder.videos[0].caption == "right" and folder.notes == [note]
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "video.MP4").rename(tmp_path / "b.MP4")  # now video.txt is a list
    (tmp_path / "video.txt").write_text("b.MP4\n")
    (tmp_path / "prompts.txt").write_text("a bird\n")
    captions = {video.file: video.caption for video in read_video_folder(tmp_path).videos}
    assert captions == {"a.MP4": "left", "b.MP4": "a bird", "prompt.MP4": "a dog"}


def _refused(root: Path, csv: str) -> str:
    (root / "t.csv").write_text(csv)
    with pytest.raises(UserError) as caught:
        read_captions(root / "t.csv", root)
    return str(caught.value)


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    composed, parted = (unicodedata.normalize(form, "gr\u00fcn") for form in ("NFC", "NFD"))
    for name in ("a.mp4", f"{parted}.mp4", f"{composed} 2.mp4"):
        (tmp_path / name).write_bytes(b"x")
    for mark in ",;\t":
        rows = [["file", "caption"], ["a.mp4", f'"x {mark} y"'], [f"{composed}.mp4", "z"]]
        (tmp_path / "t.csv").write_text("\ufeff" + "\r\n".join(map(mark.join, rows)))
        videos, refused, _ = read_captions(tmp_path / "t.csv", tmp_path)
        captions = {name: video.caption for name, video in videos.items()}
        assert captions == {"a.mp4": " ".join(f"x {mark} y".split()), f"{parted}.mp4": "z"}
        assert not refused
    for within in ("\r", "\u2028", "\x0b", "\x85"):  # only a line feed ends a line
        for text in (f"x{within}y", f'"x{within}y"'):
            (tmp_path / "t.csv").write_bytes(f"file,caption\na.mp4,{text}\n".encode())
            videos, _, _ = read_captions(tmp_path / "t.csv", tmp_path)
            assert videos["a.mp4"].caption == "x y"
    (tmp_path / f"{parted} 2.txt").write_text("beside")
    folder = read_video_folder(tmp_path, tmp_path / "t.csv")
    assert [v.caption for v in folder.videos if v.file == f"{composed} 2.mp4"] == ["beside"]
    assert ":1: has two columns 'caption'" in _refused(
        tmp_path, "file,caption,Caption\na.mp4,x,y\n"
    )
    assert "put texts that have semicolons into quotes" in _refused(
        tmp_path, "file;caption\na.mp4;x;y\n"
    )
    assert "its first line is like" in _refused(tmp_path, "file,caption\n")


def test_what_a_plan_leaves_out_or_says(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    raw_videos.write(root / "a.mp4", messy_videos.moving(8), rate=8)
    shutil.copy(root / "a.mp4", root / "b.mp4")
    raw_videos.write(root / "long.mp4", messy_videos.moving(8, 1, 16, 1024), rate=8)
    table = root / "metadata.csv"
    lines = "file,caption,split\na.mp4,x,train\nb.mp4,y,val\nlong.mp4,z,train\n"
    table.write_text(lines)
    cut, report = CutConfig(5, 8, ((48, 32),)), tmp_path / "report.json"
    check_video_folder(root, None, "", cut, None, report)
    assert left_out(report) == {
        "long.mp4": "a picture of 1024x16 is too long for 48x32: less than a 20th of it would be left; crop it first"
    }
    notes = json.loads(report.read_text())["notes"]
    assert "a.mp4 and b.mp4 have the same contents and are in train and val" in notes
    for name in ("text-cache", "work", "report.json"):
        table.write_text(lines.replace("val", name))
        with pytest.raises(
            UserError, match=f"its split is '{name}', a name that the encoding uses"
        ):
            check_video_folder(root, None, "", cut, None, None)
    with pytest.raises(UserError, match="--val is nan"):
        CutConfig(val=float("nan"))


BAD_LINES: dict[str, str] = {
    "[]": "not a JSON object",
    "{": "not JSON",
    '{"file": 1, "caption": "x"}': "'file' is '1', not a text",
    '{"file": "a.mp4"}': "has none of caption, prompt, text",
    '{"file": "a.mp4", "caption": "x", "text": "y"}': "has 'caption' and 'text'",
    '{"file": "a.mp4", "caption": "\\ud800"}': "not JSON",
    '{"file": "a.mp4", "caption": "x", "split": "../train"}': "which is no name of a folder",
    '{"file": "a.mp4", "caption": ' + "[" * 10**5: "not JSON",
    '{"file": "a.mp4", "caption": "x", "captoin": "y"}': "did you mean 'caption'",
}


@pytest.mark.parametrize("line", sorted(BAD_LINES))
def test_tables_that_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError) as caught:
        read_captions(path, tmp_path)
    message = str(caught.value)
    assert BAD_LINES[line] in message and message.startswith(str(path))
    assert len(message) < 500 and message.isprintable()


def _nul(root: Path) -> None:
    (root / "a.txt").write_text("a\0b")


def _huge(root: Path) -> None:
    (root / "a.txt").write_text("a" * 10**6)


def _link(root: Path) -> None:
    (root / "a.txt").symlink_to("/etc/passwd")


def _folder(root: Path) -> None:
    (root / "a.txt").mkdir()


@pytest.mark.parametrize("change", [_nul, _huge, _link, _folder])
def test_hostile_captions_beside_a_video(tmp_path: Path, change: Callable[[Path], None]) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    change(tmp_path)
    folder = read_video_folder(tmp_path)
    assert not folder.videos and folder.refused[0].reason.startswith("its caption a.txt")
    assert folder.refused[0].reason.isprintable()


def test_the_geometry_without_weights_is_that_of_the_vae(model: Path) -> None:
    root = recipe_runner.ROOT / "assets" / "wan_doom"
    for path in (model, root):
        assert vae_geometry(path) == load_vae(path).geometry
