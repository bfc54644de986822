"""Quality, Semantic and Total from the 16 dimensions, as VBench's ``cal_final_score.py`` does; a
missing dimension is an error.

A dimension is normalised, ``(x - min) / (max - min)``, not clipped. Quality: weighted mean of 7
(dynamic degree counts half); Semantic: mean of 9; Total: (4 Quality + Semantic) / 5. Scores are
fractions; totals here are points (percent).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scd_sf.evaluation.vbench.prompts import dimensions, packaged
from scd_sf.files import read_json, typed
from scd_sf.types import UserError

SCORE_BYTES = 2**26  # of a file with scores: a figure for each of 9,000 videos
_VIDEOS_PER_PROMPT = 5


@dataclass(frozen=True)
class Scores:
    """The scores of a file: fractions by dimension. ``reduced``: reasons why its totals do not
    compare with others'. ``protocol``: how the videos were made."""

    fractions: dict[str, float]
    reduced: tuple[str, ...] = ()
    protocol: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Totals:
    """The three totals and each normalised dimension, all in points (percent)."""

    quality: float
    semantic: float
    total: float
    normalised: dict[str, float]


def aggregate(fractions: Mapping[str, float], where: str = "scores") -> Totals:
    """Totals of all 16 dimensions. UserError (naming ``where``) for a missing one, or a value that
    is no fraction."""
    dimension_names = {dimension.name for dimension in dimensions()}
    check_fractions(fractions, where)
    missing_names = sorted(dimension_names - fractions.keys())
    if missing_names:
        raise UserError(
            f"{where}: {len(missing_names)} of 16 dimensions missing ({', '.join(missing_names)}); "
            "score them: a total without them would be another quantity"
        )
    normalised = {d.name: (fractions[d.name] - d.min) / (d.max - d.min) for d in dimensions()}
    means = {}
    for group in ("quality", "semantic"):
        group_dimensions = [d for d in dimensions() if d.group == group]
        means[group] = math.fsum(
            d.weight * normalised[d.name] for d in group_dimensions
        ) / math.fsum(d.weight for d in group_dimensions)
    constants = packaged("constants.json")
    quality = float(str(constants["quality_weight"]))
    semantic = float(str(constants["semantic_weight"]))
    total = (quality * means["quality"] + semantic * means["semantic"]) / (quality + semantic)
    points = {name: 100 * value for name, value in normalised.items()}
    return Totals(100 * means["quality"], 100 * means["semantic"], 100 * total, points)


def check_fractions(fractions: Mapping[str, float], where: str) -> None:
    """UserError for a dimension that VBench does not have, or a value outside 0..1."""
    dimension_names = [dimension.name for dimension in dimensions()]
    for name, value in fractions.items():
        if name not in dimension_names:
            raise UserError(
                f"{where}: '{name}' is none of VBench's dimensions; they are {', '.join(dimension_names)}"
            )
        if not math.isfinite(value):
            raise UserError(f"{where}: {name} is {value}; score the dimension again")
        if not 0 <= value <= 1:
            hint = (
                f"write {value / 100:.4g} for {value:g} percent"
                if 1 < value <= 100
                else "score it again"
            )
            raise UserError(f"{where}: {name} is {value:g}; it must be a fraction in 0..1: {hint}")


def read_scores(path: Path) -> Scores:
    """The scores of a JSON map dimension -> fraction, of VBench's own ``*_eval_results.json``, or
    of ``summary.json`` by vbench_eval/score.py.

    Names may have blanks or underscores. UserError names file, field and remedy.
    """
    remedy = "give a JSON map of dimension -> fraction, or VBench's *_eval_results.json"
    tree = read_json(path, remedy, SCORE_BYTES)
    if not tree:
        raise UserError(f"{path}: not a JSON object with scores; {remedy}")
    reduced: list[str] = []
    protocol: dict[str, object] = {}
    scores = tree.get("scores")
    if isinstance(scores, dict):
        summary = typed(tree, _Summary, path, remedy)
        reduced, protocol, tree = list(summary.reduced), summary.protocol, summary.scores
    fractions: dict[str, float] = {}
    for key, value in tree.items():
        name = str(key).strip().replace(" ", "_")
        if name in fractions:
            raise UserError(f"{path}: '{name}' is given twice; keep one")
        if isinstance(value, list):
            reduced += _too_few(name, value)
            value = value[0] if value else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path}: '{key}' is {value!r}, not a number; {remedy}")
        fractions[name] = float(value)
    check_fractions(fractions, str(path))
    return Scores(fractions, tuple(reduced), protocol)


@dataclass(frozen=True)
class _Summary:
    """The fields of ``summary.json`` that are read."""

    scores: dict[str, object]
    reduced: list[str] = field(default_factory=list)
    protocol: dict[str, object] = field(default_factory=dict)


def _too_few(name: str, value: list[object]) -> list[str]:
    """A reason if VBench's list of videos is shorter than the suite; color leaves out videos
    without the object."""
    prompt_counts = {dimension.name: dimension.prompts for dimension in dimensions()}
    suite_count = _VIDEOS_PER_PROMPT * prompt_counts.get(name, 0)
    count = len(value[1]) if len(value) > 1 and isinstance(value[1], list) else suite_count
    if count >= suite_count or name == "color":
        return []
    return [f"{name}: {count} of {suite_count} videos"]


def label(scores: Scores) -> str:
    """The remark that must stand beside the total of these scores; empty for the whole suite."""
    return f"not comparable: {'; '.join(scores.reduced)}" if scores.reduced else ""


def merge_scores(files: Sequence[tuple[Path, Scores]]) -> Scores:
    """The scores of several files in one, with the first file's protocol. UserError for a dimension
    in two of them."""
    fractions: dict[str, float] = {}
    reduced: list[str] = []
    for path, scores in files:
        duplicates = sorted(fractions.keys() & scores.fractions.keys())
        if duplicates:
            raise UserError(
                f"{path}: {duplicates[0]} is in another file too; give each dimension once"
            )
        fractions |= scores.fractions
        reduced += scores.reduced
    return Scores(fractions, tuple(dict.fromkeys(reduced)), files[0][1].protocol)
