"""Have a language model write short prompts out at length, as Wan 2.1's own are: 80 to 100 words on
what is seen.

    python data_prep/extend_prompts.py prompts=data/prompts/prompts.jsonl \\
        model=models/Qwen2.5-3B-Instruct out=data/long
    torchrun --nproc_per_node 8 data_prep/extend_prompts.py prompts=... model=... out=data/long \\
        batch=64
    python data_prep/extend_prompts.py prompts=... model=qwen out=data/long \\
        endpoint.url=http://localhost:8000/v1

An answer must have 40 to 160 words, be one line, in English, and without chatter; else the next
seed is tried, and after ``attempts`` the original is kept. Seeds come from ``seed``, the prompt's
uuid and the attempt. The same command, on any number of ranks, goes on where a run stopped.
``out/prompts.jsonl`` and ``prompts.txt`` have the input's order and length; ``report.json`` counts
what was extended, and why what was not. A server's key is read from the environment variable that
``endpoint.key_env`` names. Every setting: ``ExtendConfig`` (scd_sf/tools/prompts/extend/run.py).
"""

from __future__ import annotations

from scd_sf.config import from_command_line
from scd_sf.distributed import init_distributed
from scd_sf.tools.prompts.extend.run import ExtendConfig, run_extend
from scd_sf.types import exit_on_user_error

WAIT_MINUTES = 24 * 60.0  # of the ranks that are done, for the slowest


def main() -> None:
    cfg = from_command_line(ExtendConfig, __doc__ or "")
    run_extend(cfg, init_distributed(timeout_minutes=WAIT_MINUTES))


if __name__ == "__main__":
    exit_on_user_error(main)
