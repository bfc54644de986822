"""``scd gallery``: folders of samples, read for a page.

A folder is what ``scd sample`` (recipes/sample.py, vbench_eval/sample.py) writes: ``manifest.json``
with settings and every video's prompt and seed; of an unfinished run the records under ``.done``.
Their contents are not trusted: files must lie in their folder, and only MP4 is opened. A video that
is missing or cannot be read gets a mark on the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scd_sf.data.sources.video_reader import frame_count
from scd_sf.files import files_below, read_typed, safe_path, sha256_file
from scd_sf.tools.gallery.page import Page, PagePrompt, Sample
from scd_sf.types import UserError, printable

INDEX, DONE = "manifest.json", ".done"
REMEDY = "give folders that scd sample has written"
FASTEST = 1000  # frames per second
SHORT = ("sampler", "steps")  # a model's facts that every sample repeats


@dataclass(frozen=True)
class Entry:
    """A manifest's record of a video. ``title``: a benchmark's name of the prompt. ``then``:
    further prompts, each with its first pixel frame. ``start``: the image or video that it
    continues."""

    prompt: str
    prompt_index: int = 0
    sample: int = 0
    seed: int | None = None
    title: str = ""
    then: list[tuple[int, str]] = field(default_factory=list)
    start: str = ""
    sha256: str = ""

    @property
    def words(self) -> str:
        """All prompts of the video, each later one after its first frame."""
        return "".join(
            [self.prompt, *(f"\nfrom frame {frame}: {text}" for frame, text in self.then)]
        )

    @property
    def is_named(self) -> bool:
        """Whether a benchmark has another name for the prompt."""
        return self.title not in ("", self.prompt)

    @property
    def heading(self) -> str:
        """Key by which samples of several models are grouped."""
        continues = f"\ncontinues {Path(self.start).name}" if self.start else ""
        return (self.title if self.is_named else self.words) + continues


@dataclass(frozen=True)
class Manifest:
    """The fields of a manifest that the gallery reads."""

    settings: dict[str, object]
    videos: dict[str, Entry]


@dataclass(frozen=True)
class Video:
    """``fault``, ``remark``: as :class:`Sample` has them. ``frames``: 0 where there is a fault."""

    name: str
    entry: Entry
    file: Path
    frames: int
    fault: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Folder:
    """A model's samples in the order of its prompts. ``facts``: name -> text, such as checkpoint,
    sampler, seed."""

    name: str
    facts: Mapping[str, str]
    fps: float
    videos: tuple[Video, ...]

    @property
    def seconds(self) -> float:
        """Length of the longest video in seconds."""
        return max((video.frames for video in self.videos), default=0) / self.fps


def read_folder(root: Path, name: str = "") -> Folder:
    """The samples below ``root``; ``name``: of the model, else the folder's. UserError for no
    manifest, a foreign one, or a file outside the folder."""
    manifest = read_typed(root / INDEX, Manifest, REMEDY)
    fps = manifest.settings.get("fps")
    if not isinstance(fps, int | float) or not 0 < fps <= FASTEST:
        raise UserError(f"{root / INDEX}: settings.fps is {fps!r}, not frames per second; {REMEDY}")
    entries = {**_record_entries(root), **manifest.videos}
    order = sorted(
        entries, key=lambda file: (entries[file].prompt_index, entries[file].sample, file)
    )
    videos = tuple(_video(root, file, entries[file]) for file in order)
    return Folder(name or root.resolve().name, _facts(manifest.settings), float(fps), videos)


def _record_entries(root: Path) -> dict[str, Entry]:
    """Records of a run's videos by file, also of those that its manifest does not list yet."""
    records = root / DONE
    files = [file for file in files_below(records) if file.suffix == ".json"]
    return {
        file.relative_to(records).as_posix().removesuffix(".json"): read_typed(file, Entry, REMEDY)
        for file in files
    }


def _video(root: Path, name: str, entry: Entry) -> Video:
    file = safe_path(root, name, f"{root / INDEX}: a video")
    if file.suffix != ".mp4":
        raise UserError(f"{root / INDEX}: a video is {name[:80]!r}, not an mp4 file; {REMEDY}")
    if not file.is_file():
        return Video(name, entry, file, 0, "missing")
    try:
        frames = frame_count(file, str(file))
    except UserError:
        return Video(name, entry, file, 0, "damaged")
    unchanged = entry.sha256 in ("", sha256_file(file))
    return Video(
        name, entry, file, frames, remark="" if unchanged else "changed since it was sampled"
    )


def _facts(settings: Mapping[str, object]) -> dict[str, str]:
    names = (
        "checkpoint",
        "weights",
        "dtype",
        "window",
        "blocks",
        "guidance",
        "size",
        "fps",
        "seed",
    )
    facts = {name: settings[name] for name in names if settings.get(name) not in (None, "")}
    sampler = settings.get("sampler")
    if isinstance(sampler, dict):
        facts |= {
            name: sampler[key]
            for name, key in (("sampler", "name"), ("steps", "steps"))
            if key in sampler
        }
    if digest := settings.get("checkpoint_sha256"):
        facts["sha256"] = str(digest)[:16]
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in facts.items()
    }


def page_of(folders: Sequence[Folder], title: str) -> Page:
    """The page of these folders, prompts in the order of their first appearance, equal texts
    together. UserError for no videos, or two folders of one name."""
    names = [folder.name for folder in folders]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two folders are named '{min(duplicates)}'; give --names, one per folder")
    videos = [(folder, video) for folder in folders for video in folder.videos]
    if not videos:
        raise UserError("the folders hold no videos; " + REMEDY)
    together: dict[str, list[Video]] = {}
    for _, video in videos:
        together.setdefault(video.entry.heading, []).append(video)
    place = {heading: number for number, heading in enumerate(together)}
    samples = [_sample(folder, video, place[video.entry.heading]) for folder, video in videos]
    has_faults = any(video.fault for _, video in videos)
    prompts = []
    for heading, group in together.items():
        state = "some are not there" if any(video.fault for video in group) else "complete"
        words = dict.fromkeys(video.entry.words for video in group if video.entry.is_named)
        prompts.append(
            PagePrompt(heading, {"videos": state} if has_faults else {}, words=tuple(words))
        )
    fps = max(folder.fps for folder in folders)
    frames = max(1, round(max(folder.seconds for folder in folders) * fps))
    return Page(
        title, {folder.name: folder.facts for folder in folders}, prompts, samples, fps, frames
    )


def _sample(folder: Folder, video: Video, prompt: int) -> Sample:
    entry = video.entry
    facts = {} if entry.seed is None else {"seed": str(entry.seed)}
    facts |= {"sample": str(entry.sample), "file": printable(video.name)}
    if entry.start:
        facts["start"] = entry.start
    facts |= {name: folder.facts[name] for name in SHORT if name in folder.facts}
    if checkpoint := folder.facts.get("checkpoint"):
        facts["checkpoint"] = Path(checkpoint).name
    if entry.is_named:
        facts["prompt"] = entry.words
    return Sample(
        folder.name, prompt, None if video.fault else video.file, facts, video.fault, video.remark
    )
