"""Encoded clips on disk: VAE latents with their prompts, as typed batches. The training
data of stage 2 (data/frames.py: of the models from scratch).

Beside the prompt files (:mod:`scd_sf.data.prompts`) it holds ``latents-00000.safetensors`` ... with
``latents`` (n, F, C, H, W), normalised by the VAE's mean and std, and ``clips.jsonl``;
``manifest.json`` names them all. A folder of one file per clip (:mod:`scd_sf.data.clip_files`) is
opened by the same class. Letters: B batch, F latent frames, C channels, H W latent height and
width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from scd_sf.data.clip_index import LATENTS, ClipFiles
from scd_sf.data.manifest import AGAIN, MANIFEST, read_index, write_index
from scd_sf.data.prompts import PromptTable, finite
from scd_sf.data.shards import ShardReader, ShardWriter, shard_files
from scd_sf.files import Json, hash_json, typed
from scd_sf.tensor_files import dtype_name
from scd_sf.types import Conditioning, UserError, VideoShape, on_device


@dataclass(frozen=True)
class LatentClip:
    """One line of ``clips.jsonl``: indices into the prompts (``held_out_prompt`` is never trained
    on), and tags."""

    id: str
    prompt: int
    held_out_prompt: int | None = None
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LatentBatch:
    """``latents_BFCHW`` and the training prompt of each clip: fp32, or as stored until :meth:`to`
    has moved them.

    Until then text may be padded less than to the model's ``length`` (0: it is not)."""

    latents_BFCHW: Tensor
    text: Conditioning
    length: int = 0

    def to(self, device: torch.device | str) -> LatentBatch:
        """fp32 on ``device``, converted and padded there: what is stored in 16 bits and without
        padding travels so."""
        text = on_device(self.text.text_BLE, device).float()
        text = F.pad(text, (0, 0, 0, max(0, self.length - text.shape[1])))
        return LatentBatch(on_device(self.latents_BFCHW, device).float(), Conditioning(text))

    def tensors(self) -> dict[str, Tensor]:
        return {"latents": self.latents_BFCHW, "text": self.text.text_BLE}


class LatentClips:
    """The clips of a directory. Files and sizes are checked when opened, a shard's shape when first
    read; in a folder of one file per clip names when opened, the rest when read.

    ``expected``: the shape the model is configured for; another one is a UserError that names both.
    """

    def __init__(self, root: Path | str, *, expected: VideoShape | None = None) -> None:
        self.root = Path(root)
        path = self.root / MANIFEST
        manifest = LATENTS.read(self.root)
        section = manifest.get("latents")
        if not isinstance(section, dict):
            raise UserError(
                f"{path}: holds prompts but no latents; point the data at an encoded clip directory"
            )
        self.hash = str(manifest.get("hash"))
        self.shape = typed(section.get("shape"), VideoShape, f"{path}: 'latents.shape'", AGAIN)
        if expected is not None:
            _check_shape(self.shape, expected, path)
        self.prompts = PromptTable(self.root)
        self.null = self.prompts.null
        if self.prompts.files is not None:
            self._source: _Shards | _Files = _Files(self.prompts.files)
        else:
            self._source = _Shards(self.root, section, self.shape, len(self.prompts.rows))
        self.rows = self._source.rows

    def __len__(self) -> int:
        return len(self.rows)

    def latents(self, indices: Sequence[int]) -> Tensor:
        """(B, F, C, H, W) fp32. Raises UserError when a shard is damaged or has another shape than
        the manifest."""
        out = torch.empty(self.shape.latent(len(indices)))
        for row, index in zip(out, indices, strict=True):
            self._source.read(index, row)
        return out

    def batch(self, indices: Sequence[int], *, held_out: bool = False) -> LatentBatch:
        """Latents in fp32 with their training prompts, or with the held-out paraphrases."""
        prompts = [
            self.rows[index].held_out_prompt if held_out else self.rows[index].prompt
            for index in indices
        ]
        numbers = [number for number in prompts if number is not None]
        if len(numbers) != len(prompts):
            raise UserError(
                f"{self.root / 'clips.jsonl'}: clips without held_out_prompt; encode held-out captions"
            )
        return LatentBatch(self.latents(indices), self.prompts.conditioning(numbers))

    def stored(self, indices: Sequence[int]) -> LatentBatch:
        """Latents and training prompts in the stored type. A clip is read straight into the batch,
        and :meth:`LatentBatch.to` converts it to fp32."""
        latents = torch.empty(self.shape.latent(len(indices)), dtype=self._source.dtype)
        if isinstance(self._source, _Shards):
            for row, index in zip(latents, indices, strict=True):
                self._source.read(index, row)
            return LatentBatch(
                latents, self.prompts.conditioning([self.rows[index].prompt for index in indices])
            )
        files = self._source.files
        longest = max(self._source.files.rows[index].tokens for index in indices)
        text = torch.empty(len(indices), longest, self.prompts.width, dtype=files.dtype)
        for row, states, index in zip(latents, text, indices, strict=True):
            files.read(index, row, states)
            states[files.rows[index].tokens :] = 0
        return LatentBatch(latents, Conditioning(text), self.prompts.length)

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The texts of the clips' training prompts."""
        return [self.prompts.rows[self.rows[index].prompt].prompt for index in indices]

    def verify(self) -> None:
        """Compare every file's sha256 with its record (reads everything). Raises UserError."""
        self.prompts.verify()
        if isinstance(self._source, _Shards):
            self._source.reader.verify()


class _Shards:
    """Clips whose latents lie in shards of many clips each, with ``clips.jsonl``."""

    def __init__(self, root: Path, section: Json, shape: VideoShape, prompts: int) -> None:
        path, where = root / MANIFEST, root / "clips.jsonl"
        self.shape = shape
        self.reader = ShardReader(root, shard_files(section, f"{path}: latents"), str(path))
        for shard in self.reader.shards:  # before a batch of this shape is allocated
            if math.prod(shape.latent(shard.count)) * 2 > shard.bytes:
                raise UserError(
                    f"{path}: {shard.count} latents {shape.latent(1)[1:]} do not fit into {shard.file}; {AGAIN}"
                )
        self.rows = read_index(where, LatentClip, section.get("clips_sha256"))
        if len(self.rows) != len(self.reader):
            raise UserError(
                f"{where}: {len(self.rows)} rows, but {len(self.reader)} latents; {AGAIN}"
            )
        for number, clip in enumerate(self.rows, 1):
            for prompt in (clip.prompt, clip.held_out_prompt):
                if prompt is not None and not 0 <= prompt < prompts:
                    raise UserError(
                        f"{where}:{number}: prompt index outside 0..{prompts - 1}; {AGAIN}"
                    )
        self._checked_shards: set[int] = set()

    @property
    def dtype(self) -> torch.dtype:
        return self.reader.rows(0, "latents", 0, 1).dtype

    def read(self, index: int, out_FCHW: Tensor) -> None:
        shard, row = self.reader.locate(index)
        if shard not in self._checked_shards:
            shape = self.shape.latent(self.reader.shards[shard].count)
            if (file_shape := self.reader.shape(shard, "latents")) != shape:
                raise UserError(
                    f"{self.reader.paths[shard]}: latents {file_shape} instead of {shape}; {AGAIN}"
                )
            self._checked_shards.add(shard)
        out_FCHW.copy_(self.reader.rows(shard, "latents", row, row + 1)[0])


class _Files:
    """Clips with one file each, which holds latents and prompt."""

    def __init__(self, files: ClipFiles) -> None:
        self.files, self.dtype = files, files.dtype
        self.rows = [
            LatentClip(row.id, number, None, row.tags) for number, row in enumerate(files.rows)
        ]

    def read(self, index: int, out_FCHW: Tensor) -> None:
        self.files.read(index, out_FCHW, None)


class LatentWriter:
    """Appends latents; full shards go to disk at once, so an interrupted run goes on from
    :attr:`done`."""

    def __init__(
        self,
        writer: ShardWriter,
        shape: VideoShape,
        *,
        dtype: torch.dtype = torch.float16,
        per_shard: int = 256,
    ) -> None:
        self.writer = writer
        self.shape = shape
        self.dtype = dtype
        self.per_shard = per_shard
        self._queue: list[Tensor] = []

    @property
    def done(self) -> int:
        """Clips in complete shards: append those after it."""
        return self.writer.count("latents")

    def append(self, latents_BFCHW: Tensor) -> None:
        """Normalised latents of the next clips. Raises UserError for another shape or non-finite
        values."""
        first = self.done + len(self._queue)
        if tuple(latents_BFCHW.shape) != (shape := self.shape.latent(len(latents_BFCHW))):
            raise UserError(
                f"clip {first}: latents {tuple(latents_BFCHW.shape)} instead of {shape}; check the VAE"
            )
        self._queue += list(
            finite(latents_BFCHW.detach().to("cpu", self.dtype), f"latents of clip {first} and on")
        )
        while len(self._queue) >= self.per_shard:
            self._flush(self.per_shard)

    def finish(self, clips: Sequence[LatentClip], text: Json) -> None:
        """Write the rest, ``clips.jsonl`` and the manifest (last). ``text``: from
        :func:`encode_prompts`."""
        if self._queue:
            self._flush(len(self._queue))
        if self.done != len(clips):
            raise UserError(
                f"{self.writer.root}: {self.done} latents for {len(clips)} clips; {AGAIN}"
            )
        section = {
            "shape": asdict(self.shape),
            "dtype": dtype_name(self.dtype),
            "shards": self.writer.section("latents"),
            "clips_sha256": write_index(self.writer.root / "clips.jsonl", clips),
        }
        self.writer.finish(LATENTS.sealed({"text": text, "latents": section}))

    def _flush(self, count: int) -> None:
        self.writer.write("latents", count, {"latents": torch.stack(self._queue[:count])})
        del self._queue[:count]


def epoch_order(seed: int, step: int, batch: int, size: int) -> list[int]:
    """The ``batch`` clip indices of training step ``step``: a pure function, so there is no loader
    state to save.

    Every epoch is a fresh permutation of 0..size-1 drawn from (seed, epoch); a batch may span two
    epochs. All ranks get the same global batch and take ``[rank::world]`` of it.
    """
    if size < 1 or batch < 1 or step < 0:
        raise UserError(
            f"data order: batch {batch}, size {size}, step {step}; batch and size must be at least 1"
        )
    first = step * batch
    positions = range(first, first + batch)
    return [
        int(_permutation(seed, position // size, size)[position % size]) for position in positions
    ]


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    number = int(hash_json([seed, epoch])[:15], 16)
    return torch.randperm(size, generator=torch.Generator().manual_seed(number))


def _check_shape(shape: VideoShape, expected: VideoShape, path: Path) -> None:
    for entry in fields(VideoShape):
        value, expected_value = getattr(shape, entry.name), getattr(expected, entry.name)
        if value != expected_value:
            raise UserError(
                f"{path}: latents have {entry.name} {value}, the configuration asks for {expected_value}; "
                f"set it to {value}, or encode the clips at that size"
            )
