"""The folder of a filter's or an extender's result: prompts.jsonl and prompts.txt with the same
rows, report.json with their hashes, written last, and settings.json with what decided them, written
first."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scd_sf.config import stored_settings
from scd_sf.files import Json, locked, read_json, read_typed, require_own_folder, sha256_file
from scd_sf.types import UserError

SETTINGS, PROMPTS, TEXT, REPORT = "settings.json", "prompts.jsonl", "prompts.txt", "report.json"
REMEDY = "use another out="


@dataclass(frozen=True)
class Sums:
    """The fields of a report that are read back: name -> sha256 of the files beside it."""

    sha256: dict[str, str]


def require(*packages: str) -> None:
    """UserError unless every named package of the extra ``data`` is installed."""
    if missing_packages := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"package {missing_packages[0].replace('_', '-')} is missing; install it with: pip install scd-sf[data]"
        )


@contextmanager
def result_folder(out: Path, settings: Json, schema: type[Any], command: str) -> Iterator[bool]:
    """Hold ``out`` for ``command``, and yield whether the result in it is complete. ``schema``: the
    config that the settings are fields of.

    UserError for another command's folder, other settings, or a result that was changed since."""
    require_own_folder(out, (SETTINGS, REPORT))
    with locked(out, command):
        file = next((out / name for name in (SETTINGS, REPORT) if (out / name).is_file()), None)
        if file is not None:
            content = read_json(file, REMEDY)
            raw_settings = content if file.name == SETTINGS else content.get("settings")
            old_settings = raw_settings if isinstance(raw_settings, dict) else {}
            old_settings = stored_settings(schema, old_settings, str(file))
            plain = json.loads(json.dumps(settings))  # tuples as the lists that files hold
            if changed_names := [name for name in plain if old_settings.get(name) != plain[name]]:
                raise UserError(
                    f"{file}: begun with other {changed_names[0]}; nothing is overwritten: {REMEDY}"
                )
        yield (out / REPORT).is_file() and _is_whole(out)


def sums(out: Path) -> dict[str, str]:
    """File name -> sha256 of both lists."""
    return {name: sha256_file(out / name) for name in (PROMPTS, TEXT)}


def _is_whole(out: Path) -> bool:
    hashes = read_typed(out / REPORT, Sums, REMEDY).sha256
    names = [name for name in (PROMPTS, TEXT) if (out / name).is_file()]
    if changed_names := [name for name in names if sha256_file(out / name) != hashes.get(name)]:
        raise UserError(
            f"{out / changed_names[0]}: was changed since {REPORT} was written; move it away, or {REMEDY}"
        )
    return len(names) == 2
