"""Clips by a bidirectional teacher (Wan 2.1 14B): prompts -> latents, text states and mp4, one file
per clip.

    deepspeed --hostfile hosts data_prep/generate_clips.py model=models/Wan2.1-T2V-14B-Diffusers \\
        prompt_file=prompts.jsonl val=0.01 out=data/wan14b
    torchrun --nproc_per_node 8 data_prep/generate_clips.py ... engine.backend=torch
    python data_prep/generate_clips.py ... launcher=ray      # after 'ray start --head', on others 'ray start --address'

Stage 2 reads the result as ``data=<out>/train val=<out>/val``: prompts are split by their hash.
Without ``val`` all clips lie in ``out`` itself, for ``data=<out>``. A file's name is the hash of all that
decides the clip, and files appear whole: so the same command goes on after any kill, on any number
of ranks or hosts, and a clip that is made twice is the same file. Prompts are encoded first and
kept in ``out/text-cache``, which may be deleted when all is done. The
tools of such a folder: ``scd data check | repair | manifest |
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
