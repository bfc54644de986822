"""Foreign bytes at the readers of data: every mutation ends in success or in one line; bombs are
not unpacked."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from raw_sets import make_dmlab, make_far_latents, tar_of

from scd_sf.data.clip_files import About, write_clip
from scd_sf.data.clip_index import Common, open_job
from scd_sf.data.frames import FrameClips, FrameSetInfo, FrameWriter
from scd_sf.data.latents import LatentClips
from scd_sf.data.prompts import index_clips, write_fixed_prompts
from scd_sf.data.sources import raw_files
from scd_sf.data.sources.far import FarLatents, read_far_list
from scd_sf.data.sources.raw_files import arrays_of, one_tensor, open_raw
from scd_sf.data.sources.teco import Teco
from scd_sf.types import UserError, VideoShape, printable

SHAPE = VideoShape(2, 4, 4, 4)
ODD: tuple[object, ...] = (
    None,
    True,
    -1,
    2**70,
    1e308,
    "",
    "\ud800",
    "\x1b[2J",
    "a" * 5000,
    [],
    {},
    [[]] * 3,
    {"a": None},
    0,
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, a piece cut out, doubled or cut off."""
    out = bytearray(data)
    first, last = sorted(rng.randrange(len(out)) for _ in range(2))
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del out[first:last]
    elif kind == 2:
        out[first:first] = out[first : min(last, first + 600)]
    else:
        del out[first:]
    return bytes(out)


def mutated_json(value: object, rng: random.Random) -> object:
    """One of the tree's values, or keys, is another one."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {name: value[name] for name in value if name != key}
        return {**value, key: mutated_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], mutated_json(value[place], rng), *value[place + 1 :]]
    return rng.choice(ODD)


def holds(work: Callable[[], object], what: object) -> bool:
    """Whether it succeeds; otherwise it must end in one printable line of a reasonable length."""
    try:
        work()
    except UserError as error:
        line = str(error)
        assert printable(line) == line and "\n" not in line and len(line) < 2000, (what, line)
        return False
    return True


def clips(root: Path) -> Path:
    """Three files of one clip each."""
    open_job(root, Common(SHAPE, "float16", 8, 6, {"made": "here"}))
    for number in range(3):
        about = About(f"{number:02x}".ljust(32, "b"), f"prompt {number}", tags={"place": "hall"})
        write_clip(
            root, torch.rand(SHAPE.latent(1)[1:]).half(), torch.rand(2 + number, 8).half(), about
        )
    write_fixed_prompts(root, lambda texts: [torch.ones(1, 8) for _ in texts], "bad", torch.float16)
    index_clips(root)
    return root


def frames(root: Path) -> Path:
    writer = FrameWriter(root, {"source": "x"}, FrameSetInfo(3, 4, 4, 8, 3, ("a", "b")))
    for number in range(3):
        writer.append(f"c{number}", torch.rand(4, 3, 4, 4), torch.tensor([0, 1, 2, 0]), number % 2)
    writer.finish()
    return root


def read_clips(root: Path) -> None:
    data = LatentClips(root)
    data.stored(range(len(data)))
    data.batch(range(len(data)))


def read_frames(root: Path) -> None:
    data = FrameClips(root)
    data.batch(range(len(data)), [0] * len(data), 4)


@pytest.mark.parametrize("make", [clips, frames])
def test_mutated_descriptors_of_data_folders(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """Values of manifest.json, job.json and clips.jsonl, and bytes of the files: hashes are not
    needed to be read."""
    rng, root = random.Random(0), make(tmp_path / "data")
    read = read_clips if make is clips else read_frames
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name != ".lock"]
    outcomes = set()
    for path in files:
        good = path.read_bytes()
        for number in range(60 if path.suffix in (".json", ".jsonl") else 25):
            if path.suffix == ".json" and number % 3:
                path.write_text(json.dumps(mutated_json(json.loads(good), rng)))
            elif path.suffix == ".jsonl" and number % 3:
                rows = [json.loads(line) for line in good.decode().splitlines()]
                path.write_text("".join(json.dumps(row) + "\n" for row in mutated_rows(rows, rng)))
            else:
                path.write_bytes(mutated(good, rng))
            outcomes.add(holds(lambda: read(root), (path, number)))
            if make is clips and (root / "job.json").is_file():
                holds(lambda: index_clips(root), (path, number))
                make_index_again(root, files, path)
        path.write_bytes(good)
        read(root)
    assert outcomes == {True, False}


def mutated_rows(rows: list[object], rng: random.Random) -> list[object]:
    changed = mutated_json(rows, rng)
    return changed if isinstance(changed, list) else rows[1:]


def make_index_again(root: Path, files: list[Path], spared: Path) -> None:
    """What index_clips wrote from a mutated file is made good again."""
    if spared.name in ("manifest.json", "clips.jsonl") or not (root / "manifest.json").is_file():
        return
    held = spared.read_bytes()
    good = KEPT.setdefault(root, {path: path.read_bytes() for path in files if path != spared})
    for path, data in good.items():
        if path != spared:
            path.write_bytes(data)
    spared.write_bytes(held)


KEPT: dict[Path, dict[Path, bytes]] = {}


def test_mutated_archives_arrays_and_tensors(tmp_path: Path) -> None:
    """npz and pt, in a folder and in a tar: counted and named, never a traceback."""
    rng = random.Random(1)
    make_dmlab(tmp_path / "dmlab", clips=1)
    make_far_latents(tmp_path / "far", clips=2)
    npz = next((tmp_path / "dmlab").rglob("*.npz"))
    tensor = next((tmp_path / "far").rglob("*.pt")).read_bytes()
    good = npz.read_bytes()
    tar = tmp_path / "all.tar"
    tar_of(tar, tmp_path / "far", sorted((tmp_path / "far").rglob("*.*")))
    archive, outcomes = tar.read_bytes(), []
    for number in range(150):
        npz.write_bytes(mutated(good, rng))
        outcomes.append(holds(lambda: Teco(tmp_path / "dmlab", "train").read(0), ("npz", number)))
        data = mutated(tensor, rng)
        outcomes.append(holds(lambda data=data: one_tensor(data, "x.pt"), ("pt", number)))  # type: ignore[misc]
        tar.write_bytes(mutated(archive, rng))

        def read_all() -> None:
            source = FarLatents(tar, None)
            assert all(
                printable(bad.name + bad.reason) == bad.name + bad.reason for bad in source.refused
            )
            for index in range(len(source)):
                source.read(index)

        outcomes.append(holds(read_all, ("tar", number)))
    assert set(outcomes) == {True, False}


def test_mutated_lists(tmp_path: Path) -> None:
    rng, path = random.Random(2), tmp_path / "list.json"
    rows = [
        {"video_path": f"a/{number}.mp4", "action_path": f"a/{number}.npz"} for number in range(4)
    ]
    for number in range(200):
        path.write_text(json.dumps(mutated_json(rows, rng)))
        holds(lambda: read_far_list(path, "video_path"), number)


def test_an_empty_pt_and_tensors_without_numbers() -> None:
    def saved(value: object) -> bytes:
        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()

    for data, message in (
        (b"", "not a file of torch.save"),
        (saved(torch.zeros(1).expand(2**20, 2**12)), "more than"),
        (
            saved(torch.zeros(3, dtype=torch.int8)),
            "holds a Tensor, not one tensor of floating point",
        ),
        (saved(torch.rand(3, 3).to_sparse()), "has no numbers in memory"),
        (saved(torch.zeros(3, device="meta")), "has no numbers in memory"),
    ):
        with pytest.raises(UserError, match=f"x\\.pt: .*{message}"):
            one_tensor(data, "x.pt")


def test_bombs_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small npz of a large array, and a torch file whose parts are compressed."""
    file = io.BytesIO()
    np.savez_compressed(file, actions=np.zeros(2**20, np.uint8))
    assert len(file.getvalue()) < 2**13
    monkeypatch.setattr(raw_files, "LARGEST_ARRAY", 2**19)
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(UserError, match=r"'actions' has 1048704 bytes, more than"):
        arrays_of(file.getvalue(), ("actions",), "x.npz")
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(2**20), plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(UserError, match="its parts are compressed"):
        one_tensor(packed.getvalue(), "x.pt")


def test_names_that_are_no_text_and_what_is_no_file(tmp_path: Path) -> None:
    """Refused and named, printably; a pipe is not waited for; a link out of the folder is not
    read."""
    folder = tmp_path / "data" / "train" / "x"
    folder.mkdir(parents=True)
    good = io.BytesIO()
    np.savez(good, actions=np.arange(3), video=np.zeros((3, 8, 8, 3), np.uint8))
    for name in (b"a.npz", b"\xff.npz", b"\x1b[2J.npz"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(good.getvalue())
    os.mkfifo(folder / "pipe.npz")
    (tmp_path / "secret.npz").write_bytes(good.getvalue())
    (folder / "link.npz").symlink_to(tmp_path / "secret.npz")
    (folder / "loop.npz").symlink_to(folder / "loop.npz")
    clips = Teco(tmp_path / "data", "train")
    assert clips.ids == ["train/x/a", "train/x/loop", "train/x/pipe"]
    assert clips.read(0).frames == 3
    for index in (1, 2):
        with pytest.raises(UserError, match=r"cannot be read|not a regular file"):
            clips.read(index)
    assert sorted(bad.reason for bad in clips.refused) == [
        "a link that leaves the folder",
        *["its name is no plain text"] * 2,
    ]
    assert all(printable(bad.name) == bad.name for bad in clips.refused)


def test_a_tar_that_goes_backwards_ends(tmp_path: Path) -> None:
    """A size below zero led Python's reader back to the same header for ever."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        entry = tarfile.TarInfo("train/x/a.npz")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"abcd"))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[124:136] = b"\xff" * 4 + struct.pack(">q", -1024)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    files = open_raw(tmp_path / "a.tar", (".npz",))
    assert files.names == [] and "damaged or cut" in files.refused[-1].reason
