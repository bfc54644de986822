"""Encoded clips for training from scratch: latents frame by frame, with an action per frame or a
label per clip.

A directory of ``frames-00000.safetensors`` ... with ``latents`` (rows, C, H, W), normalised by the
tokenizer, and where there are actions ``actions`` (rows,); a row is a frame, the frames of a clip
lie together in one shard. ``clips.jsonl`` says which rows are whose; ``manifest.json`` names all
files and what they were made from. Clips may differ in length.

``actions[f]`` is what led from frame f-1 to frame f: what is known when frame f is predicted.
Letters: B batch, F frames, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.data.manifest import AGAIN, MANIFEST, Format, read_index, write_index
from scd_sf.data.shards import ShardReader, ShardWriter, shard_files
from scd_sf.files import Json, read_jsonl, typed, write_jsonl
from scd_sf.types import Conditioning, UserError, VideoShape, on_device

INDEX, KIND = "clips.jsonl", "frames"
FRAMES = Format(
    "scd-sf-frames",
    1,
    "no such file; encode the clips first (data_prep/teco_minecraft.py, ucf101.py or realestate10k.py)",
)


@dataclass(frozen=True)
class FrameClip:
    """One line of ``clips.jsonl``: ``frames`` rows from ``first`` on (counted over all shards)."""

    id: str
    first: int
    frames: int
    label: int | None = None

    def __post_init__(self) -> None:
        if self.first < 0 or self.frames < 1:
            raise ValueError("'first' or 'frames' is out of range")


@dataclass(frozen=True)
class FrameSetInfo:
    """Properties of a set: latents of a frame (C, H, W), pixels per latent along a side, number of
    actions (0: none), names of the labels (empty: none), and frames per second."""

    channels: int
    height: int
    width: int
    spatial: int
    num_actions: int = 0
    labels: tuple[str, ...] = ()
    fps: float = 20.0

    def __post_init__(self) -> None:
        for name in ("channels", "height", "width", "spatial"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_actions < 0 or not self.fps > 0:
            raise UserError(
                f"num_actions is {self.num_actions} and fps {self.fps}; they must not be negative, nor fps 0"
            )

    def has_label(self, label: int | None) -> bool:
        """Whether a clip of this set may have ``label``: one of its labels, None where it has
        none."""
        return label in range(len(self.labels)) if self.labels else label is None

    def shape(self, frames: int) -> VideoShape:
        return VideoShape(frames, self.channels, self.height, self.width, 1, self.spatial)


@dataclass(frozen=True)
class FrameBatch:
    """``latents_BFCHW`` in fp32, and their actions or labels."""

    latents_BFCHW: Tensor
    cond: Conditioning

    def to(self, device: torch.device | str) -> FrameBatch:
        return FrameBatch(on_device(self.latents_BFCHW, device), self.cond.to(device))

    def tensors(self) -> dict[str, Tensor]:
        tensors = {
            "latents": self.latents_BFCHW,
            "actions": self.cond.actions_BF,
            "labels": self.cond.labels_B,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


class FrameClips:
    """The clips of a directory. Files and sizes are checked when opened, tensors when first read.

    UserError names the file and the remedy.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        path, where = self.root / MANIFEST, self.root / INDEX
        manifest = FRAMES.read(self.root)
        self.hash, self.info = str(manifest.get("hash")), typed(manifest, FrameSetInfo, path, AGAIN)
        self.reader = ShardReader(self.root, shard_files(manifest, str(path)), str(path))
        self.clips = read_index(where, FrameClip, manifest.get("clips_sha256"))
        for number, clip in enumerate(self.clips, 1):
            if not self.info.has_label(clip.label):
                raise UserError(f"{where}:{number}: 'label' is out of range; {AGAIN}")
        stops = [clip.first + clip.frames for clip in self.clips]
        starts = [clip.first for clip in self.clips]
        if starts != [0, *stops[:-1]] or stops[-1] != len(self.reader):
            raise UserError(f"{where}: its clips are not the rows of the shards; {AGAIN}")

    def __len__(self) -> int:
        return len(self.clips)

    def at_least(self, frames: int) -> list[int]:
        """Indices of the clips with so many frames. UserError: there is none."""
        indices = [index for index, clip in enumerate(self.clips) if clip.frames >= frames]
        if not indices:
            longest = max(clip.frames for clip in self.clips)
            raise UserError(
                f"{self.root}: no clip has {frames} frames (the longest has {longest}); use shorter windows"
            )
        return indices

    def batch(self, indices: Sequence[int], starts: Sequence[int], frames: int) -> FrameBatch:
        """Windows of ``frames`` frames, each from its start on."""
        info, latents, actions = self.info, [], []
        for index, start in zip(indices, starts, strict=True):
            clip = self.clips[index]
            if not 0 <= start <= clip.frames - frames:
                raise IndexError(
                    f"{self.root}: frames {start}..{start + frames - 1} of {clip.id}, which has {clip.frames}"
                )
            shard, row = self.reader.locate(clip.first + start)
            latents.append(self.reader.rows(shard, "latents", row, row + frames).float())
            if info.num_actions:
                actions.append(self._actions(shard, row, frames, clip))
        labels = (
            torch.tensor([self.clips[index].label for index in indices]) if info.labels else None
        )
        shape = (frames, info.channels, info.height, info.width)
        for index, window in zip(indices, latents, strict=True):
            if tuple(window.shape) != shape:
                raise UserError(
                    f"{self.root}: {self.clips[index].id} has {tuple(window.shape)}, not {shape}; {AGAIN}"
                )
        cond = Conditioning.of_frames(
            len(indices), torch.stack(actions) if actions else None, labels
        )
        return FrameBatch(torch.stack(latents), cond)

    def _actions(self, shard: int, row: int, frames: int, clip: FrameClip) -> Tensor:
        actions_F = self.reader.rows(shard, "actions", row, row + frames).long()
        valid_actions = range(self.info.num_actions)
        if (
            actions_F.shape != (frames,)
            or int(actions_F.min()) not in valid_actions
            or int(actions_F.max()) not in valid_actions
        ):
            raise UserError(
                f"{self.reader.paths[shard]}: {clip.id} has other actions than the manifest says; {AGAIN}"
            )
        return actions_F

    def verify(self) -> None:
        """Compare every file's sha256 with its record (reads everything). Raises UserError."""
        self.reader.verify()


class FrameWriter:
    """Appends clips; full shards go to disk at once, so an interrupted run goes on from clip
    :attr:`done`."""

    def __init__(
        self, root: Path, inputs: Json, info: FrameSetInfo, *, frames_per_shard: int = 10_000
    ) -> None:
        """``inputs``: what the data is made from; a directory begun with others is a UserError."""
        self.info, self.frames_per_shard = info, frames_per_shard
        self.writer = ShardWriter(
            root,
            {**inputs, "info": {**asdict(info), "labels": list(info.labels)}},
            {"info": FrameSetInfo},
        )
        self.rows = [
            typed(row, FrameClip, self._progress, AGAIN, exact=True) for row in self._rows_on_disk()
        ]
        self._queue: list[tuple[FrameClip, Tensor, Tensor | None]] = []

    @property
    def _progress(self) -> Path:
        return self.writer.root / "clips-written.jsonl"

    @property
    def finished(self) -> bool:
        return self.writer.finished

    @property
    def done(self) -> list[str]:
        """Ids of the clips in complete shards."""
        return [row.id for row in self.rows]

    def append(
        self,
        id: str,
        latents_FCHW: Tensor,
        actions_F: Tensor | None = None,
        label: int | None = None,
    ) -> None:
        """The next clip's normalised latents. UserError: another shape, not finite, an unknown
        action or label."""
        info, frames = self.info, len(latents_FCHW)
        if frames < 1 or tuple(latents_FCHW.shape[1:]) != (info.channels, info.height, info.width):
            raise UserError(
                f"{id}: latents {tuple(latents_FCHW.shape)} do not fit {info}; check the tokenizer"
            )
        half = latents_FCHW.detach().to("cpu", torch.float16)
        if not bool(half.isfinite().all()):
            raise UserError(f"{id}: latents are not finite in 16 bits; check the tokenizer")
        if (actions_F is None) != (info.num_actions == 0) or (label is None) != (not info.labels):
            raise UserError(
                f"{id}: has actions or a label where the set has none, or lacks them; check the source"
            )
        if actions_F is not None:
            if (
                actions_F.shape != (frames,)
                or int(actions_F.min()) < 0
                or int(actions_F.max()) >= info.num_actions
            ):
                raise UserError(
                    f"{id}: actions must be {frames} numbers in 0..{info.num_actions - 1}; check the source"
                )
            actions_F = actions_F.to("cpu", torch.int16)
        if label is not None and not 0 <= label < len(info.labels):
            raise UserError(
                f"{id}: label {label} is outside 0..{len(info.labels) - 1}; check the source"
            )
        first = sum(len(latents) for _, latents, _ in self._queue) + self.writer.count(KIND)
        self._queue.append((FrameClip(id, first, frames, label), half, actions_F))
        if sum(len(latents) for _, latents, _ in self._queue) >= self.frames_per_shard:
            self._flush()

    def finish(self) -> None:
        """Write the rest, ``clips.jsonl`` and the manifest (last). UserError: there is no clip at
        all."""
        if self.finished:
            return
        if self._queue:
            self._flush()
        if not self.rows:
            raise UserError(f"{self.writer.root}: no clip was encoded; see the report for why")
        digest = write_index(self.writer.root / INDEX, self.rows)
        labels, shards = list(self.info.labels), self.writer.section(KIND)
        section = {**asdict(self.info), "labels": labels, "clips_sha256": digest, "shards": shards}
        self.writer.finish(FRAMES.sealed(section))
        self._progress.unlink(missing_ok=True)

    def _flush(self) -> None:
        clips, latents, actions = zip(*self._queue, strict=True)
        tensors = {"latents": torch.cat(latents)}
        if self.info.num_actions:
            tensors["actions"] = torch.cat(actions)
        rows = [*self.rows, *clips]
        # written before the shard: rows beyond the shards are dropped when a run resumes
        write_jsonl(self._progress, [asdict(row) for row in rows])
        self.writer.write(KIND, len(tensors["latents"]), tensors)
        self.rows, self._queue = rows, []

    def _rows_on_disk(self) -> list[Json]:
        if self.writer.finished:
            self._progress.unlink(missing_ok=True)  # of a run that was killed after its manifest
            return read_jsonl(self.writer.root / INDEX, AGAIN)
        if not self._progress.is_file():
            return []
        rows, num_rows = read_jsonl(self._progress, AGAIN), self.writer.count(KIND)
        return [
            row
            for row in rows
            if typed(row.get("first"), int, f"{self._progress}: 'first'", AGAIN) < num_rows
        ]
