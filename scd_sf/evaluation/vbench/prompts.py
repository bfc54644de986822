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
    """One of the 16: its group (quality or semantic), what its score is normalised by, and how many
    prompts it has."""

    name: str
    group: str
    min: float
    max: float
    weight: float
    prompts: int


def packaged(name: str) -> dict[str, object]:
    """One of this package's JSON files."""
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
    known = [dimension.name for dimension in dimensions()]
    wanted = [name.strip().replace(" ", "_") for name in names]
    for name in wanted:
        if name not in known:
            raise UserError(f"dimensions: '{name}' is none of VBench's: {', '.join(known)}")
    return [name for name in known if name in wanted or not wanted]


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
    """An entry of VBench_full_info.json, as far as it is read."""

    prompt_en: str
    dimension: list[str]


def _read_full_info(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    remedy = "take vbench/VBench_full_info.json from the vbench wheel, or leave full_info empty"
    where = f"full_info {path}"
    rows = parse_json(read_text(path, remedy), where, remedy)
    known = {dimension.name for dimension in dimensions()}
    pairs = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        entry = typed(
            row, _Row, f"{where}: entry {number} has no prompt_en and known dimension list", remedy
        )
        if not entry.dimension or not set(entry.dimension) <= known:
            raise UserError(
                f"{where}: entry {number} has no prompt_en and known dimension list; {remedy}"
            )
        pairs.append((entry.prompt_en, tuple(entry.dimension)))
    if not pairs:
        raise UserError(f"full_info {path}: no entry; {remedy}")
    return pairs


def select(entries: Sequence[VBenchPrompt], names: Sequence[str]) -> list[VBenchPrompt]:
    """Entries of these dimensions, each prompt once: the first of its lines."""
    found: dict[str, VBenchPrompt] = {}
    for entry in entries:
        if set(entry.dimensions) & set(names):
            found.setdefault(entry.prompt, entry)
    return list(found.values())


def prompts_hash(entries: Iterable[VBenchPrompt]) -> str:
    """One sha256 over all prompts and their dimensions, in order."""
    return hash_json([[entry.prompt, list(entry.dimensions)] for entry in entries])


def read_extended(path: Path, entries: Sequence[VBenchPrompt]) -> list[str]:
    """The wording to sample line k with, from line k of an extended-prompt file
    (``all_dimension_extended.txt``).

    UserError unless there is exactly one line that says something for each entry. Only \\n ends a
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
    """``{prompt}-{number}.mp4``. UserError where that is no name of a file in its own folder."""
    name = f"{prompt}-{number}.mp4"
    bad = [
        sign for sign in prompt if sign in _FORBIDDEN or unicodedata.category(sign) in ("Cc", "Cs")
    ]
    if bad or not prompt.strip() or prompt.startswith(".") or ".." in Path(prompt).parts:
        why = f"it holds {bad[0]!r}" if bad else "it is empty, or starts with a dot"
        raise UserError(
            f"prompt {prompt[:80]!r} cannot be a file's name: {why}; correct the list of prompts"
        )
    if len(name.encode()) > _NAME_BYTES:
        raise UserError(
            f"prompt {prompt[:80]!r}: its file name has {len(name.encode())} bytes of {_NAME_BYTES}; shorten it"
        )
    return name


def is_case_blind(folder: Path) -> bool:
    """Whether the disk under ``folder`` (or its nearest parent that exists) takes ``a`` and ``A``
    for one file."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.NamedTemporaryFile(prefix="scd-case-", suffix=".probe", dir=place) as probe:
            path = Path(probe.name)
            return path.with_name(path.name.upper()).exists()
    except OSError as error:
        raise UserError(f"{place}: cannot be written ({error}); use another out=") from error


def check_collisions(names: Iterable[str], folder: Path, *, case_blind: bool) -> None:
    """UserError if two videos would be one file: equal names, or on a case-blind disk names that
    differ by case."""
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name)
        key = key.casefold() if case_blind else key
        other = seen.setdefault(key, name)
        if other is not name:
            raise UserError(
                f"{folder}: '{other}' and '{name}' would be one file there (the disk does not tell case apart); "
                "use an out= on a case-sensitive disk"
            )
