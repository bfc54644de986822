"""Other people's layouts read as clips: TECO, FAR, UCF-101, RealEstate10K. Real video; and every
malformed file."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from raw_sets import (
    bikes,
    jpeg,
    make_dmlab,
    make_far_latents,
    make_re10k,
    make_ucf101,
    tar_of,
    write_avi,
)

from scd_sf.data.clips import read_video, write_video
from scd_sf.data.sources.far import Far, FarLatents
from scd_sf.data.sources.pixel_sources import PixelsConfig, open_pixels
from scd_sf.data.sources.raw_files import arrays_of
from scd_sf.data.sources.realestate10k import RealEstate10K
from scd_sf.data.sources.teco import Teco
from scd_sf.data.sources.ucf101 import Ucf101
from scd_sf.data.sources.video_reader import read_frames, resize_crop
from scd_sf.types import UserError


def small(picture_3HW: torch.Tensor, size: int) -> torch.Tensor:
    """Resized and cropped."""
    return torch.from_numpy(resize_crop(picture_3HW.permute(1, 2, 0).numpy(), size)).permute(
        2, 0, 1
    )


# --------------------------------------------------------------------------------------------- TECO


def test_teco_from_a_folder(doom_actions: Path) -> None:
    clips = open_pixels(PixelsConfig(kind="teco", root=str(doom_actions), split="train"))
    assert (
        clips.ids == [f"train/my_way_home/{number:05d}" for number in range(4)] and len(clips) == 4
    )
    assert (clips.num_actions, clips.labels, clips.fps, clips.refused) == (3, (), 20.0, [])
    clip = clips.read(2)
    path = doom_actions / "train/my_way_home/00002.mp4"
    assert (
        torch.equal(clip.frames_F3HW, read_video(path))
        and clip.frames == 40
        and clip.id == clips.ids[2]
    )
    stored = np.load(path.with_suffix(".npz"), allow_pickle=False)["actions"]
    assert (
        clip.actions_F is not None
        and clip.actions_F.tolist() == stored.tolist()
        and clip.label is None
    )
    assert Teco(doom_actions, "test").ids == ["test/my_way_home/00000"]
    assert Teco(doom_actions, "train", size=32).read(0).frames_F3HW.shape == (40, 3, 32, 32)
    some = open_pixels(
        PixelsConfig(kind="teco", root=str(doom_actions), split="train", every=2, first=1)
    )
    assert some.ids == clips.ids[:1] and torch.equal(
        some.read(0).frames_F3HW, clips.read(0).frames_F3HW
    )
    every = open_pixels(PixelsConfig(kind="teco", root=str(doom_actions), split="train", every=3))
    assert every.ids == [clips.ids[0], clips.ids[3]] and every.read(1).id == clips.ids[3]


@pytest.mark.parametrize("parts", [0, 3])
def test_teco_from_tars_in_place(doom_actions: Path, tmp_path: Path, parts: int) -> None:
    """A tar, and the parts that the Internet Archive has of one, give what the folder gives;
    nothing is extracted."""
    tar_of(tmp_path / "minecraft.tar", doom_actions, sorted(doom_actions.rglob("0*.*")))
    if parts:
        data = (tmp_path / "minecraft.tar").read_bytes()
        (tmp_path / "minecraft.tar").unlink()
        third = len(data) // 3 + 1
        for number, name in enumerate(("aa", "ab", "ac")):
            (tmp_path / f"minecraft.tar.part{name}").write_bytes(
                data[number * third : (number + 1) * third]
            )
    before = sorted(os.listdir(tmp_path))
    clips, folder = Teco(tmp_path, "train"), Teco(doom_actions, "train")
    assert clips.ids == folder.ids and clips.refused == []
    for index in range(len(clips)):
        one, two = clips.read(index), folder.read(index)
        assert (
            torch.equal(one.frames_F3HW, two.frames_F3HW)
            and one.actions_F is not None
            and two.actions_F is not None
        )
        assert torch.equal(one.actions_F, two.actions_F)
    assert sorted(os.listdir(tmp_path)) == before


def test_members_that_lead_elsewhere_are_refused(doom_actions: Path, tmp_path: Path) -> None:
    tar_of(tmp_path / "evil.tar", doom_actions, sorted((doom_actions / "train").rglob("00000.*")))
    good = (doom_actions / "train/my_way_home/00001.npz").read_bytes()
    with tarfile.open(tmp_path / "evil.tar", "a") as tar:
        for name in (
            "/train/a/x.npz",
            "train/../../x.npz",
            "train/a/x.py",
            "train/my_way_home/00000.npz",
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(good)
            tar.addfile(entry, io.BytesIO(good))
        for name, kind in (("train/a/l.npz", tarfile.SYMTYPE), ("train/a/h.npz", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
        tar.add(doom_actions / "train", "train", recursive=False)
    clips = Teco(tmp_path / "evil.tar", "train")
    assert clips.ids == ["train/my_way_home/00000"] and clips.read(0).frames == 40
    reasons = sorted(bad.reason.split()[0] for bad in clips.refused)
    assert reasons == sorted(["its", "its", "its", "a", "not", "not"]), clips.refused
    assert all("evil.tar[" in bad.name for bad in clips.refused)


def test_cut_and_packed_tars(doom_actions: Path, tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", doom_actions, sorted((doom_actions / "train").rglob("0*.*")))
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: len(data) // 2 + 100])
    clips = Teco(tmp_path, "train")
    assert 0 < len(clips) < 4 and any(
        "cut" in bad.reason or "beside" in bad.reason for bad in clips.refused
    )
    assert clips.read(0).frames == 40
    (tmp_path / "b.tar.gz").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"b\.tar\.gz: members of a compressed tar cannot be read in place"
    ):
        Teco(tmp_path, "train")


def test_dmlab_keeps_the_video_in_the_npz(tmp_path: Path) -> None:
    ids = make_dmlab(tmp_path)
    clips = Teco(tmp_path, "train")
    assert clips.ids == ids
    clip = clips.read(1)
    assert clip.frames_F3HW.shape == (12, 3, 64, 64) and clip.actions_F is not None
    assert clip.actions_F.tolist() == [0, 1, 2] * 4
    assert torch.equal(
        clip.frames_F3HW[0],
        torch.from_numpy(resize_crop(bikes()[12].permute(1, 2, 0).numpy(), 64)).permute(2, 0, 1),
    )


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def lying_npz() -> bytes:
    """A header of a terabyte before a few bytes."""
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        array, {"descr": "<i8", "fortran_order": False, "shape": (2**37,)}
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("actions.npy", array.getvalue() + b"12345678")
    return file.getvalue()


VIDEO = np.zeros((4, 8, 8, 3), np.uint8)
MALFORMED = {
    "no zip": (b"no", "not a .npz of plain arrays"),
    "a pickle": (npz(actions=np.array([{}, {}], dtype=object)), "could run code"),
    "a lie": (lying_npz(), "8 bytes for shape"),
    "too few actions": (npz(video=VIDEO, actions=np.zeros(3, int)), "3 actions for 4 frames"),
    "a fourth action": (
        npz(video=VIDEO, actions=np.array([0, 1, 2, 3])),
        r"actions 0..3 are not in 0..2",
    ),
    "a negative action": (
        npz(video=VIDEO, actions=np.array([0, 1, 2, -1])),
        r"actions -1..2 are not in 0..2",
    ),
    "fractions": (npz(video=VIDEO, actions=np.zeros(4)), "not whole numbers"),
    "one-hot": (npz(video=VIDEO, actions=np.zeros((4, 3), int)), "not whole numbers"),
    "no actions": (npz(video=VIDEO), "has no 'actions'"),
    "no video": (npz(actions=np.zeros(4, int)), "has neither an .mp4 beside it nor 'video' in it"),
    "grey video": (
        npz(video=VIDEO[..., 0], actions=np.zeros(4, int)),
        r"'video' is uint8 \(4, 8, 8\)",
    ),
    "float video": (npz(video=VIDEO.astype(float), actions=np.zeros(4, int)), "'video' is float64"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_npz(tmp_path: Path, name: str) -> None:
    data, message = MALFORMED[name]
    (tmp_path / "train" / "0").mkdir(parents=True)
    (tmp_path / "train" / "0" / "x.npz").write_bytes(data)
    with pytest.raises(UserError, match=rf"x\.npz: .*{message}"):
        Teco(tmp_path, "train").read(0)


def test_malformed_videos(doom_actions: Path, tmp_path: Path) -> None:
    source, folder = doom_actions / "train/my_way_home", tmp_path / "train" / "x"
    folder.mkdir(parents=True)
    video = (source / "00000.mp4").read_bytes()
    for name, data in {
        "cut": video[: len(video) // 2],
        "empty": b"",
        "text": b"hello" * 100,
        "lonely": video,
    }.items():
        (folder / f"{name}.mp4").write_bytes(data)
        if name != "lonely":
            (folder / f"{name}.npz").write_bytes((source / "00000.npz").read_bytes())
    (folder / "out.npz").symlink_to("/etc/hostname")
    clips = Teco(tmp_path, "train")
    assert [id.rpartition("/")[2] for id in clips.ids] == ["cut", "empty", "text"]
    assert [bad.reason for bad in clips.refused] == [
        "a link that leaves the folder",
        "no .npz with actions beside it",
    ]
    for index, name in enumerate(("cut", "empty", "text")):
        with pytest.raises(UserError, match=rf"{name}\.(mp4|npz): .*(decoded|actions for)"):
            clips.read(index)
    with pytest.raises(UserError, match="no clip of split 'val'"):
        Teco(tmp_path, "val")
    with pytest.raises(UserError, match="no such file or folder"):
        Teco(tmp_path / "absent", "train")
    for odd in ("aa.mp4", "bb.mp4"):
        write_video(tmp_path / odd, bikes()[:4, :, :64, : 64 if odd == "aa.mp4" else 32], 20)
    assert read_frames(tmp_path / "bb.mp4", "bb").shape == (4, 3, 64, 32)


# ---------------------------------------------------------------------------------------------- FAR


def test_far_lists(doom_actions: Path, tmp_path: Path) -> None:
    stems = [f"train/my_way_home/{number:05d}" for number in (3, 1)]
    rows: list[dict[str, object]] = [
        {"video_path": f"datasets/mc/{s}.mp4", "action_path": f"datasets/mc/{s}.npz"} for s in stems
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    config = PixelsConfig(
        kind="far",
        root=str(doom_actions),
        list=str(tmp_path / "list.json"),
        list_prefix="datasets/mc",
    )
    clips, teco = open_pixels(config), Teco(doom_actions, "train")
    assert clips.ids == stems and clips.num_actions == 3 and clips.labels == ()
    one, two = clips.read(0), teco.read(3)
    assert (
        torch.equal(one.frames_F3HW, two.frames_F3HW)
        and one.actions_F is not None
        and two.actions_F is not None
    )
    assert torch.equal(one.actions_F, two.actions_F)

    names = make_ucf101(tmp_path / "ucf", per_class=2)
    rows = [
        {"video_path": f"UCF-101/{name}", "label": number // 2} for number, name in enumerate(names)
    ]
    (tmp_path / "ucf" / "test03.json").write_text(json.dumps(rows))
    clips = open_pixels(
        PixelsConfig(kind="far", root=str(tmp_path / "ucf"), list="test03.json", size=64)
    )
    assert clips.num_actions == 0 and clips.labels == ("ApplyEyeMakeup", "Biking", "CliffDiving")
    assert clips.read(3).label == 1 and clips.read(3).actions_F is None
    other = Ucf101(tmp_path / "ucf", "test").read(3)
    assert torch.equal(clips.read(3).frames_F3HW, other.frames_F3HW)
    with pytest.raises(UserError, match="needs 'list'"):
        open_pixels(PixelsConfig(kind="far", root=str(tmp_path)))


@pytest.mark.parametrize("tars", [False, True])
def test_far_latents(tmp_path: Path, tars: bool) -> None:
    latents = make_far_latents(tmp_path)
    root = tmp_path
    if tars:
        root = tmp_path / "tars"
        root.mkdir()
        files = sorted((tmp_path / "latents").rglob("*.*"))
        tar_of(root / "shard-000.tar", tmp_path, files[:3])  # a clip's files may lie in two tars
        tar_of(root / "shard-001.tar", tmp_path, files[3:])
    clips = FarLatents(root, tmp_path / "latents.json", prefix="datasets/")
    assert (
        clips.ids == [f"latents/train/{number}" for number in range(3)] and clips.num_actions == 3
    )
    clip = clips.read(1)
    torch.testing.assert_close(clip.latents_FCHW, latents[1] * 0.2889)
    assert (
        clip.frames == 8
        and clip.actions_F is not None
        and clip.actions_F.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    )
    assert FarLatents(root, None).ids == clips.ids
    torch.testing.assert_close(
        FarLatents(root, None, scaling_factor=1.0).read(2).latents_FCHW, latents[2]
    )


def test_malformed_latents(tmp_path: Path) -> None:
    make_far_latents(tmp_path, clips=5)
    folder = tmp_path / "latents" / "train"
    torch.save(torch.zeros(8, 32, 8), folder / "0.pt")
    torch.save({"a": torch.zeros(1)}, folder / "1.pt")
    (folder / "2.pt").write_bytes((folder / "2.pt").read_bytes()[:500])
    torch.save(Path("x"), folder / "3.pt")  # a class: a pickle that imports
    (folder / "4.npz").unlink()
    clips = FarLatents(tmp_path, tmp_path / "latents.json", prefix="datasets/")
    for index, message in enumerate(
        [
            r"holds \(8, 32, 8\), not latents",
            "holds a dict, not one tensor",
            "not a file of torch.save",
            "could run code",
            "cannot be read",
        ]
    ):
        with pytest.raises(UserError, match=message):
            clips.read(index)
    pairs = FarLatents(tmp_path, None)
    assert len(pairs) == 4 and [bad.reason for bad in pairs.refused] == [
        "no .npz with actions beside it"
    ]
    with pytest.raises(UserError, match=r"no X\.pt with an X\.npz beside it"):
        FarLatents(make_ucf101_folder(tmp_path), None)


def make_ucf101_folder(root: Path) -> Path:
    make_ucf101(root / "other", per_class=1)
    return root / "other"


BAD_LISTS = {
    "{": "not JSON",
    "{}": "no list, or an empty one",
    "[]": "no list, or an empty one",
    '["a"]': r"\[0\]: has str",
    '[{"path": "a"}]': r"\[0\]: has path",
    '[{"video_path": "a", "fps": 3}]': r"\[0\]: has fps, video_path",
    '[{"video_path": 3}]': "'video_path' is no path",
    '[{"video_path": "/etc/a.mp4"}]': "leaves the folder; give its beginning as the list's prefix",
    '[{"video_path": "../a.mp4"}]': "leaves the folder",
    '[{"video_path": "a.mp4", "action_path": "../a"}]': "'action_path' is '../a', which leaves",
    '[{"video_path": "a.mp4", "label": "x"}]': "'label' is 'x'",
    '[{"video_path": "a.mp4", "label": -1}]': "'label' is -1",
    '[{"video_path": "a.mp4", "label": 1}, {"video_path": "b.mp4"}]': "some clips have actions or labels",
    '[{"video_path": "a.mp4"}, {"video_path": "a.mp4"}]': "a is listed twice",
}


@pytest.mark.parametrize("text", BAD_LISTS)
def test_bad_lists(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(UserError, match=rf"list\.json.*{BAD_LISTS[text]}"):
        Far(tmp_path, tmp_path / "list.json")


# ------------------------------------------------------------------------------------------ UCF-101


def test_ucf101(tmp_path: Path) -> None:
    names = make_ucf101(tmp_path)
    clips = Ucf101(tmp_path, "test")
    assert (
        clips.ids == names
        and clips.labels == ("ApplyEyeMakeup", "Biking", "CliffDiving")
        and clips.num_actions == 0
    )
    clip = clips.read(5)
    assert clip.label == 1 and clip.frames_F3HW.shape == (10, 3, 64, 64) and clip.actions_F is None
    # The whole frame's height, the middle of its width: as torchvision's Resize and CenterCrop.
    source = bikes()[50, :, :240, :320]
    wanted = small(source, 64)
    assert (clip.frames_F3HW[0].float() - wanted.float()).abs().mean() < 6, (
        "MPEG-4 loses little at this size"
    )
    assert Ucf101(tmp_path, "test", size=48).read(0).frames_F3HW.shape == (10, 3, 48, 48)
    train = Ucf101(tmp_path, "train")
    assert train.ids == names[::4] and [train.read(index).label for index in range(3)] == [0, 1, 2]
    evaluated = open_pixels(
        PixelsConfig(kind="ucf101", root=str(tmp_path), split="test", every=10, first=256)
    )
    assert evaluated.ids == [names[0], names[10]] and evaluated.labels == clips.labels


def test_resize_is_torchvisions() -> None:
    """Resize(64) + CenterCrop(64) of 320x240, as in FAR's loader, from their formulas: 85x64, then
    columns 10-73."""
    source = bikes()[7, :, :240, :320]
    wide = torch.nn.functional.interpolate(
        source[None].float(), (64, 85), mode="bilinear", antialias=True
    )[0].round()
    crop = small(source, 64)
    assert torch.equal(crop.float(), wide[:, :, 10:74])
    tall = resize_crop(source.permute(2, 1, 0).numpy(), 64)
    assert np.abs(tall.astype(int) - crop.permute(2, 1, 0).numpy().astype(int)).max() <= 1
    same = source[:, :64, :64].permute(1, 2, 0).contiguous().numpy()
    assert np.array_equal(resize_crop(same, 64), same)


def test_malformed_ucf101(tmp_path: Path) -> None:
    names = make_ucf101(tmp_path, per_class=2)
    lists, videos = tmp_path / "ucfTrainTestlist", tmp_path / "UCF-101"
    cut = videos / names[0]
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (videos / names[1]).unlink()
    write_avi(videos / names[2], bikes()[:3, :, :240, :320])
    clips = Ucf101(tmp_path, "test")
    with pytest.raises(UserError, match=r"g01_c01\.avi: .*decoded"):
        clips.read(0)
    with pytest.raises(UserError, match=r"g02_c01\.avi: no such file"):
        clips.read(1)
    assert clips.read(2).frames == 3
    test_list, original = lists / "testlist03.txt", (lists / "testlist03.txt").read_text()
    for text, message in {
        "Swimming/v_a.avi\n": r"testlist03\.txt:1: 'Swimming/v_a\.avi' is no '<Class>/<video>\.avi'",
        f"{names[0]}\n../Biking/a.avi\n": r"testlist03\.txt:2",
        f"{names[0]} 2\n": r"testlist03\.txt:1: label 2 is not that of ApplyEyeMakeup",
        "": "lists no clip",
    }.items():
        test_list.write_text(text)
        with pytest.raises(UserError, match=message):
            Ucf101(tmp_path, "test")
    test_list.write_text(original)
    with pytest.raises(UserError, match=r"testlist02\.txt: cannot be read"):
        Ucf101(tmp_path, "test", fold=2)
    with pytest.raises(UserError, match="split 'val' is unknown"):
        Ucf101(tmp_path, "val")
    (lists / "classInd.txt").write_text("1 A\n3 B\n")
    with pytest.raises(UserError, match=r"classInd\.txt: its lines must be '1 <Class>'"):
        Ucf101(tmp_path, "test")
    (lists / "classInd.txt").unlink()
    with pytest.raises(UserError, match=r"classInd\.txt: cannot be read"):
        Ucf101(tmp_path, "test")
    with pytest.raises(UserError, match="UCF-101: no such folder"):
        Ucf101(tmp_path / "absent", "test")


# ------------------------------------------------------------------------------------ RealEstate10K


def test_realestate10k(tmp_path: Path) -> None:
    make_re10k(tmp_path)
    clips = RealEstate10K(tmp_path, "test", size=64, frames=9, cameras=True)
    assert (
        clips.ids == [f"{number:016x}" for number in range(3)]
        and clips.num_actions == 0
        and clips.labels == ()
    )
    clip = clips.read(1)
    assert clip.frames_F3HW.shape == (9, 3, 64, 64)
    wanted = small(bikes()[12], 64)
    assert (clip.frames_F3HW[0].float() - wanted.float()).abs().mean() < 3
    assert RealEstate10K(tmp_path, "test", size=32, frames=0).read(0).frames == 12
    opened = open_pixels(
        PixelsConfig(kind="realestate10k", root=str(tmp_path), split="test", frames=9, first=2)
    )
    assert (
        len(opened) == 2
        and opened.read(0).frames_F3HW.shape == (9, 3, 256, 256)
        and opened.fps == 30
    )


def change(folder: Path, number: int, key: str, value: object) -> None:
    chunk = torch.load(folder / "000000.torch", weights_only=True)
    chunk[number][key] = value
    torch.save(chunk, folder / "000000.torch")


def test_malformed_realestate10k(tmp_path: Path) -> None:
    folder = make_re10k(tmp_path)

    def message(index: int = 0, cameras: bool = False) -> str:
        clips = RealEstate10K(tmp_path, "test", size=32, frames=9, cameras=cameras)
        with pytest.raises(UserError) as caught:
            clips.read(index)
        return str(caught.value)

    good = torch.load(folder / "000000.torch", weights_only=True)[0]["images"]
    huge = jpeg(np.zeros((8, 8, 3), np.uint8)).clone()
    # the header that holds height and width
    place = int((huge[:-1].eq(0xFF) & huge[1:].eq(0xC0)).nonzero()[0])
    large = huge.clone()
    large[place + 5 : place + 9] = torch.tensor([0x1F, 0xE0, 0x1F, 0xE0], dtype=torch.uint8)
    huge[place + 5 : place + 9] = torch.tensor([0xFF, 0x00, 0xFF, 0x00], dtype=torch.uint8)
    for images, text in (
        ([torch.arange(100).byte()] * 9, "image 0 cannot be decoded"),
        ([*good[:5], good[5][:200], *good[6:]], "image 5 cannot be decoded"),
        ([large] * 9, "image 0: 8160x8160 is too large"),
        ([huge] * 9, "exceeds limit of"),
        ([torch.zeros(4, 4)] * 9, "image 0 is not the bytes"),
        (good[:5], "5 images, 9 are needed"),
        (None, "no images, 9 are needed"),
    ):
        change(folder, 0, "images", images)
        assert text in message() and "000000.torch[0000000000000000]" in message()
    change(folder, 0, "images", good)
    change(folder, 0, "cameras", torch.zeros(12, 19))
    assert "'cameras' must be finite (12, 18)" in message(cameras=True)
    assert RealEstate10K(tmp_path, "test", size=32, frames=9).read(0).frames == 9
    change(folder, 0, "key", "another")
    assert "index.json names it, the chunk does not hold it" in message()
    torch.save([{"key": Path("x")}], folder / "000000.torch")
    assert "could run code" in message(0) and "could run code" in message(1)
    torch.save({"key": 1}, folder / "000000.torch")
    assert "not a list of clips" in message()
    (folder / "000000.torch").unlink()
    clips = RealEstate10K(tmp_path, "test", size=32, frames=9)
    assert clips.ids == ["0000000000000002"] and [bad.reason for bad in clips.refused] == [
        "listed in index.json but missing"
    ]
    for text, problem in (
        ('{"a": "../x.torch"}', "leaves"),
        ('{"a": 3}', "must be"),
        ("{}", "must be"),
        ("[]", "not a JSON object"),
        ('{"a": "x.torch"}', "none of its 1 chunks is there"),
    ):
        (folder / "index.json").write_text(text)
        with pytest.raises(UserError, match=problem):
            RealEstate10K(tmp_path, "test")


def test_bad_configs() -> None:
    for values in ({"every": 0}, {"num_actions": 0}, {"fold": 4}, {"size": -1}, {"kind": "x"}):
        with pytest.raises(UserError, match=next(iter(values))):
            PixelsConfig(**values)
    with pytest.raises(UserError, match="'root' is empty"):
        open_pixels(PixelsConfig())
    with pytest.raises(UserError, match="format"):
        arrays_of(npz_of_another_format(), ("actions",), "x")


def npz_of_another_format() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("actions.npy", b"\x93NUMPY\x07\x00" + b"\0" * 50)
    return file.getvalue()
