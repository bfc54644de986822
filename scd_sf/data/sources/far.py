"""FAR's lists of clips: JSON files of ``{"video_path", "action_path"}`` (Minecraft, DMLab) or
``{"video_path", "label"}`` (UCF-101), and ``{"latent_path", "action_path"}`` for latents that are
computed already.

Paths in a list begin at ``root`` (FAR's working folder), or, where ``root`` is a tar or a folder of
tars (FAR's latent ``shard-*.tar``), inside the tars. Latents are ``torch.save`` tensors (F, C, H,
W), as the DC-AE gives them: before they are multiplied by its scaling factor. Videos are resized
(short side) and cropped where a size is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torch import Tensor

from scd_sf.data.sources.pixels import PixelClip
from scd_sf.data.sources.raw_files import (
    COPY,
    RawFiles,
    Refused,
    actions_of,
    arrays_of,
    one_tensor,
    open_raw,
)
from scd_sf.data.sources.teco import video_of
from scd_sf.data.sources.video_reader import AS_CODED, read_frames
from scd_sf.files import parse_json, read_text
from scd_sf.types import UserError, printable

SUFFIXES = (".mp4", ".avi", ".npz", ".pt")
SCALING_FACTOR = 0.2889  # of FAR's Minecraft and UCF-101 autoencoders
REMEDY = 'it must be a list of {"video_path" or "latent_path", "action_path" or "label"}'


@dataclass(frozen=True)
class FarRow:
    """One clip of a list. ``action`` is the file with its actions, ``label`` its class; each is
    None where the clip has none."""

    path: str
    action: str | None = None
    label: int | None = None


def read_far_list(file: Path, key: str, prefix: str = "") -> list[FarRow]:
    """The rows of a list whose clips are at ``key``. ``prefix`` is cut off the paths.

    UserError names the entry: not JSON, other fields, a path that is absolute or leaves its folder,
    a negative label.
    """
    entries = parse_json(read_text(file, REMEDY), file, REMEDY)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file}: no list, or an empty one; {REMEDY}")
    rows = [_row(entry, key, prefix, f"{file}[{number}]") for number, entry in enumerate(entries)]
    if len({(row.action is None, row.label is None) for row in rows}) > 1:
        raise UserError(f"{file}: some clips have actions or labels and some have none; {REMEDY}")
    return rows


def _row(entry: object, key: str, prefix: str, where: str) -> FarRow:
    if not isinstance(entry, dict) or not {key} <= set(entry) <= {key, "action_path", "label"}:
        keys = (
            ", ".join(sorted(map(str, entry))) if isinstance(entry, dict) else type(entry).__name__
        )
        raise UserError(
            f"{where}: has {keys}, wanted is '{key}' with 'action_path' or 'label'; {REMEDY}"
        )
    action, label = entry.get("action_path"), entry.get("label")
    if label is not None and (type(label) is not int or not 0 <= label < 2**16):
        raise UserError(f"{where}: 'label' is {label!r}, not a whole number from 0 on; {REMEDY}")
    path = _path(entry[key], prefix, f"{where}: '{key}'")
    return FarRow(
        path, None if action is None else _path(action, prefix, f"{where}: 'action_path'"), label
    )


def _path(value: object, prefix: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} is no path; {REMEDY}")
    path = PurePosixPath(value.removeprefix(prefix).lstrip("/") if prefix else value)
    if path.is_absolute() or ".." in path.parts or "\\" in value or printable(value) != value:
        raise UserError(
            f"{where} is {value!r}, which leaves the folder; give its beginning as the list's prefix"
        )
    return path.as_posix()


def _labels(rows: list[FarRow]) -> tuple[str, ...]:
    """Names of the labels: the folders' where each label has one folder of its own (UCF-101), else
    the numbers."""
    folders: dict[int, set[str]] = {}
    for row in rows:
        if row.label is not None:
            folders.setdefault(row.label, set()).add(PurePosixPath(row.path).parent.name)
    if not folders:
        return ()
    names = {label: next(iter(parents)) for label, parents in folders.items() if len(parents) == 1}
    use_names = len(names) == len(folders) == len(set(names.values())) and all(names.values())
    return tuple(
        names.get(label, str(label)) if use_names else str(label)
        for label in range(max(folders) + 1)
    )


def _actions(files: RawFiles, name: str | None, frames: int, num_actions: int) -> Tensor | None:
    if name is None:
        return None
    where = files.where(name)
    return actions_of(
        arrays_of(files.read(name), ("actions",), where).get("actions"), frames, num_actions, where
    )


class Far:
    """The clips of a list, in its order. Errors as in ``PixelClips``."""

    def __init__(
        self,
        root: Path,
        file: Path,
        *,
        prefix: str = "",
        num_actions: int = 3,
        size: int = 0,
        fps: float = 0.0,
        as_coded: bool = False,
    ) -> None:
        """``fps``: videos with actions must have this rate, others are resampled to it, unless
        ``as_coded``. 0: 20 with actions (Minecraft, DMLab), else 25 (UCF-101)."""
        self._rows = read_far_list(file, "video_path", prefix)
        self._files = open_raw(root, SUFFIXES)
        self.refused: list[Refused] = list(self._files.refused)
        self.num_actions = num_actions if self._rows[0].action is not None else 0
        self.labels = _labels(self._rows)
        self.size = size
        self.fps = fps or (20.0 if self.num_actions else 25.0)
        self._rate = AS_CODED if as_coded else self.fps
        self.ids = _ids([row.path for row in self._rows], file)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> PixelClip:
        row = self._rows[index]
        data, where = self._files.read(row.path), self._files.where(row.path)
        if row.path.endswith(".npz"):
            frames = video_of(arrays_of(data, ("video",), where).get("video"), where, self.size)
        else:
            frames = read_frames(
                data, where, fps=self._rate, exact=row.action is not None, size=self.size
            )
        actions = _actions(self._files, row.action, len(frames), self.num_actions)
        return PixelClip(self.ids[index], frames, actions, row.label)


@dataclass(frozen=True)
class FarLatentClip:
    """A clip that is encoded already: ``latents_FCHW`` fp32, normalised by the scaling factor."""

    id: str
    latents_FCHW: Tensor
    actions_F: Tensor | None = None
    label: int | None = None

    @property
    def frames(self) -> int:
        return len(self.latents_FCHW)


class FarLatents:
    """FAR's latents with their actions: of a list, in its order, or all ``X.pt`` that have an
    ``X.npz`` beside them."""

    def __init__(
        self,
        root: Path,
        file: Path | None,
        *,
        prefix: str = "",
        num_actions: int = 3,
        scaling_factor: float = SCALING_FACTOR,
        fps: float = 20.0,
    ) -> None:
        self._files = open_raw(root, SUFFIXES)
        self.refused: list[Refused] = list(self._files.refused)
        self._rows = (
            self._pairs(root) if file is None else read_far_list(file, "latent_path", prefix)
        )
        self.num_actions = num_actions if self._rows[0].action is not None else 0
        self.labels, self.fps, self.scaling_factor = _labels(self._rows), fps, scaling_factor
        self.ids = _ids([row.path for row in self._rows], file or root)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> FarLatentClip:
        """UserError (file, what is wrong): no tensor (F, C, H, W) of floating point numbers, or
        wrong actions."""
        row = self._rows[index]
        where = self._files.where(row.path)
        value = one_tensor(self._files.read(row.path), where)
        if value.ndim != 4 or not value.numel():
            raise UserError(
                f"{where}: holds {tuple(value.shape)}, not latents (F, C, H, W); {COPY}"
            )
        actions = _actions(self._files, row.action, len(value), self.num_actions)
        return FarLatentClip(
            self.ids[index], value.float() * self.scaling_factor, actions, row.label
        )

    def _pairs(self, root: Path) -> list[FarRow]:
        names = set(self._files.names)
        stems = [name.removesuffix(".pt") for name in self._files.names if name.endswith(".pt")]
        rows = [FarRow(f"{stem}.pt", f"{stem}.npz") for stem in stems if f"{stem}.npz" in names]
        paths = {row.path for row in rows}
        self.refused += [
            Refused(self._files.where(f"{stem}.pt"), "no .npz with actions beside it")
            for stem in stems
            if f"{stem}.pt" not in paths
        ]
        if not rows:
            raise UserError(f"{root}: no X.pt with an X.npz beside it; give the list of clips")
        return rows


def _ids(paths: list[str], where: Path) -> list[str]:
    ids = [str(PurePosixPath(path).with_suffix("")) for path in paths]
    known_ids: set[str] = set()
    for id in ids:
        if id in known_ids:
            raise UserError(f"{where}: {id} is listed twice; list every clip once")
        known_ids.add(id)
    return ids
