"""Quality, Semantic and Total of 16 VBench dimensions; a missing one is refused, not counted as 0.

    python vbench_eval/aggregate.py scores/summary.json
    python vbench_eval/aggregate.py my_model_eval_results.json --json
    python vbench_eval/aggregate.py quality.json semantic.json    # dimensions in several files

A file holds a map dimension -> fraction (0..1), VBench's own results, or the summary of
vbench_eval/score.py. A run of fewer videos than the suite's is labelled: its totals are not
comparable with published ones.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from scd_sf.config import HelpFormatter
from scd_sf.evaluation.vbench.aggregate import aggregate, label, merge_scores, read_scores
from scd_sf.evaluation.vbench.prompts import dimensions
from scd_sf.types import exit_on_user_error, say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="scores of a run")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    args = parser.parse_args()
    scores = merge_scores([(path, read_scores(path)) for path in args.files])
    totals = aggregate(scores.fractions, ", ".join(map(str, args.files)))
    if args.json:
        print(
            json.dumps(
                asdict(totals) | {"scores": scores.fractions, "reduced": list(scores.reduced)},
                indent=2,
            )
        )
        return
    for dimension in dimensions():
        percent, normalised = (
            100 * scores.fractions[dimension.name],
            totals.normalised[dimension.name],
        )
        say(f"{dimension.name:24s} {percent:7.2f} %   normalised {normalised:7.2f}")
    note = label(scores)
    for name in ("quality", "semantic", "total"):
        say(
            f"{name.capitalize():24s} {getattr(totals, name):7.2f}"
            + (f"   ({note})" if note else "")
        )


if __name__ == "__main__":
    exit_on_user_error(main)
