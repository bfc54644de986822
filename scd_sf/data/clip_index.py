"""A folder of clips, one file each, as training data: ``job.json``, ``clips.jsonl`` and ``manifest.json``.

``job.json`` is written before the first clip: what all clips have in common. ``clips.jsonl`` and ``manifest.json`` are
made from the files' headers (:func:`build_index`), so they can be made again at any time; with them
:class:`scd_sf.data.latents.LatentClips` and :class:`scd_sf.data.prompts.PromptTable` open the folder.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from scd_sf.data.clip_files import DTYPES, ID, ClipFile, Header, clip_path, clip_paths, read_header
from scd_sf.files import Json, hash_json, others_in, read_json, read_jsonl, typed, write_json, write_jsonl
from scd_sf.types import UserError, VideoShape

JOB, ROWS, MANIFEST = "job.json", "clips.jsonl", "manifest.json"
JOB_FORMAT, JOB_VERSION = "scd-sf-clip-job", 1
INDEX_AGAIN = "run 'scd data manifest' on the folder"
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Common:
    """What all clips of a folder have in common; ``settings`` say how they were made (any JSON)."""

    shape: VideoShape
    dtype: str
    width: int
    max_length: int
    settings: Json

    @property
    def torch_dtype(self) -> torch.dtype:
        return _NAMES[self.dtype]


@dataclass(frozen=True)
class ClipRow:
    """One line of ``clips.jsonl``: from a file's header, so that nothing need be opened to know the clips."""

    id: str
    prompt: str
    bytes: int
    sha256: str
    tokens: int
    uuid: str
    seed: int
    tags: dict[str, str]

    @classmethod
    def from_json(cls, row: Json, where: str) -> Self:
        if set(row) != {entry.name for entry in fields(cls)}:
            raise UserError(f"{where}: not a clip's row; {INDEX_AGAIN}")
        clip = typed(row, cls, where, INDEX_AGAIN)
        if not ID.fullmatch(clip.id):
            raise UserError(f"{where}: 'id' is {clip.id[:80]!r}, not 32 hexadecimal digits; {INDEX_AGAIN}")
        return clip


def open_job(root: Path, common: Common) -> None:
    """Write ``job.json``, or check that the folder's is the same. UserError where clips of another kind lie there."""
    row = {"format": JOB_FORMAT, "version": JOB_VERSION, **asdict(common)}
    path = root / JOB
    if path.is_file():
        old = asdict(read_folder_job(root))
        new = asdict(common)
        changed = [n for n in new["settings"] if old["settings"].get(n) != new["settings"][n]]
        changed += [n for n in new if n != "settings" and old[n] != new[n]]
        if changed or set(old["settings"]) != set(new["settings"]):
            raise UserError(f"{path}: made with other settings ({', '.join(changed) or 'more'}); use another folder")
        return
    root.mkdir(parents=True, exist_ok=True)
    if others_in(root):
        raise UserError(f"{root}: holds files but no {JOB}; nothing is overwritten: use another folder")
    write_json(path, row)


def read_folder_job(root: Path) -> Common:
    """The folder's ``job.json``. UserError when it is missing or damaged."""
    path = root / JOB
    row = read_json(path, "use a folder of generate_clips.py or 'scd data import'")
    if (row.get("format"), row.get("version")) != (JOB_FORMAT, JOB_VERSION):
        raise UserError(f"{path}: 'format'/'version' must be {JOB_FORMAT}/{JOB_VERSION}; use this release's folders")
    common = typed(row, Common, path, "make the folder again")
    if common.dtype not in _NAMES or min(common.width, common.max_length) < 1:
        raise UserError(f"{path}: needs width, max_length and a dtype of {', '.join(_NAMES)}; make the folder again")
    return common


def fault_of(path: Path, common: Common, *, full: bool = False, clip: str = "") -> str:
    """What is wrong with a clip's file: "" for a whole one. ``full`` also reads and hashes its data. ``clip``: its id
    (empty: as the file is called)."""
    try:
        with ClipFile(path) as file:
            if fault := _misfit(file.header, common, clip or path.stem):
                return f"{path}: {fault}"
            if full and file.digest() != file.header.about.sha256:
                return f"{path}: contents changed (sha256 differs from its header)"
    except UserError as error:
        return str(error)
    return ""


def _misfit(header: Header, common: Common, clip: str) -> str:
    """How a file that is whole differs from what its folder holds; "" for not at all."""
    latents, text = header.tensors["latents"], header.tensors["text"]
    wanted, dtype = common.shape.latent(1)[1:], common.torch_dtype
    if header.about.id != clip:
        return f"says it is clip {header.about.id}"
    if latents.shape != wanted or latents.dtype != dtype:
        return f"latents {latents.shape} {latents.dtype} instead of {wanted} {dtype}"
    fits = len(text.shape) == 2 and 0 < text.shape[0] <= common.max_length and text.shape[1] == common.width
    if not fits or text.dtype != dtype:
        return f"text {text.shape} {text.dtype} instead of ({common.max_length} at most, {common.width}) {dtype}"
    return ""


def build_index(root: Path, *, section: Json, head: Json) -> int:
    """Write ``clips.jsonl`` and, last, ``manifest.json`` from the headers of the files that are there; their number.

    ``section``: the manifest's entries on text (:func:`scd_sf.data.prompts.clip_text`), ``head`` its first keys.
    UserError for a damaged file, and when there is none.
    """
    common, rows = read_folder_job(root), []
    for path in clip_paths(root):
        header = read_header(path)
        if fault := _misfit(header, common, path.stem):
            raise UserError(f"{path}: {fault}; run 'scd data repair' on the folder")
        about, tokens = header.about, header.tensors["text"].shape[0]
        row = ClipRow(about.id, about.prompt, header.bytes, about.sha256, tokens, about.uuid, about.seed, about.tags)
        rows.append(asdict(row))
    if not rows:
        raise UserError(f"{root}: holds no clip; generate or import some")
    write_jsonl(root / ROWS, rows)
    latents = {
        "shape": asdict(common.shape),
        "dtype": common.dtype,
        "clips": len(rows),
        "clips_sha256": hash_json(rows),
    }
    text = {"width": common.width, "max_length": common.max_length, "clips": True, **section}
    sections = {"text": text, "latents": latents}
    write_json(root / MANIFEST, {**head, "hash": hash_json(sections), **sections, "inputs": common.settings})
    return len(rows)


class ClipFiles:
    """The clips that ``clips.jsonl`` names. Names are checked when opened, a file's size and shapes when it is read."""

    def __init__(self, root: Path, latents: Json) -> None:
        self.root, self.common = root, read_folder_job(root)
        path = root / ROWS
        rows = read_jsonl(path, INDEX_AGAIN)
        if hash_json(rows) != latents.get("clips_sha256") or not rows:
            raise UserError(f"{path}: does not belong to the manifest (changed or cut); {INDEX_AGAIN}")
        self.rows = [ClipRow.from_json(row, f"{path}:{number}") for number, row in enumerate(rows, 1)]
        needed = math.prod(self.common.shape.latent(1)) * self.common.torch_dtype.itemsize
        for number, clip in enumerate(self.rows, 1):  # before a batch of this shape is allocated
            if needed > clip.bytes or not 0 < clip.tokens <= self.common.max_length:
                raise UserError(f"{path}:{number}: its file is too small for the folder's shape; {INDEX_AGAIN}")
        there = {file.stem for file in clip_paths(root)}
        if missing := [row.id for row in self.rows if row.id not in there]:
            first = clip_path(root, missing[0])
            raise UserError(f"{first}: listed in {path} but missing (so are {len(missing) - 1} others); {INDEX_AGAIN}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dtype(self) -> torch.dtype:
        """Of all latents and text states on disk."""
        return self.common.torch_dtype

    def read(self, index: int, latents_FCHW: Tensor | None, text_LE: Tensor | None) -> None:
        """A clip's tensors into these buffers; of ``text_LE`` only the first rows, as many as the prompt has tokens.

        UserError when the file is damaged, or not the one of the index.
        """
        row = self.rows[index]
        path = clip_path(self.root, row.id)
        with ClipFile(path) as file:
            if (file.header.bytes, file.header.about.sha256) != (row.bytes, row.sha256):
                raise UserError(f"{path}: is not the file of the index; {INDEX_AGAIN}")
            if latents_FCHW is not None:
                file.read("latents", latents_FCHW)
            if text_LE is not None:
                file.read("text", text_LE[: row.tokens])

    def verify(self) -> None:
        """Hash every file's data. Raises UserError for the first that changed."""
        for row in self.rows:
            if fault := fault_of(clip_path(self.root, row.id), self.common, full=True):
                raise UserError(f"{fault}; run 'scd data repair' on the folder")
