"""Videos of others: turned, stretched, uneven in time, deep, too large, or no videos at all."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from raw_videos import CORNERS, HEIGHT, WIDTH, corners, grey, levels, write
from torch import Tensor

from scd_sf.data.sources import video_reader
from scd_sf.data.sources.video_reader import frame_count, frames_of, read_frames, video_info
from scd_sf.types import UserError


def read(path: Path, **options: float) -> Tensor:
    return read_frames(path, str(path), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda p: p),
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),  # a phone held upright
        ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
        ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda p: np.rot90(p, 2).transpose(1, 0, 2)),
    ],
)
def test_turned_and_mirrored_videos_are_upright(
    tmp_path: Path, matrix: Sequence[int], shown: object
) -> None:
    picture = corners()
    video = read(write(tmp_path / "a.mp4", [picture] * 2, matrix=matrix))
    wanted = shown(picture)  # type: ignore[operator]
    assert video.shape[2:] == wanted.shape[:2]
    assert np.abs(video[0].permute(1, 2, 0).numpy().astype(int) - wanted).max() < 8


def test_an_angle_between_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no quarter turn"):
        read(write(tmp_path / "a.mp4", [corners()] * 2, matrix=(1, 1, -1, 1)))


@pytest.mark.parametrize(
    ("aspect", "size"),
    [(Fraction(4, 3), (32, 64)), (Fraction(1, 2), (64, 48)), (Fraction(1), (32, 48))],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_pixels_are_square(
    tmp_path: Path, name: str, aspect: Fraction, size: tuple[int, int]
) -> None:
    """The stretched side grows; the corners stay where they are. A turned video is stretched along
    its own rows."""
    video = read(write(tmp_path / name, [corners()] * 2, aspect=aspect))
    assert tuple(video.shape[2:]) == size
    assert (video[0, :, 4, 4] - torch.tensor(CORNERS[0])).abs().max() < 8
    turned = read(
        write(tmp_path / f"turned-{name}", [corners()] * 2, aspect=aspect, matrix=(0, 1, -1, 0))
    )
    assert tuple(turned.shape[2:]) == size[::-1]


@pytest.mark.parametrize(
    ("rate", "fps", "shown"),
    [
        (16, 16, range(12)),
        (32, 16, range(0, 12, 2)),
        (8, 16, [n // 2 for n in range(1, 25)]),
        (30, 20, [1, 2, 4, 5, 7, 8, 10, 11]),
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.avi"])
def test_resampled_by_timestamps(
    tmp_path: Path, name: str, rate: int, fps: int, shown: Sequence[int]
) -> None:
    """Matroska rounds times to milliseconds; equal rates still give every frame once."""
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    pixels = "yuv420p" if codec == "mpeg4" else "yuv444p"
    path = write(
        tmp_path / name, [grey(20 * n) for n in range(12)], rate=rate, codec=codec, pixels=pixels
    )
    seen = [round(level / 20) for level in levels(read(path, fps=fps))]
    assert len(seen) == round(12 * fps / rate)
    assert all(
        abs(one - other) <= (rate != fps) for one, other in zip(seen, shown, strict=False)
    ), seen
    assert [round(level / 20) for level in levels(read(path))] == list(range(12)), (
        "as coded: whatever the rate"
    )


@pytest.mark.parametrize(("name", "live"), [("a.mkv", False), ("a.mkv", True), ("a.mp4", False)])
def test_a_cut_file_is_refused(tmp_path: Path, name: str, live: bool) -> None:
    """By the length that it says, or because its last element is not whole."""
    path = write(tmp_path / name, [corners(), grey(9)] * 40, rate=16, live=live)
    assert len(read(path)) == 80
    data = path.read_bytes()
    for rest in (bytes(64), b"a word of another program"):
        path.write_bytes(data + rest)
        assert len(read(path)) == 80, "filled up"
    ends = [] if name == "a.mp4" else [len(data) - 1]  # titles are last there
    for length in (len(data) // 3, len(data) // 2, *ends):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=f"{name}: .*(it was cut, at least|Invalid data)"):
            read(path)


def test_a_recording_without_lengths_is_cut_between_frames(tmp_path: Path) -> None:
    """A browser's recording that ends with a whole frame is a whole one; all other cuts show."""
    path = write(tmp_path / "a.webm", [corners(), grey(9)] * 4, codec="libvpx-vp9", live=True)
    with av.open(str(path)) as container:
        size = [packet.size for packet in container.demux() if packet.size][-1]
    data = path.read_bytes()
    name, unknown = b"\x1f\x43\xb6\x75", b"\xff"  # ffmpeg knows the cluster's size, browsers do not
    begin = data.index(name) + len(name)
    size_bytes = 9 - data[begin].bit_length()
    data = data[:begin] + unknown + data[begin + size_bytes :]
    frames = []
    for length in range(len(data) - size - 7, len(data)):
        path.write_bytes(data[:length])
        try:
            frames.append(len(read(path)))
        except UserError as error:
            assert "it was cut, at least" in str(error)
    assert frames == [7]
    path.write_bytes(data + name[:2])
    with pytest.raises(UserError, match="it was cut, at least"):
        read(path)


def test_uneven_timestamps(tmp_path: Path) -> None:
    """A frame that stands for half a second is repeated; frames too close together are left out."""
    times = [0, 100, 600, 610, 620, 700, 800, 900]
    path = write(tmp_path / "a.mkv", [grey(30 * n) for n in range(8)], rate=10, times=times)
    seen = [round(level / 30) for level in levels(read(path, fps=10))]
    assert seen == [0, 1, 1, 1, 1, 1, 4, 5, 6, 7]
    with pytest.raises(
        UserError, match=r"a\.mkv: .*(uneven timestamps|frames per second, not the 10).*as_coded"
    ):
        read(path, fps=10, exact=True)


def test_where_each_frame_counts_another_rate_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", [grey(20 * n) for n in range(12)], rate=30)
    with pytest.raises(UserError, match=r"a\.mp4: has 30 frames per second, not the 20.*set fps"):
        read(path, fps=20, exact=True)
    for fps in (30, 29.97):
        assert len(read(path, fps=fps, exact=True)) == 12


@pytest.mark.parametrize(
    ("pixels", "colours"),
    [
        ("yuv420p", {"colorspace": 6, "color_range": 1}),
        ("yuv420p", {"colorspace": 1, "color_range": 1}),
        ("yuv420p10le", {"colorspace": 1, "color_range": 1}),
        ("yuvj420p", {"colorspace": 1, "color_range": 2}),
    ],
)
def test_depths_ranges_and_matrices_give_the_same_colours(
    tmp_path: Path, pixels: str, colours: dict[str, int]
) -> None:
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[:] = (200, 60, 30)
    video = read(write(tmp_path / "a.mp4", [picture] * 2, pixels=pixels, colours=colours))
    assert (video[0].float().mean((1, 2)) - torch.tensor([200.0, 60, 30])).abs().max() < 5


@pytest.mark.parametrize("transfer", [16, 18])  # PQ, HLG
def test_hdr_is_brought_to_an_ordinary_screen(tmp_path: Path, transfer: int) -> None:
    """The grey of PQ at 49 % is about 93 of 10,000 nits: light grey on a screen of 203, not middle
    grey."""
    colours = {"colorspace": 9, "color_range": 1, "color_trc": transfer, "color_primaries": 9}
    video = read(write(tmp_path / "a.mp4", [grey(126)] * 2, pixels="yuv420p10le", colours=colours))
    assert {16: 170, 18: 135}[transfer] < levels(video)[0] < {16: 200, 18: 160}[transfer]


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mkv", "ffv1", "bgra"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
    ],
)
def test_transparent_parts_are_refused(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    """They would show whatever colour lies below. An alpha channel that hides nothing is read; that of
    a webm, which no decoder of ours looks at, is refused."""
    clear = np.dstack([corners(), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    clear[0, 0, 3] = 0 if codec != "libvpx-vp9" else 255
    file = write(tmp_path / name, [clear] * 2, codec=codec, pixels=pixels)
    with pytest.raises(UserError, match=rf"{name}: has transparent parts \(alpha\).*flatten it"):
        read(file)
    if codec != "libvpx-vp9":
        clear[..., 3] = 255
        video = read(write(tmp_path / name, [clear] * 2, codec=codec, pixels=pixels))
        assert (video[0].permute(1, 2, 0).numpy() - corners().astype(int))[2:8, 2:8].max() < 8
    else:
        webm = write(tmp_path / name, [corners()] * 2, codec=codec, pixels="yuv420p")
        assert len(read(webm)) == 2


def test_interlaced_videos_are_refused(tmp_path: Path) -> None:
    """Where frames are taken one by one, as papers do, they are what they are."""
    path = write(tmp_path / "a.mp4", [corners()] * 4, pixels="yuv420p", interlaced=True)
    for fps in (16, 8):
        with pytest.raises(UserError, match=r"a\.mp4: is interlaced: .*-vf bwdif"):
            read(path, fps=fps)
    with pytest.raises(UserError, match="still: is interlaced"):
        video_info(path, "still")
    assert len(read(path)) == len(read(path, fps=16, exact=True)) == 4


def test_frames_that_change_their_size_are_refused(tmp_path: Path) -> None:
    """Two MPEG-2 videos of different sizes, one after the other in one transport stream."""
    parts = []
    for number, size in enumerate(((32, 48), (48, 64))):
        pictures = [np.full((*size, 3), 100, np.uint8)] * 4
        parts.append(
            write(
                tmp_path / f"{number}.ts", pictures, rate=25, codec="mpeg2video", pixels="yuv420p"
            )
        )
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(UserError, match=r"joined\.ts.* is 64x48, those before 48x32"):
        read(joined)


FOREIGN = {
    "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 0.0.0.0\nt=0 0\nm=video {port} RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "concat.mp4": "ffconcat version 1.0\nfile neighbour.mp4\n",
    "playlist.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nneighbour.mp4\n#EXT-X-ENDLIST\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_formats_that_reach_elsewhere_are_not_opened(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by name nor by content; also as bytes, and where the path looks like an address."""
    neighbour = write(tmp_path / "neighbour.mp4", [grey(1)] * 2)
    path = tmp_path / name
    path.write_text(FOREIGN[name].format(port=5004))
    for source in (path, path.read_bytes()):
        with pytest.raises(UserError, match=r"cannot be decoded.*\(video files may be mp4, mov"):
            read_frames(source, "x")
    folder = tmp_path / "http:" / "127.0.0.1:9"
    folder.mkdir(parents=True)
    (folder / "a.mp4").write_bytes(neighbour.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(read(Path("http:/127.0.0.1:9/a.mp4"))) == 2, "a path is a path"


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.mp4")
    for path in (tmp_path / "a.mp4", tmp_path, Path("/dev/zero"), tmp_path / "none.mp4"):
        with pytest.raises(UserError, match="no such file"):
            read(path)
        with pytest.raises(UserError, match="no such file"):
            frame_count(path, str(path))


def test_sizes_are_compared_before_frames_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.mp4", [grey(n) for n in range(6)])
    monkeypatch.setattr(video_reader, "LARGEST_VIDEO", 5 * HEIGHT * WIDTH * 3)
    with pytest.raises(UserError, match="bytes of frames, which is too large"):
        read(path)
    assert read(path, size=16).shape == (6, 3, 16, 16), "small frames are held, not the large ones"
    monkeypatch.setattr(video_reader, "LARGEST_FRAME", HEIGHT * WIDTH - 1)
    with pytest.raises(UserError, match="frames of 48x32 are too large"):
        read(path, size=16)
    monkeypatch.setattr(video_reader, "LARGEST_FRAME", HEIGHT * WIDTH)
    stretched = write(tmp_path / "b.mp4", [grey(9)] * 2, aspect=Fraction(20))
    with pytest.raises(UserError, match="frames of 960x32 are too large"):
        read(stretched)


def test_a_reader_that_stops_early_closes_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", [grey(n) for n in range(6)])
    frames = frames_of(path, "a", fps=video_reader.AS_CODED)
    next(frames)
    frames.close()  # type: ignore[attr-defined]
    assert frame_count(path, "a") == 6


def test_frames_are_given_back_one_by_one(tmp_path: Path) -> None:
    """No cycle of references keeps decoded frames until the garbage collector comes: 25 MB each at
    4096x4096."""
    path = write(tmp_path / "a.mp4", [grey(n) for n in range(12)], matrix=(0, 1, -1, 0))
    gc.collect()
    gc.disable()
    try:
        alive = []
        for _ in frames_of(path, "a", fps=16):
            alive.append(sum(type(value) is av.VideoFrame for value in gc.get_objects()))
    finally:
        gc.enable()
    assert max(alive) - min(alive) <= 3, alive
