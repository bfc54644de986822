"""Clips by a bidirectional teacher (Wan 2.1 14B): prompts -> latents, text states and mp4, one file
per clip.

    deepspeed --hostfile hosts data_prep/generate_clips.py model=models/Wan2.1-T2V-14B-Diffusers \\
        prompt_file=prompts.jsonl out=data/wan14b
    torchrun --nproc_per_node 8 data_prep/generate_clips.py ... engine.backend=torch
    python data_prep/generate_clips.py ... launcher=ray      # after 'ray start --head', on others 'ray start --address'

``out`` is what ``stage2_flow_matching.py data=`` takes. A file's name is the hash of all that
decides the clip, and files appear whole: so the same command goes on after any kill, on any number
of ranks or hosts, and a clip that is made twice is the same file. Prompts are encoded first and
kept in ``out/text-cache``, which may be deleted when all is done. Fields:
scd_sf/tools/generate/plan.py. The folder's tools: ``scd data check | repair | manifest |
export-webdataset``.
"""

from __future__ import annotations

from scd_sf.config import from_command_line
from scd_sf.distributed import init_distributed
from scd_sf.tools.generate.cluster import run_on_cluster
from scd_sf.tools.generate.launch import run_on_ranks
from scd_sf.tools.generate.plan import GenerateConfig
from scd_sf.types import exit_on_user_error


def main() -> None:
    cfg = from_command_line(GenerateConfig, __doc__ or "")
    if cfg.launcher == "ray":
        run_on_cluster(cfg)
    else:
        run_on_ranks(cfg, init_distributed(cfg.timeout_minutes))


if __name__ == "__main__":
    exit_on_user_error(main)
