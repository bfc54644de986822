"""Where a Wan 2.1 lies: a folder here, or a repository on the Hugging Face hub, by its name.

``Wan-AI/Wan2.1-T2V-1.3B-Diffusers`` works wherever a Wan directory is asked for, other repositories
as ``OWNER/NAME@REVISION`` (a commit, a tag or ``main``). A path that exists always wins. The parts
that are asked for (transformer, VAE, text encoder, tokenizer) come into the hub's cache (HF_HOME),
as safetensors and JSON only; pickles and code are never downloaded. HF_HUB_OFFLINE=1: the cache
alone. Of several processes that see one cache, one downloads and the others wait for it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from scd_sf.checkpoint import absolute
from scd_sf.files import Json, foreign, in_turn, read_json, read_text, write_text
from scd_sf.types import UserError, say

Part = Literal["transformer", "vae", "text_encoder", "tokenizer"]
PARTS: tuple[Part, ...] = ("transformer", "vae", "text_encoder", "tokenizer")
TEXT_PARTS: tuple[Part, ...] = ("text_encoder", "tokenizer")
# files of a part, as huggingface_hub matches them: no .bin, .pt, .pth, .py
FILES: dict[Part, tuple[str, ...]] = {
    "transformer": ("config.json", "diffusion_pytorch_model*.safetensors*"),
    "vae": ("config.json", "diffusion_pytorch_model*.safetensors*"),
    "text_encoder": ("config.json", "model*.safetensors*"),
    "tokenizer": ("*.json", "*.model", "*.txt"),
}
_STEMS: dict[Part, str] = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
# no "--", which the cache's folder names have for "/", and no ".."
_NAME = re.compile(
    r"(?!.*(?:--|\.\.))"
    r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([A-Za-z0-9][\w.-]{0,99}))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
FP32 = 4  # bytes; every tensor of Wan-AI's diffusers repositories is fp32
UMT5_PARAMETERS = 5_680_910_336  # of umT5-xxl's encoder: 256,384 words, 24 layers of width 4096
VAE_PARAMETERS = 126_892_531
TOKENIZER_BYTES = 21_454_609


@dataclass(frozen=True)
class Release:
    """A repository of Wan-AI: the commit that is taken where none is named, and the parameters of
    its transformer."""

    revision: str
    parameters: int


RELEASES = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Release(
        "0fad780a534b6463e45facd96134c9f345acfa5b", 1_418_996_800
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": Release(
        "38ec498cb3208fb688890f8cc7e94ede2cbd7f68", 14_288_491_584
    ),
}


@dataclass(frozen=True)
class HubName:
    """A repository at a revision."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"

    @property
    def is_commit(self) -> bool:
        """Whether the revision can never be another one."""
        return _COMMIT.fullmatch(self.revision) is not None


def hub_name(path: Path | str) -> HubName | None:
    """The repository that ``path`` names; None where it is a path.

    An existing path is a path. So is a name that is neither one of :data:`RELEASES` nor has an
    ``@REVISION``: a mistyped folder downloads nothing. UserError for other names of Wan-AI without
    a revision, and for its repositories in the original layout, whose parts are pickles.
    """
    text = str(path)
    match = _NAME.fullmatch(text)
    if match is None or os.path.lexists(text):
        return None
    repo, revision = match.groups()
    if f"{repo}-Diffusers" in RELEASES:
        raise UserError(
            f"{text}: its VAE and text encoder are pickles, which are not downloaded; use {repo}-Diffusers, "
            "or download it yourself and give the folder"
        )
    if revision:
        return HubName(repo, revision)
    if repo in RELEASES:
        return HubName(repo, RELEASES[repo].revision)
    if repo.startswith("Wan-AI/"):
        raise UserError(
            f"{text}: no such folder here; from the hub these are taken: {', '.join(RELEASES)}; "
            f"another repository needs a revision: {repo}@main"
        )
    return None


def download_bytes(repo: str, parts: Sequence[Part] = PARTS) -> int | None:
    """Bytes of these parts, computed from the models' numbers of parameters; None for a repository
    that is not in :data:`RELEASES`."""
    release = RELEASES.get(repo)
    if release is None:
        return None
    sizes = {
        "transformer": FP32 * release.parameters,
        "vae": FP32 * VAE_PARAMETERS,
        "text_encoder": FP32 * UMT5_PARAMETERS,
        "tokenizer": TOKENIZER_BYTES,
    }
    return sum(sizes[part] for part in parts)


def download_command(name: HubName) -> str:
    """The command line that downloads a repository into a folder, without pickles."""
    excluded = "" if name.repo in RELEASES else " --exclude '*.bin' '*.pt' '*.pth' '*.pkl'"
    folder = name.repo.rpartition("/")[2]
    return f"hf download {name.repo} --revision {name.revision}{excluded} --local-dir {folder}"


def pinned(path: Path | str) -> str:
    """``path`` as a record that means the same tomorrow: an absolute path, or a repository with the
    commit that its revision is now. UserError where the hub is asked and does not answer."""
    name = hub_name(path)
    if name is not None:
        return str(_at_commit(name))
    return absolute(path)


def wan_folder(path: Path | str, parts: Sequence[Part] = PARTS) -> Path:
    """The folder of a Wan directory: ``path`` itself, or for the name of a repository its folder in
    the hub's cache, where the files of ``parts`` are whole.

    UserError: offline and not in the cache, no such repository or revision, too small a disk.
    """
    name = hub_name(path)
    return Path(path) if name is None else _snapshot(_at_commit(name), tuple(parts))


@cache
def _at_commit(name: HubName) -> HubName:
    """The repository at the commit that its revision is now; offline: was, when it was cached."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if name.is_commit:
        return name
    reference = _storage(name) / "refs" / name.revision  # huggingface_hub's own record
    if HF_HUB_OFFLINE:
        if not reference.is_file():
            raise _absent(name, PARTS)
        return _checked_commit(name, read_text(reference, "remove it").strip())
    with foreign(_refused(name), _remedy(name, PARTS)):
        commit = str(HfApi().model_info(name.repo, revision=name.revision).sha)
        at_commit = _checked_commit(name, commit)
        reference.parent.mkdir(parents=True, exist_ok=True)
        write_text(reference, commit, durable=False)
    return at_commit


def _checked_commit(name: HubName, commit: str) -> HubName:
    """The repository at a commit that the hub or its cache names: it becomes a folder's name."""
    if not _COMMIT.fullmatch(commit):
        raise UserError(f"{name}: is at {commit[:80]!r}, which is no commit; give one as @COMMIT")
    return HubName(name.repo, commit)


@cache
def _snapshot(name: HubName, parts: tuple[Part, ...]) -> Path:
    """The folder in the cache; what is missing of ``parts`` is downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    folder = _storage(name) / "snapshots" / name.revision
    if not missing_files(folder, parts):
        return folder
    if HF_HUB_OFFLINE:
        raise _absent(name, parts)
    lock = Path(HF_HUB_CACHE) / ".locks" / f"{_storage(name).name}.scd.lock"
    with foreign(_refused(name), _remedy(name, parts)), in_turn(lock):
        if missing_files(folder, parts):
            _download(name, parts)
    if problems := missing_files(folder, parts):
        raise UserError(f"{name}: has no {problems[0]}, so it is no Wan in diffusers' layout")
    return folder


def _download(name: HubName, parts: tuple[Part, ...]) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.utils.tqdm import disable_progress_bars

    size = download_bytes(name.repo, parts)
    free = shutil.disk_usage(HF_HUB_CACHE).free
    if size is not None and size > free + _cached_bytes(name):
        raise UserError(
            f"{name}: needs {_gb(size)} in {HF_HUB_CACHE}, where {_gb(free)} are free; "
            "set HF_HOME to a folder on a larger disk"
        )
    words = "" if size is None else f", {_gb(size)} (computed)"
    say(f"{name}: downloading {', '.join(parts)}{words} into {HF_HUB_CACHE}", sys.stderr)
    if not sys.stderr.isatty():
        disable_progress_bars()
    snapshot_download(name.repo, revision=name.revision, allow_patterns=patterns(parts))


def patterns(parts: Sequence[Part]) -> list[str]:
    """What is downloaded of a repository, as huggingface_hub's ``allow_patterns``."""
    return [f"{part}/{file}" for part in parts for file in FILES[part]]


def missing_files(folder: Path, parts: Sequence[Part]) -> list[str]:
    """Files of ``parts`` that a download has not brought yet, relative to ``folder``."""
    missing: list[str] = []
    for part in parts:
        place, stem = folder / part, _STEMS.get(part)
        names = (
            ["tokenizer_config.json"] if stem is None else ["config.json", *_weights(place, stem)]
        )
        if stem is None and not any(
            (place / n).is_file() for n in ("tokenizer.json", "spiece.model")
        ):
            names.append("tokenizer.json")
        missing += [f"{part}/{name}" for name in names if not (place / name).is_file()]
    return missing


def _weights(place: Path, stem: str) -> list[str]:
    index = place / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [f"{stem}.safetensors"]
    shards: Json = read_json(index, "remove it, and it is downloaded again")
    weight_map = shards.get("weight_map")
    return sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []


def _storage(name: HubName) -> Path:
    """The repository's folder in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{name.repo.replace('/', '--')}"


def _cached_bytes(name: HubName) -> int:
    return sum(file.stat().st_size for file in (_storage(name) / "blobs").glob("*"))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _remedy(name: HubName, parts: Sequence[Part]) -> str:
    size = download_bytes(name.repo)
    words = "" if size is None else f" ({_gb(size)}, computed)"
    needed = download_bytes(name.repo, parts)
    part_words = "" if needed in (None, size) else f"; of these {_gb(needed or 0)} are needed here"
    return (
        f"correct the name; or where there is a network run {download_command(name)}{words}{part_words}, "
        "copy the folder here and give its path in place of the name"
    )


def _absent(name: HubName, parts: Sequence[Part]) -> UserError:
    from huggingface_hub.constants import HF_HUB_CACHE

    return UserError(
        f"{name}: no such folder here, not whole in the hub's cache ({HF_HUB_CACHE}), and HF_HUB_OFFLINE is set: "
        f"unset it, {_remedy(name, parts)}"
    )


def _refused(name: HubName) -> str:
    return f"{name}: no such folder here, and the hub does not give it"
