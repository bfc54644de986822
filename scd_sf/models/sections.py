"""Which weights of a file that holds several: a training's generator, its average, a critic, an
optimizer's states.

Names are the same in a flat file (``generator_ema.model.blocks.0..``) and in a pickle's tables:
everything before the first part that a model's own names begin with is the section.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from scd_sf.models.wan.names import without_wrappers
from scd_sf.tensor_files import Lazy
from scd_sf.types import UserError

log = logging.getLogger(__name__)

GENERATOR = "generator"
PLAIN = "plain"  # as a section: the weights whose names have none
AVERAGE = {"ema", "average", "averaged", "avg", "shadow", "swa"}
# Words that say nothing about which model of a training this is.
NEUTRAL = {
    "model",
    "state",
    "dict",
    "net",
    "network",
    "diffusion",
    "params",
    "weights",
    "transformer",
    "dit",
    "pipe",
}


def choose_section(
    tensors: Mapping[str, Lazy],
    roots: Collection[str],
    section: str,
    where: str,
    remedy: str = "use a file that holds one alone",
) -> dict[str, Lazy]:
    """The tensors of one section, by names without it and without what wraps models in trainings.

    ``roots``: what the model's own names begin with. ``section`` decides, :data:`PLAIN` are those
    without one; else the generator's before another model's, and the moving average before the last
    weights: a warning says which of several was taken. UserError naming the sections where that
    leaves several, as for plain tensors beside a generator's. Both end in ``remedy``, which says
    how the caller's user chooses.
    """
    names = {name: without_wrappers(name) for name in tensors}
    labels = {name: _label(bare, roots) for name, bare in names.items()}
    known_labels = sorted(
        {label for label in labels.values() if label is not None}, key=len, reverse=True
    )
    if not known_labels and section:
        raise UserError(f"{where}: no weights '{section}' in it (it has none); use another file")
    section_label = _choose_label(sorted(known_labels), section, where, remedy)
    result: dict[str, Lazy] = {}
    for name, bare in names.items():
        label = labels[name]
        if label is None:  # not one of the model's names: where it stands decides
            if any(part.startswith("optim") for part in bare.split(".")):
                continue
            label = next(
                (
                    known_label
                    for known_label in known_labels
                    if not known_label or bare.startswith(f"{known_label}.")
                ),
                "",
            )
        if label != section_label:
            continue
        model_name = bare[len(label) + 1 :] if label else bare
        if model_name in result:
            raise UserError(
                f"{where}: holds tensor '{model_name}' twice, once as '{name}'; use a file that says which is right"
            )
        if tensors[name].other_type:
            raise UserError(
                f"{where}: entry '{name}' is not a tensor; use a file of the model's weights alone"
            )
        result[model_name] = replace(tensors[name])
    return result


def _label(name: str, roots: Collection[str]) -> str | None:
    """The part of a name before the model's own name; None for names that are not the model's."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part in roots), None)
    return None if first is None or "optim" in name else ".".join(parts[:first])


def _choose_label(labels: list[str], section: str, where: str, remedy: str) -> str:
    if section:
        matches = [label for label in labels if label == ("" if section == PLAIN else section)]
        matches = matches or [
            label
            for label in labels
            if label.startswith(f"{section}.") or section in label.split(".")
        ]
        if not matches:
            names = ", ".join(map(_display_name, labels))
            raise UserError(f"{where}: no weights '{section}' in it (it has {names}); set section")
        labels = matches
    if not labels:
        return ""
    families = {_family(label) for label in labels}
    preferred_families = families & {GENERATOR, ""}
    candidates = [
        label for label in labels if not preferred_families or _family(label) in preferred_families
    ]
    if len(preferred_families or families) == 1:
        candidates = [label for label in candidates if _words(label) & AVERAGE] or candidates
    if len(candidates) != 1:
        names = ", ".join(map(_display_name, candidates))
        raise UserError(f"{where}: holds several sets of weights ({names}); {remedy}")
    if len(labels) > 1:
        names = ", ".join(map(_display_name, labels))
        log.warning(
            "%s: holds several sets of weights (%s); took %s; if that is not the one, %s",
            where,
            names,
            _display_name(candidates[0]),
            remedy,
        )
    return candidates[0]


def _words(label: str) -> set[str]:
    return {word for word in re.split(r"[._\-]", label.lower()) if word}


def _family(label: str) -> str:
    """The model of a training that a label stands for: the label without words for an average and
    neutral words."""
    return "_".join(
        sorted(word for word in _words(label) - AVERAGE - NEUTRAL if not word.isdecimal())
    )


def _display_name(label: str) -> str:
    """A label without neutral words at its end: ``generator.model`` becomes ``generator``, and an
    empty label :data:`PLAIN`."""
    parts = label.split(".")
    while len(parts) > 1 and parts[-1] in NEUTRAL:
        parts.pop()
    return ".".join(parts) or PLAIN
