"""VBench's videos from a student checkpoint: 5 per prompt, 25 candidates for temporal flickering,
the static filter.

    torchrun --nproc_per_node 8 vbench_eval/sample.py sampling.checkpoint=runs/stage3 sampling.out=runs/vbench \\
        sampling.dtype=bf16 extended=all_dimension_extended.txt raft=raft-things.pth
    python vbench_eval/sample.py sampling.checkpoint=student.safetensors sampling.out=runs/quick samples=1 \\
        dimensions='[overall_consistency]'

All fields of ``scd sample`` are under ``sampling``. Videos lie in OUT/videos, OUT/flickering and,
filtered, OUT/static, named ``{prompt}-{i}.mp4`` by VBench's own prompt; OUT/manifest.json says how
they were made. Any number of processes, the same command goes on. The whole suite is 6,220 videos
(944 distinct prompts). Wan's 81 frames at 16 fps are scored with plain VBench. Totals of fewer
samples or dimensions are marked as not comparable.
"""

from __future__ import annotations

from scd_sf.config import from_command_line
from scd_sf.distributed import init_distributed
from scd_sf.evaluation.vbench.suite import SuiteConfig, run_suite
from scd_sf.types import exit_on_user_error


def main() -> None:
    cfg = from_command_line(SuiteConfig, __doc__ or "")
    run_suite(cfg, init_distributed())


if __name__ == "__main__":
    exit_on_user_error(main)
