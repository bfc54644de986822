"""Encoded prompts on disk: token states stored without their padding, padded again when read.

A prompt directory holds ``manifest.json`` (section ``text``), ``text-00000.safetensors`` ... with
``tokens`` (T, E), all prompts of the shard one after another, and ``lengths`` (P,);
``null.safetensors`` (the empty prompt), perhaps ``negative.safetensors`` (the negative prompt), and
``prompts.jsonl``. Stored ragged because 512 padded umT5 tokens cost as much disk as a clip's
latents. In a folder of one file per clip (:mod:`scd_sf.data.clip_files`) every clip's file holds
its own prompt, and prompt number i is clip number i's. Letters: P prompts, T tokens of all prompts,
L padded length, E width, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from scd_sf.data.clip_index import LATENTS, ClipFiles, build_index
from scd_sf.data.manifest import AGAIN, BUILDING, MANIFEST, read_index, section_of, write_index
from scd_sf.data.shards import ShardReader, ShardWriter, shard_files
from scd_sf.files import Json, foreign, hash_json, sha256_file, typed, write_bytes
from scd_sf.types import Conditioning, UserError, printable

INDEX = "prompts.jsonl"
LARGEST = 2**20  # tokens of a prompt, width of a state
Encode = Callable[[Sequence[str]], list[Tensor]]


@dataclass(frozen=True)
class Prompt:
    """One line of ``prompts.jsonl``. ``held_out``: kept from training. ``tags``: what it describes
    (place, motion)."""

    id: str
    prompt: str
    held_out: bool = False
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Text:
    """A manifest's section ``text``: prompts have at most ``max_length`` tokens of ``width``."""

    width: int
    max_length: int
    null_sha256: str = ""
    prompts_sha256: str = ""
    negative: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if not (1 <= self.width <= LARGEST and 1 <= self.max_length <= LARGEST):
            raise ValueError(
                f"width {self.width} and max_length {self.max_length} must be from 1 to {LARGEST}"
            )


class Prompts(Protocol):
    """Prompts to distil with: encoded on disk (:class:`PromptSet`), or a list that is encoded while
    it is used.

    ``where`` they come from; ``hash`` of what they are; ``width``, ``length`` of the states;
    ``negative``: of ``negative_prompt``, what a teacher's guidance leads away from.
    """

    where: Path
    hash: str
    width: int
    length: int
    negative_prompt: str

    @property
    def negative(self) -> Conditioning:
        """(1, L, E) fp32, on the CPU."""
        ...

    def __len__(self) -> int: ...

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The prompts with these numbers."""
        ...

    def conditioning(self, indices: Sequence[int]) -> Conditioning:
        """(B, L, E) of the prompts with these numbers, fp32, on the CPU; zero after each true
        length."""
        ...


def about_negative(prompt: str) -> str:
    """A line for people with the prompt that the teacher's guidance leads away from."""
    excerpt = f"'{printable(prompt[:60])}'" if prompt else "the empty prompt"
    return f"the teacher is guided away from {excerpt}{' ..' if len(prompt) > 60 else ''}"


def is_encoded(path: Path) -> bool:
    """Whether a folder holds (or will hold, when its command is done) encoded prompts."""
    return (path / MANIFEST).is_file() or (path / BUILDING).is_file()


class PromptTable:
    """Every prompt of a directory, held-out ones too; reads only the requested rows.

    ``null`` is the empty prompt (text dropout), ``negative`` what a teacher's guidance leads away
    from: the directory's negative prompt, or ``null`` where it was encoded without one. ``files``:
    of a folder of one file per clip.
    """

    def __init__(self, root: Path) -> None:
        self.path = self.where = root / MANIFEST
        manifest = LATENTS.read(root)
        section = section_of(manifest, "text", self.path)
        self.hash = str(manifest.get("hash"))
        text = typed(section, _Text, f"{self.path}: text", AGAIN)
        self.width, self.length = text.width, text.max_length
        self.files: ClipFiles | None = None
        if "clips" in section:
            self.files = ClipFiles(root, section_of(manifest, "latents", self.path))
            self._source: _ShardStates | _ClipStates = _ClipStates(self.files)
        else:
            self._source = _ShardStates(root, section, text)
        self.rows = self._source.prompts
        self.null = self._read_prompt(root / "null.safetensors", text.null_sha256)
        self.negative, self.negative_prompt = self.null, ""
        if text.negative is not None:
            self.negative = self._read_prompt(
                root / "negative.safetensors", text.negative.get("sha256", "")
            )
            settings: Mapping[str, object] = text.negative
            prompt = (
                settings.get("prompt")
                if self.files is None
                else self.files.common.settings.get("negative_prompt")
            )
            self.negative_prompt = prompt if isinstance(prompt, str) and prompt else "not recorded"

    def conditioning(self, indices: Sequence[int]) -> Conditioning:
        """(B, L, E) fp32, zero after each true length."""
        return Conditioning(self._pad([self._source.states(index) for index in indices]))

    def verify(self) -> None:
        """Compare every file's sha256 with its record. Raises UserError."""
        self._source.verify()

    def _read_prompt(self, path: Path, sha256: str) -> Conditioning:
        return Conditioning(self._pad([_read_states(path, sha256, self.length, self.width)]))

    def _pad(self, states: Sequence[Tensor]) -> Tensor:
        out = torch.zeros(len(states), self.length, self.width)
        for row, state in zip(out, states, strict=True):
            row[: len(state)] = state
        return out


class _ShardStates:
    """Prompts whose states lie in shards of many prompts each, with ``prompts.jsonl``."""

    def __init__(self, root: Path, section: Json, text: _Text) -> None:
        where = root / MANIFEST
        self.width, self.length = text.width, text.max_length
        self.reader = ShardReader(root, shard_files(section, f"{where}: text"), str(where))
        self.prompts = read_index(root / INDEX, Prompt, text.prompts_sha256)
        if len(self.prompts) != len(self.reader):
            raise UserError(
                f"{root / INDEX}: {len(self.prompts)} rows, but {len(self.reader)} states; {AGAIN}"
            )
        self._offsets: dict[int, list[int]] = {}

    def states(self, index: int) -> Tensor:
        shard, row = self.reader.locate(index)
        if shard not in self._offsets:
            self._offsets[shard] = self._check(shard)
        start, stop = self._offsets[shard][row : row + 2]
        return self.reader.rows(shard, "tokens", start, stop).float()

    def verify(self) -> None:
        self.reader.verify()

    def _check(self, shard: int) -> list[int]:
        """Token offsets of a shard's prompts. Raises UserError when lengths and tokens do not
        fit."""
        count = self.reader.shards[shard].count
        values = self.reader.rows(shard, "lengths", 0, count)
        lengths = values.tolist() if values.ndim == 1 and not values.is_floating_point() else []
        offsets = [0, *accumulate(lengths)]
        fits = len(lengths) == count and all(0 < length <= self.length for length in lengths)
        if not fits or self.reader.shape(shard, "tokens") != (offsets[-1], self.width):
            raise UserError(
                f"{self.reader.paths[shard]}: tokens and lengths do not fit the manifest; {AGAIN}"
            )
        return offsets


class _ClipStates:
    """Prompts whose states lie in the files of their clips."""

    def __init__(self, files: ClipFiles) -> None:
        self.files = files
        self.prompts = [Prompt(row.id, row.prompt, False, row.tags) for row in self.files.rows]

    def states(self, index: int) -> Tensor:
        states = torch.empty(self.files.rows[index].tokens, self.files.common.width)
        self.files.read(index, None, states)
        return states

    def verify(self) -> None:
        self.files.verify()


class PromptSet:
    """Prompts to sample or to distil with. Training prompts by default; ``held_out=True`` gives
    only the kept-back."""

    def __init__(self, root: Path | str, *, held_out: bool = False) -> None:
        self.root = self.where = Path(root)
        self.table = PromptTable(self.root)
        self.width, self.length = self.table.width, self.table.length
        self.indices = [i for i, row in enumerate(self.table.rows) if row.held_out == held_out]
        if not self.indices:
            raise UserError(f"{self.root / INDEX}: no prompt with held_out {held_out}; encode some")
        self.rows = [self.table.rows[i] for i in self.indices]
        self.null, self.negative = self.table.null, self.table.negative
        self.negative_prompt = self.table.negative_prompt
        self.hash = hash_json([self.table.hash, held_out])

    def __len__(self) -> int:
        return len(self.indices)

    def __str__(self) -> str:
        return (
            f"{self.where}: {len(self):,} encoded prompts; {about_negative(self.negative_prompt)}"
        )

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The prompts at these positions of :attr:`rows`."""
        return [self.rows[index].prompt for index in indices]

    def conditioning(self, indices: Sequence[int]) -> Conditioning:
        """(B, L, E) of the prompts at these positions of :attr:`rows`."""
        return self.table.conditioning([self.indices[index] for index in indices])


def encode_prompts(
    writer: ShardWriter,
    prompts: Sequence[Prompt],
    encode: Encode,
    *,
    max_length: int,
    dtype: torch.dtype = torch.float16,
    per_shard: int = 4096,
    negative: str = "",
    progress: Callable[[int], None] = lambda num_done: None,
) -> Json:
    """Encode the prompts after the last complete shard, and return the manifest's ``text`` section.

    ``encode`` maps texts to ragged (L_i, E) states (:meth:`TextEncoder.states`); ``progress`` is
    told prompts done. ``negative``: the prompt that a teacher's guidance leads away from (empty:
    the null prompt).
    """
    null = encode([""])[0]
    while (num_done := writer.count("text")) < len(prompts):
        rows = prompts[num_done : num_done + per_shard]
        states = encode([row.prompt for row in rows])
        lengths = torch.tensor([len(state) for state in states])
        tokens = finite(
            torch.cat(states).to(dtype),
            f"text states of prompts {num_done}..{num_done + len(rows) - 1}",
        )
        writer.write("text", len(rows), {"tokens": tokens, "lengths": lengths})
        progress(writer.count("text"))
    section: Json = {"null_sha256": _write_states(writer.root / "null.safetensors", null.to(dtype))}
    if negative:
        tokens = finite(encode([negative])[0].to(dtype), "text states of the negative prompt")
        section["negative"] = {
            "prompt": negative,
            "sha256": _write_states(writer.root / "negative.safetensors", tokens),
        }
    return {
        "width": null.shape[-1],
        "max_length": max_length,
        "shards": writer.section("text"),
        "prompts_sha256": write_index(writer.root / INDEX, prompts),
        **section,
    }


def write_fixed_prompts(root: Path, encode: Encode, negative: str, dtype: torch.dtype) -> None:
    """``null.safetensors`` and, with a negative prompt, ``negative.safetensors`` of a folder of one
    file per clip."""
    for name, prompt in (("null", ""), ("negative", negative)):
        if name == "null" or prompt:
            tokens = finite(encode([prompt])[0].to(dtype), f"text states of the {name} prompt")
            _write_states(root / f"{name}.safetensors", tokens)


def index_clips(root: Path) -> int:
    """(Re)write ``clips.jsonl`` and the manifest of a folder of one file per clip; the number of
    its clips."""
    null, negative = root / "null.safetensors", root / "negative.safetensors"
    if not null.is_file():
        raise UserError(f"{null}: no such file; run the command that makes the clips again")
    section: Json = {"null_sha256": sha256_file(null)}
    if negative.is_file():
        section["negative"] = {"sha256": sha256_file(negative)}
    return build_index(root, section)


def finish_prompts(writer: ShardWriter, text: Json) -> None:
    """Write the manifest of a directory that holds prompts only (no clips), as distillation
    needs."""
    writer.finish(LATENTS.sealed({"text": text}))


def finite(values: Tensor, label: str) -> Tensor:
    """``values`` unchanged. UserError naming ``what`` when one is NaN or infinite."""
    if not values.isfinite().all():
        raise UserError(
            f"{label}: not finite in {values.dtype}; store as bfloat16, or check the model"
        )
    return values


def _write_states(path: Path, tokens: Tensor) -> str:
    """Write the states of one prompt (L, E). Returns the file's sha256."""
    write_bytes(path, save({"tokens": tokens.contiguous().cpu()}))
    return sha256_file(path)


def _read_states(path: Path, sha256: str, length: int, width: int) -> Tensor:
    if not path.is_file() or sha256_file(path) != sha256:
        raise UserError(f"{path}: missing or changed; copy it again, or {AGAIN}")
    with foreign(path, AGAIN):
        tokens = load_file(path)["tokens"]
    if tokens.ndim != 2 or tokens.shape[1] != width or len(tokens) > length:
        raise UserError(
            f"{path}: shape {tuple(tokens.shape)} instead of (at most {length}, {width}); {AGAIN}"
        )
    return tokens.float()
