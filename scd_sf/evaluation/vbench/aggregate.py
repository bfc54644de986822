"""From 16 dimensions to Quality, Semantic and Total, as VBench's ``cal_final_score.py``: a missing
one is refused.

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
_VIDEOS = 5


@dataclass(frozen=True)
class Scores:
    """What a file says: fractions by dimension; ``reduced``: why totals of it are not comparable
    with others'."""

    fractions: dict[str, float]
    reduced: tuple[str, ...] = ()
    protocol: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Totals:
    """In points: the three totals, and each dimension normalised."""

    quality: float
    semantic: float
    total: float
    normalised: dict[str, float]


def aggregate(fractions: Mapping[str, float], where: str = "scores") -> Totals:
    """Totals of all 16 dimensions. UserError (naming ``where``) for a missing one, or a value that
    is no fraction."""
    known = {dimension.name for dimension in dimensions()}
    check_fractions(fractions, where)
    absent = [name for name in sorted(known - fractions.keys())]
    if absent:
        raise UserError(
            f"{where}: {len(absent)} of 16 dimensions missing ({', '.join(absent)}); score them: a total without them "
            "would be another quantity"
        )
    normalised = {d.name: (fractions[d.name] - d.min) / (d.max - d.min) for d in dimensions()}
    means = {}
    for group in ("quality", "semantic"):
        chosen = [d for d in dimensions() if d.group == group]
        means[group] = math.fsum(d.weight * normalised[d.name] for d in chosen) / math.fsum(
            d.weight for d in chosen
        )
    constants = packaged("constants.json")
    quality, semantic = (
        float(str(constants[f"{group}_weight"])) for group in ("quality", "semantic")
    )
    total = (quality * means["quality"] + semantic * means["semantic"]) / (quality + semantic)
    points = {name: 100 * value for name, value in normalised.items()}
    return Totals(100 * means["quality"], 100 * means["semantic"], 100 * total, points)


def check_fractions(fractions: Mapping[str, float], where: str) -> None:
    """UserError for a dimension that VBench does not have, or a value outside 0..1."""
    known = [dimension.name for dimension in dimensions()]
    for name, value in fractions.items():
        if name not in known:
            raise UserError(
                f"{where}: '{name}' is none of VBench's dimensions; they are {', '.join(known)}"
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
    """A map dimension -> fraction, VBench's own ``*_eval_results.json``, or ``summary.json`` of
    vbench_eval/score.py.

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
    """``summary.json``, as far as it is read."""

    scores: dict[str, object]
    reduced: list[str] = field(default_factory=list)
    protocol: dict[str, object] = field(default_factory=dict)


def _too_few(name: str, value: list[object]) -> list[str]:
    """A reason if VBench's list of videos is shorter than the suite; color leaves out videos
    without the object."""
    expected = {dimension.name: _VIDEOS * dimension.prompts for dimension in dimensions()}.get(
        name, 0
    )
    count = len(value[1]) if len(value) > 1 and isinstance(value[1], list) else expected
    return [f"{name}: {count} of {expected} videos"] if count < expected and name != "color" else []


def label(scores: Scores) -> str:
    """ "" for the whole suite, else what must stand beside its total."""
    return f"not comparable: {'; '.join(scores.reduced)}" if scores.reduced else ""


def merge_scores(files: Sequence[tuple[Path, Scores]]) -> Scores:
    """The dimensions of several files as one. UserError for a dimension in two of them."""
    fractions: dict[str, float] = {}
    reduced: list[str] = []
    for path, scores in files:
        twice = sorted(fractions.keys() & scores.fractions.keys())
        if twice:
            raise UserError(f"{path}: {twice[0]} is in another file too; give each dimension once")
        fractions |= scores.fractions
        reduced += scores.reduced
    return Scores(fractions, tuple(dict.fromkeys(reduced)), files[0][1].protocol)
