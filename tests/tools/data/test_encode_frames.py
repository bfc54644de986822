"""From clips to encoded frames: what is stored, resuming, malformed clips and their budget, the
scripts."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from raw_sets import make_far_latents, make_re10k, make_ucf101
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from scd_sf.data.frames import FrameClips, FrameWriter
from scd_sf.data.sources.far import FarLatents
from scd_sf.data.sources.pixels import PixelClip
from scd_sf.data.sources.raw_files import Refused
from scd_sf.data.sources.teco import Teco
from scd_sf.data.sources.ucf101 import Ucf101
from scd_sf.files import locked
from scd_sf.tools.data.encode_frames import (
    EncodeConfig,
    Task,
    check_clips,
    encode_pixels,
    import_latents,
    run_pixels,
)
from scd_sf.types import Tokenizer, UserError

SCRIPTS = Path(__file__).parents[3] / "data_prep"


class Means:
    """A tokenizer: the mean of every 8x8 square. ``stop_after``: interrupts at that call."""

    channels, spatial = 3, 8

    def __init__(self, stop_after: int = 0) -> None:
        self.calls: list[int] = []
        self.stop_after = stop_after

    def encode(self, frames_BF3HW: Tensor) -> Tensor:
        assert frames_BF3HW.dtype == torch.float32 and frames_BF3HW.abs().max() <= 1
        self.calls.append(frames_BF3HW.shape[1])
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        return avg_pool2d(frames_BF3HW.flatten(0, 1), 8).unflatten(0, frames_BF3HW.shape[:2])

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        return interpolate(latents_BFCHW.flatten(0, 1), scale_factor=8.0).unflatten(
            0, latents_BFCHW.shape[:2]
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}


def test_stored_latents_actions_and_labels(doom_actions: Path, tmp_path: Path) -> None:
    source, tokenizer = Teco(doom_actions, "train"), Means()
    assert isinstance(tokenizer, object) and takes_tokenizer(tokenizer)
    report = encode_pixels(
        source, tokenizer, tmp_path / "out", {"a": 1}, EncodeConfig(batch=16, frames_per_shard=100)
    )
    assert (report.clips, report.good, report.frames, report.bad) == (4, 4, 160, [])
    assert tokenizer.calls == [16, 16, 8] * 4
    clips = FrameClips(tmp_path / "out")
    clips.verify()
    assert [clip.id for clip in clips.clips] == source.ids and len(clips.reader.shards) == 2
    assert (clips.info.channels, clips.info.height, clips.info.spatial, clips.info.num_actions) == (
        3,
        8,
        8,
        3,
    )
    batch = clips.batch([3], [5], 20)
    clip = source.read(3)
    wanted = avg_pool2d(clip.frames_F3HW[5:25].float().div(127.5).sub(1), 8)
    torch.testing.assert_close(batch.latents_BFCHW[0], wanted, atol=1e-3, rtol=0)
    assert batch.cond.actions_BF is not None and clip.actions_F is not None
    assert torch.equal(batch.cond.actions_BF[0], clip.actions_F[5:25])
    again = encode_pixels(source, tokenizer, tmp_path / "out", {"a": 1}, EncodeConfig())
    assert (again.before, again.good) == (4, 0) and len(tokenizer.calls) == 12
    with pytest.raises(UserError, match="made from other inputs"):
        encode_pixels(source, tokenizer, tmp_path / "out", {"a": 2}, EncodeConfig())

    make_ucf101(tmp_path / "ucf", per_class=1)
    encode_pixels(
        Ucf101(tmp_path / "ucf", "test"), Means(), tmp_path / "labels", {}, EncodeConfig()
    )
    labels = FrameClips(tmp_path / "labels")
    assert (
        labels.info.labels == ("ApplyEyeMakeup", "Biking", "CliffDiving")
        and labels.info.num_actions == 0
    )
    assert [clip.label for clip in labels.clips] == [0, 1, 2]


def takes_tokenizer(tokenizer: Tokenizer) -> bool:
    return tokenizer.channels == 3


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    doom_actions: Path, tmp_path: Path
) -> None:
    source, config = Teco(doom_actions, "train"), EncodeConfig(frames_per_shard=50, workers=1)
    encode_pixels(
        source,
        Means(),
        tmp_path / "whole",
        {},
        EncodeConfig(frames_per_shard=50, workers=4, batch=7),
    )
    with pytest.raises(KeyboardInterrupt):
        encode_pixels(source, Means(stop_after=4), tmp_path / "parts", {}, config)
    tokenizer = Means()
    report = encode_pixels(source, tokenizer, tmp_path / "parts", {}, config)
    assert (report.before, report.good) == (2, 2) and len(tokenizer.calls) == 2, (
        "the first shard is not made again"
    )
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_killed_at_the_end_it_is_whole_all_the_same(
    doom_actions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is there when the manifest is; what the manifest should have followed is cleared
    by the next run."""
    source, out = Teco(doom_actions, "train"), tmp_path / "out"
    unlink, finish = Path.unlink, FrameWriter.finish

    def no_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "building.json":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            FrameWriter,
            "finish",
            lambda writer: patch.setattr(Path, "unlink", no_unlink) or finish(writer),
        )
        encode_pixels(source, Means(), out, {}, EncodeConfig())
    assert (
        (out / "manifest.json").is_file()
        and (out / "building.json").is_file()
        and (out / "report.json").is_file()
    )
    encode_pixels(source, Means(), out, {}, EncodeConfig())
    assert {path.name for path in out.iterdir() if path.name != ".lock"} == {
        "manifest.json",
        "clips.jsonl",
        "report.json",
        "frames-00000.safetensors",
    }


def damaged(doom_actions: Path, root: Path) -> Path:
    """The four training clips: one cut, one with too few actions."""
    shutil.copytree(doom_actions / "train", root / "train")
    folder = root / "train" / "my_way_home"
    (folder / "00001.mp4").write_bytes((folder / "00001.mp4").read_bytes()[:2000])
    np.savez(folder / "00002.npz", actions=np.zeros(39, np.int64))
    return root


def test_malformed_clips_are_left_out_up_to_a_budget(doom_actions: Path, tmp_path: Path) -> None:
    root = damaged(doom_actions, tmp_path / "raw")
    before = {path: path.read_bytes() for path in root.rglob("*.*")}
    source = Teco(root, "train")
    report = encode_pixels(source, Means(), tmp_path / "out", {}, EncodeConfig(max_bad=0.5))
    assert [bad.name for bad in report.bad] == source.ids[1:3] and report.good == 2
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (
        "cannot be decoded" in stored["bad"][0]["reason"]
        and "39 actions for 40" in stored["bad"][1]["reason"]
    )
    assert [clip.id for clip in FrameClips(tmp_path / "out").clips] == [
        source.ids[0],
        source.ids[3],
    ]
    with pytest.raises(
        UserError,
        match=r"2 of 4 clips are malformed, more than max_bad 0\.25 \(the last is .*00002",
    ):
        encode_pixels(source, Means(), tmp_path / "strict", {}, EncodeConfig(max_bad=0.25))
    assert not (tmp_path / "strict" / "manifest.json").exists()
    assert len(json.loads((tmp_path / "strict" / "report.json").read_text())["bad"]) == 2
    checked = check_clips(source, EncodeConfig())
    assert (checked.good, checked.frames, [bad.name for bad in checked.bad]) == (
        2,
        80,
        source.ids[1:3],
    )
    assert {path: path.read_bytes() for path in root.rglob("*.*")} == before, (
        "the input is only read"
    )


class Made:
    """A source whose clips are made here, which counts how many are in someone's hands."""

    num_actions, labels, fps = 0, ("a", "b"), 20.0

    def __init__(self, sizes: list[int], labels: list[int] | None = None) -> None:
        self.sizes, self.numbers, self.refused = (
            sizes,
            labels or [0] * len(sizes),
            [Refused("x", "why")],
        )
        self.ids = [f"c{number}" for number in range(len(sizes))]
        self.begun, self.lock = 0, threading.Lock()

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> PixelClip:
        with self.lock:
            self.begun += 1
        frames = torch.full((2, 3, self.sizes[index], self.sizes[index]), index, dtype=torch.uint8)
        return PixelClip(self.ids[index], frames, label=self.numbers[index])


def test_odd_sizes_and_bounded_memory(tmp_path: Path) -> None:
    source = Made([16, 16, 24, 16, 16], [0, 1, 1, 5, 0])
    report = encode_pixels(source, Means(), tmp_path / "out", {}, EncodeConfig(max_bad=0.6))
    assert [bad.name for bad in report.bad] == ["x", "c2", "c3"] and report.clips == 6
    assert "those of the first clip are (3, 2, 2)" in report.bad[1].reason
    assert "label 5 is outside 0..1" in report.bad[2].reason
    with pytest.raises(UserError, match="20x20 does not divide by 8"):
        encode_pixels(Made([20]), Means(), tmp_path / "odd", {}, EncodeConfig(max_bad=1))
    with pytest.raises(UserError, match="1 of 2 clips are malformed, more than max_bad 0"):
        encode_pixels(Made([16]), Means(), tmp_path / "zero", {}, EncodeConfig(max_bad=0))
    assert not (tmp_path / "zero").exists()

    many = Made([16] * 30)
    ahead: list[int] = []

    class Watching(Means):
        def encode(self, frames_BF3HW: Tensor) -> Tensor:
            # the first clip is read once more, to see its size
            end = time.monotonic() + 60
            while many.begun - 1 < min(30, len(ahead) + 4) and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(0.005)  # and no more
            ahead.append(many.begun - 1 - len(ahead))
            return super().encode(frames_BF3HW)

    encode_pixels(many, Watching(), tmp_path / "many", {}, EncodeConfig(workers=3, max_bad=0.1))
    assert len(ahead) == 30 and max(ahead) == 4, "three are read while one is encoded"


def test_foreign_latents_are_scaled(tmp_path: Path) -> None:
    latents = make_far_latents(tmp_path)
    torch.save(latents[1] * float("inf"), tmp_path / "latents/train/1.pt")
    source = FarLatents(tmp_path, tmp_path / "latents.json", prefix="datasets/")
    report = import_latents(source, 16, tmp_path / "out", {}, EncodeConfig(max_bad=0.5))
    assert [bad.name for bad in report.bad] == ["latents/train/1"] and "not finite" in report.bad[
        0
    ].reason
    clips = FrameClips(tmp_path / "out")
    assert (clips.info.channels, clips.info.height, clips.info.spatial, clips.info.num_actions) == (
        32,
        8,
        16,
        3,
    )
    batch = clips.batch([1], [2], 4)
    torch.testing.assert_close(
        batch.latents_BFCHW[0], latents[2][2:6] * 0.2889, atol=2e-3, rtol=1e-3
    )
    assert batch.cond.actions_BF is not None and batch.cond.actions_BF.tolist() == [[2, 0, 1, 2]]


def test_bad_numbers() -> None:
    for config in ({"batch": 0}, {"workers": 0}, {"max_bad": 1.5}, {"frames_per_shard": 0}):
        with pytest.raises(UserError, match=next(iter(config))):
            EncodeConfig(**config)


# -------------------------------------------------------------------------------------- the scripts


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that the loader turns into :class:`Means`."""
    module = ModuleType("scd_sf.models.tokenizers.tokenizer")
    module.load_tokenizer = lambda path, device: Means()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "config.json").write_text("{}")
    return tmp_path / "tokenizer"


def test_scripts(
    doom_actions: Path, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teco = script("teco_minecraft")
    teco.main(root=doom_actions, out=tmp_path / "mc", split="test", tokenizer=tokenizer)
    assert (
        len(FrameClips(tmp_path / "mc")) == 1
        and "1 clips, 40 frames, 0 bad" in capsys.readouterr().out
    )
    make_far_latents(tmp_path / "far")
    teco.main(
        root=tmp_path / "far",
        out=tmp_path / "lat",
        data_list=tmp_path / "far" / "latents.json",
        list_prefix="datasets/",
        latents=True,
    )
    assert FrameClips(tmp_path / "lat").info.shape(8).channels == 32
    make_ucf101(tmp_path / "ucf")
    script("ucf101").main(
        root=tmp_path / "ucf", out=tmp_path / "u", split="test", tokenizer=tokenizer, every=10
    )
    assert [clip.label for clip in FrameClips(tmp_path / "u").clips] == [0, 2]
    make_re10k(tmp_path / "re")
    script("realestate10k").main(
        root=tmp_path / "re",
        out=tmp_path / "r",
        split="test",
        tokenizer=tokenizer,
        size=64,
        frames=12,
        max_bad=0.4,
        cameras=True,
    )
    assert [clip.frames for clip in FrameClips(tmp_path / "r").clips] == [12, 12]
    assert json.loads((tmp_path / "r" / "report.json").read_text())["bad"][0]["name"] == f"{1:016x}"


def test_scripts_that_only_check(
    doom_actions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = damaged(doom_actions, tmp_path / "raw")
    teco = script("teco_minecraft")
    with pytest.raises(UserError, match="2 of 4 clips are malformed"):
        teco.main(root=root, check=True, report=tmp_path / "report.json")
    out = capsys.readouterr().out
    assert "00001" in out and "2 clips, 80 frames, 2 bad" in out
    assert len(json.loads((tmp_path / "report.json").read_text())["bad"]) == 2
    teco.main(root=root, check=True, max_bad=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "report.json"]
    with pytest.raises(UserError, match="--tokenizer: is missing"):
        teco.main(root=root, out=tmp_path / "out")
    with pytest.raises(UserError, match="--out: is missing"):
        teco.main(root=root, latents=True, data_list=far_list(tmp_path))


def far_list(root: Path) -> Path:
    """A list whose files are not looked at."""
    (root / "l.json").write_text('[{"latent_path": "a.pt", "action_path": "a.npz"}]')
    return root / "l.json"


def test_output_of_others_is_left_alone_and_held(
    doom_actions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of other things, a file that is no report, a folder that another job holds; names
    are printed clean."""
    source = Teco(doom_actions, "train")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds manifest\.txt, but no data of ours"):
        encode_pixels(source, Means(), tmp_path / "mine", {}, EncodeConfig())
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["manifest.txt"]
    with (
        locked(tmp_path / "out", "another job"),
        pytest.raises(UserError, match="is at work in it"),
    ):
        encode_pixels(source, Means(), tmp_path / "out", {}, EncodeConfig())
    bad = Made([16])
    bad.refused = [Refused("\x1b[2J\nx", "why\udcff")]
    report = tmp_path / "report.json"
    report.write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"report\.json: is no report of this command"):
        run_pixels(bad, {}, Task(None, None, True, report, EncodeConfig(max_bad=1)))
    assert report.read_text() == '{"mine": 1}'
    report.unlink()
    run_pixels(bad, {}, Task(None, None, True, report, EncodeConfig(max_bad=1)))
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if "why" in line]
    assert len(lines) == 1 and "\x1b" not in said
    assert json.loads(report.read_text())["bad"][0]["name"].startswith(
        "\N{REPLACEMENT CHARACTER}[2J"
    )
