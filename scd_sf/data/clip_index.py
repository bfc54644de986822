"""A folder of clips, one file each, as training data: ``job.json``, ``clips.jsonl`` and
``manifest.json``.

``job.json`` is written before the first clip: what all clips have in common. ``clips.jsonl`` and
``manifest.json`` are made from the files' headers (:func:`build_index`), so they can be made again
at any time; with them :class:`scd_sf.data.latents.LatentClips` and
:class:`scd_sf.data.prompts.PromptTable` open the folder.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.data.clip_files import ID, ClipFile, Header, clip_path, clip_paths, read_header
from scd_sf.data.manifest import MANIFEST, Format, read_index, write_index
from scd_sf.files import Json, others_in, typed, write_json
from scd_sf.tensor_files import LONG_DTYPES, dtype_of
from scd_sf.types import UserError, VideoShape, plural

JOB, ROWS = "job.json", "clips.jsonl"
CLIP_JOB = Format(
    "scd-sf-clip-job", 1, "no such file; use a folder of generate_clips.py or 'scd data import'"
)
LATENTS = Format(
    "scd-sf-latents",
    1,
    "no such file; make it with generate_clips.py, encode_latents.py or encode_prompts.py of data_prep/",
)
INDEX_AGAIN = "run 'scd data manifest' on the folder"


@dataclass(frozen=True)
class Common:
    """Properties that all clips of a folder share. ``settings`` (any JSON) record how they were
    made."""

    shape: VideoShape
    dtype: str
    width: int
    max_length: int
    settings: Json

    @property
    def torch_dtype(self) -> torch.dtype:
        return dtype_of(self.dtype)


@dataclass(frozen=True)
class ClipRow:
    """One line of ``clips.jsonl``, copied from a file's header, so that the list needs no open
    file."""

    id: str
    prompt: str
    bytes: int
    sha256: str
    tokens: int
    uuid: str
    seed: int
    tags: dict[str, str]

    def __post_init__(self) -> None:
        if not ID.fullmatch(self.id):
            raise ValueError(f"'id' is {self.id[:80]!r}, not 32 hexadecimal digits")


def open_job(root: Path, common: Common) -> None:
    """Write ``job.json``, or check that the folder's is the same. UserError where clips of another
    kind lie there."""
    path = root / JOB
    if path.is_file():
        old = asdict(read_folder_job(root))
        new = asdict(common)
        differences = [n for n in new["settings"] if old["settings"].get(n) != new["settings"][n]]
        differences += [n for n in new if n != "settings" and old[n] != new[n]]
        if differences or set(old["settings"]) != set(new["settings"]):
            raise UserError(
                f"{path}: made with other settings ({', '.join(differences) or 'more'}); use another folder"
            )
        return
    root.mkdir(parents=True, exist_ok=True)
    if others_in(root):
        raise UserError(
            f"{root}: holds files but no {JOB}; nothing is overwritten: use another folder"
        )
    write_json(path, {"format": CLIP_JOB.name, "version": CLIP_JOB.version, **asdict(common)})


def read_folder_job(root: Path) -> Common:
    """The folder's ``job.json``. UserError when it is missing or damaged."""
    path, row = root / JOB, CLIP_JOB.read(root, JOB)
    common = typed(row, Common, path, "make the folder again")
    if common.dtype not in LONG_DTYPES or min(common.width, common.max_length) < 1:
        dtypes = ", ".join(LONG_DTYPES)
        raise UserError(
            f"{path}: needs width, max_length and a dtype of {dtypes}; make the folder again"
        )
    return common


def fault_of(path: Path, common: Common, *, full: bool = False, clip: str = "") -> str:
    """The fault of a clip's file; "" for an intact one. ``full`` also reads and hashes its data.
    ``clip``: its id (empty: the file's name)."""
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
    """How a file's header differs from its folder's properties; "" where it does not."""
    latents, text = header.tensors["latents"], header.tensors["text"]
    shape, dtype = common.shape.latent(1)[1:], common.torch_dtype
    if header.about.id != clip:
        return f"says it is clip {header.about.id}"
    if latents.shape != shape or latents.dtype != dtype:
        return f"latents {latents.shape} {latents.dtype} instead of {shape} {dtype}"
    fits = (
        len(text.shape) == 2
        and 0 < text.shape[0] <= common.max_length
        and text.shape[1] == common.width
    )
    if not fits or text.dtype != dtype:
        return f"text {text.shape} {text.dtype} instead of ({common.max_length} at most, {common.width}) {dtype}"
    return ""


def build_index(root: Path, section: Json) -> int:
    """Write ``clips.jsonl`` and, last, ``manifest.json`` from the headers of the existing files.
    Returns the number of clips.

    ``section``: the manifest's entries on text (:func:`scd_sf.data.prompts.index_clips`).
    UserError for a damaged file, and when there is none.
    """
    common, rows = read_folder_job(root), []
    for path in clip_paths(root):
        header = read_header(path)
        if fault := _misfit(header, common, path.stem):
            raise UserError(f"{path}: {fault}; run 'scd data repair' on the folder")
        about, tokens = header.about, header.tensors["text"].shape[0]
        row = ClipRow(
            about.id,
            about.prompt,
            header.bytes,
            about.sha256,
            tokens,
            about.uuid,
            about.seed,
            about.tags,
        )
        rows.append(row)
    if not rows:
        raise UserError(f"{root}: holds no clip; generate or import some")
    digest = write_index(root / ROWS, rows)
    shape = asdict(common.shape)
    latents = {"shape": shape, "dtype": common.dtype, "clips": len(rows), "clips_sha256": digest}
    text = {"width": common.width, "max_length": common.max_length, "clips": True, **section}
    manifest = LATENTS.sealed({"text": text, "latents": latents})
    write_json(root / MANIFEST, {**manifest, "inputs": common.settings})
    return len(rows)


class ClipFiles:
    """The clips that ``clips.jsonl`` lists. Names are checked when it is opened, sizes and shapes
    of a file when that is read."""

    def __init__(self, root: Path, latents: Json) -> None:
        self.root, self.common = root, read_folder_job(root)
        path = root / ROWS
        self.rows = read_index(path, ClipRow, latents.get("clips_sha256"), INDEX_AGAIN)
        min_bytes = math.prod(self.common.shape.latent(1)) * self.common.torch_dtype.itemsize
        for number, clip in enumerate(self.rows, 1):  # before a batch of this shape is allocated
            if min_bytes > clip.bytes or not 0 < clip.tokens <= self.common.max_length:
                raise UserError(
                    f"{path}:{number}: its file is too small for the folder's shape; {INDEX_AGAIN}"
                )
        existing_ids = {file.stem for file in clip_paths(root)}
        if missing_ids := [row.id for row in self.rows if row.id not in existing_ids]:
            first = clip_path(root, missing_ids[0])
            count = plural(len(missing_ids), "clip")
            raise UserError(
                f"{first}: listed in {path} but missing ({count} in all); {INDEX_AGAIN}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dtype(self) -> torch.dtype:
        """The type of all latents and text states on disk."""
        return self.common.torch_dtype

    def read(self, index: int, latents_FCHW: Tensor | None, text_LE: Tensor | None) -> None:
        """A clip's tensors into these buffers; of ``text_LE`` only the first rows, as many as the
        prompt has tokens.

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
