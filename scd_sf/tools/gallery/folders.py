"""``scd gallery``: folders of samples, read for a page.

A folder is what ``scd sample`` (recipes/sample.py, vbench_eval/sample.py) writes: ``manifest.json`` with settings and
every video's prompt and seed; of an unfinished run the records under ``.done``. What they say is not trusted: files
must lie in their folder, text is text, and only MP4 is opened. A video that is not there or cannot be read stays a
place on the page, marked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scd_sf.data.sources.video_reader import frame_count
from scd_sf.files import files_below, read_json, sha256_file
from scd_sf.tools.gallery.page import Page, Prompt, Sample
from scd_sf.types import UserError, printable

INDEX, DONE = "manifest.json", ".done"
REMEDY = "give folders that scd sample has written"


@dataclass(frozen=True)
class Video:
    """``heading``: what equal prompts of several models are put together by. ``words``: the prompt it was sampled with,
    where the heading is only a benchmark's name for it. ``fault``, ``remark``: as :class:`Sample` has them."""

    heading: str
    words: str
    file: Path | None
    frames: int
    facts: Mapping[str, str]
    fault: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Folder:
    """A model's samples in the order of its prompts. ``frames``: of the longest video."""

    name: str
    facts: Mapping[str, str]
    fps: float
    frames: int
    videos: tuple[Video, ...]


def read_folder(root: Path, name: str = "") -> Folder:
    """UserError: no manifest, a foreign one, a file outside the folder."""
    document = read_json(root / INDEX, REMEDY)
    settings, listed = document.get("settings"), document.get("videos")
    if not isinstance(settings, dict) or not isinstance(listed, dict):
        raise UserError(f"{root / INDEX}: no sample manifest ('settings' and 'videos'); {REMEDY}")
    fps, size = settings.get("fps"), settings.get("size")
    if not isinstance(fps, int | float) or not 0 < fps <= 1000:
        raise UserError(f"{root / INDEX}: settings.fps is {fps!r}, not frames per second; {REMEDY}")
    entries: dict[str, object] = {**_finished(root), **listed}
    videos = [_video(root, file, entries[file]) for file in sorted(entries, key=lambda file: _place(file, entries))]
    asked = size[0] if isinstance(size, list) and size and isinstance(size[0], int) and 0 < size[0] < 1 << 20 else 1
    longest = max((video.frames for video in videos if video.file is not None), default=asked)
    return Folder(name or root.resolve().name, _facts(settings), float(fps), longest, tuple(videos))


def _finished(root: Path) -> dict[str, object]:
    """Records of a run whose manifest does not list its videos yet."""
    done = root / DONE
    files = [file for file in files_below(done) if file.suffix == ".json"]
    return {file.relative_to(done).as_posix().removesuffix(".json"): read_json(file, REMEDY) for file in files}


def _place(file: str, entries: Mapping[str, object]) -> tuple[int, int, str]:
    """By prompt, then sample, then name."""
    entry = entries[file]
    numbers = [entry.get(key) if isinstance(entry, dict) else None for key in ("prompt_index", "sample")]
    prompt, sample = (number if isinstance(number, int) else 0 for number in numbers)
    return prompt, sample, file


def _video(root: Path, file: str, entry: object) -> Video:
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(prompt, str):
        raise UserError(f"{root / INDEX}: videos[{file!r}] has no prompt; {REMEDY}")
    path = _inside(root, file)
    title, changes, start = entry.get("title"), _changes(entry.get("then")), entry.get("start")
    named = isinstance(title, str) and title not in ("", prompt)
    facts = {key: _text(entry[key]) for key in ("seed", "sample", "start") if key in entry}
    facts["file"] = printable(file)
    heading, words = (str(title), prompt + changes) if named else (prompt + changes, "")
    if isinstance(start, str) and start:
        heading += f"\ncontinues {Path(start).name}"
    if not path.is_file():
        return Video(heading, words, None, 1, facts, "missing")
    frames = _length(path)
    if frames == 0:
        return Video(heading, words, None, 1, facts, "damaged")
    vouched = entry.get("sha256")
    same = not isinstance(vouched, str) or sha256_file(path) == vouched
    return Video(heading, words, path, frames, facts, remark="" if same else "changed since it was sampled")


def _inside(root: Path, file: str) -> Path:
    """UserError unless it names an mp4 file in the folder, also through links."""
    try:
        path = (root / file).resolve()
        path.is_file()  # a name that the file system does not take
        inside = path.is_relative_to(root.resolve()) and path.suffix == ".mp4"
    except (OSError, ValueError):
        inside = False
    if not inside:
        raise UserError(f"{root / INDEX}: {file[:200]!r} is not an mp4 file inside the folder; {REMEDY}")
    return path


def _changes(then: object) -> str:
    """Prompts that follow the first one, a line each."""
    given = then if isinstance(then, list) else []
    pairs = [change for change in given if isinstance(change, list) and len(change) == 2]
    return "".join(f"\nfrom frame {_text(frame)}: {_text(text)}" for frame, text in pairs)


def _length(file: Path) -> int:
    """Frames that a video has; 0 where it cannot be read."""
    try:
        return frame_count(file, str(file))
    except UserError:
        return 0


def _facts(settings: Mapping[str, object]) -> dict[str, str]:
    """What one wants to know of a model, as text."""
    kept = ("checkpoint", "weights", "dtype", "window", "blocks", "guidance", "size", "fps", "seed")
    found = {name: settings[name] for name in kept if settings.get(name) not in (None, "")}
    sampler = settings.get("sampler")
    if isinstance(sampler, dict):
        found |= {name: sampler[key] for name, key in (("sampler", "name"), ("steps", "steps")) if key in sampler}
    if digest := settings.get("checkpoint_sha256"):
        found["sha256"] = str(digest)[:16]
    return {name: _text(value) for name, value in found.items()}


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def page_of(folders: Sequence[Folder], title: str) -> Page:
    """Prompts in the order they are first seen, equal texts together. UserError: nothing, or equal names."""
    names = [folder.name for folder in folders]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two folders are named '{min(twice)}'; give --names, one per folder")
    videos = [(folder, video) for folder in folders for video in folder.videos]
    if not videos:
        raise UserError("the folders hold no videos; " + REMEDY)
    number = {heading: place for place, heading in enumerate(dict.fromkeys(video.heading for _, video in videos))}
    words: dict[str, list[str]] = {heading: [] for heading in number}
    faulty: set[str] = set()
    samples = []
    for folder, video in videos:
        facts = {**video.facts, **_short(folder.facts)}
        if video.words:
            words[video.heading].append(video.words)
            facts["prompt"] = video.words
        faulty |= {video.heading} if video.fault else set()
        place = number[video.heading]
        samples.append(Sample(folder.name, place, video.file, facts, video.fault, video.remark))
    prompts = []
    for heading in number:
        tags = {"videos": "some are not there" if heading in faulty else "complete"} if faulty else {}
        prompts.append(Prompt(heading, tags, words=tuple(dict.fromkeys(words[heading]))))
    fps = max(folder.fps for folder in folders)
    longest = max(folder.frames / folder.fps for folder in folders)
    models = {folder.name: folder.facts for folder in folders}
    return Page(title, models, prompts, samples, fps, max(1, round(longest * fps)))


def _short(facts: Mapping[str, str]) -> dict[str, str]:
    """Of a model's facts those that every sample repeats."""
    found = {name: facts[name] for name in ("sampler", "steps") if name in facts}
    if "checkpoint" in facts:
        found["checkpoint"] = Path(facts["checkpoint"]).name
    return found
