"""Score VBench's videos, dimension by dimension, in an environment of VBench's own.

    python vbench_eval/score.py videos=runs/vbench    # all 16, on all GPUs
    python vbench_eval/score.py videos=runs/vbench dimensions='[temporal_flickering]' gpus=0
    python vbench_eval/score.py videos=runs/vbench python=/envs/vbench/bin/python \\
        cache=/weights/vbench

The first call builds the environment (vbench 0.1.5, numpy below 2; every command is printed) in
``env``, several GB. Weights are looked for first, and each missing file is named with its place and
address; ``download=true`` lets VBench fetch them. Object class, multiple objects, color and spatial
relationship need detectron2
(``detectron2=git+https://github.com/facebookresearch/detectron2.git``). The same command goes on
after the last finished dimension. Then: ``python vbench_eval/aggregate.py
runs/vbench/scores/summary.json``.
"""

from __future__ import annotations

from scd_sf.config import from_command_line
from scd_sf.evaluation.vbench.score import ScoreConfig, run_score
from scd_sf.types import exit_on_user_error, say


def main() -> None:
    for name, score in run_score(from_command_line(ScoreConfig, __doc__ or "")).items():
        say(f"{name:24s} {score:.6f}")


if __name__ == "__main__":
    exit_on_user_error(main)
