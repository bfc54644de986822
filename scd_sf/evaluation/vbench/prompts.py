"""VBench's prompts: its 946 entries (944 distinct), extended wordings by line, and the names that
videos must have.

VBench finds a video by its prompt: ``{prompt}-{i}.mp4``. So extended prompts are sampled under the
original's name.
"""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from scd_sf.files import hash_json, lines_of, parse_json, read_text, typed
from scd_sf.types import UserError

FLICKERING = "temporal_flickering"
_NAME_BYTES = 255 - len(".json.tmp")  # the longest name that a run derives from a video's
_FORBIDDEN = "/\\\0"


@dataclass(frozen=True)
class VBenchPrompt:
    """One line of VBench's list; ``line`` counts from 0, as seeds do."""

    line: int
    prompt: str
    dimensions: tuple[str, ...]


@dataclass(frozen=True)
class Dimension:
    """One of the 16 dimensions: its group (quality or semantic), the range and weight by which its
    score is normalised, and its number of prompts."""

    name: str
    group: str
    min: float
    max: float
    weight: float
    prompts: int


def packaged(name: str) -> dict[str, object]:
    """The content of one of this package's JSON files."""
    return json.loads(
        resources.files("scd_sf.evaluation.vbench").joinpath(name).read_text(encoding="utf-8")
    )


@cache
def dimensions() -> tuple[Dimension, ...]:
    """The 16 dimensions in VBench's order."""
    rows = packaged("constants.json")["dimensions"]
    assert isinstance(rows, list)
    return tuple(Dimension(**row) for row in rows)


def chosen_dimensions(names: Sequence[str]) -> list[str]:
    """These dimensions in VBench's order (all if none is named), blanks as underscores. UserError
    for others."""
    dimension_names = [dimension.name for dimension in dimensions()]
    requested_names = [name.strip().replace(" ", "_") for name in names]
    for name in requested_names:
        if name not in dimension_names:
            raise UserError(
                f"dimensions: '{name}' is none of VBench's: {', '.join(dimension_names)}"
            )
    return [name for name in dimension_names if name in requested_names or not requested_names]


def load_entries(full_info: str = "") -> list[VBenchPrompt]:
    """VBench's list as shipped here, or from another ``VBench_full_info.json``. UserError names
    file, entry, remedy."""
    if not full_info:
        groups = packaged("prompts.json")["groups"]
        assert isinstance(groups, list)
        pairs = [
            (prompt, tuple(group["dimensions"])) for group in groups for prompt in group["prompts"]
        ]
    else:
        pairs = _read_full_info(Path(full_info))
    return [VBenchPrompt(line, prompt, dims) for line, (prompt, dims) in enumerate(pairs)]


@dataclass(frozen=True)
class _Row:
    """The fields of an entry of VBench_full_info.json that are read."""

    prompt_en: str
    dimension: list[str]


def _read_full_info(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    remedy = "take vbench/VBench_full_info.json from the vbench wheel, or leave full_info empty"
    where = f"full_info {path}"
    rows = parse_json(read_text(path, remedy), where, remedy)
    dimension_names = {dimension.name for dimension in dimensions()}
    pairs = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        entry = typed(
            row, _Row, f"{where}: entry {number} has no prompt_en and known dimension list", remedy
        )
        if not entry.dimension or not set(entry.dimension) <= dimension_names:
            raise UserError(
                f"{where}: entry {number} has no prompt_en and known dimension list; {remedy}"
            )
        pairs.append((entry.prompt_en, tuple(entry.dimension)))
    if not pairs:
        raise UserError(f"full_info {path}: no entry; {remedy}")
    return pairs


def select(entries: Sequence[VBenchPrompt], names: Sequence[str]) -> list[VBenchPrompt]:
    """Entries of these dimensions, each prompt once: the first of its lines."""
    first_entries: dict[str, VBenchPrompt] = {}
    for entry in entries:
        if set(entry.dimensions) & set(names):
            first_entries.setdefault(entry.prompt, entry)
    return list(first_entries.values())


def prompts_hash(entries: Iterable[VBenchPrompt]) -> str:
    """One sha256 over all prompts and their dimensions, in order."""
    return hash_json([[entry.prompt, list(entry.dimensions)] for entry in entries])


def read_extended(path: Path, entries: Sequence[VBenchPrompt]) -> list[str]:
    """The wording to sample line k with, from line k of an extended-prompt file
    (``all_dimension_extended.txt``).

    UserError unless the file has exactly one line with text for each entry. Only \\n ends a
    line.
    """
    lines = [line.strip() for line in lines_of(read_text(path, "check the path"))]
    if len(lines) != len(entries):
        raise UserError(
            f"extended {path}: {len(lines)} lines for {len(entries)} prompts; line k must belong to line k of VBench's "
            "list (python vbench_eval/prompts.py prints it)"
        )
    for number, line in enumerate(lines, 1):
        if not line:
            raise UserError(
                f"extended {path}: line {number} is empty; write the prompt of '{entries[number - 1].prompt}'"
            )
    return lines


def video_name(prompt: str, number: int) -> str:
    """``{prompt}-{number}.mp4``. UserError where that is not a valid file name."""
    name = f"{prompt}-{number}.mp4"
    bad_characters = [
        character
        for character in prompt
        if character in _FORBIDDEN or unicodedata.category(character) in ("Cc", "Cs")
    ]
    if bad_characters or not prompt.strip() or prompt.startswith(".") or ".." in Path(prompt).parts:
        reason = (
            f"it holds {bad_characters[0]!r}"
            if bad_characters
            else "it is empty, or starts with a dot"
        )
        raise UserError(
            f"prompt {prompt[:80]!r} cannot be a file's name: {reason}; correct the list of prompts"
        )
    if len(name.encode()) > _NAME_BYTES:
        raise UserError(
            f"prompt {prompt[:80]!r}: its file name has {len(name.encode())} bytes of {_NAME_BYTES}; shorten it"
        )
    return name


def is_case_blind(folder: Path) -> bool:
    """Whether the disk of ``folder`` (or of its nearest parent that exists) ignores case in file
    names. UserError: it cannot be written."""
    existing_folder = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir()
    )
    try:
        with tempfile.NamedTemporaryFile(
            prefix="scd-case-", suffix=".probe", dir=existing_folder
        ) as probe:
            path = Path(probe.name)
            return path.with_name(path.name.upper()).exists()
    except OSError as error:
        raise UserError(
            f"{existing_folder}: cannot be written ({error}); use another out="
        ) from error


def check_collisions(names: Iterable[str], folder: Path, *, case_blind: bool) -> None:
    """UserError if two videos would be one file: equal names, or on a case-blind disk names that
    differ by case."""
    first_names: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name)
        key = key.casefold() if case_blind else key
        first_name = first_names.setdefault(key, name)
        if first_name is not name:
            raise UserError(
                f"{folder}: '{first_name}' and '{name}' would be one file there (the disk does not tell case apart); "
                "use an out= on a case-sensitive disk"
            )
