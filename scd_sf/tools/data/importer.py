"""``scd data import``: clips of other projects' layouts (foreign.py) as a folder of one file per
clip."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scd_sf import __version__
from scd_sf.data.clip_files import (
    ID,
    SUFFIX,
    VIDEO,
    About,
    bytes_of,
    clip_path,
    quarantine_of,
    read_header,
    sweep_clips,
    write_clip,
)
from scd_sf.data.clip_index import Common, fault_of, open_job
from scd_sf.data.prompts import index_clips, write_fixed_prompts
from scd_sf.data.sources.raw_files import Refused
from scd_sf.files import Json, files_below, locked, sha256_bytes, write_bytes, write_jsonl
from scd_sf.models.wan.text import TextEncoder, wan_negative
from scd_sf.models.wan.text_cache import open_text_encoder
from scd_sf.models.wan.vae import Vae, load_vae
from scd_sf.tensor_files import dtype_of
from scd_sf.tools.data.foreign import ForeignClip, Part, read_lmdb, read_parquet, read_tar
from scd_sf.types import UserError, VideoShape, device_of, printable

REFUSED = "refused.jsonl"


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import.

    ``model``: a Wan directory. Its VAE normalises latents that are not normalised. Its text encoder
    encodes the empty and the negative prompt, and all prompts where the source has no text states.
    ``store``: bf16, fp16 or fp32."""

    source: Path
    out: Path
    model: Path
    store: str = "bf16"
    negative_prompt: str = "wan"
    text_cache: str = ""
    device: str = "cpu"


def sources_of(path: Path) -> tuple[str, list[Path]]:
    """("tar" | "lmdb" | "parquet", its files or environments in name order). UserError for none, or
    for several."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    if path.is_file():
        files_by_kind = {
            "tar": [path] if path.suffix == ".tar" else [],
            "parquet": [path] if path.suffix == ".parquet" else [],
            "lmdb": [],
        }
    else:
        candidates = list(files_below(path))
        files_by_kind = {
            "tar": [file for file in candidates if file.suffix == ".tar" and file.parent == path],
            "parquet": [file for file in candidates if file.suffix == ".parquet"],
            "lmdb": [
                f.parent
                for f in candidates
                if f.name == "data.mdb" and path in (f.parent, f.parent.parent)
            ],
        }
    kinds = [kind for kind, files in files_by_kind.items() if files]
    if len(kinds) != 1:
        raise UserError(
            f"{path}: holds {' and '.join(kinds) or 'none'} of .tar, .parquet and data.mdb; give one kind"
        )
    return kinds[0], files_by_kind[kinds[0]]


def import_clips(
    options: ImportOptions, progress: Callable[[int], None] = lambda count: None
) -> str:
    """Copy every clip of the source and return one line about the result. Whole clips in the folder
    are not written again.

    UserError, after all others are imported, where parts were refused;
    ``quarantine/refused.jsonl`` lists them.
    """
    dtype_of(options.store, "--store")
    kind, files = sources_of(options.source)
    device = device_of(options.device)
    encoder = open_text_encoder(options.model, options.text_cache, device=device)
    with ExitStack() as locks:
        target = _Target(options, kind, encoder, load_vae(options.model, device=device), locks)
        return _import(options, target, _parts(kind, files), progress)


def _import(
    options: ImportOptions, target: _Target, parts: Iterator[Part], progress: Callable[[int], None]
) -> str:
    refusals: list[Json] = []
    for number, part in enumerate(parts, 1):
        fault = part.reason if isinstance(part, Refused) else target.add(part)
        if fault:
            refusals.append({"name": printable(part.name), "reason": printable(fault)})
        progress(number)
    if target.common is None:
        hint = f"; the first part was refused: {refusals[0]['reason']}" if refusals else ""
        raise UserError(f"{options.source}: no clip in it could be taken{hint}")
    report_path = quarantine_of(options.out) / REFUSED
    write_jsonl(report_path, refusals)
    negative = wan_negative(options.negative_prompt)
    write_fixed_prompts(options.out, target.encoder.states, negative, target.common.torch_dtype)
    count = index_clips(options.out)
    if refusals:
        refusal = f"{refusals[0]['name']}: {refusals[0]['reason']}"
        raise UserError(
            f"{len(refusals)} parts of {options.source} were refused, {report_path} lists them; first {refusal}"
        )
    return f"{options.out}: {target.count} clips from {options.source} ({target.kind}), {count} in the index"


def _parts(kind: str, files: list[Path]) -> Iterator[Part]:
    for file in files:
        yield from {"tar": read_tar, "lmdb": read_lmdb, "parquet": read_parquet}[kind](file)


class _Target:
    """The folder that is written. The first clip decides the shape of all."""

    def __init__(
        self, options: ImportOptions, kind: str, encoder: TextEncoder, vae: Vae, locks: ExitStack
    ) -> None:
        """``locks``: keeps the folder's lock, which is taken with the first clip."""
        self.options = options
        self.kind = kind
        self.encoder = encoder
        self.vae = vae
        self.locks = locks
        self.common: Common | None = None
        self.count = 0

    def add(self, sample: ForeignClip) -> str:
        """Write a clip and return "" or the reason of its refusal. UserError where the folder
        cannot be begun."""
        try:
            if sample.own_bytes is not None:
                self._add_own(sample, sample.own_bytes)
            else:
                self._add(sample)
        except ValueError as error:  # UserErrors too
            if self.common is None and isinstance(error, UserError):
                raise
            return str(error)
        self.count += 1
        return ""

    def _add(self, sample: ForeignClip) -> None:
        assert sample.latents is not None
        latents = self._normalise(sample.latents.float()) if sample.raw else sample.latents
        text = self.encoder.states([sample.prompt])[0] if sample.text is None else sample.text
        dtype = dtype_of(self.options.store, "--store")
        latents, text = latents.to(dtype).contiguous(), text.to(dtype)
        common = self._common(latents.shape, dtype)
        if tuple(latents.shape) != common.shape.latent(1)[1:]:
            raise ValueError(
                f"latents {tuple(latents.shape)} instead of {common.shape.latent(1)[1:]}, as the first clip's"
            )
        if text.shape[1] != common.width or not 0 < len(text) <= common.max_length:
            raise ValueError(
                f"text {tuple(text.shape)} instead of ({common.max_length} at most, {common.width})"
            )
        digest = sha256_bytes(bytes_of(latents))
        key = json.dumps([self.kind, sample.prompt, digest], ensure_ascii=False)
        clip, shape = hashlib.blake2b(key.encode(), digest_size=16).hexdigest(), common.shape
        path = clip_path(self.options.out, clip)
        if not path.is_file() or fault_of(path, common):
            size = f"{shape.pixel_width}x{shape.pixel_height}"
            about = About(
                clip,
                sample.prompt,
                frames=shape.pixel_frames,
                size=size,
                source=self.kind,
                toolkit=__version__,
            )
            write_clip(self.options.out, latents, text, about)

    def _add_own(self, sample: ForeignClip, data: bytes) -> None:
        """Add one of our files byte for byte, after its checksums are compared. The video is
        written first."""
        name = sample.name.removesuffix("]").rpartition("[")[2].rpartition("/")[2]
        if not ID.fullmatch(name):
            raise ValueError(f"its key is {name!r}, not a clip's id")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, f"{name}{SUFFIX}")
            file.write_bytes(data)
            try:
                header = read_header(file)
            except UserError as error:
                raise ValueError(str(error)) from error
            latents = header.tensors["latents"]
            common = self._common(latents.shape, latents.dtype)
            if fault := fault_of(file, common, full=True):
                raise ValueError(fault)
        if sample.video is not None and sha256_bytes(sample.video) != header.about.video_sha256:
            raise ValueError("its mp4 is not the one of its latents (sha256 differs)")
        path = clip_path(self.options.out, name)
        path.parent.mkdir(exist_ok=True)
        if sample.video is not None:
            write_bytes(path.with_suffix(VIDEO), sample.video)
        if not path.is_file() or fault_of(path, common):
            write_bytes(path, data)

    def _common(self, shape: tuple[int, ...], dtype: torch.dtype) -> Common:
        """The common record of all clips. The first clip begins the folder. ValueError where its
        latents do not fit the model's VAE."""
        if self.common is None:
            geometry = self.vae.geometry
            if len(shape) != 4 or shape[1] != geometry.channels:
                raise ValueError(
                    f"latents (F, C, H, W) {tuple(shape)}, but the model's VAE has C = {geometry.channels}"
                )
            video = VideoShape(*shape, geometry.temporal, geometry.spatial)
            settings: Json = {
                "imported": self.kind,
                "negative_prompt": wan_negative(self.options.negative_prompt),
            }
            name = str(dtype).removeprefix("torch.")
            common = Common(video, name, self.encoder.width, self.encoder.max_length, settings)
            open_job(self.options.out, common)
            self.locks.enter_context(locked(self.options.out, "scd data import"))
            sweep_clips(self.options.out)
            self.common = common
        return self.common

    def _normalise(self, raw_FCHW: Tensor) -> Tensor:
        return (
            self.vae.normalised(raw_FCHW.transpose(0, 1).unsqueeze(0).to(self.vae.device))[0]
            .transpose(0, 1)
            .cpu()
        )
